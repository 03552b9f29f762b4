//! `postgres.integrity`: what was there before the run is there after it, or the difference is named.

#![cfg(test)]

use std::sync::Arc;

use serde_json::{Value, json};
use upgrade_core::check::Check;
use upgrade_core::executor::{Executor, Interrupt, Outcome, RunOptions};
use upgrade_core::file::{LoadOptions, parse};
use upgrade_core::journal::MemoryJournal;
use upgrade_core::testkit::TestContext;
use upgrade_core::verdict::{Status, Verdict};
use upgrade_testbed::postgres::{Database, Version};

use crate::world::{any_database, check, database, registry, target_yaml};

const SHOP: &str = "create table customers (id int primary key, name text, seen timestamptz); \
     insert into customers select n, 'customer ' || n, now() from generate_series(1, 20) n; \
     create table orders (id int primary key, customer int references customers, amount numeric(10, 2)); \
     insert into orders select n, n, n * 1.5 from generate_series(1, 20) n; \
     create table events (id int generated always as identity, what text); insert into events (what) values ('made');";

/// Asks as before a run, and gives what asks later.
struct Asked {
    check: Arc<dyn Check>,
    later: TestContext,
    before: Verdict,
}

impl Asked {
    async fn before(database: &Database, mut with: Value) -> Self {
        with["target"] = "db".into();
        let check = check(database, "postgres.integrity", with).unwrap();
        assert!(check.needs_baseline());
        let before = check.check(&TestContext::new("data").is_baseline().forward()).await.unwrap();
        let facts = before.facts.iter();
        let later = facts.fold(TestContext::new("data"), |test, (name, text)| test.baseline_fact(name, text));
        Self { check, later, before }
    }

    async fn after(&self) -> Verdict {
        self.check.check(&self.later.forward()).await.unwrap()
    }

    async fn after_rollback(&self) -> Verdict {
        self.check.check(&self.later.back()).await.unwrap()
    }
}

#[tokio::test]
async fn every_difference_is_named() {
    let Some(database) = any_database() else { return };
    database.execute(SHOP);
    let asked = Asked::before(&database, json!({})).await;
    assert_eq!((asked.before.status, asked.before.message.as_str()), (Status::Pass, "3 tables with 41 rows"));
    // Rewritten in another order: the same rows.
    database.execute("update customers set name = name where id % 2 = 0");
    database.execute("vacuum full customers");
    for verdict in [asked.after().await, asked.after_rollback().await] {
        assert_eq!(
            (verdict.status, verdict.message.as_str()),
            (Status::Pass, "3 tables with 41 rows, as before the run")
        );
    }
    database.execute(
        "update customers set name = 'somebody' where id = 7; delete from orders where id = 3; drop table events",
    );
    let verdict = asked.after().await;
    assert_eq!(verdict.status, Status::Fail);
    assert_eq!(
        verdict.message,
        "public.customers has other contents in its 20 rows; public.events is gone; public.orders has 19 rows, had 20"
    );
    assert_eq!(verdict.measurements["differences"], 3.0);
    assert!(verdict.hint.unwrap().contains("`ignore_columns`"));
}

#[tokio::test]
async fn what_an_upgrade_adds_is_no_difference_until_it_should_be_gone_again() {
    let Some(database) = any_database() else { return };
    database.execute(SHOP);
    let asked = Asked::before(&database, json!({})).await;
    database.execute("alter table orders add currency text default 'EUR'; create table invoices (id int)");
    assert_eq!(asked.after().await.status, Status::Pass);
    let verdict = asked.after_rollback().await;
    assert_eq!(verdict.message, "public.orders still has the columns currency; public.invoices was not there before");
    database.execute("alter table orders drop amount");
    assert_eq!(asked.after().await.message, "public.orders has lost its columns amount");
}

#[tokio::test]
async fn what_live_traffic_changes_can_be_left_out() {
    let Some(database) = any_database() else { return };
    database.execute(SHOP);
    let with = json!({
        "ignore": ["orders"], "ignore_columns": { "customers": ["seen"] }, "may_grow": ["public.events"],
    });
    let asked = Asked::before(&database, with).await;
    database.execute(
        "update customers set seen = null; delete from orders; insert into events (what) values ('more'), ('and more'); \
         update events set what = 'another' where id = 1",
    );
    assert_eq!(asked.after().await.status, Status::Pass);
    database.execute("delete from events");
    assert_eq!(asked.after().await.message, "public.events has 0 rows, had 1");
}

#[tokio::test]
async fn rows_alone_can_be_compared() {
    let Some(database) = any_database() else { return };
    database.execute(SHOP);
    let asked = Asked::before(&database, json!({ "compare": "rows", "tables": ["orders"] })).await;
    database
        .execute("update orders set amount = 0; delete from customers where id not in (select customer from orders)");
    assert_eq!(asked.after().await.message, "1 tables with 20 rows, as before the run");
    database.execute("delete from orders where id = 1");
    assert_eq!(asked.after().await.status, Status::Fail);
}

#[tokio::test]
async fn foreign_keys_that_nobody_vouches_for_are_counted() {
    for version in [Version::V15, Version::V18] {
        let Some(database) = database(version) else { continue };
        database.execute(SHOP);
        database.execute(
            "create table pairs (a int, b int, primary key (a, b)); insert into pairs values (1, 1); \
             create table uses (a int, b int); insert into uses values (1, 1), (1, null), (2, 2), (null, null); \
             alter table uses add constraint simple foreign key (a, b) references pairs not valid; \
             alter table uses add constraint whole foreign key (a, b) references pairs match full not valid;",
        );
        let asked = Asked::before(&database, json!({})).await;
        let before = &asked.before;
        assert_eq!(before.status, Status::Warn, "{before:?}");
        assert_eq!(before.measurements["foreign_key_violations"], 3.0);
        assert!(before.message.contains("simple of public.uses (1), whole of public.uses (2)"), "{before:?}");
        assert_eq!(asked.after().await.status, Status::Warn);
        // Behind the back of its triggers, a row that breaks a key that was validated once.
        database.execute("alter table orders disable trigger all; update orders set customer = 99 where id = 2;");
        let after = asked.after().await;
        assert_eq!(after.status, Status::Fail);
        assert!(
            after
                .message
                .contains("1 rows break the foreign key orders_customer_fkey of public.orders, before it were 0"),
            "{after:?}"
        );
        // Switched on again, the server vouches for what it did not look at: only asking for all finds it.
        database.execute("alter table orders enable trigger all");
        let all = Asked::before(&database, json!({ "foreign_keys": "all" })).await;
        assert_eq!(all.before.measurements["foreign_key_violations"], 4.0);
        let none = Asked::before(&database, json!({ "foreign_keys": "none" })).await;
        assert_eq!(none.before.status, Status::Pass);
    }
}

#[tokio::test]
async fn assertions_hold_or_say_what_they_found() {
    let Some(database) = any_database() else { return };
    database.execute(SHOP);
    let with = json!({ "tables": ["orders"], "assertions": [
        { "name": "total", "is_true": "select sum(amount) = 315 from orders" },
        { "name": "no orphans", "is_empty": "select id from orders where customer is null" },
    ]});
    let asked = Asked::before(&database, with).await;
    assert_eq!(asked.before.status, Status::Pass, "{:?}", asked.before);
    database.execute("update orders set customer = null, amount = 0 where id = 4");
    let verdict = asked.after().await;
    assert!(verdict.message.contains("`total` answers false, not true"), "{verdict:?}");
    assert!(verdict.message.contains("`no orphans` finds 1 rows, the first is (4)"), "{verdict:?}");
    // One that asks for what the upgrade is yet to make does not cost the baseline.
    let with = json!({ "tables": ["customers"], "assertions": [
        { "name": "filled", "is_true": "select count(nickname) = 20 from customers" },
    ]});
    let asked = Asked::before(&database, with).await;
    assert_eq!(asked.before.status, Status::Fail);
    database.execute("alter table customers add nickname text default 'x'");
    assert_eq!(asked.after().await.status, Status::Pass);
}

#[tokio::test]
async fn an_assertion_can_change_nothing() {
    let Some(database) = any_database() else { return };
    database.execute(SHOP);
    database.execute("create function spoil() returns bool language sql as 'delete from orders; select true'");
    let with = json!({ "assertions": [{ "name": "spoils", "is_true": "select spoil()" }] });
    let check = check(&database, "postgres.integrity", {
        let mut with = with;
        with["target"] = "db".into();
        with
    })
    .unwrap();
    let error = check.check(&TestContext::new("data").is_baseline().forward()).await.unwrap_err();
    assert!(error.message().contains("read-only transaction"), "{error}");
    assert_eq!(database.text("select count(*) from orders"), "20");
}

#[tokio::test]
async fn without_a_baseline_the_answer_is_unknown() {
    let Some(database) = any_database() else { return };
    database.execute(SHOP);
    let check = check(&database, "postgres.integrity", json!({ "target": "db" })).unwrap();
    let verdict = check.check(&TestContext::new("data").forward()).await.unwrap();
    assert_eq!(verdict.status, Status::Unknown, "{verdict:?}");
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let Some(database) = any_database() else { return };
    for (with, said) in [
        (json!({ "target": "db", "tables": ["a"], "schemas": ["b"] }), "`schemas` adds nothing"),
        (json!({ "target": "db", "assertions": [{ "name": "x" }] }), "assertion `x` needs one query"),
        (
            json!({ "target": "db", "assertions": [{ "name": "x", "is_true": "select 1", "is_empty": "select 1" }] }),
            "one query",
        ),
    ] {
        let Err(error) = check(&database, "postgres.integrity", with) else { panic!("{said}") };
        assert!(error.to_string().contains(said), "{error}");
    }
}

/// The check proves, of a run that failed after it had changed schema and contents, that all is back.
#[tokio::test]
async fn after_a_rollback_all_is_as_before() {
    let Some(database) = any_database() else { return };
    database.execute(SHOP);
    let document = format!(
        r#"
upgrade: shop
targets: {{ db: {} }}
rollback_verify:
  - {{ id: data, uses: postgres.integrity, with: {{ target: db }} }}
steps:
  - id: column
    uses: postgres.sql
    with: {{ target: db, statement: alter table orders add currency text, undo: UNDO }}
  - id: prices
    uses: postgres.sql
    with: {{ target: db, statement: "update orders set amount = amount * 2", undo: "update orders set amount = amount / 2" }}
  - id: fails
    uses: postgres.sql
    with: {{ target: db, statement: select 1 / 0, undo: select 1 }}
"#,
        target_yaml(&database.url())
    );
    for (undo, good) in [("alter table orders drop currency", true), ("select 1", false)] {
        let document = document.replace("UNDO", undo);
        let pipeline =
            parse(&document, "pipeline.yaml".as_ref(), "/".as_ref(), &LoadOptions::default(), &registry()).unwrap();
        let executor = Executor::new(Arc::new(MemoryJournal::default()));
        let report = executor.run(&pipeline, &RunOptions::default(), &Interrupt::new()).await.unwrap();
        let text = format!("{report:?}");
        assert!(matches!(report.outcome, Outcome::RolledBack { .. }), "{text}");
        assert_eq!(text.contains("RestoredButUnhealthy"), !good, "{text}");
    }
}
