//! Exactly once, whenever the connection breaks; and nothing left in the database at the end.

#![cfg(test)]

use std::sync::Arc;

use serde_json::json;
use sqlx::{Connection, PgConnection};
use upgrade_core::error::{Class, StepError};
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::testkit::TestContext;
use upgrade_core::undoable::OptionalRollback;
use upgrade_postgres::Database;
use upgrade_postgres::ledger::Ledger;
use upgrade_postgres::steps::{Sql, UndoableSql};
use upgrade_testbed::postgres;

use crate::forwarder::{Cut, Forwarder};
use crate::world::{any_database, build_context, build_context_with, target, target_with};

const OURS: &str = "select count(*) from pg_namespace where nspname = '_upgrade'";

fn counting(url: &str) -> UndoableSql {
    let config = json!({
        "target": "db",
        "statement": "update counter set n = n + 1",
        "undo": "update counter set n = n - 1",
    });
    Sql::from_config(serde_json::from_value(config).unwrap(), &build_context(url)).unwrap().undoable().unwrap()
}

/// Tells when the connection breaks in each round: well before the server may have the message, and
/// at any moment up to well after.
fn cut(round: u64) -> Cut {
    if round.is_multiple_of(4) { Cut::Within } else { Cut::After((round * 37) % 900) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_breaks_in_the_commit_leaves_an_effect_that_is_made_once() {
    let Some(database) = any_database() else { return };
    database.execute("create table counter (n int); insert into counter values (0)");
    let network = Forwarder::before(&database).await;
    let step = counting(&network.url(&database));
    let (mut had_happened, mut had_not) = (0, 0);
    let n = || database.text("select n from counter").parse::<u64>().unwrap();
    for round in 0..60 {
        let test = TestContext::new(format!("round-{round}"));
        let Ok(Prepared::Change { undo, .. }) = step.prepare(&test.forward()).await else { panic!("a change") };

        network.cut_next_commit(cut(round));
        let error = step.apply(&test.forward(), &undo).await.expect_err("the connection broke");
        assert_eq!(error.class(), Class::Transient, "{error:?}");
        assert!(error.message().contains("committing the statement failed"), "{error:?}");
        step.settle(&test.forward(), &undo).await.unwrap();
        if n() == 1 {
            had_happened += 1;
        } else {
            had_not += 1;
        }
        let output = step.apply(&test.forward(), &undo).await.unwrap();
        assert_eq!((n(), output.rows), (1, 1), "round {round}");

        network.cut_next_commit(cut(round + 1));
        step.rollback(&test.back(), &undo, None).await.expect_err("the connection broke");
        step.settle(&test.back(), &undo).await.unwrap();
        step.rollback(&test.back(), &undo, None).await.unwrap();
        assert_eq!(n(), 0, "round {round}");
        assert_eq!(database.text(OURS), "0");
    }
    assert_eq!(network.cuts(), 120);
    println!("cut in the commit: {had_happened} had happened, {had_not} had not");
    assert!(had_happened >= 5 && had_not >= 5, "{had_happened} {had_not}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_process_that_is_ended_at_any_instant_leaves_an_effect_that_is_made_once() {
    let Some(database) = any_database() else { return };
    database.execute("create table counter (n int); insert into counter values (0)");
    let step = Arc::new(counting(&database.url()));
    let mut broken = 0;
    for round in 0..50_u64 {
        let test = TestContext::new(format!("round-{round}"));
        let Ok(Prepared::Change { undo, .. }) = step.prepare(&test.forward()).await else { panic!("a change") };
        let undo = Arc::new(undo);
        let (applying, cx, kept) = (Arc::clone(&step), test.forward(), Arc::clone(&undo));
        let applying = tokio::spawn(async move { applying.apply(&cx, &kept).await });
        tokio::time::sleep(std::time::Duration::from_micros(4_000 + round * 400)).await;
        database.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity \
             where application_name like 'upgrade/%' and datname = current_database()",
        );
        if let Err(error) = applying.await.unwrap() {
            broken += 1;
            assert_eq!(error.class(), Class::Transient, "{error:?}");
        }
        step.settle(&test.forward(), &undo).await.unwrap();
        step.apply(&test.forward(), &undo).await.unwrap();
        assert_eq!(database.text("select n from counter"), "1", "round {round}");
        step.rollback(&test.back(), &undo, None).await.unwrap();
        assert_eq!(database.text("select n from counter"), "0", "round {round}");
    }
    println!("{broken} of 50 calls were broken off");
    assert!(broken > 0);
}

async fn one_life(database: &Database, test: &TestContext) -> Result<(), StepError> {
    let cx = test.forward();
    let mut session = database.connect(&cx).await?;
    let ledger = Ledger::of(database, &cx);
    ledger.ensure(&mut session).await?;
    let kept = &ledger;
    let policy = database.lock_policy();
    policy
        .transaction(&cx, &mut session, "noting", move |connection, _| {
            Box::pin(async move {
                assert_eq!(kept.get::<u32>(connection, "item").await?, None);
                kept.put(connection, "item", &1).await
            })
        })
        .await?;
    assert_eq!(ledger.get::<u32>(session.connection(), "item").await?, Some(1));
    assert_eq!(ledger.all(session.connection()).await?.len(), 1);
    ledger.clear(&mut session, &[]).await?;
    ledger.clear(&mut session, &[]).await?;
    assert_eq!(ledger.all(session.connection()).await?.len(), 0);
    session.close().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_that_make_and_remove_the_ledger_at_once_are_in_nobodys_way() {
    let Some(database) = any_database() else { return };
    let db = Arc::new(target(&database.url()));
    let runs: Vec<_> = (0..3)
        .map(|run| {
            let db = Arc::clone(&db);
            tokio::spawn(async move {
                for round in 0..100 {
                    let test = TestContext::new(format!("run-{run}-round-{round}"));
                    one_life(&db, &test).await.unwrap_or_else(|error| panic!("run {run} round {round}: {error:?}"));
                }
            })
        })
        .collect();
    for run in runs {
        run.await.unwrap();
    }
    assert_eq!(database.text(OURS), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn isolation_by_default_makes_no_difference() {
    let Some(database) = any_database() else { return };
    database.execute(&format!("alter database {} set default_transaction_isolation = 'serializable'", database.name()));
    let db = Arc::new(target(&database.url()));
    let runs: Vec<_> = (0..3)
        .map(|run| {
            let db = Arc::clone(&db);
            tokio::spawn(async move {
                for round in 0..20 {
                    one_life(&db, &TestContext::new(format!("run-{run}-round-{round}"))).await.unwrap();
                }
            })
        })
        .collect();
    for run in runs {
        run.await.unwrap();
    }
    assert_eq!(database.text(OURS), "0");
}

async fn kept_and_cleared(database: &postgres::Database, schema: &str) -> Result<(), StepError> {
    let db = target_with(&database.url(), |config| config.state_schema = Some(schema.parse().unwrap()));
    one_life(&db, &TestContext::new("step")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_of_the_users_is_used_and_kept_with_all_that_is_in_it() {
    let Some(database) = any_database() else { return };
    let odd = r#"odd "$do$' schema\"#;
    database.execute(r#"create schema "odd ""$do$' schema\"; create table "odd ""$do$' schema\".theirs (n int)"#);
    let before = database.schema();
    kept_and_cleared(&database, odd).await.unwrap();
    assert_eq!(database.schema(), before);

    // One that is not there is made, and removed again.
    kept_and_cleared(&database, "made \"for\" it").await.unwrap();
    assert_eq!(database.schema(), before);

    // A table of theirs that happens to have the name is neither written to nor removed.
    database.execute("create table public.ledger (n int)");
    let error = kept_and_cleared(&database, "public").await.unwrap_err();
    assert!(error.message().contains("was not made by an upgrade"), "{error:?}");
    assert!(error.hint().unwrap().contains("state_schema"), "{error:?}");
    assert_eq!(database.text("select count(*) from public.ledger"), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_was_left_behind_keeps_the_schema_and_nothing_else() {
    let Some(database) = any_database() else { return };
    let db = target(&database.url());
    let test = TestContext::new("step");
    let mut session = db.connect(&test.forward()).await.unwrap();
    let ledger = Ledger::of(&db, &test.forward());
    ledger.ensure(&mut session).await.unwrap();
    let side = ledger.table_name("start of a \"long\" name, so long that it has to be cut, or the server would");
    database.execute(&format!("create table {side} (n int); create table _upgrade.left_behind (n int)"));
    ledger.clear(&mut session, &[side]).await.unwrap();
    let left = "select string_agg(relname, ',') from pg_class where relnamespace = '_upgrade'::regnamespace";
    assert_eq!(database.text(left), "left_behind");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_of_the_ledger_does_not_keep_it_there() {
    let Some(database) = any_database() else { return };
    let db = target(&database.url());
    let test = TestContext::new("step");
    let mut session = db.connect(&test.forward()).await.unwrap();
    let ledger = Ledger::of(&db, &test.forward());
    ledger.ensure(&mut session).await.unwrap();
    // What a backup does.
    let mut reader = PgConnection::connect(&database.url()).await.unwrap();
    sqlx::raw_sql("begin; select * from _upgrade.ledger").execute(&mut reader).await.unwrap();
    let clearing = tokio::spawn(async move {
        ledger.clear(&mut session, &[]).await.unwrap();
    });
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    sqlx::raw_sql("commit").execute(&mut reader).await.unwrap();
    clearing.await.unwrap();
    assert_eq!(database.text(OURS), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_privilege_the_schema_of_ones_own_is_named_as_the_remedy() {
    let Some(database) = any_database() else { return };
    let role = format!("poor_{}", database.name());
    database.execute(&format!(
        "create role {role} login password 'pw'; create table counter (n int); \
        insert into counter values (0); grant select, update on counter to {role}"
    ));
    let url = database.url().replace("tester:secret-of-tester", &format!("{role}:pw"));
    let step = counting(&url);
    let test = TestContext::new("step");
    let Ok(Prepared::Change { undo, .. }) = step.prepare(&test.forward()).await else { panic!("a change") };
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert_eq!(error.class(), Class::Permanent);
    assert!(error.message().contains("42501"), "{error:?}");
    assert!(error.hint().unwrap().contains("grant CREATE on the database"), "{error:?}");
    assert_eq!(database.text("select n from counter"), "0");

    database.execute(&format!("create schema kept authorization {role}"));
    let db = target_with(&url, |config| config.state_schema = Some("kept".parse().unwrap()));
    let config = json!({ "target": "db", "statement": "update counter set n = n + 1" });
    let step = Sql::from_config(serde_json::from_value(config).unwrap(), &build_context_with(db)).unwrap();
    step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!(database.text("select n from counter"), "1");
    step.commit(&test.commit(), &undo).await.unwrap();
    assert_eq!(database.text("select count(*) from pg_class where relnamespace = 'kept'::regnamespace"), "0");
    database.execute(&format!("drop owned by {role}; drop role {role}"));
}
