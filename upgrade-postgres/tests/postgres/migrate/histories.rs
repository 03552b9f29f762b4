//! The histories of other tools: used as they are, or taken over.

#![cfg(test)]

use serde_json::json;
use sqlx::migrate::Migrator;
use sqlx::{Connection, PgConnection};
use upgrade_core::step::{Prepared, Step};
use upgrade_core::testkit::TestContext;
use upgrade_core::verdict::Status;
use upgrade_testbed::postgres::Database;

use super::directory::{apply, apply_and_commit, directory, migrate, refused, undo};
use crate::world::{any_database, check};

const FILES: [(&str, &str); 4] = [
    ("0001_a_b.up.sql", "create table a (id int);\n"),
    ("0001_a_b.down.sql", "drop table a;\n"),
    ("0002_c.up.sql", "-- no-transaction\ncreate index concurrently c on a (id);\n"),
    ("0002_c.down.sql", "drop index c;\n"),
];

async fn sqlx_migrates(database: &Database, dir: &std::path::Path) -> Result<(), sqlx::migrate::MigrateError> {
    let migrator = Migrator::new(dir).await?;
    let mut connection = PgConnection::connect(&database.url()).await?;
    migrator.run_direct(None, &mut connection, false).await
}

#[tokio::test]
async fn the_services_own_migrator_finds_everything_applied() {
    let Some(database) = any_database() else { return };
    let home = directory(&FILES);
    apply_and_commit(&migrate(&database, home.path(), json!({}))).await;
    let rows = "select version || description || success || encode(checksum, 'hex') from _sqlx_migrations order by 1";
    let ours = database.text(rows);
    let schema = database.schema();
    sqlx_migrates(&database, home.path()).await.unwrap();
    assert_eq!((database.text(rows), database.schema()), (ours.clone(), schema.clone()));
    // And a database that sqlx has migrated looks the same, to the byte.
    let other = any_database().unwrap();
    sqlx_migrates(&other, home.path()).await.unwrap();
    assert_eq!((other.text(rows), other.schema()), (ours, schema));
    assert!(database.text("select min(execution_time) from _sqlx_migrations").parse::<i64>().unwrap() >= 0);
}

#[tokio::test]
async fn what_the_services_own_migrator_applied_is_found() {
    let Some(database) = any_database() else { return };
    let home = directory(&FILES);
    sqlx_migrates(&database, home.path()).await.unwrap();
    let step = migrate(&database, home.path(), json!({}));
    let prepared = step.prepare(&TestContext::new("schema").forward()).await.unwrap();
    assert!(matches!(prepared, Prepared::Unchanged { .. }), "{prepared:?}");
    // A row that sqlx left half done is not passed over.
    database.execute("update _sqlx_migrations set success = false where version = 2");
    refused(&step, &["version 2 is marked as failed", "correct its row"]).await;
}

#[tokio::test]
async fn diesels_table_is_as_diesel_makes_it() {
    let Some(database) = any_database() else { return };
    let home = directory(&[
        ("00000000000000_diesel_initial_setup/up.sql", "create function f() returns int language sql as 'select 1';"),
        ("00000000000000_diesel_initial_setup/down.sql", "drop function f();"),
        ("2026-01-31-120000_a/up.sql", "create table a ();"),
        ("2026-01-31-120000_a/down.sql", "drop table a;"),
    ]);
    let before = database.schema();
    let step = migrate(&database, home.path(), json!({}));
    let test = TestContext::new("schema");
    let (record, output) = apply(&step, &test).await.unwrap();
    assert_eq!(output.migrations, 2);
    assert_eq!(
        database.text("select version from __diesel_schema_migrations order by 1"),
        "00000000000000\n20260131120000"
    );
    undo(&step, &test, &record).await;
    assert_eq!(database.schema(), before);
}

#[tokio::test]
async fn flyways_history_is_taken_over_once_its_checksums_were_compared() {
    let Some(database) = any_database() else { return };
    let home = directory(&[
        ("V1__a.sql", "create table a (id int);\r\n"),
        ("V2__b.sql", "create table b (id int);\n-- ü\n"),
        ("V3__c.sql", "create table c (id int);\n"),
        ("U3__c.sql", "drop table c;\n"),
    ]);
    // The checksums are those that Flyway writes: CRC-32 of the lines, signed.
    database.execute(
        "create table a (id int); create table b (id int); \
         create table flyway_schema_history (installed_rank int primary key, version varchar(50), \
           description varchar(200) not null, type varchar(20) not null, script varchar(1000) not null, checksum int, \
           installed_by varchar(100) not null, installed_on timestamp not null default now(), \
           execution_time int not null, success bool not null); \
         insert into flyway_schema_history values (1, null, '<< Flyway Schema Creation >>', 'SCHEMA', 'x', null, 'x', now(), 1, true), \
           (2, '1', 'a', 'SQL', 'V1__a.sql', CRC1, 'x', now(), 1, true), (3, '2', 'b', 'SQL', 'V2__b.sql', CRC2, 'x', now(), 1, true)"
            .replace("CRC1", &crc(&["create table a (id int);"]).to_string())
            .replace("CRC2", &crc(&["create table b (id int);", "-- ü"]).to_string())
            .as_str(),
    );
    let before = (database.schema(), database.contents());
    refused(&migrate(&database, home.path(), json!({})), &["has a history of flyway", "adopt: flyway"]).await;
    let step = migrate(&database, home.path(), json!({ "adopt": "flyway" }));
    let test = TestContext::new("schema");
    let (record, output) = apply(&step, &test).await.unwrap();
    assert_eq!(output.migrations, 1);
    assert_eq!(database.text("select version from _upgrade_migrations order by 1"), "1\n2\n3");
    undo(&step, &test, &record).await;
    assert_eq!((database.schema(), database.contents()), before);

    database.execute("update flyway_schema_history set checksum = checksum + 1 where version = '2'");
    refused(&step, &["V2__b.sql: version 2 was applied from another text"]).await;
    database.execute("update flyway_schema_history set success = false where version = '2'");
    refused(&step, &["version 2 is marked as failed"]).await;
}

/// Computes CRC-32 as the standard defines it, bit by bit: the other side of the comparison.
fn crc(lines: &[&str]) -> i32 {
    let mut crc = u32::MAX;
    for byte in lines.iter().flat_map(|line| line.bytes()) {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 };
        }
    }
    (!crc).cast_signed()
}

#[tokio::test]
async fn the_history_of_golang_migrate_is_taken_over_unless_it_is_dirty() {
    let Some(database) = any_database() else { return };
    let home = directory(&[
        ("000001_a.up.sql", "create table a (id int);"),
        ("000001_a.down.sql", "drop table a;"),
        ("000002_b.up.sql", "create table b (id int);"),
        ("000002_b.down.sql", "drop table b;"),
    ]);
    database.execute(
        "create table a (id int); create table schema_migrations (version bigint primary key, dirty boolean not null); \
         insert into schema_migrations values (1, true)",
    );
    let with = json!({ "layout": "golang-migrate", "adopt": "golang-migrate" });
    let step = migrate(&database, home.path(), with.clone());
    refused(&step, &["version 1 is marked as failed"]).await;
    database.execute("update schema_migrations set dirty = false");
    apply_and_commit(&step).await;
    assert_eq!(database.text("select version || ' ' || description from _upgrade_migrations order by 1"), "1 a\n2 b");
    // Taken over once, there is nothing more to do.
    let prepared = step.prepare(&TestContext::new("schema").forward()).await.unwrap();
    assert!(matches!(prepared, Prepared::Unchanged { .. }), "{prepared:?}");
    database.execute("update schema_migrations set version = 7");
    refused(&step, &["version 7 was applied, and there is no file for it"]).await;
    database.execute("drop table schema_migrations");
    refused(&step, &["there is no schema_migrations here"]).await;
}

#[tokio::test]
async fn the_check_tells_pending_and_drift() {
    let Some(database) = any_database() else { return };
    let home = directory(&FILES);
    let ask = async |more: serde_json::Value| {
        let mut with = json!({ "target": "db", "directory": home.path() });
        with.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let check = check(&database, "postgres.migrations", with).unwrap();
        check.check(&TestContext::new("agree").forward()).await.unwrap()
    };
    let verdict = ask(json!({})).await;
    assert_eq!((verdict.status, verdict.measurements["pending"]), (Status::Fail, 2.0), "{verdict:?}");
    assert_eq!(ask(json!({ "pending": "allow" })).await.status, Status::Pass);
    apply_and_commit(&migrate(&database, home.path(), json!({}))).await;
    let verdict = ask(json!({})).await;
    assert_eq!((verdict.status, verdict.measurements["applied"]), (Status::Pass, 2.0), "{verdict:?}");
    database.execute("update _sqlx_migrations set checksum = '\\x00' where version = 1");
    let verdict = ask(json!({ "pending": "allow" })).await;
    assert_eq!((verdict.status, verdict.measurements["drift"]), (Status::Fail, 1.0), "{verdict:?}");
    assert!(verdict.message.contains("0001_a_b.up.sql: version 1"), "{verdict:?}");
}
