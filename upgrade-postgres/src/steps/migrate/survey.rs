//! Reads directory, history and the tool to take over, and says what is to be done.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use sqlx::PgConnection;
use upgrade_core::context::{Context, blocking};
use upgrade_core::error::StepError;

use super::config::MigrateConfig;
use super::undo::{Adopted, Course, Item};
use crate::error::PostgresError;
use crate::identifier::TableName;
use crate::migrations::compare::compare;
use crate::migrations::history::Applied;
use crate::migrations::script::hex;
use crate::migrations::{
    Directory, Drift, History, HistoryTable, Layout, Migration, MigrationVersion, Pending, Script, Terms, Tool,
};

/// Says where migrations are and on what terms they are compared.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    pub(crate) directory: PathBuf,
    pub(crate) layout: Option<Layout>,
    pub(crate) history_table: Option<TableName>,
    pub(crate) adopt: Option<Tool>,
    pub(crate) terms: Terms,
}

/// Holds what was read.
pub(crate) struct Survey {
    pub(crate) directory: Directory,
    pub(crate) history: History,
    /// What the history says, the rows to take over included.
    pub(crate) applied: BTreeMap<MigrationVersion, Applied>,
    /// What is to be taken over.
    pub(super) adopted: Vec<Adopted>,
}

/// Holds what is to be done: the scripts that run, in order, and what is kept of each.
pub(super) struct Todo {
    pub(super) course: Course,
    pub(super) items: Vec<Item>,
    pub(super) scripts: Vec<Script>,
}

impl Source {
    pub(super) fn of(config: &MigrateConfig, directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
            layout: config.layout,
            history_table: config.history_table.clone(),
            adopt: config.adopt,
            terms: config.terms(),
        }
    }

    /// Reads the directory.
    pub(crate) async fn directory(&self) -> Result<Directory, StepError> {
        let (directory, layout) = (self.directory.clone(), self.layout);
        blocking(move || Directory::read(&directory, layout)).await
    }

    /// Reads what the database knows.
    pub(crate) async fn survey(
        &self,
        directory: Directory,
        connection: &mut PgConnection,
    ) -> Result<Survey, PostgresError> {
        let kind = HistoryTable::of(directory.layout);
        let history = History::find(&mut *connection, kind, self.history_table.as_ref()).await?;
        let mut applied = history.applied(&mut *connection).await?.unwrap_or_default();
        let mut adopted = Vec::new();
        match self.adopt {
            Some(tool) => {
                for version in tool.applied(connection, &directory, self.terms.ignore_missing).await? {
                    let Some(migration) = directory.find(&version).filter(|_| !applied.contains_key(&version)) else {
                        continue;
                    };
                    let row = adopted_row(kind, migration)?;
                    let found = Applied {
                        checksum: row.checksum.clone(),
                        failed: false,
                        description: row.description.clone(),
                        down: None,
                    };
                    applied.insert(version, found);
                    adopted.push(row);
                }
            }
            None if applied.is_empty() && self.history_table.is_none() => {
                if let Some(tool) = Tool::with_history(connection, kind).await? {
                    return Err(StepError::permanent(format!(
                        "{history} knows of no migration, but this database has a history of {tool}"
                    ))
                    .with_hint(format!("take it over with `adopt: {tool}`, or name the table with `history_table`"))
                    .into());
                }
            }
            None => {}
        }
        Ok(Survey { directory, history, applied, adopted })
    }
}

fn adopted_row(kind: HistoryTable, migration: &Migration) -> Result<Adopted, StepError> {
    let down = if kind == HistoryTable::Own { migration.down()?.map(|script| script.text) } else { None };
    Ok(Adopted {
        version: migration.version.clone(),
        description: migration.description.clone(),
        checksum: kind.checksum(&migration.up),
        down,
    })
}

impl Survey {
    /// Compares files and history.
    pub(crate) fn compare(&self, terms: &Terms) -> Result<(Pending<'_>, Vec<Drift>), StepError> {
        let kind = self.history.kind;
        compare(&self.directory, &self.applied, |migration| kind.checksum(&migration.up), terms)
    }

    /// Reads the scripts of what is pending.
    pub(super) fn todo(&self, pending: &Pending<'_>) -> Result<Todo, StepError> {
        let kind = self.history.kind;
        let (mut items, mut scripts) = (Vec::new(), Vec::new());
        let course = match pending {
            Pending::Up(migrations) => {
                for migration in migrations {
                    let script = migration.up.clone();
                    items.push(Item {
                        version: migration.version.clone(),
                        description: migration.description.clone(),
                        checksum: kind.checksum(&script),
                        file: script.file.clone(),
                        sha256: script.sha256(),
                        undo: migration.down()?,
                        down: None,
                    });
                    scripts.push(script);
                }
                Course::Up
            }
            Pending::Down(versions) => {
                for version in versions {
                    let (item, script) = self.taken_back(version)?;
                    items.push(item);
                    scripts.push(script);
                }
                Course::Down
            }
        };
        Ok(Todo { course, items, scripts })
    }

    /// Finds what takes a version back: the down script that went with it, else the one that is there.
    fn taken_back(&self, version: &MigrationVersion) -> Result<(Item, Script), StepError> {
        let row = self.applied.get(version);
        let kept = row.and_then(|row| row.down.clone());
        let migration = self.directory.find(version);
        let script = match (&kept, migration) {
            (Some(script), _) => Some(script.clone()),
            (None, Some(migration)) => migration.down()?,
            (None, None) => None,
        };
        let script = script.ok_or_else(|| {
            StepError::permanent(format!("version {version} cannot be taken back: there is no down script for it"))
                .with_hint("bring its file into the directory, or correct `to`")
        })?;
        let undo = migration.map(|migration| migration.up.clone());
        let item = Item {
            version: version.clone(),
            description: row.map(|row| row.description.clone()).unwrap_or_default(),
            checksum: row.and_then(|row| row.checksum.clone()),
            file: script.file.clone(),
            sha256: script.sha256(),
            undo,
            down: kept.map(|script| script.text),
        };
        Ok((item, script))
    }
}

/// Digests the rows of a history apart from some versions: those that are none of our business.
pub(super) fn others_of(
    applied: &BTreeMap<MigrationVersion, Applied>,
    ours: impl Fn(&MigrationVersion) -> bool,
) -> (String, usize) {
    let mut digest = Sha256::new();
    let mut count = 0;
    for (version, row) in applied.iter().filter(|(version, _)| !ours(version)) {
        digest.update(format!("{version} {} {}\n", row.checksum.as_deref().unwrap_or("-"), row.failed));
        count += 1;
    }
    (hex(&digest.finalize()), count)
}

/// Reports how far the work has come, where there is enough of it.
pub(super) fn report(cx: &Context, at: usize, total: usize, what: &str) {
    cx.progress(at as u64, total as u64, what.to_owned());
}
