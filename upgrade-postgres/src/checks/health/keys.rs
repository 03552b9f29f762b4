//! Sequences and integer keys that come to their end.

use sqlx::{AssertSqlSafe, PgConnection};

use super::Figure;
use crate::error::{Doing, PostgresError};
use crate::identifier::{Identifier, TableName, literal};

/// Measures the sequence that has used most of its numbers.
pub(super) async fn sequences(connection: &mut PgConnection, user: &str) -> Result<Figure, PostgresError> {
    let (share, name, hidden): (Option<f64>, Option<String>, Option<String>) = sqlx::query_as(
        // One that cycles has no end.
        "select max(share), (array_agg(format('sequence %s', name) order by share desc nulls last))[1], \
           (array_agg(name order by name) filter (where hidden))[1] from ( \
           select format('%I.%I', schemaname, sequencename) as name, \
             not has_sequence_privilege(format('%I.%I', schemaname, sequencename), 'select, usage') as hidden, \
             case when increment_by > 0 then (last_value - start_value)::float8 / nullif(max_value - start_value, 0) \
               else (start_value - last_value)::float8 / nullif(start_value - min_value, 0) end as share \
           from pg_sequences where not cycle) as sequences",
    )
    .fetch_one(connection)
    .await
    .doing(|| "looking at the sequences".into())?;
    Ok(match hidden {
        Some(name) => {
            Figure::hidden("sequence_share", format!("`grant select on sequence {name} to {user}`, and so on"))
        }
        None => Figure::new("sequence_share", share.unwrap_or(0.0), share.and(name)),
    })
}

/// Measures the integer key whose largest value is nearest to the end of its type.
pub(super) async fn integer_keys(connection: &mut PgConnection, user: &str) -> Result<Figure, PostgresError> {
    // The largest value of the first column of an index is read from the index.
    let keys: Vec<(String, String, String, i64, bool)> = sqlx::query_as(
        "select distinct n.nspname::text, c.relname::text, a.attname::text, \
           case a.atttypid when 'int2'::regtype then 32767 when 'int4'::regtype then 2147483647 \
             else 9223372036854775807 end::int8, has_column_privilege(c.oid, a.attnum, 'select') \
         from pg_index i join pg_class c on c.oid = i.indrelid join pg_namespace n on n.oid = c.relnamespace \
           join pg_attribute a on a.attrelid = c.oid and a.attnum = i.indkey[0] \
           join pg_class x on x.oid = i.indexrelid join pg_am m on m.oid = x.relam and m.amname = 'btree' \
         where i.indisunique and i.indisvalid and i.indpred is null and c.relkind = 'r' and c.relpersistence <> 't' \
           and a.atttypid in ('int2'::regtype, 'int4'::regtype, 'int8'::regtype) \
           and n.nspname <> 'information_schema' and n.nspname !~ '^pg_' order by 1, 2, 3",
    )
    .fetch_all(&mut *connection)
    .await
    .doing(|| "listing the integer keys".into())?;
    let name = |text: &str| Identifier::new(text).expect("the catalog holds names");
    if let Some((schema, table, ..)) = keys.iter().find(|(.., readable)| !readable) {
        let table = TableName::new(name(schema), name(table));
        return Ok(Figure::hidden("integer_key_share", format!("`grant select on {table} to {user}`, and so on")));
    }
    let (mut worst, mut of) = (0.0, None);
    // Many tables, few round trips, none of them too long a statement.
    for some in keys.chunks(100) {
        let each: Vec<_> = some
            .iter()
            .map(|(schema, table, column, end, _)| {
                let (table, column) = (TableName::new(name(schema), name(table)), name(column));
                let shown = format!("column {column} of {table}");
                format!("select {} as key, max({column})::float8 / {end} as share from {table}", literal(&shown))
            })
            .collect();
        let sql = format!(
            "select key, share from ({}) as keys where share is not null order by share desc limit 1",
            each.join(" union all ")
        );
        let found: Option<(String, f64)> = sqlx::query_as(AssertSqlSafe(sql))
            .persistent(false)
            .fetch_optional(&mut *connection)
            .await
            .doing(|| "reading the largest keys".into())?;
        if let Some((key, share)) = found.filter(|(_, share)| *share > worst) {
            (worst, of) = (share, Some(key));
        }
    }
    Ok(Figure::new("integer_key_share", worst, of))
}
