//! What a backfill writes where, as its undo record keeps it: enough to undo it without the pipeline.

use serde::{Deserialize, Serialize};

use crate::identifier::{Identifier, TableName};

/// Describes a column.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Column {
    /// Its name.
    pub name: Identifier,
    /// Its type, as the server spells it: `numeric(10,2)`.
    pub declared: String,
    /// The type of the elements of the arrays in which its values are kept; none where a text is
    /// kept, as for arrays themselves, composites and domains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub element: Option<String>,
}

impl Column {
    /// Returns the type in which its values are kept.
    pub fn kept(&self) -> &str {
        self.element.as_deref().unwrap_or("text")
    }
}

/// Says what the rows held before, as far as that must be known to put it back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Found {
    /// NULL in every column: the server proves that the condition admits nothing else.
    Null,
    /// Values that are kept beside the key of each row.
    Values,
    /// What these expressions make of what is there, one for each column.
    Inverse(Vec<String>),
    /// No row.
    Nothing,
}

/// Says what is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The table that is changed.
    pub table: TableName,
    /// The unique key in whose order it is walked.
    pub key: Vec<Column>,
    /// The columns that are written.
    pub columns: Vec<Column>,
    /// What the rows held before.
    pub found: Found,
}

impl Plan {
    /// Returns the columns whose old values are kept.
    pub fn kept_columns(&self) -> &[Column] {
        if self.found == Found::Values { &self.columns } else { &[] }
    }
}
