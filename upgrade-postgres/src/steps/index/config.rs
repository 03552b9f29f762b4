//! What an index is to be, as a pipeline says it, and in SQL.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::identifier::{Identifier, TableName, literal};

/// Configures `postgres.index`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct IndexConfig {
    /// The database.
    pub target: String,
    /// The table or materialized view, with its schema unless that is `public`.
    pub table: TableName,
    /// The name of the index, in the schema of its table.
    pub name: Identifier,
    /// Whether the index is to be there. With `absent`, only `target`, `table` and `name` are given.
    #[serde(default)]
    pub state: IndexPresence,
    /// What is indexed, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub columns: Vec<IndexKey>,
    /// Whether each key may be there only once.
    #[serde(default)]
    pub unique: bool,
    /// Whether two keys that are null count as equal (from PostgreSQL 15 on).
    #[serde(default)]
    pub nulls_not_distinct: bool,
    /// The method: `btree`, `gin`, `gist`, `brin`, `hash`, or one of an extension. Default `btree`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<Identifier>,
    /// Columns that are stored with the keys.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub include: Vec<Identifier>,
    /// The condition for rows to be indexed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub r#where: Option<String>,
    /// Storage parameters: `fillfactor: 70`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub parameters: BTreeMap<Identifier, Value>,
    /// Where it is stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tablespace: Option<Identifier>,
}

/// Says whether an index is to be there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum IndexPresence {
    /// It is to be there.
    #[default]
    Present,
    /// It is to be gone.
    Absent,
}

/// Names one key of an index: a column, or more about it.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum IndexKey {
    /// A column, in ascending order.
    Column(Identifier),
    /// A column or an expression, and how it is indexed.
    Detailed(Box<DetailedIndexKey>),
}

/// Describes one key of an index.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DetailedIndexKey {
    /// A column.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<Identifier>,
    /// An expression, in place of a column.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expression: Option<String>,
    /// The order of the key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<Order>,
    /// Where nulls are sorted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nulls: Option<Nulls>,
    /// The operator class: `text_pattern_ops`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operator_class: Option<Identifier>,
    /// The collation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collation: Option<Identifier>,
}

/// Orders a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// The least first.
    Asc,
    /// The greatest first.
    Desc,
}

/// Places nulls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Nulls {
    /// Before every value.
    First,
    /// After every value.
    Last,
}

impl IndexKey {
    fn sql(&self) -> String {
        let key = match self {
            IndexKey::Column(column) => return column.to_string(),
            IndexKey::Detailed(key) => key,
        };
        let mut sql = match (&key.column, &key.expression) {
            (Some(column), _) => column.to_string(),
            (None, expression) => format!("({})", expression.as_deref().unwrap_or_default()),
        };
        if let Some(collation) = &key.collation {
            sql.push_str(&format!(" collate {collation}"));
        }
        if let Some(class) = &key.operator_class {
            sql.push_str(&format!(" {class}"));
        }
        sql.push_str(match key.order {
            Some(Order::Desc) => " desc",
            Some(Order::Asc) | None => "",
        });
        sql.push_str(match key.nulls {
            Some(Nulls::First) => " nulls first",
            Some(Nulls::Last) => " nulls last",
            None => "",
        });
        sql
    }
}

impl IndexConfig {
    /// Describes an index on columns, everything else by default.
    pub fn new(target: impl Into<String>, table: TableName, name: Identifier, columns: Vec<IndexKey>) -> Self {
        Self {
            target: target.into(),
            table,
            name,
            state: IndexPresence::Present,
            columns,
            unique: false,
            nulls_not_distinct: false,
            method: None,
            include: Vec::new(),
            r#where: None,
            parameters: BTreeMap::new(),
            tablespace: None,
        }
    }

    /// Writes what comes after the name of the table.
    pub(super) fn definition(&self) -> String {
        let list = |names: Vec<String>| names.join(", ");
        let method = self.method.as_ref().map_or_else(|| "btree".to_owned(), ToString::to_string);
        let mut sql = format!("using {method} ({})", list(self.columns.iter().map(IndexKey::sql).collect()));
        if !self.include.is_empty() {
            sql.push_str(&format!(" include ({})", list(self.include.iter().map(ToString::to_string).collect())));
        }
        if self.nulls_not_distinct {
            sql.push_str(" nulls not distinct");
        }
        if !self.parameters.is_empty() {
            let value = |value: &Value| match value {
                Value::String(text) => literal(text),
                other => literal(&other.to_string()),
            };
            let parameters = self.parameters.iter().map(|(name, v)| format!("{name} = {}", value(v))).collect();
            sql.push_str(&format!(" with ({})", list(parameters)));
        }
        if let Some(condition) = &self.r#where {
            sql.push_str(&format!(" where ({condition})"));
        }
        sql
    }
}
