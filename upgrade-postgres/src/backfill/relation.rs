//! What the catalog says about a table that is to be filled, its keys and what stands in the way.

use sqlx::{AssertSqlSafe, PgConnection};
use upgrade_core::error::StepError;

use super::plan::Column;
use crate::error::{Doing, PostgresError};
use crate::identifier::{Identifier, TableName};

/// Describes a table.
#[derive(Debug, Clone)]
pub(crate) struct Relation {
    pub(crate) rows: Option<u64>,
    pub(crate) size: i64,
    pub(crate) columns: Vec<Described>,
    pub(crate) keys: Vec<Vec<Identifier>>,
    pub(crate) primary: bool,
    pub(crate) triggers: Vec<String>,
    pub(crate) vacuums: bool,
}

/// Describes a column as far as it may be written.
#[derive(Debug, Clone)]
pub(crate) struct Described {
    pub(crate) column: Column,
    pub(crate) generated: bool,
    pub(crate) privileged: bool,
}

/// Says why a table cannot be filled, and whether an earlier step may change that.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) error: StepError,
    pub(crate) may_come: bool,
}

impl Refusal {
    fn for_good(message: String, hint: &str) -> Self {
        Self { error: StepError::permanent(message).with_hint(hint), may_come: false }
    }

    fn for_now(message: String, hint: String) -> Self {
        Self { error: StepError::permanent(message).with_hint(hint), may_come: true }
    }
}

type Row = (sqlx::postgres::types::Oid, String, f32, i64, bool, bool, bool, bool);

/// Reads what is known of a table; `event` is what is done to its rows, as triggers call it.
pub(crate) async fn read(
    connection: &mut PgConnection,
    table: &TableName,
    event: Event,
) -> Result<Result<Relation, Refusal>, PostgresError> {
    let found: Option<Row> = sqlx::query_as(AssertSqlSafe(format!(
        "select c.oid, c.relkind::text, \
           case when c.relkind = 'p' then (select sum(greatest(p.reltuples, 0))::float4 from pg_partition_tree(c.oid) t \
             join pg_class p on p.oid = t.relid where t.isleaf) else c.reltuples end, \
           case when c.relkind = 'p' then (select coalesce(sum(pg_table_size(t.relid)), 0)::int8 from pg_partition_tree(c.oid) t) \
             when c.relkind in ('r', 'm') then pg_table_size(c.oid) else 0::int8 end, \
           row_security_active(c.oid), has_any_column_privilege(c.oid, 'SELECT'), \
           has_table_privilege(c.oid, '{privilege}') or {privilege_of_columns}, \
           pg_has_role(c.relowner, 'USAGE') \
         from pg_class c where c.oid = to_regclass($1)",
        privilege = event.undo_privilege(),
        privilege_of_columns = event == Event::Update,
    )))
    .bind(table.to_string())
    .fetch_optional(&mut *connection)
    .await
    .doing(|| format!("reading what {table} is"))?;
    let Some((oid, kind, rows, size, row_security, readable, writable, vacuums)) = found else {
        return Ok(Err(Refusal::for_now(
            format!("there is no table {table}"),
            "check `table` (or `into`): without a schema it is looked for in `public`".into(),
        )));
    };
    let what = match kind.as_str() {
        "r" | "p" => None,
        "v" => Some("a view: fill the tables behind it"),
        "m" => Some("a materialized view: refresh it instead (`postgres.sql`)"),
        "f" => Some(
            "a foreign table, whose rows cannot be changed in the transaction of the bookmark: fill it where it lives",
        ),
        _ => Some("not a table"),
    };
    if let Some(what) = what {
        let (what, hint) = what.split_once(": ").unwrap_or((what, "name a table"));
        return Ok(Err(Refusal::for_good(format!("{table} is {what}"), hint)));
    }
    if row_security {
        return Ok(Err(Refusal::for_good(
            format!("row security hides rows of {table} from this user, which a backfill would miss"),
            "connect as the owner of the table, or as a user with BYPASSRLS",
        )));
    }
    if !readable || !writable {
        return Ok(Err(Refusal::for_good(
            format!("this user may not read and {} rows of {table}", event.verb()),
            "grant SELECT, INSERT, UPDATE and DELETE on it, as far as the step needs them, or connect as the owner",
        )));
    }
    let columns: Vec<(String, String, Option<String>, bool, bool)> = sqlx::query_as(AssertSqlSafe(format!(
        "select a.attname::text, format_type(a.atttypid, a.atttypmod), \
           case when t.typtype in ('b', 'e', 'r', 'm') and t.typcategory <> 'A' and t.typarray <> 0 \
             then format_type(a.atttypid, -1) end, \
           a.attgenerated <> '' or a.attidentity = 'a', has_column_privilege(a.attrelid, a.attnum, '{}') \
         from pg_attribute a join pg_type t on t.oid = a.atttypid \
         where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped order by a.attnum",
        event.privilege()
    )))
    .bind(oid)
    .fetch_all(&mut *connection)
    .await
    .doing(|| format!("reading the columns of {table}"))?;
    let named = |name: String| Identifier::new(name).expect("the catalog holds names");
    let columns = columns
        .into_iter()
        .map(|(name, declared, element, generated, privileged)| Described {
            column: Column { name: named(name), declared, element },
            generated,
            privileged,
        })
        .collect();
    // Only an index that can be walked in one direction, with the order that plain comparison has.
    let keys: Vec<(bool, Vec<String>)> = sqlx::query_as(
        "select i.indisprimary, array(select a.attname::text from unnest(i.indkey::int2[]) with ordinality k (attnum, place) \
           join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum where k.place <= i.indnkeyatts order by k.place) \
         from pg_index i join pg_class c on c.oid = i.indexrelid \
         where i.indrelid = $1 and i.indisunique and i.indisvalid and i.indimmediate and i.indpred is null and i.indexprs is null \
           and (select bool_and(a.attnotnull and o.opcdefault and l.coll = a.attcollation) \
                  and count(distinct n.opt & 1) = 1 \
                from unnest(i.indkey::int2[]) with ordinality k (attnum, place) \
                join unnest(i.indclass::oid[]) with ordinality s (opclass, place) using (place) \
                join unnest(i.indcollation::oid[]) with ordinality l (coll, place) using (place) \
                join unnest(i.indoption::int2[]) with ordinality n (opt, place) using (place) \
                join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum \
                join pg_opclass o on o.oid = s.opclass where place <= i.indnkeyatts) \
         order by i.indisprimary desc, i.indnkeyatts, c.relname",
    )
    .bind(oid)
    .fetch_all(&mut *connection)
    .await
    .doing(|| format!("reading the keys of {table}"))?;
    let triggers: Vec<String> = sqlx::query_scalar(
        "select tgname::text from pg_trigger where tgrelid = $1 and not tgisinternal and tgenabled in ('O', 'A') \
         and tgtype & $2 <> 0 order by tgname",
    )
    .bind(oid)
    .bind(event.trigger_bit())
    .fetch_all(&mut *connection)
    .await
    .doing(|| format!("reading the triggers of {table}"))?;
    Ok(Ok(Relation {
        // Minus one where nobody has counted yet.
        rows: (rows > 0.0 || (rows == 0.0 && size == 0)).then_some(f64::from(rows) as u64),
        size,
        columns,
        primary: keys.first().is_some_and(|(primary, _)| *primary),
        keys: keys.into_iter().map(|(_, names)| names.into_iter().map(named).collect()).collect(),
        triggers,
        vacuums,
    }))
}

/// What is done to rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    Update,
    Insert,
}

impl Event {
    fn privilege(self) -> &'static str {
        match self {
            Event::Update => "UPDATE",
            Event::Insert => "INSERT",
        }
    }

    fn undo_privilege(self) -> &'static str {
        match self {
            Event::Update => "UPDATE",
            Event::Insert => "DELETE",
        }
    }

    fn verb(self) -> &'static str {
        match self {
            Event::Update => "update",
            Event::Insert => "insert and delete",
        }
    }

    /// The bits of `pg_trigger.tgtype` for INSERT and UPDATE.
    fn trigger_bit(self) -> i16 {
        match self {
            Event::Insert => 1 << 2,
            Event::Update => 1 << 4,
        }
    }
}

impl Relation {
    /// Chooses the key in whose order the table is walked.
    pub(crate) fn key(&self, table: &TableName, named: Option<&[Identifier]>) -> Result<Vec<Column>, Refusal> {
        let sorted = |names: &[Identifier]| {
            let mut names = names.to_vec();
            names.sort();
            names
        };
        let chosen = match named {
            None => self.keys.first(),
            Some(named) => self.keys.iter().find(|key| sorted(key) == sorted(named)),
        };
        let Some(chosen) = chosen else {
            let columns = |names: &[Identifier]| names.iter().map(Identifier::as_str).collect::<Vec<_>>().join(", ");
            let known = match self.keys.as_slice() {
                [] => "it has no unique key".to_owned(),
                keys => {
                    format!(
                        "its unique keys: {}",
                        keys.iter().map(|k| format!("({})", columns(k))).collect::<Vec<_>>().join(", ")
                    )
                }
            };
            let wanted =
                named.map_or_else(|| "a unique key".to_owned(), |names| format!("a unique key ({})", columns(names)));
            return Err(Refusal::for_now(
                format!("{table} has not {wanted} that it could be walked by: {known}"),
                "a primary key, or a unique index over NOT NULL columns without WHERE and expressions; \
                 `create unique index concurrently` makes one under traffic (`postgres.index`)"
                    .into(),
            ));
        };
        let described = |name: &Identifier| self.columns.iter().find(|described| described.column.name == *name);
        Ok(chosen.iter().filter_map(described).map(|described| described.column.clone()).collect())
    }

    /// Finds the columns that are to be written.
    pub(crate) fn written(
        &self,
        table: &TableName,
        names: &[Identifier],
        event: Event,
    ) -> Result<Vec<Column>, Refusal> {
        let one = |name: &Identifier| {
            let shown = name.as_str();
            let Some(described) = self.columns.iter().find(|described| described.column.name == *name) else {
                return Err(Refusal::for_now(
                    format!("{table} has no column {shown}"),
                    "correct the name, or let the step that adds the column run before this one".into(),
                ));
            };
            if described.generated {
                return Err(Refusal::for_good(
                    format!("column {shown} of {table} is generated by the server"),
                    "fill the columns that it is computed from, or take it out",
                ));
            }
            if !described.privileged {
                return Err(Refusal::for_good(
                    format!("this user may not {} column {shown} of {table}", event.privilege()),
                    "grant the privilege to the user of the target's `url`, or connect as the owner",
                ));
            }
            Ok(described.column.clone())
        };
        names.iter().map(one).collect()
    }
}
