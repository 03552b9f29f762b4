//! A backup proven: listed by pg_restore, or restored into a scratch database and compared.

use std::path::Path;

use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use super::contents;
use super::manifest::{Layout, Manifest};
use super::reload::{Readable, Reload};
use super::swap::{self, Like};
use super::tools::Tool;
use crate::error::Doing;
use crate::identifier::Identifier;
use crate::session::Session;
use crate::target::Database;

/// Names the scratch database of a step: the same in every call.
pub(crate) fn scratch_name(cx: &Context) -> Identifier {
    Identifier::derived("_upgrade_prove", &cx.marker())
}

/// Lets pg_restore list what the backup holds, and sees that each table's file is there.
///
/// # Errors
/// pg_restore cannot read it, or a file that it will ask for is missing.
pub(crate) async fn list(
    cx: &Context,
    tool: &Tool,
    manifest: &Manifest,
    backup: &Path,
    scratch: &Path,
) -> Result<(), StepError> {
    let (listed, readable) = if manifest.archive.layout == Layout::Directory && !tool.elsewhere {
        // What the dump says about itself is not compressed.
        (tool.program().with(["--list".to_owned(), super::dump_directory(backup).display().to_string()]), None)
    } else {
        let readable = Readable::of(cx, manifest, backup, scratch, 1).await?;
        (tool.program().with(["--list"]).reading(readable.path.join("archive")), Some(readable))
    };
    let listed = listed.succeed(cx).await;
    if let Some(readable) = readable {
        readable.remove().await?;
    }
    let listed = listed?;
    if manifest.archive.layout != Layout::Directory {
        return Ok(());
    }
    for line in listed.stdout.lines().filter(|line| line.contains(" TABLE DATA ")) {
        let number = line.split(';').next().unwrap_or_default();
        let stem = format!("{number}.dat");
        let there = manifest.files.iter().any(|file| {
            file.path.file_name().and_then(|name| name.to_str()).is_some_and(|name| {
                name.strip_prefix(stem.as_str()).is_some_and(|end| end.is_empty() || end.starts_with('.'))
            })
        });
        if !there {
            return Err(StepError::unknown(format!("the backup lists data that it does not hold: {line}"))
                .with_hint("pg_dump did not write it all: look at its version, and report it"));
        }
    }
    Ok(())
}

/// Restores the backup into a scratch database on the same server, and compares it with what the
/// manifest says that it was taken from.
///
/// # Errors
/// It cannot be restored, or holds something else.
pub(crate) async fn restore(
    cx: &Context,
    database: &Database,
    session: &mut Session,
    like: &Like,
    reload: &Reload<'_>,
    manifest: &Manifest,
    backup: &Path,
) -> Result<(), StepError> {
    let name = scratch_name(cx);
    swap::drop_database(session, &name).await?;
    cx.progress(0, None, "restoring the backup into a scratch database, to prove it");
    swap::create_like(session, &name, like, None).await?;
    let proven = async {
        let address = session.address().clone();
        reload.load(cx, &address, manifest, backup, &name).await?;
        let mut scratch = database.connect_to(cx, name.as_str()).await?;
        cx.progress(0, None, "comparing the restored backup with its source");
        let canceller = scratch.canceller();
        let connection = scratch.connection();
        let found = canceller
            .cancels(cx, contents::differences(connection, manifest))
            .await
            .doing(|| "comparing the restored backup".into())?;
        scratch.close().await;
        Ok::<_, StepError>(found)
    };
    let proven = proven.await;
    // A failed one is dropped as well: what counts is why it failed.
    let dropped = swap::drop_database(session, &name).await;
    let found = proven?;
    dropped?;
    if found.is_empty() {
        return Ok(());
    }
    Err(StepError::unknown(format!("the backup, restored, is not what it was taken from: {}", found[0]))
        .with_detail(found.join("\n"))
        .with_hint("look at the server's log and at the medium; a table that an extension fills may need `schemas`"))
}
