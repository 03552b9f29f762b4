//! What undoing migrations needs, and what the run keeps of them in the database.

use serde::{Deserialize, Serialize};

use crate::migrations::{History, MigrationVersion, Script};
use crate::steps::BackupOutput;

/// Holds what undoing migrations needs, whichever directory is there by then.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MigrateUndo {
    /// The table of the history.
    pub(super) history: History,
    /// Which way the migrations go.
    pub(super) course: Course,
    /// Digest of the rows of the history that these migrations are not about.
    pub(super) others: String,
    /// How many those are.
    pub(super) others_count: usize,
    /// The migrations in the order of their work.
    pub(super) migrations: Vec<Item>,
    /// Rows taken over from another tool.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) adopted: Vec<Adopted>,
    /// The backup that is put back where there is no down script: the output of its step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) backup: Option<BackupOutput>,
}

/// Says whether migrations are applied or taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Course {
    Up,
    Down,
}

/// Holds one migration: the digest of what is run, the whole of what undoes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Item {
    pub(super) version: MigrationVersion,
    pub(super) description: String,
    /// As the history keeps it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) checksum: Option<String>,
    /// The file that is run.
    pub(super) file: String,
    /// Its SHA-256.
    pub(super) sha256: String,
    /// The script that undoes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) undo: Option<Script>,
    /// The down script that the history keeps, where it is not the undo.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) down: Option<String>,
}

impl Item {
    /// Names its note in the ledger.
    pub(super) fn key(&self) -> String {
        format!("migration {}", self.version)
    }

    /// Names the note of its undo, where that runs outside of a transaction.
    pub(super) fn undo_key(&self) -> String {
        format!("undo of {}", self.version)
    }

    /// Names it in messages.
    pub(super) fn what(&self) -> String {
        format!("migration {} ({})", self.version, self.file)
    }
}

/// Holds a row taken over from another tool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Adopted {
    pub(super) version: MigrationVersion,
    pub(super) description: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) checksum: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) down: Option<String>,
}

/// What the ledger keeps of one migration, in its transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub(super) enum Note {
    /// A script outside of a transaction is under way.
    Started {
        /// How many of its statements are done.
        done: usize,
        /// The one that runs, where no transaction takes it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        running: Option<Running>,
    },
    /// It is done, by this run.
    Done {
        /// SHA-256 of the script that ran.
        sha256: String,
        /// SHA-256 of the script that undoes it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        undo: Option<String>,
    },
}

/// What is kept of a statement that runs outside of a transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Running {
    pub(super) statement: String,
    /// The indexes that were there before it.
    pub(super) indexes: Vec<i64>,
}

/// The note of the ledger that says that this run made the table of the history.
pub(super) const MADE_TABLE: &str = "history";

/// The note of the ledger that says that this run took over another tool's rows.
pub(super) const ADOPTED: &str = "adopted";

/// Tells what was done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrateOutput {
    /// The newest version applied before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<MigrationVersion>,
    /// The newest version applied now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<MigrationVersion>,
    /// How many migrations this run applied or took back.
    pub migrations: usize,
    /// How many another run did meanwhile.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub by_others: usize,
}

fn is_zero(number: &usize) -> bool {
    *number == 0
}
