//! What a database holds, as far as a backup of it is judged by that.

use std::collections::BTreeMap;

use sqlx::PgConnection;
use upgrade_core::error::StepError;

use super::manifest::{Contents, LargeObjects, Manifest, Scope, SequenceEntry, Source, TableEntry};
use crate::error::{Doing, PostgresError};
use crate::fingerprint::fingerprints;
use crate::identifier::{Identifier, TableName};

/// Names the database, and its server, as a manifest does.
pub(crate) async fn source(connection: &mut PgConnection) -> Result<Source, PostgresError> {
    let (system, version, database, encoding, bytes): (String, i32, String, String, i64) = sqlx::query_as(
        "select (select system_identifier::text from pg_control_system()), current_setting('server_version_num')::int, \
         datname::text, pg_encoding_to_char(encoding)::text, pg_database_size(oid) \
         from pg_database where datname = current_database()",
    )
    .fetch_one(connection)
    .await
    .doing(|| "reading which database it is".into())?;
    Ok(Source { system, version, database, encoding, bytes })
}

/// Lists the tables whose rows a backup of that scope holds; partitions stand for themselves.
///
/// # Errors
/// A schema or table that is named is not there.
pub(crate) async fn tables(connection: &mut PgConnection, scope: &Scope) -> Result<Vec<TableEntry>, PostgresError> {
    let (schemas, named) = match scope {
        Scope::Whole => (None, None),
        Scope::Schemas(schemas) => {
            (Some(schemas.iter().map(|name| name.as_str().to_owned()).collect::<Vec<_>>()), None)
        }
        Scope::Tables(tables) => (None, Some(tables.iter().map(ToString::to_string).collect::<Vec<_>>())),
    };
    let missing: Vec<String> = sqlx::query_scalar(
        "select 'schema ' || name from unnest($1::text[]) name where to_regnamespace(quote_ident(name)) is null \
         union all select 'table ' || name from unnest($2::text[]) name where to_regclass(name) is null",
    )
    .bind(schemas.clone())
    .bind(named.clone())
    .fetch_all(&mut *connection)
    .await
    .doing(|| "looking for what is to be kept".into())?;
    if !missing.is_empty() {
        return Err(StepError::permanent(format!("there is no {}", missing.join(", no ")))
            .with_hint("correct `schemas` or `tables`, or let an earlier step make it")
            .into());
    }
    let rows: Vec<(String, String, i64, i64)> = sqlx::query_as(
        "select n.nspname::text, c.relname::text, greatest(c.reltuples, 0)::int8, pg_table_size(c.oid) \
         from pg_class c join pg_namespace n on n.oid = c.relnamespace \
         where c.relkind = 'r' and c.relpersistence <> 't' and n.nspname <> 'information_schema' and n.nspname !~ '^pg_' \
           and not exists (select from pg_depend d where d.classid = 'pg_class'::regclass and d.objid = c.oid \
             and d.deptype = 'e') \
           and ($1::text[] is null or n.nspname = any($1)) \
           and ($2::text[] is null or c.oid = any(array(select to_regclass(name)::oid from unnest($2) name)) \
             or c.oid = any(array(select relid::oid from unnest($2) name, pg_partition_tree(to_regclass(name))))) \
         order by 1, 2",
    )
    .bind(schemas)
    .bind(named)
    .fetch_all(connection)
    .await
    .doing(|| "listing the tables".into())?;
    let name = |text| Identifier::new(text).expect("the catalog holds names");
    Ok(rows
        .into_iter()
        .map(|(schema, table, rows_estimate, bytes)| TableEntry {
            table: TableName::new(name(schema), name(table)),
            rows_estimate,
            bytes,
            fingerprint: None,
        })
        .collect())
}

/// Reads what each of the tables holds.
pub(crate) async fn read(
    connection: &mut PgConnection,
    tables: &[TableName],
) -> Result<BTreeMap<TableName, Contents>, PostgresError> {
    let read = fingerprints(connection, tables, &BTreeMap::new()).await?;
    Ok(read.into_iter().map(|(table, is)| (table, Contents { rows: is.rows, digest: is.digest })).collect())
}

/// Tells where the sequences stand; those of a whole database alone, as pg_dump keeps no others' for
/// certain.
pub(crate) async fn sequences(connection: &mut PgConnection) -> Result<Vec<SequenceEntry>, PostgresError> {
    let rows: Vec<(String, String, Option<i64>)> = sqlx::query_as(
        "select schemaname::text, sequencename::text, last_value from pg_sequences s where not exists (\
           select from pg_depend d where d.classid = 'pg_class'::regclass and d.deptype = 'e' \
           and d.objid = to_regclass(format('%I.%I', schemaname, sequencename))) order by 1, 2",
    )
    .fetch_all(connection)
    .await
    .doing(|| "reading where the sequences stand".into())?;
    let name = |text| Identifier::new(text).expect("the catalog holds names");
    let entry = |(schema, sequence, last_value)| SequenceEntry {
        sequence: TableName::new(name(schema), name(sequence)),
        last_value,
    };
    Ok(rows.into_iter().map(entry).collect())
}

/// Tells what the large objects hold.
pub(crate) async fn large_objects(connection: &mut PgConnection) -> Result<LargeObjects, PostgresError> {
    let (count, digest): (i64, String) = sqlx::query_as(
        "select count(*), md5(coalesce(string_agg(oid::text || ' ' || md5(lo_get(oid)), ',' order by oid), '')) \
         from pg_largeobject_metadata",
    )
    .fetch_one(connection)
    .await
    .doing(|| "reading the large objects".into())?;
    Ok(LargeObjects { count, digest })
}

/// Compares a database with what a manifest says that it was taken from; answers with the differences.
pub(crate) async fn differences(
    connection: &mut PgConnection,
    manifest: &Manifest,
) -> Result<Vec<String>, PostgresError> {
    let mut found = Vec::new();
    // Of a part of a database, what pg_dump left out on purpose cannot be told from what is missing.
    let there: Vec<TableName> =
        tables(&mut *connection, &Scope::Whole).await?.into_iter().map(|entry| entry.table).collect();
    let known: Vec<TableName> = manifest.tables.iter().map(|entry| entry.table.clone()).collect();
    found.extend(known.iter().filter(|table| !there.contains(table)).map(|table| format!("table {table} is missing")));
    if manifest.scope == Scope::Whole {
        found.extend(there.iter().filter(|table| !known.contains(table)).map(|table| format!("table {table} is new")));
    }
    if !found.is_empty() {
        return Ok(found);
    }
    let proven: Vec<TableName> =
        manifest.tables.iter().filter(|entry| entry.fingerprint.is_some()).map(|entry| entry.table.clone()).collect();
    let present = read(&mut *connection, &proven).await?;
    for entry in &manifest.tables {
        if let (Some(expected), Some(present)) = (&entry.fingerprint, present.get(&entry.table))
            && expected != present
        {
            let how = if expected.rows == present.rows {
                "other contents in as many rows".to_owned()
            } else {
                format!("{} rows in place of {}", present.rows, expected.rows)
            };
            found.push(format!("table {}: {how}", entry.table));
        }
    }
    if let Some(expected) = &manifest.large_objects {
        let present = large_objects(&mut *connection).await?;
        if present != *expected {
            found.push(format!("large objects: {} in place of {}, or others", present.count, expected.count));
        }
    }
    let present: BTreeMap<_, _> =
        sequences(connection).await?.into_iter().map(|entry| (entry.sequence, entry.last_value)).collect();
    for expected in &manifest.sequences {
        match present.get(&expected.sequence) {
            None => found.push(format!("sequence {} is missing", expected.sequence)),
            Some(value) if *value != expected.last_value => {
                found.push(format!("sequence {} stands elsewhere", expected.sequence));
            }
            Some(_) => {}
        }
    }
    Ok(found)
}
