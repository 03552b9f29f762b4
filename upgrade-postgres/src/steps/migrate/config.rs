//! The configuration of `postgres.migrate`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use upgrade_core::names::StepId;
use upgrade_core::text_or_secret::TextOrSecret;

use crate::identifier::TableName;
use crate::lint::LintSettings;
use crate::migrations::{Layout, MigrationVersion, Terms, Tool};

/// Configures `postgres.migrate`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrateConfig {
    /// The database.
    pub target: String,
    /// The directory of the migrations; with `runner`, the program's working directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<PathBuf>,
    /// How its files are named. Default: told from the names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<Layout>,
    /// The version to reach; older than what is applied, newer ones are taken back. Default: the newest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<MigrationVersion>,
    /// The table of the history. Default: the one of the layout's tool, where that tool looks for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history_table: Option<TableName>,
    /// Takes over the history of another tool, once its checksums were compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adopt: Option<Tool>,
    /// Applies migrations that are older than the newest one applied.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub out_of_order: bool,
    /// Puts up with migrations that were applied and whose files are gone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ignore_missing: bool,
    /// Tries all that is pending in a transaction that is rolled back, and shows the locks it took.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
    /// Which rules of `postgres.lint` count when a plan judges the pending scripts, and where not.
    #[serde(default)]
    pub lint: LintSettings,
    /// How migrations are undone that have no down script.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undo: Option<UndoBy>,
    /// Why the step is not to be undone at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub irreversible: Option<String>,
    /// Somebody else's tool that applies the migrations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runner: Option<RunnerConfig>,
}

/// Says how migrations without a down script are undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct UndoBy {
    /// The step `postgres.backup` whose backup is put back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub restore: Option<StepId>,
    /// The step `postgres.writes` that has stopped writes before the backup, until commit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub writes: Option<StepId>,
    /// Why what is written after the backup, or what a downgrade discards, may be lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accept_data_loss: Option<String>,
}

/// Describes somebody else's tool: argument vectors, read by no shell.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RunnerConfig {
    /// A tool whose commands are known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset: Option<Preset>,
    /// Prints the present revision, as the first word of a line; nothing where there is none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub current: Vec<String>,
    /// Upgrades; `{to}` stands for `to`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub up: Vec<String>,
    /// Downgrades to `{revision}`, the one found before.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub down: Vec<String>,
    /// What stands for `{revision}` where there was none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub none: Option<String>,
    /// Variables added to its environment: texts, or references to secrets.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, TextOrSecret>,
}

/// Names tools whose commands are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Preset {
    /// Alembic: `alembic current`, `alembic upgrade head`, `alembic downgrade REVISION`.
    Alembic,
}

impl MigrateConfig {
    /// Describes the migrations of a directory for a target, everything else by default.
    pub fn new(target: impl Into<String>, directory: impl Into<PathBuf>) -> Self {
        Self {
            target: target.into(),
            directory: Some(directory.into()),
            layout: None,
            to: None,
            history_table: None,
            adopt: None,
            out_of_order: false,
            ignore_missing: false,
            dry_run: false,
            lint: LintSettings::default(),
            undo: None,
            irreversible: None,
            runner: None,
        }
    }

    pub(super) fn terms(&self) -> Terms {
        Terms { to: self.to.clone(), out_of_order: self.out_of_order, ignore_missing: self.ignore_missing }
    }

    pub(super) fn accepts_loss(&self) -> Option<&str> {
        self.undo.as_ref()?.accept_data_loss.as_deref()
    }
}
