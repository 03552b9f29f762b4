//! The tables of a journal, and their format.

use sqlx::{AssertSqlSafe, Connection, Executor};
use upgrade_core::journal::JournalError;

use super::clerk::Session;
use super::failure::server;
use crate::identifier::Identifier;
use crate::session::advisory_key;

/// Numbers the format of the tables that this code makes.
const FORMAT: i32 = 1;

/// Entries and requests are texts, not `jsonb`: digests are over the bytes as they were written, and
/// `jsonb` keeps neither the order of keys nor every number, nor takes every string.
const TABLES: &str = "
    CREATE TABLE format (version int NOT NULL);
    CREATE SEQUENCE epochs;
    CREATE TABLE runs (
        run text COLLATE \"C\" PRIMARY KEY,
        entries bigint NOT NULL,
        digest text NOT NULL,
        epoch bigint NOT NULL,
        summary text
    ) WITH (fillfactor = 50);
    CREATE TABLE records (
        run text COLLATE \"C\" NOT NULL,
        seq bigint NOT NULL,
        at text NOT NULL,
        prev text NOT NULL,
        entry text NOT NULL,
        digest text NOT NULL,
        PRIMARY KEY (run, seq)
    );
    CREATE TABLE leases (
        epoch bigint PRIMARY KEY,
        locks text[] NOT NULL,
        holder text NOT NULL,
        since timestamptz NOT NULL DEFAULT now()
    );
    CREATE TABLE requests (
        run text COLLATE \"C\" NOT NULL,
        id text COLLATE \"C\" NOT NULL,
        request text NOT NULL,
        PRIMARY KEY (run, id)
    );
    CREATE TABLE sealed (
        run text COLLATE \"C\" NOT NULL,
        digest text COLLATE \"C\" NOT NULL,
        contents bytea NOT NULL,
        PRIMARY KEY (run, digest)
    );";

/// Makes the tables, unless somebody else did meanwhile.
pub(super) async fn make(session: &mut Session, schema: &Identifier) -> Result<(), JournalError> {
    let doing = || server("making the journal's tables");
    let mut transaction = session.begin().await.map_err(doing())?;
    sqlx::query("SELECT pg_advisory_xact_lock($1)")
        .bind(advisory_key(&format!("journal {schema} make")))
        .execute(&mut *transaction)
        .await
        .map_err(doing())?;
    // By a query of the catalog: a look by name answers out of a cache, from before the wait.
    const MADE: &str = "SELECT EXISTS (SELECT FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace \
        WHERE nspname = $1 AND relname = 'format')";
    let made: bool =
        sqlx::query_scalar(MADE).bind(schema.as_str()).fetch_one(&mut *transaction).await.map_err(doing())?;
    if !made {
        let there: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)")
            .bind(schema.as_str())
            .fetch_one(&mut *transaction)
            .await
            .map_err(doing())?;
        // Not IF NOT EXISTS: that asks for the right to create one that is there already.
        let schema = if there { String::new() } else { format!("CREATE SCHEMA {schema};") };
        let sql = format!("{schema}{TABLES} INSERT INTO format VALUES ({FORMAT});");
        transaction.execute(sqlx::raw_sql(AssertSqlSafe(sql))).await.map_err(doing())?;
    }
    transaction.commit().await.map_err(doing())
}

/// Checks that the tables are of a format that this code knows.
pub(super) async fn check(session: &mut Session, place: &str) -> Result<(), JournalError> {
    let found: Option<i32> = sqlx::query_scalar("SELECT version FROM format")
        .fetch_optional(&mut **session)
        .await
        .map_err(server("reading the journal's format"))?;
    match found {
        Some(found) if found > FORMAT => Err(JournalError::Format {
            place: place.to_owned(),
            found: found.unsigned_abs(),
            known: FORMAT.unsigned_abs(),
        }),
        Some(_) => Ok(()),
        None => Err(super::failure::damaged(place, 1, "the table that tells the format is empty")),
    }
}
