//! `postgres.backfill` beside writers, under a budget, and through the death of sessions and servers.

#![cfg(test)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use upgrade_core::error::{Class, StepError};
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::testkit::TestContext;
use upgrade_postgres::session::application_name;
use upgrade_postgres::steps::{Backfill, BackfillUndo};
use upgrade_testbed::postgres::{Database, Server, Version, own};

use crate::backfill::build;
use crate::world;

/// Draws numbers that look random and are the same in every run.
struct Draw(u64);

impl Draw {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

async fn undo_of(step: &Backfill, cx: &TestContext) -> BackfillUndo {
    match step.prepare(&cx.forward()).await.unwrap() {
        Prepared::Change { undo, .. } => undo,
        other => panic!("{other:?}"),
    }
}

const ITEMS: &str = "create table items (id int primary key, net int not null, gross int, seen int not null default 0); \
    insert into items (id, net) select 2 * n, n from generate_series(1, 30000) n; analyze items";

/// Which rows a writer changes, and how.
const WRITES: [&str; 5] = [
    "update items set seen = seen + 1 where id = ID",
    "update items set net = net + 1, gross = case when gross is not null then (net + 1) * 2 end where id = ID",
    "delete from items where id = ID",
    "insert into items (id, net) values (ID + 1, 5) on conflict do nothing",
    "begin; update items set seen = seen + 1 where id = ID; update items set seen = seen + 1 where id = ID + 600; commit",
];

/// Writes to random rows until it is told to stop; each row's changes are also noted in `log`.
fn writer(database: &Database, seed: u64, stop: &Arc<AtomicBool>) -> std::thread::JoinHandle<u64> {
    let (url, stop) = (database.url(), stop.clone());
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            use sqlx::Connection as _;
            let mut connection = sqlx::PgConnection::connect(&url).await.unwrap();
            let (mut draw, mut done) = (Draw(seed), 0);
            while !stop.load(Ordering::SeqCst) {
                let id = (2 * draw.below(30_000)).to_string();
                let write = WRITES[usize::try_from(draw.below(5)).unwrap()].replace("ID", &id);
                match sqlx::raw_sql(sqlx::AssertSqlSafe(write)).execute(&mut connection).await {
                    Ok(_) => done += 1,
                    // A deadlock must not be one with the backfill, which lets others pass.
                    Err(error) => {
                        sqlx::raw_sql("rollback").execute(&mut connection).await.unwrap();
                        assert!(error.to_string().contains("deadlock"), "{error}");
                    }
                }
            }
            done
        })
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn beside_writers_no_row_is_missed_and_no_write_is_lost_in_either_direction() {
    for version in [Version::V15, Version::V18] {
        let Some(database) = world::database(version) else { continue };
        database.execute(ITEMS);
        // Every write that commits leaves its trace, by a trigger that the backfill's own updates pass by.
        database.execute(
            "create table log (id int, kind text, net int); create index on log (id); \
             create function note() returns trigger language plpgsql as $$ begin \
               if current_setting('application_name') not like 'upgrade/%' then \
                 insert into log values (coalesce(new.id, old.id), tg_op, new.net); end if; return null; end $$; \
             create trigger note after insert or update or delete on items for each row execute function note()",
        );
        let step = build(
            &database,
            json!({ "table": "items", "set": { "gross": "net * 2" }, "where": "gross is null", "batch_time": "20ms", "max_batch_rows": 400 }),
        )
        .unwrap();
        let cx = TestContext::new("fill");
        let undo = undo_of(&step, &cx).await;
        let stop = Arc::new(AtomicBool::new(false));
        let writers: Vec<_> = (0..3).map(|seed| writer(&database, seed, &stop)).collect();
        // The writers end before the walk does, or new rows would go on to be missing.
        let ending = {
            let stop = stop.clone();
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(1500));
                stop.store(true, Ordering::SeqCst);
            })
        };
        let mut applied = step.apply(&cx.forward(), &undo).await;
        while applied
            .as_ref()
            .is_err_and(|error| error.message().contains("keep coming") || error.class() == Class::Transient)
        {
            applied = step.apply(&cx.forward(), &undo).await;
        }
        applied.unwrap();
        ending.join().unwrap();
        let done: u64 = writers.into_iter().map(|writer| writer.join().unwrap()).sum();
        assert!(done > 100, "the writers wrote: {done}");
        let missed = step.apply(&cx.forward(), &undo).await.unwrap();
        assert_eq!(database.text("select count(*) from items where gross is null"), "0", "{missed:?}");
        let wrong = "select count(*) from items where gross is distinct from net * 2";
        assert_eq!(database.text(wrong), "0");
        // What the writers did is all there: counted by the trigger, in the same transactions.
        let lost = "select count(*) from items i where seen + (i.net - coalesce(nullif(i.id % 2, 1) + i.id / 2, 5)) \
            <> (select count(*) from log l where l.id = i.id and kind = 'UPDATE' \
                and not exists (select from log d where d.id = i.id and d.kind = 'DELETE'))";
        let again = "select count(*) from log where kind = 'DELETE'";
        assert_eq!(database.text(lost), "0", "{}", database.text(again));
        let deleted = "select count(*) from items i join log l using (id) where l.kind = 'DELETE' and i.id % 2 = 0";
        assert_eq!(database.text(deleted), "0", "a row that was deleted came back");
        // The way back, beside writers again.
        let before = database.text("select count(*) from items");
        let stop = Arc::new(AtomicBool::new(false));
        let writers: Vec<_> = (3..5).map(|seed| writer(&database, seed, &stop)).collect();
        step.rollback(&cx.back(), &undo, None).await.unwrap();
        stop.store(true, Ordering::SeqCst);
        writers.into_iter().for_each(|writer| assert!(writer.join().unwrap() > 0));
        assert_eq!(database.text(lost), "0", "of {before} rows");
        // NULL again, or what a writer made of it: twice the net, which was noted with it.
        let left = "select count(*) from items where gross is not null and gross <> net * 2";
        assert_eq!(database.text(left), "0");
        let foreign =
            "select count(*) from items i where gross is not null and not exists (select from log l where l.id = i.id)";
        assert_eq!(database.text(foreign), "0", "a row that nobody else touched was not put back");
        assert_eq!(database.text("select to_regnamespace('_upgrade') is null"), "t");
    }
}

/// Ends sessions of the step again and again, at times drawn at random.
fn killer(database: &Database, application: String, seed: u64, stop: &Arc<AtomicBool>) -> std::thread::JoinHandle<u64> {
    let (url, stop) = (database.url(), stop.clone());
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            use sqlx::Connection as _;
            let mut connection = sqlx::PgConnection::connect(&url).await.unwrap();
            let (mut draw, mut killed) = (Draw(seed), 0);
            while !stop.load(Ordering::SeqCst) {
                tokio::time::sleep(Duration::from_millis(5 + draw.below(120))).await;
                let victim: Option<bool> = sqlx::query_scalar(
                    "select pg_terminate_backend(pid) from pg_stat_activity where application_name = $1 \
                     order by md5(pid::text || $2) limit 1",
                )
                .bind(&application)
                .bind(draw.below(1000).to_string())
                .fetch_optional(&mut connection)
                .await
                .unwrap();
                killed += u64::from(victim == Some(true));
            }
            killed
        })
    })
}

const COUNTERS: &str = "create table counters (id int primary key, n int not null, pad text not null default repeat('x', 60)); \
    insert into counters select i, i from generate_series(1, ROWS) i; analyze counters";

fn counting() -> Value {
    json!({ "table": "counters", "set": { "n": "n + 1" }, "once": true, "batch_time": "8ms", "max_batch_rows": 100, "workers": 2 })
}

fn survivable(error: &StepError) -> bool {
    matches!(error.class(), Class::Transient | Class::Unknown)
}

/// Counts every row up by one while sessions are ended, then back: a row done twice, or not, shows.
async fn sessions_are_ended(rows: u64, kills_at_least: u64) {
    let Some(database) = world::any_database() else { return };
    database.execute(&COUNTERS.replace("ROWS", &rows.to_string()));
    let before = database.contents();
    let step = build(&database, counting()).unwrap();
    let (mut killed, mut rounds) = (0, 0);
    while killed < kills_at_least || rounds < 2 {
        rounds += 1;
        let cx = TestContext::new("count");
        let undo = undo_of(&step, &cx).await;
        let stop = Arc::new(AtomicBool::new(false));
        let killing = killer(&database, application_name(&cx.forward().marker()), rounds, &stop);
        // Every other round is broken off in the middle and rolled back from there.
        let attempts = if rounds % 2 == 0 { 2 } else { u32::MAX };
        let mut done = false;
        for _ in 0..attempts {
            match step.apply(&cx.forward(), &undo).await {
                Ok(output) => {
                    assert_eq!(output.rows, rows);
                    done = true;
                    break;
                }
                Err(error) => assert!(survivable(&error), "{error:?}"),
            }
        }
        if done {
            let wrong = database.text("select count(*) from counters where n <> id + 1");
            assert_eq!(wrong, "0", "lost or doubled after {rounds} rounds");
        }
        while let Err(error) = step.rollback(&cx.back(), &undo, None).await {
            assert!(survivable(&error), "{error:?}");
        }
        stop.store(true, Ordering::SeqCst);
        killed += killing.join().unwrap();
        assert_eq!(database.text("select count(*) from counters where n <> id"), "0");
    }
    assert_eq!(before, database.contents(), "after {rounds} rounds and {killed} ended sessions");
    println!("{killed} sessions ended in {rounds} rounds");
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_are_ended_lose_and_double_nothing() {
    sessions_are_ended(4_000, 8).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a campaign"]
async fn campaign_sessions_that_are_ended_lose_and_double_nothing() {
    sessions_are_ended(20_000, 60).await;
}

/// Stops the whole server as a crash would, again and again, with real syncs.
async fn the_server_crashes(rows: u64, crashes: u32) {
    let Some(server) = own(Version::V15, &[("fsync", "on"), ("wal_writer_delay", "200ms")]) else { return };
    let server: Arc<Server> = Arc::new(server);
    let database = server.database();
    database.execute(&COUNTERS.replace("ROWS", &rows.to_string()));
    let before = database.contents();
    let mut with = counting();
    with["max_rows_per_second"] = 4000.into();
    let step = build(&database, with).unwrap();
    let (mut crashed, mut draw) = (0, Draw(7));
    while crashed < crashes {
        let cx = TestContext::new("count");
        let undo = undo_of(&step, &cx).await;
        for forward in [true, false] {
            loop {
                let crash = crashed < crashes;
                let wait = Duration::from_millis(30 + draw.below(900));
                let server = server.clone();
                let (told, tell) = std::sync::mpsc::channel::<()>();
                let crashing = std::thread::spawn(move || {
                    if crash && tell.recv_timeout(wait).is_err() {
                        server.stop_immediate();
                        server.start();
                        return 1;
                    }
                    0
                });
                let done = if forward {
                    step.apply(&cx.forward(), &undo).await.map(|output| assert_eq!(output.rows, rows))
                } else {
                    step.rollback(&cx.back(), &undo, None).await
                };
                let _ = told.send(());
                crashed += crashing.join().unwrap();
                match done {
                    Ok(()) => break,
                    Err(error) => assert!(survivable(&error), "{error:?}"),
                }
            }
            let wrong = format!("select count(*) from counters where n <> id + {}", i32::from(forward));
            assert_eq!(database.text(&wrong), "0", "lost or doubled after {crashed} crashes, forward: {forward}");
        }
    }
    assert_eq!(before, database.contents());
    println!("{crashed} crashes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_crashes_loses_and_doubles_nothing() {
    the_server_crashes(3_000, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a campaign"]
async fn campaign_a_server_that_crashes_loses_and_doubles_nothing() {
    the_server_crashes(6_000, 15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_not_committed_when_its_place_is_passed_is_not_missed() {
    let Some(database) = world::any_database() else { return };
    database.execute(ITEMS);
    use sqlx::Connection as _;
    let mut slow = sqlx::PgConnection::connect(&database.url()).await.unwrap();
    sqlx::raw_sql("begin; insert into items (id, net) values (1, 7)").execute(&mut slow).await.unwrap();
    let step =
        build(&database, json!({ "table": "items", "set": { "gross": "net * 2" }, "where": "gross is null" })).unwrap();
    let cx = TestContext::new("fill");
    let undo = undo_of(&step, &cx).await;
    let committing = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(2)).await;
        sqlx::raw_sql("commit").execute(&mut slow).await.unwrap();
    });
    assert_eq!(step.apply(&cx.forward(), &undo).await.unwrap().rows, 30_001);
    committing.await.unwrap();
    assert_eq!(database.text("select gross from items where id = 1"), "14");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_paced_paused_and_cancelled_between_batches() {
    let Some(database) = world::any_database() else { return };
    database.execute(ITEMS);
    let with = json!({ "table": "items", "set": { "gross": "net * 2" }, "where": "gross is null", "max_rows_per_second": 3000 });
    let step = Arc::new(build(&database, with).unwrap());
    let mut cx = TestContext::new("fill");
    let undo = undo_of(&step, &cx).await;
    let filled = || database.text("select count(*) from items where gross is not null").parse::<u64>().unwrap();
    let began = Instant::now();
    let running = {
        let (step, cx, undo) = (step.clone(), cx.forward(), undo.clone());
        tokio::spawn(async move { step.apply(&cx, &undo).await })
    };
    while filled() < 6000 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (rows, time) = (filled() as f64, began.elapsed().as_secs_f64());
    assert!(rows / time < 4500.0, "{rows} rows in {time} s");
    // The operator's pause, and its end.
    let marker = cx.forward().marker();
    database
        .execute(&format!("insert into _upgrade.ledger (marker, item, value) values ('{marker}', 'pause', 'true')"));
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let paused = filled();
    tokio::time::sleep(Duration::from_millis(1000)).await;
    assert_eq!(filled(), paused);
    assert!(
        cx.reported().iter().any(|progress| progress.message.contains("paused by the item")),
        "{:?}",
        cx.reported()
    );
    database.execute("delete from _upgrade.ledger where item = 'pause'");
    let deadline = Instant::now() + Duration::from_secs(20);
    while filled() == paused && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(filled() > paused);
    cx.cancellation().cancel();
    let error = running.await.unwrap().unwrap_err();
    assert!(error.message().contains("cancelled") && error.class() == Class::Transient, "{error:?}");
    let at = filled();
    assert!(at < 30_000);
    cx.renew();
    let fast =
        build(&database, json!({ "table": "items", "set": { "gross": "net * 2" }, "where": "gross is null" })).unwrap();
    assert_eq!(fast.apply(&cx.forward(), &undo).await.unwrap().rows, 30_000, "it goes on from {at}");
    assert!(cx.reported().iter().all(|progress| progress.total.is_none_or(|total| progress.done <= total)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_locked_row_holds_up_nobody_and_is_named_when_it_stays_locked() {
    let Some(server) = upgrade_testbed::postgres::shared(Version::V15) else { return };
    let database = server.database();
    database.execute(ITEMS);
    use sqlx::Connection as _;
    let mut holder = sqlx::PgConnection::connect(&database.url()).await.unwrap();
    sqlx::raw_sql("begin; update items set seen = 1 where id = 20000").execute(&mut holder).await.unwrap();
    let target = world::target_with(&database.url(), |config| config.lock_budget = Some("1s".parse().unwrap()));
    let config = serde_json::from_value(
        json!({ "target": "db", "table": "items", "set": { "gross": "net * 2" }, "where": "gross is null" }),
    );
    let step = Backfill::from_config(config.unwrap(), &world::build_context_with(target)).unwrap();
    let cx = TestContext::new("fill");
    let undo = undo_of(&step, &cx).await;
    let error = step.apply(&cx.forward(), &undo).await.unwrap_err();
    assert!(error.message().contains("no lock") && error.message().contains("update items set seen"), "{error:?}");
    assert!(error.hint().unwrap().contains("pg_terminate_backend"), "{error:?}");
    let filled: u64 = database.text("select count(*) from items where gross is not null").parse().unwrap();
    assert!(filled > 5000, "what came before the locked row is done: {filled}");
    sqlx::raw_sql("commit").execute(&mut holder).await.unwrap();
    assert_eq!(step.apply(&cx.forward(), &undo).await.unwrap().rows, 30_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_budget_that_cannot_be_held_slows_it_down_and_one_that_can_does_not() {
    let Some(database) = world::any_database() else { return };
    database.execute(ITEMS);
    let fill = |p95: &str, probe: &str| {
        build(
            &database,
            json!({ "table": "items", "set": { "gross": "net * 2" }, "where": "gross is null", "max_batch_rows": 500,
            "budget": { "probe": probe, "p95": p95, "interval": "2ms" } }),
        )
        .unwrap()
    };
    let cx = TestContext::new("fill");
    let easy = fill("5s", "select 1");
    let undo = undo_of(&easy, &cx).await;
    easy.apply(&cx.forward(), &undo).await.unwrap();
    easy.rollback(&cx.back(), &undo, None).await.unwrap();
    let hard = fill("1ms", "select pg_sleep(0.01)");
    let mut cx = TestContext::new("fill");
    let undo = undo_of(&hard, &cx).await;
    let token = cx.cancellation().clone();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(3)).await;
        token.cancel();
    });
    let error = hard.apply(&cx.forward(), &undo).await.expect_err("a budget that is always exceeded slows it down");
    assert!(error.message().contains("cancelled"), "{error:?}");
    let said = cx.reported();
    assert!(said.iter().any(|progress| progress.message.contains("held to")), "{said:?}");
    cx.renew();
    hard.settle(&cx.forward(), &undo).await.unwrap();
    hard.rollback(&cx.back(), &undo, None).await.unwrap();
    assert_eq!(database.text("select count(*) from items where gross is not null"), "0");
}
