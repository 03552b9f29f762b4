//! What is changed about a column, as it is asked for and as it is resolved.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use upgrade_core::registry::BuildError;

use crate::identifier::{Identifier, TableName};

/// Configures `postgres.expand`: one of `add`, `rename`, `retype` and `not_null`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExpandConfig {
    /// The database.
    pub target: String,
    /// The table.
    pub table: TableName,
    /// Adds a column.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub add: Option<AddColumn>,
    /// Gives a column another name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rename: Option<RenameColumn>,
    /// Gives a column another type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retype: Option<RetypeColumn>,
    /// Forbids NULL in a column.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_null: Option<NotNullColumn>,
    /// A schema with a view of the table in its new shape, until commit. New code puts it first in
    /// its `search_path`. Made if it is missing, removed at commit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<Identifier>,
    /// How many pages of the table (8 kB each) are filled in one transaction. Default 64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch: Option<u32>,
}

/// Configures `add`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AddColumn {
    /// The new column.
    pub column: Identifier,
    /// Its type.
    #[serde(rename = "type")]
    pub type_name: String,
    /// Its default, an expression. Existing rows get it as well, unless `up` is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default: Option<String>,
    /// Whether NULL is forbidden. Default false.
    #[serde(default)]
    pub not_null: bool,
    /// What existing rows get, an expression over the other columns; without a `default` also what
    /// rows get that old code inserts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub up: Option<String>,
}

/// Configures `rename`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RenameColumn {
    /// The column.
    pub column: Identifier,
    /// Its new name.
    pub to: Identifier,
}

/// Configures `retype`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RetypeColumn {
    /// The column.
    pub column: Identifier,
    /// Its new type.
    #[serde(rename = "type")]
    pub type_name: String,
    /// The new value, an expression over a row in the old shape. Default: the old value, converted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub up: Option<String>,
    /// The old value, an expression over a row in the new shape. Default: the new value, converted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub down: Option<String>,
    /// Its new default. Needed if the column has one and `up` is given; `"null"` for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default: Option<String>,
    /// The new shape's own name for the column, for good. Without one, the new shape is seen
    /// through `schema` and takes the column's name at commit.
    #[serde(default, rename = "as", skip_serializing_if = "Option::is_none")]
    pub name: Option<Identifier>,
}

/// Configures `not_null`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NotNullColumn {
    /// The column.
    pub column: Identifier,
    /// The new value where the old one is NULL, an expression over a row in the old shape.
    pub up: String,
    /// What the old shape sees, an expression over a row in the new shape. Default: the new value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub down: Option<String>,
    /// The new shape's own name for the column, as in `retype`.
    #[serde(default, rename = "as", skip_serializing_if = "Option::is_none")]
    pub name: Option<Identifier>,
}

/// Holds the one change that is asked for.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    Add(AddColumn),
    Rename(RenameColumn),
    Retype(RetypeColumn),
    NotNull(NotNullColumn),
}

impl Change {
    /// Returns the column that is there before, if there is one.
    pub(crate) fn old(&self) -> Option<&Identifier> {
        match self {
            Change::Add(_) => None,
            Change::Rename(change) => Some(&change.column),
            Change::Retype(change) => Some(&change.column),
            Change::NotNull(change) => Some(&change.column),
        }
    }

    /// Returns the name that the new shape has for good.
    pub(crate) fn name_after(&self) -> &Identifier {
        match self {
            Change::Add(change) => &change.column,
            Change::Rename(change) => &change.to,
            Change::Retype(change) => change.name.as_ref().unwrap_or(&change.column),
            Change::NotNull(change) => change.name.as_ref().unwrap_or(&change.column),
        }
    }
}

impl ExpandConfig {
    /// Reads the one change, and refuses what contradicts itself.
    pub(crate) fn change(&self) -> Result<Change, BuildError> {
        let mut changes: Vec<Change> = Vec::new();
        changes.extend(self.add.clone().map(Change::Add));
        changes.extend(self.rename.clone().map(Change::Rename));
        changes.extend(self.retype.clone().map(Change::Retype));
        changes.extend(self.not_null.clone().map(Change::NotNull));
        let change = match (changes.pop(), changes.pop()) {
            (Some(change), None) => change,
            (None, _) => {
                return Err(BuildError::new("there is nothing to change")
                    .at("table")
                    .with_hint("give one of `add`, `rename`, `retype` and `not_null`"));
            }
            _ => {
                return Err(BuildError::new("there is more than one change")
                    .at("table")
                    .with_hint("give each a step and a run of its own; a table changes one column at a time"));
            }
        };
        for (key, text) in self.texts(&change) {
            if text.trim().is_empty() {
                return Err(BuildError::new("the text is empty").at(key));
            }
        }
        if self.batch == Some(0) {
            return Err(BuildError::new("a batch has at least one page").at("batch"));
        }
        match &change {
            Change::Add(add) => {
                if self.schema.is_some() {
                    return Err(BuildError::new("an added column is seen in the table itself")
                        .at("schema")
                        .with_hint("take `schema` out"));
                }
                if add.not_null && add.default.is_none() && add.up.is_none() {
                    return Err(BuildError::new("existing rows, and those that old code inserts, would have no value")
                        .at("add.not_null")
                        .with_hint("give a `default`, or `up`"));
                }
            }
            Change::Rename(rename) if rename.column == rename.to => {
                return Err(BuildError::new("it has that name already").at("rename.to"));
            }
            Change::Rename(_) => {}
            Change::Retype(_) | Change::NotNull(_) if change.old() == Some(change.name_after()) => {
                if self.schema.is_none() {
                    let key = if matches!(change, Change::Retype(_)) { "retype.as" } else { "not_null.as" };
                    return Err(BuildError::new("new code has no way to see the new shape before commit")
                        .at(key)
                        .with_hint("give the new shape a name of its own with `as`, or a view of it with `schema`"));
                }
            }
            Change::Retype(_) | Change::NotNull(_) => {}
        }
        Ok(change)
    }

    fn texts<'a>(&self, change: &'a Change) -> Vec<(&'static str, &'a String)> {
        let optional = |key, text: &'a Option<String>| text.as_ref().map(|text| (key, text));
        match change {
            Change::Add(add) => {
                [Some(("add.type", &add.type_name)), optional("add.default", &add.default), optional("add.up", &add.up)]
                    .into_iter()
                    .flatten()
                    .collect()
            }
            Change::Rename(_) => Vec::new(),
            Change::Retype(retype) => [
                Some(("retype.type", &retype.type_name)),
                optional("retype.up", &retype.up),
                optional("retype.down", &retype.down),
                optional("retype.default", &retype.default),
            ]
            .into_iter()
            .flatten()
            .collect(),
            Change::NotNull(not_null) => {
                [Some(("not_null.up", &not_null.up)), optional("not_null.down", &not_null.down)]
                    .into_iter()
                    .flatten()
                    .collect()
            }
        }
    }
}

/// Holds a change with all that was read about the table: what the undo record keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Expansion {
    /// The table.
    pub(crate) table: TableName,
    /// The column in its old shape.
    pub(crate) old: Option<Identifier>,
    /// The column in its new shape, until commit.
    pub(crate) new: Identifier,
    /// Its name from then on.
    pub(crate) name_after: Identifier,
    /// Its type, as the server spells it, with its collation.
    pub(crate) type_name: String,
    /// Whether the new shape forbids NULL.
    pub(crate) not_null: bool,
    /// The default of the new shape: at once for one that is added, else from commit on.
    pub(crate) default: Option<String>,
    /// The new value, over a row in the old shape.
    pub(crate) up: Option<String>,
    /// The old value, over a row in the new shape.
    pub(crate) down: Option<String>,
    /// Marks rows that are still to be filled; none if no row has to be.
    pub(crate) pending: Option<Identifier>,
    /// Where the view of the new shape is.
    pub(crate) schema: Option<Identifier>,
    /// The function of the triggers.
    pub(crate) function: TableName,
    /// What the names of triggers, indexes and constraints of ours are made from.
    pub(crate) mark: String,
    /// Whether the fill may keep the triggers of others from firing.
    pub(crate) silent: bool,
}

impl Expansion {
    /// Names a trigger, index or constraint of ours, the same on every attempt.
    pub(crate) fn own(&self, start: &str, what: &str) -> Identifier {
        Identifier::derived(start, &format!("{} {start} {what}", self.mark))
    }

    /// Spells the search path under which the expressions are understood, wherever they run.
    pub(crate) fn search_path(&self) -> String {
        search_path(&self.table)
    }

    /// Tells whether a text names a column; it may say so where it is a function or a string.
    pub(crate) fn mentions(text: &str, column: &str) -> bool {
        mentions(text, column)
    }

    /// Returns where the view of the new shape is.
    pub(crate) fn view(&self) -> Option<TableName> {
        self.schema.as_ref().map(|schema| TableName::new(schema.clone(), self.table.name.clone()))
    }
}

pub(crate) fn search_path(table: &TableName) -> String {
    format!("{}, public, pg_temp", table.schema)
}

pub(crate) fn mentions(text: &str, column: &str) -> bool {
    let of_a_name = |c: char| c.is_alphanumeric() || c == '_' || c == '$';
    if column.chars().all(of_a_name) {
        text.split(|c| !of_a_name(c)).any(|word| word.eq_ignore_ascii_case(column))
    } else {
        text.contains(&column.replace('"', "\"\""))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_is_found_in_an_expression() {
        for (text, column) in
            [("amount / 100", "amount"), ("lower(\"Full Name\")", "Full Name"), ("NEW.Amount+1", "amount")]
        {
            assert!(mentions(text, column), "{text} {column}");
        }
        for (text, column) in [("amounts / 100", "amount"), ("amount_exact", "amount"), ("my_amount", "amount")] {
            assert!(!mentions(text, column), "{text} {column}");
        }
    }
}
