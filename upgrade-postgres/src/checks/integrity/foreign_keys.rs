//! Foreign keys that the server itself does not vouch for.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sqlx::types::Json;
use sqlx::{AssertSqlSafe, PgConnection};

use crate::error::{Doing, PostgresError};
use crate::identifier::{Identifier, TableName};

/// Says which foreign keys are asked for rows that break them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ForeignKeys {
    /// Those that the server does not vouch for: not validated, not enforced, or with triggers
    /// switched off.
    #[default]
    Unproven,
    /// All, also those that only damage could have broken.
    All,
    /// None.
    None,
}

/// One foreign key as the catalog has it.
#[derive(Deserialize)]
struct Key {
    schema: String,
    name: String,
    constraint: String,
    other_schema: String,
    other_name: String,
    full: bool,
    columns: Vec<String>,
    other_columns: Vec<String>,
    operators: Vec<String>,
}

/// Counts the rows that break each foreign key of the tables.
pub(super) async fn violations(
    connection: &mut PgConnection,
    which: ForeignKeys,
    tables: &[TableName],
) -> Result<BTreeMap<String, i64>, PostgresError> {
    let mut counted = BTreeMap::new();
    if which == ForeignKeys::None {
        return Ok(counted);
    }
    // Keys of partitions follow from those of what they are partitions of; a key over periods
    // (version 18) compares otherwise.
    let keys: Vec<Json<Key>> = sqlx::query_scalar(
        "select to_jsonb(keys) from (select n.nspname::text as schema, c.relname::text as name, k.conname::text as \"constraint\", \
           o.nspname::text as other_schema, r.relname::text as other_name, k.confmatchtype = 'f' as full, \
           array(select a.attname::text from unnest(k.conkey) with ordinality as u(attnum, at) \
             join pg_attribute a on a.attrelid = k.conrelid and a.attnum = u.attnum order by u.at) as columns, \
           array(select a.attname::text from unnest(k.confkey) with ordinality as u(attnum, at) \
             join pg_attribute a on a.attrelid = k.confrelid and a.attnum = u.attnum order by u.at) as other_columns, \
           array(select format('operator(%I.%s)', s.nspname, p.oprname) from unnest(k.conpfeqop) with ordinality as u(op, at) \
             join pg_operator p on p.oid = u.op join pg_namespace s on s.oid = p.oprnamespace order by u.at) as operators \
         from pg_constraint k join pg_class c on c.oid = k.conrelid join pg_namespace n on n.oid = c.relnamespace \
           join pg_class r on r.oid = k.confrelid join pg_namespace o on o.oid = r.relnamespace \
         where k.contype = 'f' and k.conparentid = 0 and coalesce((to_jsonb(k)->>'conperiod')::bool, false) = false \
           and ($1 or not k.convalidated or not coalesce((to_jsonb(k)->>'conenforced')::bool, true) \
             or exists (select from pg_trigger t where t.tgconstraint = k.oid and t.tgenabled not in ('O', 'A')))) as keys \
         order by schema, name, \"constraint\"",
    )
    .bind(which == ForeignKeys::All)
    .fetch_all(&mut *connection)
    .await
    .doing(|| "listing the foreign keys".into())?;
    let name = |text: &str| Identifier::new(text).expect("the catalog holds names");
    for Json(key) in keys {
        let table = TableName::new(name(&key.schema), name(&key.name));
        if !tables.contains(&table) && !is_partitioned(connection, &table).await? {
            continue;
        }
        let other = TableName::new(name(&key.other_schema), name(&key.other_name));
        let nulls = |how: &str, join: &str| {
            let parts: Vec<_> = key.columns.iter().map(|column| format!("t.{} is {how}", name(column))).collect();
            parts.join(join)
        };
        // The key's own operators have the referenced column on their left.
        let equal: Vec<_> = key
            .columns
            .iter()
            .zip(&key.other_columns)
            .zip(&key.operators)
            .map(|((column, other), operator)| format!("o.{} {operator} t.{}", name(other), name(column)))
            .collect();
        let missing = format!(
            "({} and not exists (select from {other} as o where {}))",
            nulls("not null", " and "),
            equal.join(" and ")
        );
        let condition = match key.full && key.columns.len() > 1 {
            true => format!("{missing} or (({}) and ({}))", nulls("null", " or "), nulls("not null", " or ")),
            false => missing,
        };
        let rows: i64 =
            sqlx::query_scalar(AssertSqlSafe(format!("select count(*) from {table} as t where {condition}")))
                .fetch_one(&mut *connection)
                .await
                .doing(|| format!("counting the rows that break {}", key.constraint))?;
        counted.insert(format!("{} of {}", key.constraint, String::from(table)), rows);
    }
    Ok(counted)
}

/// A partitioned table is not among those that are read: its partitions are.
async fn is_partitioned(connection: &mut PgConnection, table: &TableName) -> Result<bool, PostgresError> {
    let partitioned: Option<bool> =
        sqlx::query_scalar("select relkind = 'p' from pg_class where oid = to_regclass($1)")
            .bind(table.to_string())
            .fetch_optional(connection)
            .await
            .doing(|| format!("looking at {table}"))?;
    Ok(partitioned == Some(true))
}
