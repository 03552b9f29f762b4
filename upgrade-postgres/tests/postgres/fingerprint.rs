//! Fingerprints: the same for the same rows, however they lie and whatever the session's settings;
//! another for every change.

#![cfg(test)]

use sqlx::{Connection, PgConnection};
use upgrade_postgres::fingerprint::{Fingerprint, fingerprints, table_fingerprint, tables};
use upgrade_testbed::postgres::{Database, Version};

use crate::world::{any_database, database};

const EVERY_TYPE: &str = "create table t (id int, amount numeric, ratio float8, small real, at timestamptz, day date, \
     span interval, raw bytea, doc jsonb, tags text[], price money, class regclass, note text); \
     insert into t select n, n / 7.0, n / 7.0, n / 7.0, '2026-01-01 00:00Z'::timestamptz + n * interval '1 h', \
       '2026-01-01'::date + n, n * interval '1 month 2 days 03:04:05', decode(md5(n::text), 'hex'), \
       jsonb_build_object('n', n), array['a', null, n::text], n::money, 'pg_class'::regclass, \
       case n % 3 when 0 then null when 1 then '' else 'ü, \"' end from generate_series(1, 500) n;";

async fn connect(database: &Database) -> PgConnection {
    PgConnection::connect(&database.url()).await.unwrap()
}

async fn of(connection: &mut PgConnection, table: &str) -> Fingerprint {
    table_fingerprint(connection, &table.parse().unwrap(), &[]).await.unwrap()
}

#[tokio::test]
async fn order_holes_and_settings_do_not_show() {
    let Some(database) = any_database() else { return };
    database.execute(EVERY_TYPE);
    let mut connection = connect(&database).await;
    let plain = of(&mut connection, "t").await;
    assert_eq!(plain.rows, 500);
    database.execute(
        "create table other (gone int, note text, class regclass, id int, amount numeric, ratio float8, small real, \
           at timestamptz, day date, span interval, raw bytea, doc jsonb, tags text[], price money); \
         alter table other drop gone; alter table other add late int; alter table other drop late; \
         insert into other (id, amount, ratio, small, at, day, span, raw, doc, tags, price, class, note) \
           select * from t order by md5(id::text);",
    );
    assert_eq!(of(&mut connection, "other").await, plain);
    let settings = "set timezone = 'Asia/Tokyo'; set datestyle = 'German'; set intervalstyle = 'iso_8601'; \
         set bytea_output = 'escape'; set extra_float_digits = 0; set search_path = ''; \
         set quote_all_identifiers = on;";
    sqlx::raw_sql(settings).execute(&mut connection).await.unwrap();
    assert_eq!(of(&mut connection, "t").await, plain);
    let zone: String = sqlx::query_scalar("select current_setting('timezone') || current_setting('search_path')")
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert_eq!(zone, "Asia/Tokyo\"\"", "the session's own settings are back");
}

#[tokio::test]
async fn every_version_answers_alike() {
    let mut seen = Vec::new();
    for version in [Version::V15, Version::V16, Version::V18] {
        let Some(database) = database(version) else { continue };
        database.execute(EVERY_TYPE);
        seen.push(of(&mut connect(&database).await, "t").await);
    }
    assert!(seen.windows(2).all(|pair| pair[0] == pair[1]), "{seen:?}");
}

#[tokio::test]
async fn every_change_shows() {
    let Some(database) = any_database() else { return };
    database.execute(EVERY_TYPE);
    let mut connection = connect(&database).await;
    let plain = of(&mut connection, "t").await;
    let mut seen = vec![plain.clone()];
    for change in [
        "update t set note = '' where id = 3",
        "update t set amount = 1.0 where id = 7",
        "update t set amount = 1.00 where id = 7",
        "delete from t where id = 500",
        "insert into t select * from t where id = 1",
        // Two more of the same: an exclusive or would not see them.
        "insert into t select t.* from t, generate_series(1, 2) where id = 2",
        "update t set id = case id when 10 then 11 else 10 end where id in (10, 11)",
        "update t set ratio = ratio + 1e-16 where id = 1",
    ] {
        database.execute(change);
        let now = of(&mut connection, "t").await;
        assert!(!seen.iter().any(|one| one.digest == now.digest), "{change} does not show");
        seen.push(now);
    }
    database.execute("create table empty (id int)");
    let empty = of(&mut connection, "empty").await;
    assert_eq!(empty.rows, 0);
    database.execute("create table nothing (); insert into nothing default values;");
    assert_ne!(of(&mut connection, "nothing").await, empty);
}

#[tokio::test]
async fn excluded_columns_do_not_count_and_must_be_there() {
    let Some(database) = any_database() else { return };
    database.execute("create table t (id int, \"Touched At\" timestamptz); insert into t values (1, now());");
    let mut connection = connect(&database).await;
    let (table, touched) = ("t".parse().unwrap(), "Touched At".parse().unwrap());
    let excluded = std::slice::from_ref(&touched);
    let before = table_fingerprint(&mut connection, &table, excluded).await.unwrap();
    database.execute("update t set \"Touched At\" = null");
    assert_eq!(table_fingerprint(&mut connection, &table, excluded).await.unwrap(), before);
    let wrong = table_fingerprint(&mut connection, &table, &["touched".parse().unwrap()]).await.unwrap_err();
    assert!(wrong.to_string().contains("has no column \"touched\""), "{wrong}");
    let wrong = table_fingerprint(&mut connection, &"shop.t".parse().unwrap(), &[]).await.unwrap_err();
    assert!(wrong.to_string().contains("there is no table \"shop\".\"t\""), "{wrong}");
    // The connection is as usable as before.
    assert_eq!(table_fingerprint(&mut connection, &table, excluded).await.unwrap(), before);
}

#[tokio::test]
async fn the_tables_of_a_database_are_those_that_hold_its_rows() {
    let Some(database) = any_database() else { return };
    database.execute(
        "create schema shop; create schema other; create table plain (id int); create table shop.parent (id int); \
         create table shop.child () inherits (shop.parent); insert into shop.child values (1); \
         create table parts (id int) partition by range (id); \
         create table parts_1 partition of parts for values from (0) to (10); insert into parts values (1), (2); \
         create table other.kept (id int); create view v as select * from plain; \
         create materialized view m as select 1 as one;",
    );
    let mut connection = connect(&database).await;
    let names = |list: Vec<upgrade_postgres::identifier::TableName>| {
        list.into_iter().map(String::from).collect::<Vec<_>>().join(" ")
    };
    let all = tables(&mut connection, &[], &["other".parse().unwrap()]).await.unwrap();
    let read = fingerprints(&mut connection, &all, &Default::default()).await.unwrap();
    let rows: Vec<i64> = read.values().map(|one| one.rows).collect();
    assert_eq!(names(all), "public.parts_1 public.plain shop.child shop.parent");
    assert_eq!(rows, [2, 0, 1, 0]);
    assert_eq!(names(tables(&mut connection, &["other".parse().unwrap()], &[]).await.unwrap()), "other.kept");
    assert_eq!(of(&mut connection, "parts").await, of(&mut connection, "parts_1").await);
    assert_eq!(of(&mut connection, "v").await, of(&mut connection, "plain").await);
}

#[tokio::test]
async fn rows_that_a_policy_hides_are_an_error_and_not_a_fingerprint() {
    let Some(database) = any_database() else { return };
    let role = format!("reader_{}", database.name());
    database.execute(&format!(
        "create table t (id int); insert into t values (1), (2); alter table t enable row level security; \
         create policy one on t using (id = 1); create role \"{role}\"; grant select on t to \"{role}\";"
    ));
    let mut connection = connect(&database).await;
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!("set role \"{role}\""))).execute(&mut connection).await.unwrap();
    let refused = table_fingerprint(&mut connection, &"t".parse().unwrap(), &[]).await.unwrap_err();
    assert_eq!(refused.code(), Some("42501"), "{refused}");
    connection.close().await.unwrap();
    database.execute(&format!("drop owned by \"{role}\"; drop role \"{role}\""));
}

#[tokio::test]
async fn parallel_workers_read_a_large_table() {
    // Version 18 counts the workers that were launched, by database.
    let Some(database) = database(Version::V18) else { return };
    database.execute(
        "create table t (id int, note text); insert into t select n, md5(n::text) from generate_series(1, 200000) n; \
         analyze t;",
    );
    let mut connection = connect(&database).await;
    sqlx::raw_sql("set max_parallel_workers_per_gather = 0").execute(&mut connection).await.unwrap();
    let alone = of(&mut connection, "t").await;
    assert_eq!(workers(&mut connection).await, 0);
    sqlx::raw_sql("set max_parallel_workers_per_gather = 2").execute(&mut connection).await.unwrap();
    assert_eq!(of(&mut connection, "t").await, alone);
    assert!(workers(&mut connection).await > 0, "the table was read by one process");
}

async fn workers(connection: &mut PgConnection) -> i64 {
    sqlx::raw_sql("select pg_stat_force_next_flush()").execute(&mut *connection).await.unwrap();
    sqlx::query_scalar("select parallel_workers_launched from pg_stat_database where datname = current_database()")
        .fetch_one(connection)
        .await
        .unwrap()
}
