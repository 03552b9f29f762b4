//! What a foreign key is to be, as a pipeline says it.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::identifier::{Identifier, TableName};

/// Configures `postgres.foreign_key`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ForeignKeyConfig {
    /// The database.
    pub target: String,
    /// The table that refers to another, with its schema unless that is `public`.
    pub table: TableName,
    /// The name of the constraint.
    pub name: Identifier,
    /// The columns that refer, in order.
    pub columns: Vec<Identifier>,
    /// What they refer to.
    pub references: References,
    /// What happens to rows whose referenced row is deleted.
    #[serde(default)]
    pub on_delete: Action,
    /// What happens to rows whose referenced key changes.
    #[serde(default)]
    pub on_update: Action,
    /// Whether of several columns all are null or none.
    #[serde(default)]
    pub match_full: bool,
    /// Whether a transaction may put the check off to its end.
    #[serde(default)]
    pub deferrable: bool,
    /// Whether transactions put it off unless they say otherwise.
    #[serde(default)]
    pub initially_deferred: bool,
    /// What is said where no index begins with the columns that refer: each deletion of a referenced
    /// row then reads the whole table.
    #[serde(default)]
    pub unindexed: Unindexed,
}

/// Names the rows that others refer to.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct References {
    /// The table, with its schema unless that is `public`.
    pub table: TableName,
    /// Its columns. Default: its primary key.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub columns: Vec<Identifier>,
}

/// Says what becomes of rows that lose what they refer to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// The change is refused, at the latest when the transaction ends.
    #[default]
    NoAction,
    /// The change is refused at once.
    Restrict,
    /// They go with it.
    Cascade,
    /// Their columns become null.
    SetNull,
    /// Their columns get their defaults.
    SetDefault,
}

impl Action {
    /// Reads the catalog's letter for it.
    pub(super) fn of_catalog(letter: &str) -> Option<Self> {
        Some(match letter {
            "a" => Self::NoAction,
            "r" => Self::Restrict,
            "c" => Self::Cascade,
            "n" => Self::SetNull,
            "d" => Self::SetDefault,
            _ => return None,
        })
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoAction => "no action",
            Self::Restrict => "restrict",
            Self::Cascade => "cascade",
            Self::SetNull => "set null",
            Self::SetDefault => "set default",
        })
    }
}

/// Says what is done where no index begins with the columns that refer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Unindexed {
    /// The step is refused.
    Refuse,
    /// The plan says so.
    #[default]
    Warn,
    /// Nothing.
    Allow,
}
