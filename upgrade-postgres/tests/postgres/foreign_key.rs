//! `postgres.foreign_key` beside writers, over rows that break it, and where it cannot be added.

#![cfg(test)]

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use upgrade_core::context::OnConflict;
use upgrade_core::error::{Class, StepError};
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::testkit::TestContext;
use upgrade_core::units::Span;
use upgrade_postgres::steps::{ForeignKey, ForeignKeyConfig, ForeignKeyUndo};
use upgrade_testbed::postgres::{Database, Version};

use crate::traffic::{Writers, connect, run};
use crate::world;

const SHOP: &str = "create table customers (id int primary key, email text unique); \
    insert into customers select n, 'c' || n from generate_series(1, 100) n; \
    create table orders (id int primary key, number int, customer int); \
    insert into orders select n, n, n % 100 + 1 from generate_series(1, 1000) n;";

fn shop() -> Option<Database> {
    let database = world::any_database()?;
    database.execute(SHOP);
    Some(database)
}

fn by_customer() -> Value {
    json!({ "table": "orders", "name": "orders_customer", "columns": ["customer"], "references": { "table": "customers" } })
}

fn key(database: &Database, with: Value) -> ForeignKey {
    key_on(world::target(&database.url()), with)
}

fn key_on(target: upgrade_postgres::Database, mut with: Value) -> ForeignKey {
    with["target"] = "db".into();
    let config: ForeignKeyConfig = serde_json::from_value(with).unwrap();
    ForeignKey::from_config(config, &world::build_context_with(target)).unwrap()
}

async fn undo(step: &ForeignKey, test: &TestContext) -> ForeignKeyUndo {
    match step.prepare(&test.forward()).await.unwrap() {
        Prepared::Change { undo, .. } => undo,
        other => panic!("{other:?}"),
    }
}

async fn refused(step: &ForeignKey) -> StepError {
    step.prepare(&TestContext::new("key").forward()).await.unwrap_err()
}

fn there(database: &Database) -> String {
    database.text(
        "select format('%s %s %s', conname, convalidated, pg_get_constraintdef(oid)) from pg_constraint \
         where conrelid = 'orders'::regclass and contype <> 'p' and contype <> 'n' order by 1",
    )
}

fn nothing_of_ours(database: &Database) {
    assert_eq!(database.text("select to_regnamespace('_upgrade')"), "NULL");
}

const CUSTOMER: &str = "orders_customer t FOREIGN KEY (customer) REFERENCES customers(id)";

#[tokio::test]
async fn rows_that_break_it_are_named_before_anything_changes() {
    let Some(database) = shop() else { return };
    database.execute("insert into orders select n, n, n - 1300 from generate_series(2001, 2007) n; insert into orders values (0, 0, null)");
    let error = refused(&key(&database, by_customer())).await;
    assert_eq!(error.class(), Class::Permanent);
    assert!(error.message().contains("7 rows of \"public\".\"orders\" refer to no row"), "{error}");
    assert!(error.message().contains("(701), (702), (703), (704), (705), …"), "{error}");
    assert!(error.hint().unwrap().contains("correct or delete"), "{error:?}");
    assert_eq!(there(&database), "");
    nothing_of_ours(&database);
    // With MATCH FULL, null in one of two columns breaks it as well.
    database.execute("delete from orders where customer > 100; alter table customers add unique (email, id)");
    database.execute("alter table orders add email text; update orders set email = 'c' || customer; update orders set email = null where id = 5");
    let error = refused(&key(
        &database,
        json!({ "table": "orders", "name": "x", "columns": ["email", "customer"], "match_full": true,
                "references": { "table": "customers", "columns": ["email", "id"] } }),
    ))
    .await;
    assert!(error.message().contains("1 rows of") && error.message().contains("(null, 6)"), "{error}");
}

#[tokio::test]
async fn a_row_that_breaks_it_meanwhile_is_named_and_undone() {
    let Some(database) = shop() else { return };
    let (step, test) = (key(&database, by_customer()), TestContext::new("key"));
    let found = undo(&step, &test).await;
    database.execute("insert into orders values (5000, 1, 999)");
    let error = step.apply(&test.forward(), &found).await.unwrap_err();
    assert!(error.message().contains("1 rows of") && error.message().contains("(999)"), "{error}");
    assert_eq!(error.class(), Class::Permanent);
    assert!(there(&database).ends_with("NOT VALID"), "{}", there(&database));
    step.rollback(&test.back(), &found, None).await.unwrap();
    assert_eq!(there(&database), "");
    nothing_of_ours(&database);
}

#[tokio::test]
async fn what_cannot_be_added_is_refused_before_anything_changes() {
    let Some(database) = shop() else { return };
    database.execute(
        "create table parts (id int, customer int) partition by range (id); create view seen as select 1 as customer; \
         alter table orders add constraint taken check (id > 0), \
           add constraint other foreign key (customer) references customers on delete cascade;",
    );
    let with = |adjust: Value| {
        let mut with = by_customer();
        with.as_object_mut().unwrap().extend(adjust.as_object().unwrap().clone());
        with
    };
    for (adjusted, message, hint) in [
        (json!({ "table": "parts" }), "is partitioned", "each partition"),
        (json!({ "table": "seen" }), "is not a table", "correct `table`"),
        (json!({ "table": "nothing" }), "no table", "shop.orders"),
        (json!({ "references": { "table": "nothing" } }), "no table", "references.table"),
        (json!({ "name": "taken" }), "CHECK", "another `name`"),
        (json!({ "name": "other" }), "on delete cascade", "another `name`"),
        (json!({ "columns": ["customer", "id"] }), "the primary key of", "name the referenced columns"),
        (json!({ "unindexed": "refuse" }), "no index of", "postgres.index"),
    ] {
        let error = refused(&key(&database, with(adjusted.clone()))).await;
        assert_eq!(error.class(), Class::Permanent, "{adjusted}");
        assert!(error.message().contains(message), "{adjusted}: {error}");
        assert!(error.hint().unwrap().contains(hint), "{adjusted}: {:?}", error.hint());
    }
    for (adjusted, message) in [
        (json!({ "columns": ["nothing"] }), "column \"nothing\""),
        (json!({ "references": { "table": "customers", "columns": ["email"] } }), "cannot be implemented"),
        (json!({ "references": { "table": "orders", "columns": ["number"] } }), "no unique constraint"),
    ] {
        let error = refused(&key(&database, with(adjusted.clone()))).await;
        assert!(error.message().contains(message), "{adjusted}: {error}");
    }
    nothing_of_ours(&database);
}

#[tokio::test]
async fn the_plan_warns_of_a_missing_index_and_needs_no_table() {
    let Some(database) = shop() else { return };
    let test = TestContext::new("key").dry_run();
    let summary = async |with: Value| match key(&database, with).prepare(&test.forward()).await.unwrap() {
        Prepared::Change { changes, .. } => changes[0].summary.clone().unwrap(),
        other => panic!("{other:?}"),
    };
    assert!(summary(by_customer()).await.contains("no index begins with"));
    database.execute("create index on orders (customer, id)");
    assert!(!summary(by_customer()).await.contains("no index begins with"));
    let mut later = by_customer();
    later["references"]["table"] = "clients".into();
    assert!(summary(later).await.contains("known when"));
    let mut later = by_customer();
    later["columns"] = json!(["client"]);
    assert!(summary(later).await.contains("known when"));
}

#[tokio::test]
async fn an_equal_one_leaves_nothing_to_do_and_is_not_taken_for_ours() {
    let Some(database) = shop() else { return };
    let (step, test) = (key(&database, by_customer()), TestContext::new("key"));
    let found = undo(&step, &test).await;
    database.execute("alter table orders add constraint orders_customer foreign key (customer) references customers");
    let prepared = step.prepare(&TestContext::new("again").forward()).await.unwrap();
    assert!(matches!(prepared, Prepared::Unchanged { .. }));
    // Made by somebody else between `prepare` and `apply`: wanted, but not ours to drop.
    step.apply(&test.forward(), &found).await.unwrap();
    step.rollback(&test.back(), &found, None).await.unwrap();
    assert_eq!(there(&database), CUSTOMER);
    nothing_of_ours(&database);
}

#[tokio::test]
async fn somebody_elses_change_is_a_conflict_or_is_overwritten() {
    let Some(database) = shop() else { return };
    for overwrite in [false, true] {
        let test = TestContext::new("key");
        let test = if overwrite { test.on_conflict(OnConflict::Overwrite) } else { test };
        let step = key(&database, by_customer());
        let found = undo(&step, &test).await;
        database.execute("alter table orders add constraint orders_customer foreign key (customer) references customers on delete cascade");
        let applied = step.apply(&test.forward(), &found).await;
        if overwrite {
            applied.unwrap();
            assert_eq!(there(&database), CUSTOMER);
            step.rollback(&test.back(), &found, None).await.unwrap();
            assert_eq!(there(&database), "");
        } else {
            let error = applied.unwrap_err();
            assert_eq!(error.as_conflict().unwrap().found, "absent");
            assert!(error.as_conflict().unwrap().present.contains("on delete cascade"));
            step.rollback(&test.back(), &found, None).await.unwrap();
            database.execute("alter table orders drop constraint orders_customer");
        }
        nothing_of_ours(&database);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_go_on_while_it_is_added_and_validated() {
    for version in [Version::V15, Version::V16, Version::V18] {
        let Some(database) = world::database(version) else { continue };
        database.execute(SHOP);
        database.execute("insert into orders select n, n, n % 100 + 1 from generate_series(1001, 300000) n");
        let writers = Writers::start(&database, 3).await;
        // A writer's long transaction keeps the constraint from being added: nobody may queue behind that.
        let mut long = connect(&database).await;
        run(&mut long, "begin; update orders set number = 0 where id = 200000").await;
        let (step, test) = (Arc::new(key(&database, by_customer())), TestContext::new("key"));
        let found = Arc::new(undo(&step, &test).await);
        let adding = tokio::spawn({
            let (step, found, cx) = (step.clone(), found.clone(), test.forward());
            async move { step.apply(&cx, &found).await }
        });
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert!(!adding.is_finished());
        let during = writers.count();
        run(&mut long, "rollback").await;
        adding.await.unwrap().unwrap();
        let longest = writers.stop().await;
        println!("PostgreSQL {version}: {during} writes within 1.5 s, the longest of all took {longest:?}");
        assert!(during > 30, "{during} writes");
        assert!(longest < Duration::from_secs(1), "{longest:?}");
        assert_eq!(there(&database), CUSTOMER);
        step.rollback(&test.back(), &found, None).await.unwrap();
        assert_eq!(there(&database), "");
        nothing_of_ours(&database);
    }
}

#[tokio::test]
async fn a_long_transaction_is_named_when_the_budget_is_used_up() {
    let Some(database) = shop() else { return };
    let mut long = connect(&database).await;
    run(&mut long, "begin; update orders set number = 0 where id = 1").await;
    let target =
        world::target_with(&database.url(), |config| config.lock_budget = Some(Span(Duration::from_millis(500))));
    let (step, test) = (key_on(target, by_customer()), TestContext::new("key"));
    let found = undo(&step, &test).await;
    let error = step.apply(&test.forward(), &found).await.unwrap_err();
    assert_eq!(error.class(), Class::Transient);
    assert!(error.message().contains("update orders set number = 0"), "{error}");
    assert_eq!(there(&database), "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminated_backend_leaves_it_done_once_or_undone() {
    let Some(database) = shop() else { return };
    let terminate = "select pg_terminate_backend(pid) from pg_stat_activity \
        where datname = current_database() and application_name like 'upgrade/key/%'";
    for (hold, go_on) in [
        ("update orders set number = 0 where id = 1", true),
        ("lock table orders in share update exclusive mode", true),
        ("lock table orders in share update exclusive mode", false),
    ] {
        let (step, test) = (Arc::new(key(&database, by_customer())), TestContext::new("key"));
        let found = Arc::new(undo(&step, &test).await);
        if hold.starts_with("lock") {
            // Added already, so that the validation is what waits.
            database.execute("insert into orders values (5000, 1, 999)");
            step.apply(&test.forward(), &found).await.unwrap_err();
            database.execute("delete from orders where id = 5000");
            assert!(there(&database).ends_with("NOT VALID"));
        }
        let mut long = connect(&database).await;
        run(&mut long, &format!("begin; {hold}")).await;
        let applying = tokio::spawn({
            let (step, found, cx) = (step.clone(), found.clone(), test.forward());
            async move { step.apply(&cx, &found).await }
        });
        tokio::time::sleep(Duration::from_millis(300)).await;
        database.execute(terminate);
        let error = applying.await.unwrap().unwrap_err();
        assert_eq!(error.class(), Class::Transient, "{error:?}");
        run(&mut long, "rollback").await;
        if go_on {
            step.apply(&test.forward(), &found).await.unwrap();
            assert_eq!(there(&database), CUSTOMER);
        }
        step.rollback(&test.back(), &found, None).await.unwrap();
        assert_eq!(there(&database), "");
        nothing_of_ours(&database);
    }
}

#[test]
fn mistakes_in_the_configuration_name_their_key() {
    let Some(database) = world::any_database() else { return };
    let base =
        json!({ "target": "db", "table": "orders", "name": "x", "columns": ["a"], "references": { "table": "b" } });
    for (adjust, at) in [
        (json!({ "columns": [] }), "columns"),
        (json!({ "references": { "table": "b", "columns": ["c", "d"] } }), "references.columns"),
        (json!({ "initially_deferred": true }), "initially_deferred"),
        (json!({ "on_delete": "explode" }), "on_delete"),
    ] {
        let mut with = base.clone();
        with.as_object_mut().unwrap().extend(adjust.as_object().unwrap().clone());
        let error = world::step(&database, "postgres.foreign_key", with).unwrap_err();
        assert_eq!(error.key.as_deref(), Some(at), "{error}");
    }
}
