//! `postgres.index` beside live traffic, behind long transactions, and where it cannot be built.

#![cfg(test)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use upgrade_core::context::OnConflict;
use upgrade_core::error::{Class, StepError};
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::testkit::TestContext;
use upgrade_core::units::Span;
use upgrade_postgres::steps::{Index, IndexConfig, IndexUndo};
use upgrade_testbed::postgres::{Database, Version};

use crate::traffic::{Writers, connect, run};
use crate::world;

const ORDERS: &str = "create table orders (id int primary key, number int, note text); \
    insert into orders select n, n, 'note ' || n from generate_series(1, 1000) n;";

fn orders() -> Option<Database> {
    let database = world::any_database()?;
    database.execute(ORDERS);
    Some(database)
}

fn index(database: &Database, with: Value) -> Index {
    index_on(world::target(&database.url()), with)
}

fn index_on(target: upgrade_postgres::Database, mut with: Value) -> Index {
    with["target"] = "db".into();
    let config: IndexConfig = serde_json::from_value(with).unwrap();
    Index::from_config(config, &world::build_context_with(target)).unwrap()
}

fn by_number() -> Value {
    json!({ "table": "orders", "name": "orders_number", "columns": ["number"] })
}

/// Lists the indexes of `orders` beside its primary key.
fn there(database: &Database) -> String {
    database.text(
        "select format('%s %s %s', c.relname, i.indisvalid, pg_get_indexdef(c.oid)) from pg_index i \
         join pg_class c on c.oid = i.indexrelid where i.indrelid = 'orders'::regclass and not i.indisprimary order by 1",
    )
}

const NUMBER: &str = "orders_number t CREATE INDEX orders_number ON public.orders USING btree (number)";

async fn undo(step: &Index, test: &TestContext) -> IndexUndo {
    match step.prepare(&test.forward()).await.unwrap() {
        Prepared::Change { undo, .. } => undo,
        other => panic!("{other:?}"),
    }
}

async fn refused(step: &Index) -> StepError {
    step.prepare(&TestContext::new("index").forward()).await.unwrap_err()
}

/// Waits until a build is under way and has left its unfinished index behind.
async fn until_building(database: &Database) {
    let began = Instant::now();
    while database.text("select count(*) from pg_index where not indisvalid") == "0" {
        assert!(began.elapsed() < Duration::from_secs(30), "no build began");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn an_equal_valid_index_leaves_nothing_to_do() {
    let Some(database) = orders() else { return };
    let spelled = json!({ "table": "orders", "name": "odd \"Name\"", "unique": true,
        "columns": [{ "expression": "lower(note)", "order": "desc" }, { "column": "number", "nulls": "first" }],
        "include": ["id"], "where": "number > 5 and note is not null", "parameters": { "fillfactor": 70 } });
    let (step, test) = (index(&database, spelled), TestContext::new("index"));
    let found = undo(&step, &test).await;
    let output = step.apply(&test.forward(), &found).await.unwrap();
    assert!(output.bytes > 0 && output.definition.unwrap().contains("lower(note) DESC"));
    step.commit(&test.commit(), &found).await.unwrap();
    let before = there(&database);
    assert!(before.starts_with("odd \"Name\" t CREATE UNIQUE INDEX"), "{before}");
    // Spelled in another way, it is the same to the server.
    let prepared = step.prepare(&TestContext::new("again").forward()).await.unwrap();
    assert!(matches!(prepared, Prepared::Unchanged { .. }), "{prepared:?}");
    assert_eq!(there(&database), before);
}

#[tokio::test]
async fn an_index_of_another_definition_is_left_alone_or_replaced_and_put_back() {
    let Some(database) = orders() else { return };
    database.execute("create index orders_number on orders (note)");
    let before = there(&database);
    let step = index(&database, by_number());
    let error = refused(&step).await;
    assert_eq!(error.class(), Class::Permanent);
    assert!(error.message().contains("btree (note)") && error.message().contains("btree (number)"), "{error}");
    assert!(error.hint().unwrap().contains("on_conflict: overwrite"));
    assert_eq!(there(&database), before);

    let test = TestContext::new("index").on_conflict(OnConflict::Overwrite);
    let found = undo(&step, &test).await;
    step.apply(&test.forward(), &found).await.unwrap();
    assert!(there(&database).contains(NUMBER), "{}", there(&database));
    step.rollback(&test.back(), &found, None).await.unwrap();
    assert_eq!(there(&database), before);
}

#[tokio::test]
async fn an_index_that_appears_meanwhile_is_a_conflict() {
    let Some(database) = orders() else { return };
    let (step, test) = (index(&database, by_number()), TestContext::new("index"));
    let found = undo(&step, &test).await;
    database.execute("create index orders_number on orders (note)");
    let error = step.apply(&test.forward(), &found).await.unwrap_err();
    let conflict = error.as_conflict().unwrap();
    assert_eq!(conflict.found, "absent");
    assert_eq!(conflict.present, "btree (note) on public.orders");
    let error = step.rollback(&test.back(), &found, None).await.unwrap_err();
    assert!(error.as_conflict().is_some());
    database.execute("drop index orders_number; create view orders_number as select 1");
    let error = step.apply(&test.forward(), &found).await.unwrap_err();
    assert!(error.message().contains("is no index"), "{error}");
}

#[tokio::test]
async fn keys_that_are_there_twice_leave_no_invalid_index() {
    let Some(database) = orders() else { return };
    database.execute("insert into orders values (0, 7, 'twice')");
    let mut with = by_number();
    with["unique"] = true.into();
    let (step, test) = (index(&database, with), TestContext::new("index"));
    let found = undo(&step, &test).await;
    let error = step.apply(&test.forward(), &found).await.unwrap_err();
    assert_eq!(error.class(), Class::Permanent);
    assert!(error.message().contains("could not create unique index"), "{error}");
    assert!(error.detail().unwrap().contains("(number)=(7)"), "{error:?}");
    assert!(error.hint().unwrap().contains("public.orders"), "{error:?}");
    assert_eq!(there(&database), "");
    step.rollback(&test.back(), &found, None).await.unwrap();
    assert_eq!(there(&database), "");
}

#[tokio::test]
async fn what_cannot_be_indexed_is_refused_before_anything_changes() {
    let Some(database) = orders() else { return };
    database.execute(
        "create table parts (id int) partition by range (id); create view seen as select 1 as number; \
         create table taken (id int); create index taken_id on taken (id); \
         create table child (id int references orders);",
    );
    let refusals = [
        (json!({ "table": "parts", "name": "x", "columns": ["id"] }), "is partitioned", "attach partition"),
        (json!({ "table": "seen", "name": "x", "columns": ["number"] }), "neither a table", "correct `table`"),
        (json!({ "table": "nowhere.orders", "name": "x", "columns": ["id"] }), "no table", "shop.orders"),
        (json!({ "table": "orders", "name": "taken", "columns": ["id"] }), "is no index", "another `name`"),
        (json!({ "table": "orders", "name": "taken_id", "columns": ["id"] }), "another table", "correct `table`"),
        (
            json!({ "table": "orders", "name": "orders_pkey", "state": "absent" }),
            "rests on it",
            "no matter of this step",
        ),
    ];
    for (with, message, hint) in refusals {
        let error = refused(&index(&database, with.clone())).await;
        assert_eq!(error.class(), Class::Permanent, "{with}");
        assert!(error.message().contains(message), "{with}: {error}");
        assert!(error.hint().unwrap().contains(hint), "{with}: {:?}", error.hint());
    }
    for (with, message) in [
        (json!({ "table": "orders", "name": "x", "columns": ["nothing"] }), "column \"nothing\" does not exist"),
        (json!({ "table": "orders", "name": "x", "columns": [{ "expression": "now()" }] }), "must be marked IMMUTABLE"),
        (
            json!({ "table": "orders", "name": "x", "columns": ["id"], "where": "true); drop table orders; --" }),
            "multiple commands",
        ),
        (json!({ "table": "orders", "name": "x", "columns": ["id"], "method": "tree" }), "access method \"tree\""),
    ] {
        let error = refused(&index(&database, with)).await;
        assert!(error.message().contains(message), "{error}");
    }
    assert_eq!(database.text("select count(*) from orders"), "1000");
    assert_eq!(there(&database), "");
}

#[tokio::test]
async fn another_users_table_is_refused() {
    let Some(database) = orders() else { return };
    let role = format!("indexer_{}", database.name());
    database.execute(&format!("create role \"{role}\" login password 'pw-of-indexer'"));
    let url = database.url().replacen("tester:secret-of-tester", &format!("{role}:pw-of-indexer"), 1);
    let error = refused(&index_on(world::target(&url), by_number())).await;
    assert!(error.message().contains("belongs to another user"), "{error}");
    assert!(error.hint().unwrap().contains("owner"), "{error:?}");
    database.execute(&format!("drop role \"{role}\""));
}

#[tokio::test]
async fn a_plan_does_not_need_the_table_to_be_there() {
    let Some(database) = world::any_database() else { return };
    let test = TestContext::new("index").dry_run();
    let Prepared::Change { changes, .. } = index(&database, by_number()).prepare(&test.forward()).await.unwrap() else {
        panic!()
    };
    assert_eq!(changes[0].subject, "index public.orders_number");
    database.execute("create table orders (id int)");
    let prepared = index(&database, by_number()).prepare(&test.forward()).await.unwrap();
    assert!(matches!(prepared, Prepared::Change { .. }));
}

#[tokio::test]
async fn an_index_that_is_not_there_need_not_be_dropped() {
    let Some(database) = orders() else { return };
    let step = index(&database, json!({ "table": "orders", "name": "orders_number", "state": "absent" }));
    let prepared = step.prepare(&TestContext::new("index").forward()).await.unwrap();
    assert!(matches!(prepared, Prepared::Unchanged { .. }));
}

#[tokio::test]
async fn a_long_transaction_is_named_and_the_budget_bounds_the_wait() {
    let Some(database) = orders() else { return };
    let mut reader = connect(&database).await;
    run(&mut reader, "begin; update orders set note = 'held' where id = 1").await;
    let target =
        world::target_with(&database.url(), |config| config.lock_budget = Some(Span(Duration::from_millis(600))));
    let (step, test) = (index_on(target, by_number()), TestContext::new("index"));
    let found = undo(&step, &test).await;
    let error = step.apply(&test.forward(), &found).await.unwrap_err();
    assert_eq!(error.class(), Class::Transient);
    assert!(error.message().contains("update orders set note = "), "{error}");
    assert!(error.hint().unwrap().contains("pg_terminate_backend"), "{error:?}");
    assert!(test.reported().iter().any(|progress| progress.message.contains("waits for pid")), "{:?}", test.reported());
    run(&mut reader, "rollback").await;
    step.apply(&test.forward(), &found).await.unwrap();
    assert_eq!(there(&database), NUMBER);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_go_on_while_an_index_is_built() {
    for version in [Version::V15, Version::V16, Version::V18] {
        let Some(database) = world::database(version) else { continue };
        database.execute(ORDERS);
        database.execute("insert into orders select n, n from generate_series(1001, 200000) n");
        // Holds the build back in the middle: whoever it blocked would be blocked as long.
        let mut reader = connect(&database).await;
        run(&mut reader, "begin isolation level repeatable read; select count(*) from orders").await;
        let writers = Writers::start(&database, 3).await;
        let (step, test) = (index(&database, by_number()), TestContext::new("index"));
        let found = undo(&step, &test).await;
        let cx = test.forward();
        let (step, found) = (Arc::new(step), Arc::new(found));
        let building = tokio::spawn({
            let (step, found) = (step.clone(), found.clone());
            async move { step.apply(&cx, &found).await }
        });
        until_building(&database).await;
        let before = writers.count();
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let during = writers.count() - before;
        assert!(!building.is_finished());
        run(&mut reader, "rollback").await;
        building.await.unwrap().unwrap();
        let longest = writers.stop().await;
        println!("PostgreSQL {version}: {during} writes within 1.5 s of a build, the longest took {longest:?}");
        assert!(during > 30, "{during} writes");
        assert!(longest < Duration::from_secs(1), "{longest:?}");
        assert_eq!(there(&database), NUMBER);
        // What the index says, not the table.
        run(&mut reader, "set enable_seqscan = off; set enable_bitmapscan = off").await;
        let seen: i64 = sqlx::query_scalar("select count(*) from orders where number between -1000000 and 1000000")
            .fetch_one(&mut reader)
            .await
            .unwrap();
        assert_eq!(seen, 200_000, "the index misses rows");
        step.rollback(&test.back(), &found, None).await.unwrap();
        assert_eq!(there(&database), "");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_build_whose_backend_is_terminated_is_built_again_or_cleared() {
    let Some(database) = orders() else { return };
    for go_on in [true, false] {
        let (step, test) = (Arc::new(index(&database, by_number())), TestContext::new("index"));
        let found = Arc::new(undo(&step, &test).await);
        let mut reader = connect(&database).await;
        run(&mut reader, "begin; update orders set note = 'held' where id = 1").await;
        let building = tokio::spawn({
            let (step, found, cx) = (step.clone(), found.clone(), test.forward());
            async move { step.apply(&cx, &found).await }
        });
        until_building(&database).await;
        database.execute(
            "select pg_terminate_backend(pid) from pg_stat_progress_create_index where datname = current_database()",
        );
        let error = building.await.unwrap().unwrap_err();
        assert_eq!(error.class(), Class::Transient, "{error:?}");
        assert!(there(&database).contains(" f CREATE INDEX upgrade_built_"), "{}", there(&database));
        run(&mut reader, "rollback").await;
        if go_on {
            step.apply(&test.forward(), &found).await.unwrap();
            assert_eq!(there(&database), NUMBER);
        }
        step.rollback(&test.back(), &found, None).await.unwrap();
        assert_eq!(there(&database), "");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_driver_left_running_is_ended_and_cleared() {
    let Some(database) = orders() else { return };
    let (step, test) = (Arc::new(index(&database, by_number())), TestContext::new("index"));
    let found = Arc::new(undo(&step, &test).await);
    let mut reader = connect(&database).await;
    run(&mut reader, "begin; update orders set note = 'held' where id = 1").await;
    let building = tokio::spawn({
        let (step, found, cx) = (step.clone(), found.clone(), test.forward());
        async move { step.apply(&cx, &found).await }
    });
    until_building(&database).await;
    building.abort();
    step.settle(&test.back(), &found).await.unwrap();
    assert_eq!(
        database.text("select count(*) from pg_stat_progress_create_index where datname = current_database()"),
        "0"
    );
    run(&mut reader, "rollback").await;
    step.rollback(&test.back(), &found, None).await.unwrap();
    assert_eq!(there(&database), "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_build_ends_at_once() {
    let Some(database) = orders() else { return };
    let (step, test) = (Arc::new(index(&database, by_number())), TestContext::new("index"));
    let found = Arc::new(undo(&step, &test).await);
    let mut reader = connect(&database).await;
    run(&mut reader, "begin; update orders set note = 'held' where id = 1").await;
    let building = tokio::spawn({
        let (step, found, cx) = (step.clone(), found.clone(), test.forward());
        async move { step.apply(&cx, &found).await }
    });
    until_building(&database).await;
    test.cancellation().cancel();
    let ended = tokio::time::timeout(Duration::from_secs(10), building).await.expect("it ends");
    assert!(ended.unwrap().unwrap_err().message().contains("cancelled"));
    let mut test = test;
    test.renew();
    run(&mut reader, "rollback").await;
    step.rollback(&test.back(), &found, None).await.unwrap();
    assert_eq!(there(&database), "");
}

#[test]
fn mistakes_in_the_configuration_name_their_key() {
    let Some(database) = world::any_database() else { return };
    for (with, key) in [
        (json!({ "target": "db", "table": "orders", "name": "x" }), "columns"),
        (json!({ "target": "db", "table": "orders", "name": "x", "columns": [{ "order": "asc" }] }), "columns.0"),
        (json!({ "target": "db", "table": "orders", "name": "x", "columns": ["a"], "state": "absent" }), "state"),
        (
            json!({ "target": "db", "table": "orders", "name": "x", "columns": ["a"], "nulls_not_distinct": true }),
            "nulls_not_distinct",
        ),
        (json!({ "target": "db", "table": "a.b.c", "name": "x", "columns": ["a"] }), "table"),
        (json!({ "target": "other", "table": "a", "name": "x", "columns": ["a"] }), "target"),
    ] {
        let error = world::step(&database, "postgres.index", with.clone()).unwrap_err();
        assert_eq!(error.key.as_deref(), Some(key), "{with}: {error}");
    }
}
