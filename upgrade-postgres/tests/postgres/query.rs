//! `postgres.query`: values, limits, and what is no answer.

#![cfg(test)]

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use upgrade_core::testkit::TestContext;
use upgrade_core::verdict::{Status, Verdict};
use upgrade_testbed::postgres::Database;

use crate::world;

async fn ask(
    database: &Database,
    mut with: Value,
    test: &TestContext,
) -> Result<Verdict, upgrade_core::error::StepError> {
    with["target"] = "db".into();
    world::check(database, "postgres.query", with).unwrap().check(&test.forward()).await
}

#[tokio::test]
async fn values_of_every_type_are_held_to_what_was_asked() {
    let Some(database) = world::any_database() else { return };
    let test = TestContext::new("query").baseline("value", 100.0);
    for (with, status) in [
        (json!({ "query": "select 5", "max": 5 }), Status::Pass),
        (json!({ "query": "select 5.5::numeric -- with a comment", "max": 5 }), Status::Fail),
        (json!({ "query": "select 5::bigint;", "min": 6 }), Status::Fail),
        (json!({ "query": "select 119", "max_increase": "20%" }), Status::Pass),
        (json!({ "query": "select 121", "max_increase": "20%" }), Status::Fail),
        (json!({ "query": "select 79", "max_decrease": "20%" }), Status::Fail),
        (json!({ "query": "select 103", "max_rise": 2 }), Status::Fail),
        (json!({ "query": "select 1", "name": "other", "max_rise": 2 }), Status::Unknown),
        (json!({ "query": "select 'ready'", "equals": "ready" }), Status::Pass),
        (json!({ "query": "select 'Ready'", "equals": "ready" }), Status::Fail),
        (json!({ "query": "select 3 = 3", "equals": true }), Status::Pass),
        (json!({ "query": "select '2026-01-02'::date", "equals": "2026-01-02" }), Status::Pass),
        (json!({ "query": "with a as (select 7 as n) select n from a", "equals": 7.0 }), Status::Pass),
        (json!({ "query": "select null::int", "max": 5 }), Status::Unknown),
        (json!({ "query": "select null::text", "equals": "null" }), Status::Unknown),
        (json!({ "query": "select 1 where false", "max": 5 }), Status::Unknown),
        (json!({ "query": "select generate_series(1, 2)", "max": 5 }), Status::Unknown),
        (json!({ "query": "select 1 as a, 2 as b", "max": 5 }), Status::Unknown),
        (json!({ "query": "select 'many'", "max": 5 }), Status::Unknown),
        (json!({ "query": "select 'NaN'::float8", "max": 5 }), Status::Unknown),
        (json!({ "query": "select 'infinity'::float8", "max": 5 }), Status::Unknown),
    ] {
        let verdict = ask(&database, with.clone(), &test).await.unwrap_or_else(|error| panic!("{with}: {error}"));
        assert_eq!(verdict.status, status, "{with}: {verdict:?}");
    }
    let verdict =
        ask(&database, json!({ "query": "select 42", "name": "open_orders", "max": 50 }), &test).await.unwrap();
    assert!((verdict.measurements["open_orders"] - 42.0).abs() < f64::EPSILON);
    assert_eq!(verdict.facts["open_orders"], "42");
    assert_eq!(verdict.message, "open_orders is 42");
}

#[tokio::test]
async fn a_query_changes_nothing() {
    let Some(database) = world::any_database() else { return };
    database.execute(
        "create table notes (n int); create sequence seen; \
         create function sneaky() returns int language plpgsql as $$ begin insert into notes values (1); return 1; end $$; \
         create function switches() returns int language plpgsql as $$ begin \
           perform set_config('transaction_read_only', 'off', true); insert into notes values (1); return 1; end $$;",
    );
    let test = TestContext::new("query");
    for query in ["select sneaky()", "select switches()", "select nextval('seen')"] {
        let error = ask(&database, json!({ "query": query, "max": 5 }), &test).await.unwrap_err();
        assert!(error.message().contains("read-only") || error.message().contains("read-write"), "{query}: {error}");
    }
    let error = ask(&database, json!({ "query": "select sneaky()", "max": 5 }), &test).await.unwrap_err();
    assert!(error.hint().unwrap().contains("postgres.sql"), "{error:?}");
    for query in ["select 1) as answer; drop table notes; --", "delete from notes returning n", "commit"] {
        ask(&database, json!({ "query": query, "max": 5 }), &test).await.unwrap_err();
    }
    assert_eq!(database.text("select count(*) from notes"), "0");
    assert_eq!(database.text("select is_called::int from seen"), "0");
}

#[tokio::test]
async fn a_slow_query_has_a_time_of_its_own() {
    let Some(database) = world::any_database() else { return };
    let began = Instant::now();
    let with =
        json!({ "query": "select count(*) from (select pg_sleep(30)) s", "max": 5, "statement_timeout": "200ms" });
    let error = ask(&database, with, &TestContext::new("query")).await.unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(15));
    assert!(error.message().contains("statement timeout"), "{error}");
    assert!(error.hint().unwrap().contains("of the check"), "{error:?}");
}

#[tokio::test]
async fn a_table_that_is_not_there_is_no_pass() {
    let Some(database) = world::any_database() else { return };
    let error =
        ask(&database, json!({ "query": "select count(*) from nothing", "min": 0 }), &TestContext::new("query"))
            .await
            .unwrap_err();
    assert!(error.message().contains("\"nothing\" does not exist"), "{error}");
}

#[test]
fn mistakes_in_the_configuration_name_their_key() {
    let Some(database) = world::any_database() else { return };
    for (with, key) in [
        (json!({ "target": "db", "query": "select 1" }), "query"),
        (json!({ "target": "db", "query": " ", "max": 1 }), "query"),
        (json!({ "target": "db", "query": "select 1", "equals": [1] }), "equals"),
        (json!({ "target": "db", "query": "select 1", "equals": 1, "max": 1 }), "equals"),
        (json!({ "target": "other", "query": "select 1", "max": 1 }), "target"),
    ] {
        let error = world::check(&database, "postgres.query", with.clone()).err().unwrap();
        assert_eq!(error.key.as_deref(), Some(key), "{with}: {error}");
    }
}
