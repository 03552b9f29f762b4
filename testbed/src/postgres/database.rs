//! One fresh database.

use std::path::{Path, PathBuf};
use std::process::Command;

use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor, Row, ValueRef};

use super::cluster::{HOST, Place};
use super::{administer, url};
use crate::blocking::wait;

/// A database that is dropped, with whoever is connected to it, when it is let go of.
#[derive(Debug)]
pub struct Database {
    place: Place,
    bin: PathBuf,
    name: String,
}

impl Database {
    pub(super) fn create(place: &Place, bin: &Path, name: String) -> Self {
        let database = Self { place: place.clone(), bin: bin.to_owned(), name };
        // Copied through the log: the other way needs two checkpoints.
        let sql = format!("CREATE DATABASE {} TEMPLATE template0 STRATEGY wal_log", database.name);
        connected(place, "postgres", async |connection| {
            run(connection, &sql).await;
        });
        database
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The address of its server.
    pub fn host(&self) -> &str {
        HOST
    }

    /// The port of its server.
    pub fn port(&self) -> u16 {
        self.place.port
    }

    /// Its URL, with the superuser's name and password.
    pub fn url(&self) -> String {
        url(self.place.port, &self.name)
    }

    /// Runs any number of statements.
    ///
    /// # Panics
    /// With the server's message where one fails.
    pub fn execute(&self, sql: &str) {
        connected(&self.place, &self.name, async |connection| {
            run(connection, sql).await;
        });
    }

    /// The first column of what a query answers as text, one row a line; NULL reads `NULL`.
    ///
    /// # Panics
    /// With the server's message where it fails.
    pub fn text(&self, sql: &str) -> String {
        connected(&self.place, &self.name, async |connection| lines(&fetch(connection, sql).await))
    }

    /// What `pg_dump --schema-only` writes, without what differs between two dumps of one schema.
    ///
    /// # Panics
    /// Where `pg_dump` fails.
    pub fn schema(&self) -> String {
        let done = Command::new(self.bin.join("pg_dump"))
            .args(["--schema-only", "--no-password", "--host", HOST])
            .args(["--port", &self.place.port.to_string()])
            .args(["--username", super::USER, "--dbname", &self.name])
            .env("PGPASSWORD", super::PASSWORD)
            .output()
            .expect("pg_dump can be started");
        assert!(done.status.success(), "pg_dump: {}", String::from_utf8_lossy(&done.stderr));
        let text = String::from_utf8(done.stdout).expect("the database is in UTF-8");
        let kept = |line: &&str| {
            // The restrict lines hold a number that is drawn for each dump.
            !line.is_empty()
                && !line.starts_with("--")
                && !line.starts_with("\\restrict ")
                && !line.starts_with("\\unrestrict ")
        };
        let mut lines: Vec<&str> = text.lines().filter(kept).collect();
        lines.push("");
        lines.join("\n")
    }

    /// Every row of every table outside the system's schemas, as text, in one order.
    ///
    /// # Panics
    /// With the server's message where it fails.
    pub fn contents(&self) -> String {
        const TABLES: &str = "SELECT format('%I.%I', n.nspname, c.relname)
            FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE c.relkind = 'r' AND n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\\_%'
            ORDER BY format('%I.%I', n.nspname, c.relname) COLLATE \"C\"";
        connected(&self.place, &self.name, async |connection| {
            run(connection, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await;
            let mut text = String::new();
            for table in lines(&fetch(connection, TABLES).await).lines() {
                // An alias that no column is likely to have, or it would stand for the column.
                let query = format!(
                    "SELECT whole_row::text FROM {table} AS whole_row
                     ORDER BY whole_row::text COLLATE \"C\""
                );
                let rows = lines(&fetch(connection, &query).await);
                text.push_str(table);
                text.push('\n');
                for row in rows.lines() {
                    text.push_str("  ");
                    text.push_str(row);
                    text.push('\n');
                }
            }
            text
        })
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let sql = format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", self.name);
        // An own server that the test stopped takes its databases along.
        let _ = wait(async || {
            let mut connection = administer(&self.place, "postgres").connect().await?;
            connection.execute(AssertSqlSafe(sql)).await?;
            connection.close().await
        });
    }
}

fn connected<T: Send>(place: &Place, database: &str, work: impl AsyncFnOnce(&mut PgConnection) -> T + Send) -> T {
    let options = administer(place, database);
    wait(async || {
        let mut connection = match options.connect().await {
            Ok(connection) => connection,
            Err(error) => panic!("connecting to {database}: {error}"),
        };
        let answer = work(&mut connection).await;
        // Until the server has seen it go, it counts against whoever wants the database alone.
        let _ = connection.close().await;
        answer
    })
}

async fn run(connection: &mut PgConnection, sql: &str) {
    if let Err(error) = connection.execute(sqlx::raw_sql(AssertSqlSafe(sql))).await {
        panic!("{error}\nin: {sql}");
    }
}

async fn fetch(connection: &mut PgConnection, sql: &str) -> Vec<PgRow> {
    // Unprepared, every value comes as the text that psql shows.
    match connection.fetch_all(sqlx::raw_sql(AssertSqlSafe(sql))).await {
        Ok(rows) => rows,
        Err(error) => panic!("{error}\nin: {sql}"),
    }
}

fn lines(rows: &[PgRow]) -> String {
    let text = |row: &PgRow| {
        let value = row.try_get_raw(0).expect("a query answers a column");
        if value.is_null() { "NULL".to_owned() } else { value.as_str().expect("it is text").to_owned() }
    };
    rows.iter().map(text).collect::<Vec<_>>().join("\n")
}
