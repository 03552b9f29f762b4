//! Fingerprints of what tables hold: equal for equal rows in whatever order, on whatever server.
//!
//! A row is taken as the text of its columns in the order of their names, so that neither a dropped
//! column nor one that was added again elsewhere shows; the settings that shape such a text are
//! fixed while it is made. Two 64-bit hashes of it, of different seeds, are summed as whole numbers.
//! A sum, unlike an exclusive or, sees a row that is there twice; two of them, and the count of
//! rows, leave a chance of about 2⁻¹²⁸ that different contents look alike. Nobody who chooses the
//! rows for that end is guarded against.
//!
//! The hash is the server's own, of bytes: `hashtextextended` under the collation `C`, the same in
//! every version since 11, as hash partitions that `pg_upgrade` carries over ask of it. It differs
//! between little-endian and big-endian machines, and between databases of different encodings.
//! MD5 in its place takes 2.6 times as long.
//!
//! Large objects are not read, nor are the positions of sequences.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sqlx::{AssertSqlSafe, PgConnection};
use upgrade_core::error::StepError;

use crate::error::{Doing, PostgresError};
use crate::identifier::{Identifier, TableName};

/// Tells what a table holds, in a few bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// How many rows there are.
    pub rows: i64,
    /// What stands for their contents, in hexadecimal digits.
    pub digest: String,
}

/// What the text of a value depends on, beside the value, and what makes reading it quick.
const SETTINGS: [(&str, &str); 10] = [
    ("DateStyle", "ISO, YMD"),
    ("IntervalStyle", "postgres"),
    ("TimeZone", "UTC"),
    ("bytea_output", "hex"),
    ("extra_float_digits", "1"),
    ("jit", "off"),
    ("lc_monetary", "C"),
    ("quote_all_identifiers", "off"),
    // A policy that hides rows gives an error in place of a fingerprint of some of them.
    ("row_security", "off"),
    ("search_path", "pg_catalog"),
];

/// Reads what a table holds, without regard to the columns in `excluded`.
///
/// A partitioned table is read with all its partitions; one that others inherit from, alone.
///
/// ```
/// # use upgrade_postgres::{PostgresError, fingerprint::table_fingerprint, session::Session};
/// # async fn same(session: &mut Session) -> Result<bool, PostgresError> {
/// let orders = "shop.orders".parse().expect("a table");
/// let before = table_fingerprint(session.connection(), &orders, &[]).await?;
/// let after = table_fingerprint(session.connection(), &orders, &[]).await?;
/// # Ok(before == after)
/// # }
/// ```
///
/// # Guarantees
/// Settings of the session are afterwards as they were. Read in a transaction of the caller's, it
/// is of that transaction's snapshot.
///
/// # Errors
/// There is no such table or column, the user may not read it, or a row-level policy hides rows.
pub async fn table_fingerprint(
    connection: &mut PgConnection,
    table: &TableName,
    excluded: &[Identifier],
) -> Result<Fingerprint, PostgresError> {
    let excluded = BTreeMap::from([(table.clone(), excluded.to_vec())]);
    let mut read = fingerprints(connection, std::slice::from_ref(table), &excluded).await?;
    Ok(read.remove(table).expect("every table that was asked for is answered"))
}

/// Reads what each of the tables holds, without regard to their columns in `excluded`.
///
/// # Errors
/// As [`table_fingerprint`], for the first table that has one.
pub async fn fingerprints(
    connection: &mut PgConnection,
    tables: &[TableName],
    excluded: &BTreeMap<TableName, Vec<Identifier>>,
) -> Result<BTreeMap<TableName, Fingerprint>, PostgresError> {
    let names = SETTINGS.map(|(name, _)| name);
    let found: Vec<String> = sqlx::query_scalar("select current_setting(name) from unnest($1::text[]) as name")
        .bind(names)
        .fetch_all(&mut *connection)
        .await
        .doing(|| "reading the session's settings".into())?;
    set(connection, &SETTINGS.map(|(_, value)| value.to_owned())).await?;
    let read = async {
        let mut read = BTreeMap::new();
        for table in tables {
            let excluded = excluded.get(table).map_or(&[][..], Vec::as_slice);
            read.insert(table.clone(), read_one(connection, table, excluded).await?);
        }
        Ok::<_, PostgresError>(read)
    };
    let read = read.await;
    let put_back = set(connection, &found).await;
    // A failed statement in a transaction of the caller's has put them back already.
    let read = read?;
    put_back?;
    Ok(read)
}

/// Lists the tables whose contents make up the database: those of `schemas`, or of all if it is
/// empty, but for the schemas `without`.
///
/// Partitions are listed one by one, in place of what they are partitions of. Left out are views,
/// foreign tables, temporary tables and what belongs to an extension.
///
/// # Errors
/// The server refused it.
pub async fn tables(
    connection: &mut PgConnection,
    schemas: &[Identifier],
    without: &[Identifier],
) -> Result<Vec<TableName>, PostgresError> {
    let plain = |names: &[Identifier]| names.iter().map(|name| name.as_str().to_owned()).collect::<Vec<_>>();
    let found: Vec<(String, String)> = sqlx::query_as(
        "select n.nspname::text, c.relname::text from pg_class c join pg_namespace n on n.oid = c.relnamespace \
         where c.relkind = 'r' and c.relpersistence <> 't' \
           and n.nspname <> 'information_schema' and n.nspname !~ '^pg_' \
           and (cardinality($1::text[]) = 0 or n.nspname = any ($1)) and n.nspname <> all ($2::text[]) \
           and not exists (select from pg_depend d where d.classid = 'pg_class'::regclass and d.objid = c.oid \
             and d.deptype = 'e') \
         order by n.nspname, c.relname",
    )
    .bind(plain(schemas))
    .bind(plain(without))
    .fetch_all(connection)
    .await
    .doing(|| "listing the tables".into())?;
    let name = |text: String| Identifier::new(text).expect("the catalog holds names");
    Ok(found.into_iter().map(|(schema, table)| TableName::new(name(schema), name(table))).collect())
}

async fn set(connection: &mut PgConnection, values: &[String]) -> Result<(), PostgresError> {
    sqlx::query("select set_config(name, value, false) from unnest($1::text[], $2::text[]) as given(name, value)")
        .bind(SETTINGS.map(|(name, _)| name))
        .bind(values)
        .execute(connection)
        .await
        .doing(|| "fixing how values are written".into())?;
    Ok(())
}

async fn read_one(
    connection: &mut PgConnection,
    table: &TableName,
    excluded: &[Identifier],
) -> Result<Fingerprint, PostgresError> {
    let found: Option<(bool, Vec<String>)> = sqlx::query_as(
        "select c.relkind = 'r', array(select attname::text from pg_attribute \
           where attrelid = c.oid and attnum > 0 and not attisdropped order by attname) \
         from pg_class c where c.oid = to_regclass($1)",
    )
    .bind(table.to_string())
    .fetch_optional(&mut *connection)
    .await
    .doing(|| format!("reading the columns of {table}"))?;
    let Some((alone, columns)) = found else {
        return Err(StepError::permanent(format!("there is no table {table}"))
            .with_hint("check its name and schema; without a schema it is looked for in `public`")
            .into());
    };
    if let Some(unknown) = excluded.iter().find(|name| !columns.iter().any(|column| column == name.as_str())) {
        return Err(StepError::permanent(format!("table {table} has no column {unknown}"))
            .with_hint(format!("its columns are {}", columns.join(", ")))
            .into());
    }
    let columns: Vec<String> = columns
        .into_iter()
        .filter(|column| !excluded.iter().any(|name| name.as_str() == column))
        .map(|column| format!("t.{}", Identifier::new(column).expect("the catalog holds names")))
        .collect();
    let only = if alone { "only " } else { "" };
    // The offset keeps the text from being made twice. Written as a constant of its own type it leaves
    // the scan to parallel workers; a plain 0 would not.
    let sql = format!(
        "select count(*), coalesce(sum(hashtextextended(content, 1)), 0)::text, \
           coalesce(sum(hashtextextended(content, 2)), 0)::text \
         from (select row({})::text collate \"C\" as content from {only}{table} as t offset bigint '0') as rows",
        columns.join(", ")
    );
    let (rows, one, two): (i64, String, String) = sqlx::query_as(AssertSqlSafe(sql))
        .persistent(false)
        .fetch_one(connection)
        .await
        .doing(|| format!("reading the contents of {table}"))?;
    let digest = upgrade_core::sealed::sha256_hex(format!("{rows} {one} {two}").as_bytes());
    Ok(Fingerprint { rows, digest: digest[..32].to_owned() })
}
