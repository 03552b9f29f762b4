//! `postgres.health`: each figure driven beyond its limit on a real server, and what is said then.

#![cfg(test)]

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, PgConnection};
use upgrade_core::error::Class;
use upgrade_core::step::Step;
use upgrade_core::testkit::TestContext;
use upgrade_core::verdict::{Status, Verdict};
use upgrade_postgres::steps::{Sql, Writes};
use upgrade_testbed::postgres::{Database, Version, own};

use crate::world::{any_database, build_context, database, registry};

async fn ask(url: &str, limits: Value) -> Verdict {
    let with = json!({ "target": "db", "limits": limits });
    let check = registry().make_check("postgres.health", with, &build_context(url)).unwrap();
    check.check(&TestContext::new("health").forward()).await.unwrap()
}

/// Holds only one figure to its limit: others on the shared server have troubles of their own.
async fn only(database: &Database, figure: &str) -> Verdict {
    let mut limits = json!({});
    for name in [
        "connections_share",
        "dead_rows_share",
        "idle_in_transaction_s",
        "integer_key_share",
        "invalid_indexes",
        "longest_transaction_s",
        "prepared_transactions",
        "replication_lag_bytes",
        "replication_lag_s",
        "replication_slot_bytes",
        "sequence_share",
        "wraparound_share",
    ] {
        if name != figure {
            limits[name] = json!({});
        }
    }
    ask(&database.url(), limits).await
}

fn assert_fails(verdict: &Verdict, message: &str, hint: &str) {
    assert_eq!(verdict.status, Status::Fail, "{verdict:?}");
    assert!(verdict.message.contains(message), "{verdict:?}");
    assert!(verdict.hint.as_deref().is_some_and(|given| given.contains(hint)), "{verdict:?}");
}

#[tokio::test]
async fn a_server_that_is_well_passes_on_every_version() {
    for version in [Version::V15, Version::V16, Version::V18] {
        let Some(server) = own(version, &[("fsync", "off")]) else { continue };
        let database = server.database();
        database.execute("create table t (id serial primary key); insert into t default values");
        let verdict = ask(&database.url(), json!({})).await;
        assert_eq!(verdict.status, Status::Pass, "{verdict:?}");
        assert!(verdict.message.contains("0 standbys, 0.0 s behind"), "{verdict:?}");
        assert_eq!(verdict.measurements.len(), 16, "{verdict:?}");
    }
}

#[tokio::test]
async fn a_sequence_and_a_key_near_their_end() {
    let Some(database) = any_database() else { return };
    database.execute(
        "create table small (id smallserial primary key); create sequence down increment by -1 minvalue -100; \
         create sequence round maxvalue 10 cycle; select setval('round', 10); create table bare (id int primary key);",
    );
    let verdict = only(&database, "sequence_share").await;
    assert_eq!(verdict.status, Status::Pass, "{verdict:?}");
    database.execute("select setval('small_id_seq', 30000)");
    assert_fails(
        &only(&database, "sequence_share").await,
        "sequence_share is 0.9156, above 0.8",
        "sequence public.small_id_seq",
    );
    database.execute("select setval('down', -95)");
    assert_fails(&only(&database, "sequence_share").await, "sequence_share is 0.9495", "sequence public.down");

    assert_eq!(only(&database, "integer_key_share").await.status, Status::Pass);
    database.execute("insert into bare values (1), (2000000000)");
    let verdict = only(&database, "integer_key_share").await;
    assert_fails(&verdict, "integer_key_share is 0.9313, above 0.8", "column \"id\" of \"public\".\"bare\"");
    let limits = json!({ "integer_key_share": { "max": 0.95 } });
    let verdict = ask(&database.url(), limits).await;
    assert!(!verdict.message.contains("integer_key_share"), "{verdict:?}");
}

#[tokio::test]
async fn an_index_that_is_not_valid() {
    let Some(database) = any_database() else { return };
    database.execute("create table t (id int); insert into t values (1), (1)");
    let mut connection = PgConnection::connect(&database.url()).await.unwrap();
    sqlx::raw_sql("create unique index concurrently left_over on t (id)").execute(&mut connection).await.unwrap_err();
    let verdict = only(&database, "invalid_indexes").await;
    assert_fails(&verdict, "invalid_indexes is 1.0000, above 0", "left_over: `reindex index concurrently`");
    database.execute("alter table t add constraint positive check (id > 0) not valid");
    assert_eq!(only(&database, "").await.measurements["not_valid_constraints"], 1.0);
}

#[tokio::test]
async fn transactions_that_last() {
    let Some(database) = any_database() else { return };
    let options: PgConnectOptions = database.url().parse().unwrap();
    let mut connection = options.application_name("forgotten").connect().await.unwrap();
    sqlx::raw_sql("begin; select 1").execute(&mut connection).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    // The shared server's other sessions may be older: that there is one is enough.
    for figure in ["idle_in_transaction_s", "longest_transaction_s"] {
        let verdict = ask(&database.url(), json!({ figure: { "max": 0.2 } })).await;
        assert_fails(&verdict, &format!("{figure} is "), "pid ");
    }
    connection.close().await.unwrap();
}

#[tokio::test]
async fn dead_rows_are_counted_by_the_servers_statistics() {
    let Some(database) = any_database() else { return };
    database.execute(
        "create table t (id int) with (autovacuum_enabled = off); insert into t select generate_series(1, 12000);",
    );
    database.execute("delete from t where id > 2000");
    let began = Instant::now();
    loop {
        let verdict = ask(&database.url(), json!({ "dead_rows_share": { "max": 0.5 } })).await;
        if verdict.status == Status::Fail {
            assert_fails(&verdict, "dead_rows_share is 0.8333, above 0.5", "t: `vacuum (verbose)`");
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "{verdict:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test]
async fn connections_prepared_transactions_and_slots() {
    let settings = [("max_connections", "8"), ("max_prepared_transactions", "2"), ("fsync", "off")];
    let Some(server) = own(Version::V15, &settings) else { return };
    let database = server.database();
    let mut open = Vec::new();
    for _ in 0..4 {
        open.push(PgConnection::connect(&database.url()).await.unwrap());
    }
    let verdict = only(&database, "connections_share").await;
    assert_fails(&verdict, "connections_share is 1.0000, above 0.9", "raise max_connections");
    open.clear();

    database.execute("create table t (id int)");
    database.execute("begin; insert into t values (1); prepare transaction 'left behind'");
    let verdict = only(&database, "prepared_transactions").await;
    assert_fails(&verdict, "prepared_transactions is 1.0000, above 0", "left behind: end each with `commit prepared`");
    database.execute("rollback prepared 'left behind'");

    database.execute("select pg_create_physical_replication_slot('nobody', true)");
    database.execute("insert into t select generate_series(1, 20000)");
    let verdict = ask(&database.url(), json!({ "replication_slot_bytes": { "max": 100_000 } })).await;
    assert_fails(&verdict, "replication_slot_bytes is ", "slot nobody");
    database.execute("select pg_drop_replication_slot('nobody')");
}

#[tokio::test]
async fn a_standby_that_is_behind_and_that_takes_no_writes() {
    for version in [Version::V15, Version::V18] {
        let Some(server) = own(version, &[("fsync", "off")]) else { continue };
        let database = server.database();
        database.execute("create table t (id int)");
        let standby = server.standby(&[]);
        let replica = standby.url(database.name());
        let behind = json!({ "replication_lag_bytes": { "max": 100_000 }, "replication_lag_s": { "max": 1 } });
        let began = Instant::now();
        loop {
            let verdict = ask(&database.url(), behind.clone()).await;
            if verdict.status == Status::Pass && verdict.measurements["standbys"] == 1.0 {
                break;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "{verdict:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let mut on_standby = PgConnection::connect(&replica).await.unwrap();
        sqlx::raw_sql("select pg_wal_replay_pause()").execute(&mut on_standby).await.unwrap();
        database.execute("insert into t select generate_series(1, 20000)");
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let verdict = ask(&database.url(), behind.clone()).await;
        assert_fails(&verdict, "replication_lag_bytes is ", "walreceiver at 127.0.0.1: look at the standby");
        // Asked itself, it tells how far it is behind.
        let verdict = ask(&replica, behind.clone()).await;
        assert_fails(&verdict, "replication_lag_bytes is ", "look at the standby");
        assert!(verdict.measurements["replication_lag_s"] > 1.0, "{verdict:?}");
        sqlx::raw_sql("select pg_wal_replay_resume()").execute(&mut on_standby).await.unwrap();
        on_standby.close().await.unwrap();

        let sql = json!({ "target": "db", "statement": "delete from t", "undo": "select 1" });
        let sql = Sql::from_config(serde_json::from_value(sql).unwrap(), &build_context(&replica)).unwrap();
        let error = sql.prepare(&TestContext::new("s").forward()).await.unwrap_err();
        assert_eq!((error.class(), error.message()), (Class::Permanent, "the server is a standby and takes no writes"));
        let stop = serde_json::from_value(json!({ "target": "db", "state": "stopped" })).unwrap();
        let stop = Writes::from_config(stop, &build_context(&replica)).unwrap();
        let error = stop.prepare(&TestContext::new("s").forward()).await.unwrap_err();
        assert_eq!(error.hint(), Some("point the target's `url` at the primary"));
    }
}

#[tokio::test]
async fn what_may_not_be_seen_is_unknown_with_the_grant_that_shows_it() {
    let Some(database) = database(Version::V15) else { return };
    let role = format!("looker_{}", database.name());
    database.execute(&format!(
        "create role {role} login password 'secret-of-role'; create table t (id serial primary key)"
    ));
    let mut url = url::Url::parse(&database.url()).unwrap();
    url.set_username(&role).unwrap();
    url.set_password(Some("secret-of-role")).unwrap();
    let other = PgConnection::connect(&database.url()).await.unwrap();
    let verdict = ask(url.as_str(), json!({})).await;
    assert_eq!(verdict.status, Status::Unknown, "{verdict:?}");
    assert!(verdict.message.contains("longest_transaction_s was not measured"), "{verdict:?}");
    let hint = verdict.hint.unwrap();
    for grant in [
        format!("`grant pg_monitor to {role}`"),
        format!("`grant select on sequence public.t_id_seq to {role}`"),
        format!("`grant select on \"public\".\"t\" to {role}`"),
    ] {
        assert!(hint.contains(&grant), "{hint}");
    }
    database.execute(&format!("grant pg_monitor to {role}; grant select on t, t_id_seq to {role}"));
    let verdict = ask(url.as_str(), json!({})).await;
    assert_eq!(verdict.measurements.len(), 16, "{verdict:?}");
    other.close().await.unwrap();
    database.execute(&format!("drop owned by {role}; drop role {role}"));
}

#[test]
fn a_limit_on_what_is_not_measured_is_refused() {
    let Some(database) = any_database() else { return };
    let with = json!({ "target": "db", "limits": { "idle": { "max": 1 } } });
    let Err(error) = registry().make_check("postgres.health", with, &build_context(&database.url())) else { panic!() };
    assert!(error.to_string().contains("there is no figure `idle`"), "{error}");
}
