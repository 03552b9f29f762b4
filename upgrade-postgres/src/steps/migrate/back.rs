//! Takes back what this run applied, by the scripts of the undo record.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};

use super::Migrate;
use super::forward::{conflict, read_note, row_of};
use super::outside;
use super::survey::{others_of, report};
use super::undo::{ADOPTED, Course, Item, MADE_TABLE, MigrateUndo, Note};
use super::work::{How, Work};
use crate::backup::replace::restore_into_place;
use crate::backup::tools::Tools;
use crate::error::PostgresError;
use crate::ledger::Ledger;
use crate::migrations::history::Applied;
use crate::migrations::{MigrationVersion, Script};
use crate::steps::BackupOutput;

type Rows = BTreeMap<MigrationVersion, Applied>;

pub(super) async fn rollback(cx: &Context, step: &Migrate, undo: &MigrateUndo) -> Result<(), StepError> {
    let mut work = Work::begin(cx, &step.database).await?;
    let notes = work.ledger.all(work.session.connection()).await?;
    if let Some(backup) = &undo.backup {
        let needed = undo.migrations.iter().any(|item| item.undo.is_none() && notes.contains_key(&item.key()));
        // What is put back holds no notes: after a crash, only the checkpoint says that it was begun.
        if needed || cx.last_checkpoint::<PuttingBack>()?.is_some() {
            work.session.close().await;
            return put_back(cx, step, backup).await;
        }
    }
    let done = run(cx, &mut work, undo, &notes).await;
    if done.is_ok() {
        work.ledger.clear(&mut work.session, &[]).await?;
    }
    work.session.close().await;
    Ok(done?)
}

/// The checkpoint of a rollback that goes back to the backup.
#[derive(Debug, Serialize, Deserialize)]
struct PuttingBack {
    backup: PathBuf,
}

async fn put_back(cx: &Context, step: &Migrate, backup: &BackupOutput) -> Result<(), StepError> {
    cx.checkpoint(&PuttingBack { backup: backup.path.clone() }).await?;
    restore_into_place(cx, &step.database, backup, &Tools::default()).await?;
    let mut session = step.database.connect(cx).await?;
    Ledger::of(&step.database, cx).clear(&mut session, &[]).await?;
    session.close().await;
    Ok(())
}

async fn run(
    cx: &Context,
    work: &mut Work<'_>,
    undo: &MigrateUndo,
    notes: &BTreeMap<String, Value>,
) -> Result<(), PostgresError> {
    let history = &undo.history;
    let present = history.applied(work.session.connection()).await?;
    let there = present.is_some();
    let present = present.unwrap_or_default();
    let mut ours = Vec::new();
    for item in undo.migrations.iter().rev() {
        if let Some(note) = read_note(notes, &item.key())? {
            ours.push((item, note));
        }
    }
    if cx.on_conflict() == OnConflict::Stop {
        compare(undo, &ours, &present)?;
    }
    let total = ours.len();
    for (at, (item, note)) in ours.into_iter().enumerate() {
        report(cx, at, total, &item.file);
        take_back(work, undo, item, &note).await?;
    }
    // The history was made for these migrations: it goes with the last of them.
    let adopted: Vec<MigrationVersion> = match notes.get(ADOPTED) {
        Some(versions) => serde_json::from_value(versions.clone())
            .map_err(|error| StepError::permanent("what was taken over cannot be read").with_cause(&error))?,
        None => Vec::new(),
    };
    if notes.contains_key(ADOPTED) {
        let mut rows: Vec<_> = adopted.iter().map(|version| history.delete(version)).collect();
        rows.push(work.ledger.remove_statement(ADOPTED));
        work.write("giving back the history of another tool", &rows).await?;
    }
    if notes.contains_key(MADE_TABLE) && there {
        let empty = history.applied(work.session.connection()).await?.is_some_and(|rows| rows.is_empty());
        let mut rows = vec![work.ledger.remove_statement(MADE_TABLE)];
        if empty {
            rows.push(format!("drop table {}", history.table));
        }
        work.write("removing the history of migrations", &rows).await?;
    }
    Ok(())
}

/// Asks that our rows are as we left them, and that nobody has built on top of them.
fn compare(undo: &MigrateUndo, ours: &[(&Item, Note)], present: &Rows) -> Result<(), StepError> {
    for (item, note) in ours {
        let Note::Done { undo: kept, .. } = note else { continue };
        let row = present.get(&item.version);
        let as_left = match undo.course {
            Course::Up => row.is_some_and(|row| row.checksum == item.checksum && !row.failed),
            Course::Down => row.is_none(),
        };
        if !as_left {
            let found = if undo.course == Course::Up { "not applied" } else { "applied" };
            return Err(conflict(item, undo.course, row, found));
        }
        if *kept != item.undo.as_ref().map(Script::sha256) {
            return Err(StepError::permanent(format!(
                "{}: the undo record and the database disagree about its down script",
                item.what()
            ))
            .with_hint("look at the schema `_upgrade` and at the journal; undo it by hand and resolve with --skip"));
        }
    }
    let Some(oldest) = ours.iter().map(|(item, _)| &item.version).min() else { return Ok(()) };
    if undo.course == Course::Down {
        return Ok(());
    }
    let prepared = |version: &MigrationVersion| undo.migrations.iter().any(|item| item.version == *version);
    let noted = |version: &MigrationVersion| ours.iter().any(|(item, _)| item.version == *version);
    let adopted = |version: &MigrationVersion| undo.adopted.iter().any(|row| row.version == *version);
    // What was there before is not on top, though it may be newer: migrations may come out of order.
    let as_found = others_of(present, |version| prepared(version) || adopted(version)).0 == undo.others;
    let mut newer = present.keys().rev().filter(|version| *version > oldest && !noted(version) && !adopted(version));
    match newer.find(|version| prepared(version) || !as_found) {
        Some(version) => Err(StepError::conflict(Conflict {
            subject: format!("the history of migrations, {}", undo.history),
            found: format!("{} rows", undo.others_count),
            intended: format!("{} more", ours.len()),
            present: format!("version {version} on top, applied by somebody else"),
        })),
        None => Ok(()),
    }
}

async fn take_back(work: &mut Work<'_>, undo: &MigrateUndo, item: &Item, note: &Note) -> Result<(), PostgresError> {
    let partial = matches!(note, Note::Started { .. });
    let Some(script) = &item.undo else {
        return Err(StepError::permanent(format!("{}: there is no down script", item.what()))
            .with_hint("undo it by hand and resolve the step with --skip")
            .into());
    };
    if partial {
        outside::clear_after(work, note).await?;
    }
    let history = &undo.history;
    let mut rows = vec![work.ledger.remove_statement(&item.key()), work.ledger.remove_statement(&item.undo_key())];
    match undo.course {
        Course::Up => rows.push(history.delete(&item.version)),
        // Its row goes with the last of its statements: it is still there.
        Course::Down if partial => {}
        Course::Down => rows.push(history.insert(row_of(item, item.down.as_deref()))),
    }
    work.run(script, How { key: &item.undo_key(), partial }, &rows).await
}
