//! Strong locks under traffic: nobody queues for long, those in the way are named, and the wait ends
//! with them.

#![cfg(test)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection};
use upgrade_core::context::Context;
use upgrade_core::error::{Class, StepError};
use upgrade_core::testkit::TestContext;
use upgrade_postgres::Database;
use upgrade_postgres::locking::LockPolicy;
use upgrade_testbed::postgres::{self, Version, own};

use crate::forwarder::Forwarder;
use crate::world::{any_database, target};

const TABLE: &str =
    "create table t (id int primary key, v text); insert into t select n, 'x' from generate_series(1, 100) n";
const ALTER: &str = "alter table t add column w int";

/// Runs statements with a policy, as a step does.
async fn run(policy: &LockPolicy, db: &Database, cx: &Context, sql: &'static str) -> Result<(), StepError> {
    let mut session = db.connect(cx).await?;
    policy
        .transaction(cx, &mut session, "altering public.t", move |connection, _| {
            Box::pin(async move {
                sqlx::raw_sql(sql).execute(connection).await?;
                Ok(())
            })
        })
        .await?;
    session.close().await;
    Ok(())
}

async fn client(database: &postgres::Database, application: &str, sql: &str) -> PgConnection {
    let options: PgConnectOptions = database.url().parse().unwrap();
    let mut client = options.application_name(application).connect().await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut client).await.unwrap();
    client
}

fn columns(database: &postgres::Database) -> String {
    database
        .text("select count(*) from pg_attribute where attrelid = 't'::regclass and attnum > 0 and not attisdropped")
}

fn sessions_of_ours(database: &postgres::Database) -> String {
    database.text("select count(*) from pg_stat_activity where datname = current_database() and application_name like 'upgrade/%'")
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_do_not_queue_behind_a_statement_that_waits_for_a_long_one() {
    let Some(database) = any_database() else { return };
    database.execute(TABLE);
    let mut long = client(&database, "report", "begin; select * from t").await;

    let stop = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let (stop, url) = (Arc::clone(&stop), database.url());
            tokio::spawn(async move {
                let mut reader = PgConnection::connect(&url).await.unwrap();
                let mut waits = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let began = Instant::now();
                    sqlx::query("select count(*) from t").execute(&mut reader).await.unwrap();
                    waits.push(began.elapsed());
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                waits
            })
        })
        .collect();

    let test = TestContext::new("alter");
    let (db, cx) = (target(&database.url()), test.forward());
    let altering = tokio::spawn(async move {
        run(&LockPolicy::default(), &db, &cx, ALTER).await.unwrap();
        Instant::now()
    });
    tokio::time::sleep(Duration::from_secs(4)).await;
    sqlx::raw_sql("commit").execute(&mut long).await.unwrap();
    let freed = Instant::now();
    let done = altering.await.unwrap();
    stop.store(true, Ordering::Relaxed);
    let mut waits = Vec::new();
    for reader in readers {
        waits.extend(reader.await.unwrap());
    }
    waits.sort();
    let longest = waits[waits.len() - 1];
    let p99 = waits[waits.len() * 99 / 100];
    println!("{} reads: p99 {p99:?}, longest {longest:?}; done {:?} after the reader", waits.len(), done - freed);
    // The lock timeout is 50 ms; a busy machine adds its own.
    assert!(longest < Duration::from_millis(500), "{longest:?}");
    assert!(done - freed < Duration::from_secs(1), "{:?}", done - freed);
    assert_eq!(columns(&database), "3");
    let named = test.reported().into_iter().filter(|progress| progress.message.contains("behind pid ")).count();
    assert!(named >= 2, "{:?}", test.reported());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_in_the_way_is_named_in_progress_and_in_the_error() {
    let Some(database) = any_database() else { return };
    database.execute(TABLE);
    let in_the_way = client(
        &database,
        "100% {odd} %s",
        "begin; select * from t where v in ('hunter2', 'it''s hunter3', $x$hunter4$x$)\n and id > 7",
    )
    .await;
    let test = TestContext::new("alter");
    let policy = LockPolicy { budget: Duration::from_millis(600), ..LockPolicy::default() };
    let error = run(&policy, &target(&database.url()), &test.forward(), ALTER).await.unwrap_err();
    assert_eq!(error.class(), Class::Transient);
    let pid = database.text("select pid from pg_stat_activity where application_name like '100%'");
    let message = error.message();
    for part in [
        "altering public.t: no lock in ",
        &format!("pid {pid} (tester 100% {{odd}} %s, idle in transaction, transaction of 0."),
        " s): begin; select * from t where v in ('…', '…', '…') and id > 7",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert!(!format!("{error:?} {:?}", test.reported()).contains("hunter"), "{error:?}");
    let hint = error.hint().unwrap();
    assert!(hint.contains(&format!("pg_terminate_backend({pid})")) && hint.contains("lock_budget"), "{hint}");
    assert!(test.reported().iter().any(|progress| progress.message.contains(&format!("behind pid {pid}"))));
    assert_eq!(columns(&database), "2");
    drop(in_the_way);
}

#[tokio::test(flavor = "multi_thread")]
async fn those_who_only_sit_in_their_transaction_are_ended_if_the_policy_says_so() {
    let Some(database) = any_database() else { return };
    database.execute(TABLE);
    let end = LockPolicy {
        end_idle_in_transaction: Some(Duration::from_millis(700)),
        budget: Duration::from_secs(20),
        ..LockPolicy::default()
    };
    let mut sits = client(&database, "sits", "begin; select * from t").await;
    let began = Instant::now();
    run(&end, &target(&database.url()), &TestContext::new("alter").forward(), ALTER).await.unwrap();
    assert!(began.elapsed() > Duration::from_millis(600), "{:?}", began.elapsed());
    assert!(sqlx::raw_sql("select 1").execute(&mut sits).await.is_err(), "it was ended");

    let mut works = client(&database, "works", "begin; select * from t").await;
    let working =
        tokio::spawn(async move { sqlx::raw_sql("select pg_sleep(2); commit").execute(&mut works).await.map(drop) });
    run(&end, &target(&database.url()), &TestContext::new("alter").forward(), "alter table t drop column w")
        .await
        .unwrap();
    working.await.unwrap().expect("whoever works is left alone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadlock_is_tried_again() {
    let Some(database) = any_database() else { return };
    database.execute("create table a (n int); create table b (n int)");
    let (db, test) = (target(&database.url()), TestContext::new("both"));
    let mut other = client(&database, "other", "set deadlock_timeout = '30s'; begin; lock table b").await;
    let policy = LockPolicy { lock_timeout: Duration::from_secs(10), ..LockPolicy::default() };
    let attempts = Arc::new(AtomicU32::new(0));
    let (cx, counted) = (test.forward(), Arc::clone(&attempts));
    let ours = tokio::spawn(async move {
        let mut session = db.connect(&cx).await?;
        policy
            .transaction(&cx, &mut session, "locking both", move |connection, _| {
                counted.fetch_add(1, Ordering::SeqCst);
                Box::pin(async move {
                    sqlx::raw_sql("lock table a").execute(&mut *connection).await?;
                    sqlx::raw_sql("lock table b").execute(&mut *connection).await?;
                    Ok(())
                })
            })
            .await
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    sqlx::raw_sql("lock table a; commit").execute(&mut other).await.unwrap();
    ours.await.unwrap().unwrap();
    assert_eq!(attempts.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_in_the_middle_of_a_wait_it_returns_at_once_and_leaves_nothing() {
    let Some(database) = any_database() else { return };
    database.execute(TABLE);
    let _long = client(&database, "report", "begin; select * from t").await;
    let waits = LockPolicy::default();
    let patient = LockPolicy { lock_timeout: Duration::from_secs(60), ..LockPolicy::default() };
    for (policy, sql) in [(waits, ALTER), (patient, ALTER), (LockPolicy::default(), "select pg_sleep(60)")] {
        let test = TestContext::new("alter");
        let (db, cx) = (target(&database.url()), test.forward());
        let running = tokio::spawn(async move { run(&policy, &db, &cx, sql).await });
        tokio::time::sleep(Duration::from_millis(700)).await;
        assert_eq!(sessions_of_ours(&database), "1");
        test.cancellation().cancel();
        let began = Instant::now();
        let error = running.await.unwrap().unwrap_err();
        assert!(began.elapsed() < Duration::from_millis(800), "{sql}: {:?}", began.elapsed());
        assert_eq!(error.class(), Class::Transient);
        assert!(error.message().contains("cancelled"), "{error:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(sessions_of_ours(&database), "0", "{sql}");
        assert_eq!(database.text("select count(*) from pg_locks where relation = 't'::regclass and not granted"), "0");
    }
    assert_eq!(columns(&database), "2");
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_on_a_connection_that_fell_silent_it_returns_as_well() {
    let Some(database) = any_database() else { return };
    let network = Forwarder::before(&database).await;
    let test = TestContext::new("sleep");
    let (db, cx) = (target(&network.url(&database)), test.forward());
    let running = tokio::spawn(async move { run(&LockPolicy::default(), &db, &cx, "select pg_sleep(60)").await });
    tokio::time::sleep(Duration::from_millis(500)).await;
    network.fall_silent();
    test.cancellation().cancel();
    let began = Instant::now();
    let error = running.await.unwrap().unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    assert_eq!(error.class(), Class::Unknown, "{error:?}");
    assert!(error.message().contains("connection to the server was lost"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_work_goes_on_when_what_watches_those_in_the_way_is_ended() {
    let Some(database) = any_database() else { return };
    database.execute(TABLE);
    let mut long = client(&database, "report", "begin; select * from t").await;
    let test = TestContext::new("alter");
    let (db, cx) = (target(&database.url()), test.forward());
    let altering = tokio::spawn(async move { run(&LockPolicy::default(), &db, &cx, ALTER).await });
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_millis(300)).await;
        database.execute("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'upgrade' and datname = current_database()");
    }
    sqlx::raw_sql("commit").execute(&mut long).await.unwrap();
    altering.await.unwrap().unwrap();
    assert_eq!(columns(&database), "3");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vacuum_that_the_server_began_by_itself_steps_aside() {
    let slow = [
        ("autovacuum_naptime", "1s"),
        ("autovacuum_vacuum_cost_delay", "100ms"),
        ("autovacuum_vacuum_cost_limit", "1"),
        ("fsync", "off"),
    ];
    let Some(server) = own(Version::V15, &slow) else { return };
    let database = server.database();
    database.execute(
        "create table t (id int primary key, v text) with (autovacuum_vacuum_threshold = 10, autovacuum_vacuum_scale_factor = 0, autovacuum_analyze_threshold = 1000000000); \
         insert into t select n, repeat('x', 200) from generate_series(1, 20000) n; update t set v = v || 'y'",
    );
    let running = "select count(*) from pg_stat_progress_vacuum where relid = 't'::regclass";
    let began = Instant::now();
    while database.text(running) == "0" {
        assert!(began.elapsed() < Duration::from_secs(60), "no vacuum began");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let began = Instant::now();
    run(&LockPolicy::default(), &target(&database.url()), &TestContext::new("alter").forward(), ALTER).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert_eq!(columns(&database), "3");
}
