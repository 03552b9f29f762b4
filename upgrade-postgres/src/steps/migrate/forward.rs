//! Applies what was prepared, and what is left of it after a crash.

use std::collections::BTreeMap;

use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};

use super::Migrate;
use super::survey::{others_of, report};
use super::undo::{ADOPTED, Course, Item, MADE_TABLE, MigrateOutput, MigrateUndo, Note};
use super::work::{How, Work};
use crate::error::PostgresError;
use crate::migrations::history::{Applied, Row};
use crate::migrations::{Directory, MigrationVersion, Script};

type Rows = BTreeMap<MigrationVersion, Applied>;

pub(super) async fn apply(cx: &Context, step: &Migrate, undo: &MigrateUndo) -> Result<MigrateOutput, StepError> {
    let directory = step.source.directory().await?;
    let mut work = Work::begin(cx, &step.database).await?;
    let done = run(cx, &mut work, undo, &directory).await;
    work.session.close().await;
    Ok(done?)
}

async fn run(
    cx: &Context,
    work: &mut Work<'_>,
    undo: &MigrateUndo,
    directory: &Directory,
) -> Result<MigrateOutput, PostgresError> {
    let history = &undo.history;
    let present = history.applied(work.session.connection()).await?;
    let made = present.is_none();
    let present = present.unwrap_or_default();
    if cx.on_conflict() == OnConflict::Stop {
        compare_others(undo, &present)?;
    }
    let from = present.keys().next_back().cloned();
    if made {
        let note = work.ledger.put_statement(MADE_TABLE, &true)?;
        work.write("making the history of migrations", &[history.create(), note]).await?;
    }
    adopt(work, undo, &present).await?;
    let notes = work.ledger.all(work.session.connection()).await?;
    let mut output = MigrateOutput { from, ..MigrateOutput::default() };
    let total = undo.migrations.len();
    for (at, item) in undo.migrations.iter().enumerate() {
        report(cx, at, total, &item.file);
        let note: Option<Note> = read_note(&notes, &item.key())?;
        let row = present.get(&item.version);
        let there = match undo.course {
            Course::Up => row.is_some(),
            Course::Down => row.is_none(),
        };
        match note {
            Some(Note::Done { .. }) if there || cx.on_conflict() == OnConflict::Overwrite => {
                output.migrations += 1;
                continue;
            }
            Some(Note::Done { .. }) => return Err(conflict(item, undo.course, row, "as this run left it").into()),
            Some(Note::Started { .. }) => {}
            // Another run did it meanwhile, with the same script.
            None if there && row.is_none_or(|row| row.checksum == item.checksum && !row.failed) => {
                output.by_others += 1;
                continue;
            }
            None if there => return Err(conflict(item, undo.course, row, "not applied").into()),
            None => {
                if undo.course == Course::Down
                    && row.is_some_and(|row| row.checksum != item.checksum)
                    && cx.on_conflict() == OnConflict::Stop
                {
                    return Err(conflict(item, undo.course, row, "applied").into());
                }
            }
        }
        let script = script_of(item, undo, directory, &present)?;
        let note = Note::Done { sha256: item.sha256.clone(), undo: item.undo.as_ref().map(Script::sha256) };
        let note = work.ledger.put_statement(&item.key(), &note)?;
        let row = match undo.course {
            Course::Up => {
                let down = item.undo.as_ref().map(|down| down.text.as_str());
                history.insert(row_of(item, down))
            }
            Course::Down => history.delete(&item.version),
        };
        work.run(&script, How { key: &item.key(), partial: false }, &[row, note]).await?;
        output.migrations += 1;
    }
    let applied = history.applied(work.session.connection()).await?.unwrap_or_default();
    output.to = applied.into_keys().next_back();
    Ok(output)
}

pub(super) fn row_of<'a>(item: &'a Item, down: Option<&'a str>) -> Row<'a> {
    Row { version: &item.version, description: &item.description, checksum: item.checksum.as_deref(), down }
}

pub(super) fn read_note(notes: &BTreeMap<String, serde_json::Value>, key: &str) -> Result<Option<Note>, StepError> {
    notes
        .get(key)
        .cloned()
        .map(serde_json::from_value)
        .transpose()
        .map_err(|error| StepError::permanent(format!("what the step kept as {key} cannot be read")).with_cause(&error))
}

/// Compares the rows that are none of our business with those that were found.
fn compare_others(undo: &MigrateUndo, present: &Rows) -> Result<(), StepError> {
    let ours = |version: &MigrationVersion| {
        undo.migrations.iter().any(|item| item.version == *version)
            || undo.adopted.iter().any(|row| row.version == *version)
    };
    let (others, count) = others_of(present, ours);
    if others == undo.others {
        return Ok(());
    }
    let of = |count: usize, digest: &str| format!("{count} rows ({digest:.12})");
    let found = of(undo.others_count, &undo.others);
    Err(StepError::conflict(Conflict {
        subject: format!("the history of migrations, {}", undo.history),
        intended: format!("{found} and the {} of this step", undo.migrations.len()),
        found,
        present: of(count, &others),
    }))
}

pub(super) fn conflict(item: &Item, course: Course, row: Option<&Applied>, found: &str) -> StepError {
    let short = |checksum: Option<&String>| checksum.map_or_else(|| "no checksum".to_owned(), |c| format!("{c:.12}"));
    StepError::conflict(Conflict {
        subject: format!("the history's row of {}", item.what()),
        found: found.to_owned(),
        intended: match course {
            Course::Up => format!("applied, {}", short(item.checksum.as_ref())),
            Course::Down => "not applied".to_owned(),
        },
        present: match row {
            Some(row) if row.failed => "marked as failed".to_owned(),
            Some(row) => format!("applied, {}", short(row.checksum.as_ref())),
            None => "not applied".to_owned(),
        },
    })
}

/// Takes over the rows of another tool, in one transaction with the note that says so.
async fn adopt(work: &mut Work<'_>, undo: &MigrateUndo, present: &Rows) -> Result<(), PostgresError> {
    let notes = work.ledger.all(work.session.connection()).await?;
    if undo.adopted.is_empty() || notes.contains_key(ADOPTED) {
        return Ok(());
    }
    let rows: Vec<_> = undo.adopted.iter().filter(|row| !present.contains_key(&row.version)).collect();
    let mut statements: Vec<String> = rows
        .iter()
        .map(|row| {
            undo.history.insert(Row {
                version: &row.version,
                description: &row.description,
                checksum: row.checksum.as_deref(),
                down: row.down.as_deref(),
            })
        })
        .collect();
    let versions: Vec<_> = rows.iter().map(|row| row.version.clone()).collect();
    statements.push(work.ledger.put_statement(ADOPTED, &versions)?);
    work.write("taking over the history of migrations", &statements).await
}

/// Finds the script that was prepared.
fn script_of(item: &Item, undo: &MigrateUndo, directory: &Directory, present: &Rows) -> Result<Script, StepError> {
    let migration = directory.find(&item.version);
    let script = match undo.course {
        Course::Up => migration.map(|migration| migration.up.clone()),
        Course::Down => match present.get(&item.version).and_then(|row| row.down.clone()) {
            Some(kept) => Some(kept),
            None => migration.map(|migration| migration.down()).transpose()?.flatten(),
        },
    };
    script.filter(|script| script.sha256() == item.sha256).ok_or_else(|| {
        StepError::permanent(format!("{} was changed after the step was prepared", item.file))
            .with_hint("put it back as it was and resume, or roll back and run again")
    })
}
