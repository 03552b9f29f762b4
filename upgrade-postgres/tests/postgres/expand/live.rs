//! Writers through both shapes, before, while and after a column has two of them; none of what they
//! wrote is lost, whatever becomes of the change and of the sessions that make it.
//!
//! Each writer has rows of its own and knows what it wrote last; some rows are counted up by all of
//! them, through either shape.

#![cfg(test)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::task::JoinSet;
use upgrade_core::step::Step;
use upgrade_testbed::postgres::{Database, Version};

use super::{Run, nothing_left};
use crate::world::database;

const ROWS: i32 = 20_000;
const WRITERS: i32 = 4;
const COUNTERS: i32 = 4;

pub(super) type Model = BTreeMap<i32, Option<i64>>;

/// Describes a change by how its two shapes spell one value.
#[derive(Clone, Copy)]
pub(super) struct Kind {
    pub(super) change: fn() -> Value,
    /// The table and the column in the new shape.
    table: &'static str,
    column: &'static str,
    /// Spells a value in the new shape.
    spelled: fn(Option<i64>) -> String,
    /// One more of it, in the new shape.
    one: &'static str,
    /// Reads the value in the new shape, in terms of the old one.
    pub(super) read: &'static str,
    /// Whether the new shape takes the old one's name, so that old code must be gone by commit.
    in_place: bool,
    /// The join of both shapes, where they are to be seen side by side.
    side_by_side: &'static str,
}

fn plain(value: Option<i64>) -> String {
    value.map_or("null".into(), |value| value.to_string())
}

fn hundredths(value: Option<i64>) -> String {
    value.map_or("null".into(), |value| format!("({value} / 100.0)"))
}

const RENAMED: Kind = Kind {
    change: || json!({ "rename": { "column": "amount", "to": "sum" }, "batch": 2 }),
    table: "accounts",
    column: "sum",
    spelled: plain,
    one: "1",
    read: "sum::int8",
    in_place: false,
    side_by_side: "select amount::int8 as o, sum::int8 as n from accounts",
};

pub(super) const RETYPED: Kind = Kind {
    change: || {
        json!({ "retype": { "column": "amount", "type": "numeric(12,2)", "up": "amount / 100.0",
                            "down": "(exact * 100)::int", "as": "exact" }, "batch": 2 })
    },
    table: "accounts",
    column: "exact",
    spelled: hundredths,
    one: "0.01",
    read: "(exact * 100)::int8",
    in_place: false,
    side_by_side: "select amount::int8 as o, (exact * 100)::int8 as n from accounts",
};

const RETYPED_IN_A_VIEW: Kind = Kind {
    change: || {
        json!({ "retype": { "column": "amount", "type": "numeric(12,2)", "up": "amount / 100.0",
                            "down": "(amount * 100)::int" }, "schema": "v2", "batch": 2 })
    },
    table: "v2.accounts",
    column: "amount",
    spelled: hundredths,
    one: "0.01",
    read: "(amount * 100)::int8",
    in_place: true,
    side_by_side: "select a.amount::int8 as o, (b.amount * 100)::int8 as n from accounts a join v2.accounts b using (id)",
};

const NOT_NULL: Kind = Kind {
    change: || json!({ "not_null": { "column": "amount", "up": "-1", "down": "nullif(sure, -1)", "as": "sure" }, "batch": 2 }),
    table: "accounts",
    column: "sure",
    spelled: |value| value.unwrap_or(-1).to_string(),
    one: "1",
    read: "nullif(sure, -1)::int8",
    in_place: false,
    side_by_side: "select amount::int8 as o, nullif(sure, -1)::int8 as n from accounts",
};

/// Draws numbers that look random and are the same every time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// What all writers share.
#[derive(Default)]
pub(super) struct Traffic {
    /// How many rows there are to begin with.
    rows: i32,
    ends: AtomicBool,
    /// Old code does not run any more.
    only_new: AtomicBool,
    counted: [AtomicI64; COUNTERS as usize],
    through_the_old: AtomicU32,
    through_the_new: AtomicU32,
    slowest: AtomicU32,
}

impl Traffic {
    pub(super) fn of(rows: i32) -> Self {
        Self { rows, ..Self::default() }
    }
}

async fn connect(url: &str, path: &str) -> PgConnection {
    let mut connection = PgConnection::connect(url).await.unwrap();
    sqlx::query(AssertSqlSafe(format!("set search_path to {path}"))).execute(&mut connection).await.unwrap();
    connection
}

/// Makes one write; says false where there is no such shape at the time.
async fn write(connection: &mut PgConnection, sql: String, traffic: &Traffic) -> Option<u64> {
    let began = Instant::now();
    let written = sqlx::query(AssertSqlSafe(sql.clone())).persistent(false).execute(connection).await;
    let took = u32::try_from(began.elapsed().as_millis()).unwrap();
    traffic.slowest.fetch_max(took, Ordering::Relaxed);
    match written {
        Ok(written) => Some(written.rows_affected()),
        Err(error) => {
            let code = error.as_database_error().and_then(|e| e.code()).map(|code| code.into_owned());
            assert!(matches!(code.as_deref(), Some("42703" | "42P01")), "{error}: {sql}");
            None
        }
    }
}

async fn writer(url: String, kind: Kind, number: i32, mut model: Model, traffic: Arc<Traffic>, seed: u64) -> Model {
    let mut old = connect(&url, "public").await;
    let mut new = connect(&url, "v2, public").await;
    let mut dice = Dice(seed);
    let Kind { table, column, .. } = kind;
    while !traffic.ends.load(Ordering::Relaxed) {
        let through_the_new = dice.below(2) == 0 || traffic.only_new.load(Ordering::Relaxed);
        let connection = if through_the_new { &mut new } else { &mut old };
        let (table, column) = if through_the_new { (table, column) } else { ("accounts", "amount") };
        let value = (dice.below(6) > 0).then(|| i64::try_from(dice.below(1_000_000)).unwrap());
        let spelled = if through_the_new { (kind.spelled)(value) } else { plain(value) };
        let id =
            number + WRITERS * i32::try_from(dice.below(u64::try_from(traffic.rows / WRITERS + 200).unwrap())).unwrap();
        let there = model.contains_key(&id);
        let done = match dice.below(10) {
            0 => {
                let counter = i32::try_from(dice.below(u64::try_from(COUNTERS).unwrap())).unwrap();
                let one = if through_the_new { kind.one } else { "1" };
                // A row that is not filled yet has no value that the new shape could count up.
                let sql = format!(
                    "update {table} set {column} = {column} + {one} where id = {} and {column} is not null \
                     and {column} >= 0",
                    -1 - counter
                );
                let done = write(connection, sql, &traffic).await;
                let by = i64::try_from(done.unwrap_or(0)).unwrap();
                traffic.counted[usize::try_from(counter).unwrap()].fetch_add(by, Ordering::Relaxed);
                done
            }
            1 | 2 if there => {
                let done = write(connection, format!("delete from {table} where id = {id}"), &traffic).await;
                if done.is_some() {
                    assert_eq!(done, Some(1), "row {id} was gone");
                    model.remove(&id);
                }
                done
            }
            3 if table == "accounts" && column != "amount" => {
                // Both at once, and they contradict each other: what the new shape says holds.
                let sql = if there {
                    format!("update accounts set amount = 1234567, {column} = {spelled} where id = {id}")
                } else if value.is_some() {
                    format!("insert into accounts (id, amount, {column}) values ({id}, 1234567, {spelled})")
                } else {
                    continue;
                };
                // Equal to what was there, it is not written through the new shape at all.
                let same = there && model[&id] == value;
                if same {
                    continue;
                }
                let done = write(connection, sql, &traffic).await;
                if done.is_some() {
                    model.insert(id, value);
                }
                done
            }
            _ => {
                let sql = if there {
                    format!("update {table} set {column} = {spelled} where id = {id}")
                } else {
                    format!("insert into {table} (id, {column}) values ({id}, {spelled})")
                };
                let done = write(connection, sql, &traffic).await;
                if done.is_some() {
                    assert_eq!(done, Some(1), "row {id}");
                    model.insert(id, value);
                }
                done
            }
        };
        if done.is_some() {
            let count = if through_the_new { &traffic.through_the_new } else { &traffic.through_the_old };
            count.fetch_add(1, Ordering::Relaxed);
        }
        // Writers that never rest would leave nothing of two processors to what is being tested.
        tokio::time::sleep(Duration::from_micros(500)).await;
    }
    old.close().await.unwrap();
    new.close().await.unwrap();
    model
}

pub(super) struct Writers {
    traffic: Arc<Traffic>,
    tasks: JoinSet<(i32, Model)>,
}

impl Writers {
    pub(super) fn start(database: &Database, kind: Kind, models: Vec<Model>, traffic: Arc<Traffic>, seed: u64) -> Self {
        traffic.ends.store(false, Ordering::Relaxed);
        let mut tasks = JoinSet::new();
        for (number, model) in (0..).zip(models) {
            let (url, traffic) = (database.url(), traffic.clone());
            let seed = seed + u64::try_from(number).unwrap();
            tasks.spawn(async move { (number, writer(url, kind, number, model, traffic, seed).await) });
        }
        Self { traffic, tasks }
    }

    pub(super) async fn stop(self) -> Vec<Model> {
        self.traffic.ends.store(true, Ordering::Relaxed);
        let mut models = self.tasks.join_all().await;
        models.sort_by_key(|(number, _)| *number);
        models.into_iter().map(|(_, model)| model).collect()
    }
}

/// Names the rows that are not as the writers know them.
pub(super) async fn wrong(url: &str, read: &str, models: &[Model], traffic: &Traffic) -> Vec<String> {
    let mut connection = PgConnection::connect(url).await.unwrap();
    let rows: Vec<(i32, Option<i64>)> = sqlx::query_as(AssertSqlSafe(format!("select id, {read} from accounts")))
        .fetch_all(&mut connection)
        .await
        .unwrap();
    let mut expected: Model = models.iter().flatten().map(|(id, value)| (*id, *value)).collect();
    for (number, counted) in (0..).zip(&traffic.counted) {
        expected.insert(-1 - number, Some(counted.load(Ordering::Relaxed)));
    }
    let found: Model = rows.into_iter().collect();
    connection.close().await.unwrap();
    expected
        .iter()
        .filter(|(id, value)| found.get(*id) != Some(*value))
        .map(|(id, value)| format!("{id}: {value:?}, found {:?}", found.get(id)))
        .chain(found.keys().filter(|id| !expected.contains_key(*id)).map(|id| format!("{id}: deleted, and there")))
        .take(10)
        .collect()
}

/// Compares every row with what the writers know.
async fn compare(url: &str, read: &str, models: &[Model], traffic: &Traffic) {
    let wrong = wrong(url, read, models, traffic).await;
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Asks, while writers write, that every row says the same in both shapes.
async fn in_step(url: &str, kind: Kind) {
    let mut connection = PgConnection::connect(url).await.unwrap();
    for _ in 0..5 {
        let wrong: i64 = sqlx::query_scalar(AssertSqlSafe(format!(
            "select count(*) from ({}) as both_shapes where o is distinct from n",
            kind.side_by_side
        )))
        .fetch_one(&mut connection)
        .await
        .unwrap();
        assert_eq!(wrong, 0);
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
    connection.close().await.unwrap();
}

pub(super) fn setup(database: &Database, rows: i32) -> Vec<Model> {
    database.execute(&format!(
        "create table accounts (id int primary key, amount int, note text); \
         insert into accounts select n, nullif(n % 1000, 7), repeat('x', 50) from generate_series(0, {}) n; \
         insert into accounts select -n, 0 from generate_series(1, {COUNTERS}) n; \
         create index on accounts (amount) where amount > 500;",
        rows - 1
    ));
    let mut models = vec![Model::new(); usize::try_from(WRITERS).unwrap()];
    for id in 0..rows {
        let value = Some(i64::from(id % 1000)).filter(|value| *value != 7);
        models[usize::try_from(id % WRITERS).unwrap()].insert(id, value);
    }
    models
}

/// Lets sessions of upgrades on this database end at random instants.
async fn terminate(url: String, ends: Arc<AtomicBool>, kills: Arc<AtomicU32>) {
    let mut connection = PgConnection::connect(&url).await.unwrap();
    let mut dice = Dice(7);
    while !ends.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(20 + dice.below(180))).await;
        let killed: i64 = sqlx::query_scalar(
            "select count(*) filter (where pg_terminate_backend(pid)) from pg_stat_activity \
             where datname = current_database() and application_name like 'upgrade/%'",
        )
        .fetch_one(&mut connection)
        .await
        .unwrap();
        kills.fetch_add(u32::try_from(killed).unwrap(), Ordering::Relaxed);
    }
    connection.close().await.unwrap();
}

/// Start, rollback, start, complete, under writers through both shapes.
async fn live(kind: Kind, version: Version, at_least_killed: u32) {
    let Some(database) = database(version) else { return };
    let mut models = setup(&database, ROWS);
    let (url, traffic) = (database.url(), Arc::new(Traffic::of(ROWS)));
    let (ends, kills) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let terminating = (at_least_killed > 0).then(|| tokio::spawn(terminate(url.clone(), ends.clone(), kills.clone())));
    let before = database.schema();
    let mut round = 0;
    loop {
        round += 1;
        let last = round > 1 && kills.load(Ordering::Relaxed) >= at_least_killed;
        let mut writers = Writers::start(&database, kind, models, traffic.clone(), round * 1000);
        let mut run = Run::new(&database, "accounts", &(kind.change)());
        while run.prepare().await.is_err() {}
        let output = run.until(async |run| run.step.apply(&run.test.forward(), run.undo()).await).await;
        assert_eq!(output.column, kind.column);
        in_step(&url, kind).await;
        if last && kind.in_place {
            // The new code names no schema: that what it sees is a view, and then is not, it never notices.
            let models = writers.stop().await;
            traffic.only_new.store(true, Ordering::Relaxed);
            let kind = Kind { table: "accounts", ..kind };
            writers = Writers::start(&database, kind, models, traffic.clone(), 77_000);
        }
        if last {
            run.until(Run::commit).await;
            tokio::time::sleep(Duration::from_millis(200)).await;
            run.until(Run::commit).await;
        } else {
            run.until(Run::rollback).await;
            run.until(Run::rollback).await;
        }
        models = writers.stop().await;
        if last {
            let read = kind.read;
            compare(&url, read, &models, &traffic).await;
            break;
        }
        compare(&url, "amount::int8", &models, &traffic).await;
        assert_eq!(database.schema(), before);
    }
    ends.store(true, Ordering::Relaxed);
    if let Some(terminating) = terminating {
        terminating.await.unwrap();
    }
    nothing_left(&database);
    let (old, new) = (&traffic.through_the_old, &traffic.through_the_new);
    println!(
        "{round} rounds, {} writes through the old shape, {} through the new; the slowest took {} ms; {} sessions ended",
        old.load(Ordering::Relaxed),
        new.load(Ordering::Relaxed),
        traffic.slowest.load(Ordering::Relaxed),
        kills.load(Ordering::Relaxed)
    );
    assert!(new.load(Ordering::Relaxed) > 50 && old.load(Ordering::Relaxed) > 50);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_write_is_lost_while_a_column_is_renamed() {
    live(RENAMED, Version::V15, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_write_is_lost_while_a_column_is_retyped() {
    live(RETYPED, Version::V15, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_write_is_lost_while_a_column_is_retyped_in_a_view() {
    live(RETYPED_IN_A_VIEW, Version::V18, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_write_is_lost_while_null_is_forbidden() {
    live(NOT_NULL, Version::V16, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_write_is_lost_when_sessions_end_at_any_instant() {
    live(RETYPED, Version::V15, 20).await;
}
