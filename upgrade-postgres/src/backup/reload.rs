//! A backup loaded into a database that is ours alone.

use std::path::Path;

use upgrade_core::context::{Context, blocking};
use upgrade_core::error::StepError;

use super::dump::{conninfo_elsewhere, quoted};
use super::manifest::{Compression, Layout, Manifest};
use super::tools::Tool;
use super::{compression, dump_directory, storage};
use crate::address::Address;
use crate::error::cancelled;
use crate::identifier::Identifier;

/// Says who owns what is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ownership {
    /// Whoever owned it, with all privileges.
    Kept,
    /// Whoever loads it: only the contents count.
    Ours,
}

/// Says how a backup is loaded.
#[derive(Debug)]
pub(crate) struct Reload<'a> {
    pub(crate) tool: &'a Tool,
    pub(crate) jobs: usize,
    pub(crate) ownership: Ownership,
    /// A directory of our own for what has to be decompressed; made and removed here.
    pub(crate) scratch: &'a Path,
}

impl Reload<'_> {
    /// Loads the dump of `backup` into `database`, which is empty.
    pub(crate) async fn load(
        &self,
        cx: &Context,
        address: &Address,
        manifest: &Manifest,
        backup: &Path,
        database: &Identifier,
    ) -> Result<(), StepError> {
        let readable = Readable::of(cx, manifest, backup, self.scratch, self.jobs).await?;
        let address = address.clone().database(database.as_str());
        let mut program = self.tool.program().on(cx, &address)?.with(["--no-password", "--exit-on-error"]);
        if self.ownership == Ownership::Ours {
            // A subscription would keep the scratch database from being dropped.
            program = program.with([
                "--no-owner",
                "--no-privileges",
                "--no-comments",
                "--no-publications",
                "--no-subscriptions",
                "--no-security-labels",
            ]);
        }
        let program = match (manifest.archive.layout, self.tool.elsewhere) {
            (Layout::Directory, true) => {
                return Err(StepError::permanent(
                    "this backup is a directory of files, and pg_restore runs where they are not",
                )
                .with_hint("leave out `tools.pg_restore`, so that one of this machine is used"));
            }
            (Layout::Directory, false) => program.with([
                format!("--dbname=dbname={}", quoted(database.as_str())),
                format!("--jobs={}", self.jobs),
                "--format=directory".to_owned(),
                readable.path.display().to_string(),
            ]),
            (_, true) => program
                .with([format!("--dbname={}", conninfo_elsewhere(cx, &address)?)])
                .reading(readable.path.join("archive")),
            (_, false) => program.with([
                format!("--dbname=dbname={}", quoted(database.as_str())),
                format!("--jobs={}", self.jobs),
                readable.path.join("archive").display().to_string(),
            ]),
        };
        let loaded = program.succeed(cx).await;
        readable.remove().await?;
        loaded.map(|_| ())
    }
}

/// Holds a dump in the form that pg_restore reads.
pub(crate) struct Readable {
    /// The directory of its files.
    pub(crate) path: std::path::PathBuf,
    temporary: bool,
}

impl Readable {
    /// Decompresses a dump into `scratch`, if pg_restore cannot read it as it is.
    pub(crate) async fn of(
        cx: &Context,
        manifest: &Manifest,
        backup: &Path,
        scratch: &Path,
        jobs: usize,
    ) -> Result<Self, StepError> {
        let directory = dump_directory(backup);
        if manifest.archive.compression != Compression::Upgrade {
            return Ok(Self { path: directory, temporary: false });
        }
        let needed: u64 = manifest.files.iter().map(|file| file.plain_bytes.unwrap_or(file.bytes)).sum();
        let (files, to, stop) = (manifest.files.clone(), scratch.to_owned(), cx.cancelled().clone());
        cx.progress(0, None, "decompressing the backup");
        blocking(move || {
            let failed = |error: &std::io::Error| match stop.is_cancelled() {
                true => cancelled(),
                false => storage::failed(format!("the backup cannot be decompressed into {}", to.display()), error),
            };
            let free = storage::free(&to).map_err(|error| failed(&error))?;
            if needed > free {
                return Err(storage::no_room("the decompressed backup", needed, &to, free));
            }
            storage::create_directories(&storage::parent(&to)).map_err(|error| failed(&error))?;
            storage::fresh_directory(&to).map_err(|error| failed(&error))?;
            compression::unpack(&directory, &files, &to, jobs, &stop).map_err(|error| failed(&error))?;
            Ok(Self { path: to.clone(), temporary: true })
        })
        .await
    }

    pub(crate) async fn remove(self) -> Result<(), StepError> {
        if !self.temporary {
            return Ok(());
        }
        blocking(move || {
            storage::remove(&self.path)
                .map_err(|error| storage::failed(format!("{} cannot be removed", self.path.display()), &error))
        })
        .await
    }
}
