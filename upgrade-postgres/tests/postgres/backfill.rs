//! `postgres.backfill` beside live traffic, through crashes, and what it refuses.

#![cfg(test)]

use serde_json::{Value, json};
use upgrade_core::context::OnConflict;
use upgrade_core::error::{Class, StepError};
use upgrade_core::registry::BuildError;
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::testkit::TestContext;
use upgrade_postgres::steps::{Backfill, BackfillConfig, BackfillOutput, BackfillUndo};
use upgrade_testbed::postgres::{Database, Version};

use crate::world;

pub(crate) fn build(database: &Database, mut with: Value) -> Result<Backfill, BuildError> {
    with["target"] = "db".into();
    let config: BackfillConfig = serde_json::from_value(with).unwrap();
    Backfill::from_config(config, &world::build_context(&database.url()))
}

fn backfill(database: &Database, with: Value) -> Backfill {
    build(database, with).unwrap()
}

async fn prepared(step: &Backfill, cx: &TestContext) -> BackfillUndo {
    match step.prepare(&cx.forward()).await.unwrap() {
        Prepared::Change { undo, .. } => undo,
        other => panic!("{other:?}"),
    }
}

async fn summary(step: &Backfill, cx: &TestContext) -> String {
    match step.prepare(&cx.forward()).await.unwrap() {
        Prepared::Change { changes, .. } => format!("{} {}", changes[0].subject, changes[0].summary.clone().unwrap()),
        other => panic!("{other:?}"),
    }
}

async fn refusal(database: &Database, with: Value) -> StepError {
    let step = backfill(database, with);
    step.prepare(&TestContext::new("fill").forward()).await.expect_err("it is refused")
}

const PEOPLE: &str = "create table people (id bigint primary key, first text not null, full_name text, visits int not null default 0); \
    insert into people select n, 'first' || n from generate_series(1, 40000) n; analyze people";

#[tokio::test(flavor = "multi_thread")]
async fn a_table_is_filled_by_two_workers_and_put_back() {
    for version in Version::ALL {
        let Some(database) = world::database(version) else { continue };
        database.execute(PEOPLE);
        let step = backfill(
            &database,
            json!({ "table": "people", "set": { "full_name": "first || id", "visits": "visits + 1" }, "where": "full_name is null" }),
        );
        let cx = TestContext::new("fill");
        let before = format!("{}{}", database.schema(), database.contents());
        let undo = prepared(&step, &cx).await;
        assert_eq!(before, format!("{}{}", database.schema(), database.contents()), "prepare reads only");
        assert_eq!(step.apply(&cx.forward(), &undo).await.unwrap(), BackfillOutput { rows: 40_000 });
        assert_eq!(database.text("select count(*) from people where full_name = first || id and visits = 1"), "40000");
        let ranges =
            database.text("select jsonb_array_length(value->'ranges') from _upgrade.ledger where item = 'walk'");
        assert_eq!(ranges, "8", "two workers share parts of the table");
        // Again: nothing is done twice.
        assert_eq!(step.apply(&cx.forward(), &undo).await.unwrap().rows, 40_000);
        assert_eq!(database.text("select sum(visits) from people"), "40000");
        step.rollback(&cx.back(), &undo, None).await.unwrap();
        assert_eq!(before, format!("{}{}", database.schema(), database.contents()));
        step.rollback(&cx.back(), &undo, None).await.unwrap();
        assert_eq!(before, format!("{}{}", database.schema(), database.contents()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_others_changed_since_are_left_and_named() {
    for version in [Version::V15, Version::V18] {
        let Some(database) = world::database(version) else { continue };
        database.execute("create table t (a int, b uuid default gen_random_uuid(), v jsonb, w text, primary key (a, b)); \
            insert into t (a, v, w) select n, case when n % 2 = 0 then '{\"a\": 1}' else 'null' end::jsonb, nullif('x', case when n % 3 = 0 then 'x' end) from generate_series(1, 500) n");
        let step = backfill(
            &database,
            json!({ "table": "t", "set": { "v": "jsonb_build_object('b', a)", "w": "w || 'y'" }, "where": "not v ? 'b'", "max_batch_rows": 60 }),
        );
        let mut cx = TestContext::new("fill");
        let undo = prepared(&step, &cx).await;
        let before = database.text("select * from t where a not in (17, 18, 19) order by a");
        let whole = database.text("select t::text from t where a not in (17, 18, 19) order by a");
        assert_eq!(step.apply(&cx.forward(), &undo).await.unwrap().rows, 500);
        database.execute("update t set w = 'mine' where a = 17; delete from t where a = 18; update t set v = '{\"b\": 0}' where a = 19");
        let mine = database.text("select t::text from t where a in (17, 19) order by a");
        step.rollback(&cx.back(), &undo, None).await.unwrap();
        assert_eq!(before, database.text("select * from t where a not in (17, 18, 19) order by a"));
        assert_eq!(whole, database.text("select t::text from t where a not in (17, 18, 19) order by a"));
        assert_eq!(mine, database.text("select t::text from t where a in (17, 19) order by a"));
        let said = cx.reported().into_iter().map(|p| p.message).find(|m| m.contains("changed since")).unwrap();
        assert!(said.starts_with("2 rows") && said.contains("17, "), "{said}");
        // Written over where the pipeline says so.
        cx = TestContext::new("fill").on_conflict(OnConflict::Overwrite);
        let undo = prepared(&step, &cx).await;
        step.apply(&cx.forward(), &undo).await.unwrap();
        database.execute("update t set w = 'theirs' where a = 20");
        step.rollback(&cx.back(), &undo, None).await.unwrap();
        assert_eq!(whole, database.text("select t::text from t where a not in (17, 18, 19) order by a"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_filled_is_refused_before_anything_is_changed() {
    let Some(database) = world::any_database() else { return };
    database.execute(
        "create table t (id int primary key, v text, g text generated always as (v || 'x') stored, i int generated always as identity); \
         create table loose (v text, id int); create unique index partial on loose (id) where v is null; create unique index nullable on loose (id); \
         create view seen as select * from t; create materialized view kept as select * from t; \
         create extension postgres_fdw; create server elsewhere foreign data wrapper postgres_fdw; create foreign table far (id int) server elsewhere; \
         insert into t (id) values (1); create table hidden (id int primary key, v text); alter table hidden enable row level security, force row level security",
    );
    for (with, message, hint) in [
        (json!({ "table": "nowhere", "set": { "v": "'x'" } }), "no table", "check `table`"),
        (json!({ "table": "t", "set": { "nothing": "'x'" } }), "no column nothing", "run before"),
        (json!({ "table": "seen", "set": { "v": "'x'" } }), "a view", "behind it"),
        (json!({ "table": "kept", "set": { "v": "'x'" } }), "materialized", "refresh"),
        (json!({ "table": "far", "set": { "id": "1" } }), "foreign table", "where it lives"),
        (json!({ "table": "t", "set": { "g": "'x'" } }), "generated by the server", "computed from"),
        (json!({ "table": "t", "set": { "i": "1" } }), "generated by the server", "computed from"),
        (json!({ "table": "t", "set": { "id": "id + 1" } }), "part of the key", "another unique key"),
        (json!({ "table": "loose", "set": { "v": "'x'" } }), "has no unique key", "primary key"),
        (json!({ "table": "t", "key": ["v"], "set": { "v": "'x'" } }), "not a unique key (v)", "create unique index"),
        (json!({ "into": "t", "select": "select v from t" }), "gives no column id", "select the key"),
        (
            json!({ "table": "t", "set": { "v": "'x'", }, "budget": { "probe": "select nothing", "p95": "5ms" } }),
            "the probe",
            "",
        ),
        (json!({ "table": "t", "set": { "v": "missing(1)" } }), "understanding what is written", ""),
    ] {
        let error = refusal(&database, with.clone()).await;
        assert!(error.message().contains(message), "{with}: {error:?}");
        assert!(error.hint().unwrap_or_default().contains(hint), "{with}: {error:?}");
        assert_eq!(error.class(), Class::Permanent, "{with}");
    }
    // In a plan, what an earlier step may make does not fail; what none can mend does.
    let plan = TestContext::new("fill").dry_run();
    for with in [
        json!({ "table": "nowhere", "set": { "v": "'x'" } }),
        json!({ "table": "t", "set": { "soon": "v" } }),
        json!({ "table": "t", "set": { "v": "soon" } }),
    ] {
        assert!(summary(&backfill(&database, with), &plan).await.contains("known when"));
    }
    let view = backfill(&database, json!({ "table": "seen", "set": { "v": "'x'" } }));
    view.prepare(&plan.forward()).await.expect_err("a view stays a view");
}

#[test]
fn a_configuration_that_says_too_little_or_too_much_is_refused() {
    let Some(database) = world::any_database() else { return };
    for (with, key) in [
        (json!({}), "table"),
        (json!({ "table": "t", "into": "t" }), "into"),
        (json!({ "table": "t" }), "set"),
        (json!({ "table": "t", "set": { "v": " " } }), "set.v"),
        (json!({ "table": "t", "set": { "v": "1" }, "select": "select 1" }), "select"),
        (json!({ "into": "t" }), "select"),
        (json!({ "into": "t", "select": "select 1", "where": "true" }), "set"),
        (json!({ "table": "t", "set": { "v": "1" }, "where": "" }), "where"),
        (json!({ "table": "t", "set": { "v": "1" }, "inverse": { "w": "1" } }), "inverse"),
        (json!({ "table": "t", "set": { "v": "1" }, "workers": 0 }), "workers"),
        (json!({ "table": "t", "set": { "v": "1" }, "budget": {} }), "budget.probe"),
        (json!({ "table": "t", "set": { "v": "1" }, "budget": { "p95": "5ms" } }), "budget.p95"),
        (json!({ "table": "t", "set": { "v": "1" }, "budget": { "probe": "select 1" } }), "budget.probe"),
    ] {
        let error = build(&database, with.clone()).unwrap_err();
        assert_eq!(error.key.as_deref(), Some(key), "{with}: {error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_plan_tells_rows_key_budget_triggers_and_what_undo_keeps() {
    let Some(database) = world::any_database() else { return };
    database.execute(PEOPLE);
    database.execute(
        "create function nothing() returns trigger language plpgsql as 'begin return new; end'; \
        create trigger watch before update on people for each row execute function nothing()",
    );
    let step = backfill(
        &database,
        json!({ "table": "people", "set": { "full_name": "first" }, "where": "full_name is null",
        "budget": { "probe": "select 1", "p95": "20ms", "lock_waits": 2 } }),
    );
    let said = summary(&step, &TestContext::new("fill").dry_run()).await;
    for part in [
        "(full_name)",
        "about 40000 rows of 40000",
        "order of (id)",
        "100ms by 1 worker",
        "p95 of the probe at most 20ms",
        "triggers watch",
        "rows hold NULL",
        "until commit",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_default_did_already_is_unchanged() {
    let Some(database) = world::any_database() else { return };
    database.execute(PEOPLE);
    database.execute("alter table people add column country text not null default 'DE'");
    for with in [
        json!({ "table": "people", "set": { "country": "'DE'" } }),
        json!({ "table": "people", "set": { "country": "'DE'" }, "where": "country is null" }),
        json!({ "into": "people", "select": "select id, first from people where id < 100" }),
    ] {
        match backfill(&database, with).prepare(&TestContext::new("fill").forward()).await.unwrap() {
            Prepared::Unchanged { reason, .. } => assert!(reason.contains("no row"), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expression_that_never_comes_to_rest_is_refused_or_done_once() {
    let Some(database) = world::any_database() else { return };
    database.execute(PEOPLE);
    let step = backfill(&database, json!({ "table": "people", "set": { "visits": "visits + 1" } }));
    let cx = TestContext::new("fill");
    let undo = prepared(&step, &cx).await;
    let error = step.apply(&cx.forward(), &undo).await.unwrap_err();
    assert!(error.message().contains("still match") && error.hint().unwrap().contains("once: true"), "{error:?}");
    assert_eq!(error.class(), Class::Permanent);
    step.rollback(&cx.back(), &undo, None).await.unwrap();
    assert_eq!(database.text("select count(*) from people where visits <> 0"), "0");
    assert_eq!(database.text("select to_regnamespace('_upgrade') is null"), "t");
}
