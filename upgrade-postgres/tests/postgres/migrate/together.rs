//! Several at once, connections that break, a server that crashes: nothing lost, nothing doubled.

#![cfg(test)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use upgrade_core::error::{Class, StepError};
use upgrade_core::step::{Prepared, Step};
use upgrade_core::testkit::TestContext;
use upgrade_postgres::steps::{Migrate, MigrateUndo};
use upgrade_testbed::postgres::{Database, Version, own};

use super::directory::{apply, many, migrate, migrate_at, prepare, said, undo};
use crate::world::any_database;

async fn one(url: &str, dir: &Path) -> Result<usize, StepError> {
    let step = migrate_at(url, dir, json!({}));
    let test = TestContext::new("schema");
    match step.prepare(&test.forward()).await? {
        Prepared::Change { undo, .. } => {
            let output = step.apply(&test.forward(), &undo).await?;
            step.commit(&test.commit(), &undo).await?;
            Ok(output.migrations)
        }
        _ => Ok(0),
    }
}

/// Lets three apply the same migrations at once; each tells how many it applied.
async fn three(database: &Database, dir: &Path) -> [usize; 3] {
    let url = database.url();
    let (a, b, c) = tokio::join!(one(&url, dir), one(&url, dir), one(&url, dir));
    [a, b, c].map(|done| done.unwrap_or_else(|error| panic!("{}", said(&error))))
}

async fn rounds(rounds: usize, count: usize) {
    let dir = many(count);
    for round in 0..rounds {
        let Some(database) = any_database() else { return };
        database.execute("create table done (id int primary key)");
        let half = if round % 2 == 1 { count / 2 } else { 0 };
        if half > 0 {
            let step = migrate(&database, dir.path(), json!({ "to": half }));
            let test = TestContext::new("schema");
            let (record, _) = apply(&step, &test).await.unwrap();
            step.commit(&test.commit(), &record).await.unwrap();
        }
        let did = three(&database, dir.path()).await;
        assert_eq!(did.iter().sum::<usize>(), count - half, "{did:?}");
        assert_eq!(database.text("select count(*) from done"), count.to_string());
        assert_eq!(database.text("select count(*) from _sqlx_migrations"), count.to_string());
        assert_eq!(database.text("select count(*) from pg_namespace where nspname = '_upgrade'"), "0");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_at_once_apply_each_migration_once() {
    rounds(4, 30).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes"]
async fn campaign_three_at_once_apply_each_of_a_thousand_migrations_once() {
    rounds(2, 1000).await;
    rounds(50, 60).await;
    println!("campaign: 50 rounds of 60 and 2 of 1,000 migrations, three commands at once");
}

/// Drives a step as an executor would: what is transient is tried again, after settling.
async fn until_done(step: &Migrate, test: &TestContext, record: &MigrateUndo) {
    let until = Instant::now() + Duration::from_secs(120);
    while Instant::now() < until {
        let cx = test.clone().interrupted().forward();
        if step.settle(&cx, record).await.is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        }
        match step.apply(&cx, record).await {
            Ok(_) => return,
            Err(error) if error.class() == Class::Permanent => panic!("{}", said(&error)),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
    panic!("it does not come to an end");
}

/// Ends the sessions of the step again and again, at changing instants, until told to stop.
fn terminator(url: String, stop: Arc<AtomicBool>, ended: Arc<AtomicU32>) -> tokio::task::JoinHandle<()> {
    use sqlx::Connection;
    tokio::spawn(async move {
        let mut connection = sqlx::PgConnection::connect(&url).await.unwrap();
        let mut pause = 3_u64;
        while !stop.load(Ordering::Relaxed) {
            pause = (pause * 7 + 11) % 61;
            tokio::time::sleep(Duration::from_millis(15 + pause)).await;
            let count: i64 = sqlx::query_scalar(
                "select count(*) filter (where pg_terminate_backend(pid)) from pg_stat_activity \
                 where application_name like 'upgrade/%' and datname = current_database()",
            )
            .fetch_one(&mut connection)
            .await
            .unwrap();
            ended.fetch_add(u32::try_from(count).unwrap(), Ordering::Relaxed);
        }
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backends_terminated_in_the_middle_lose_and_double_nothing() {
    let dir = many(150);
    let ended = Arc::new(AtomicU32::new(0));
    for round in 0.. {
        let Some(database) = any_database() else { return };
        database.execute("create table done (id int primary key)");
        let before = (database.schema(), database.contents());
        let step = migrate(&database, dir.path(), json!({}));
        let test = TestContext::new("schema");
        let (record, _) = prepare(&step, &test.forward()).await.unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let terminating = terminator(database.url(), stop.clone(), ended.clone());
        if round % 2 == 0 {
            until_done(&step, &test, &record).await;
        } else {
            let _ = step.apply(&test.forward(), &record).await;
        }
        stop.store(true, Ordering::Relaxed);
        terminating.await.unwrap();
        if round % 2 == 0 {
            assert_eq!(database.text("select count(*) from done"), "150");
            assert_eq!(database.text("select count(*) from _sqlx_migrations"), "150");
        }
        step.settle(&test.back(), &record).await.unwrap();
        undo(&step, &test, &record).await;
        assert_eq!((database.schema(), database.contents()), before);
        if ended.load(Ordering::Relaxed) >= 30 {
            break;
        }
        assert!(round < 60, "only {ended:?} backends were ended");
    }
    println!("{} backends ended", ended.load(Ordering::Relaxed));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_crashes_ten_times_loses_and_doubles_nothing() {
    let dir = many(400);
    let Some(server) = own(Version::V15, &[("max_connections", "20")]) else { return };
    let server = Arc::new(server);
    let database = server.database();
    database.execute("create table done (id int primary key)");
    let before = (database.schema(), database.contents());
    let step = migrate(&database, dir.path(), json!({}));
    let test = TestContext::new("schema");
    let (record, _) = prepare(&step, &test.forward()).await.unwrap();
    let crashing = server.clone();
    let crashes = tokio::task::spawn_blocking(move || {
        for crash in 0..10_u64 {
            std::thread::sleep(Duration::from_millis(40 + crash * 37 % 90));
            crashing.stop_immediate();
            crashing.start();
        }
    });
    until_done(&step, &test, &record).await;
    crashes.await.unwrap();
    assert_eq!(database.text("select count(*) from done"), "400");
    assert_eq!(database.text("select count(*) from _sqlx_migrations"), "400");
    undo(&step, &test, &record).await;
    assert_eq!((database.schema(), database.contents()), before);
}
