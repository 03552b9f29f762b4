//! A real Alembic, from PyPI, as somebody else's runner.

#![cfg(test)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::testkit::TestContext;
use upgrade_postgres::steps::{Runner, RunnerUndo};
use upgrade_testbed::postgres::{Database, PASSWORD};

use super::directory::said;
use crate::world::{any_database, build_context};

/// Finds Alembic where `scripts/alembic` has put it.
fn alembic() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let asked =
        std::process::Command::new(root.join("scripts/alembic")).env("UPGRADE_NO_INSTALL", "1").output().unwrap();
    if asked.status.success() {
        return Some(String::from_utf8(asked.stdout).unwrap().trim().into());
    }
    assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "Alembic is promised under CI");
    eprintln!("skipped: no Alembic (scripts/alembic installs it)");
    None
}

fn runner(database: &Database, alembic: &Path, env: &Value) -> Runner {
    let words = |words: &[&str]| {
        let program = std::iter::once(alembic.to_str().unwrap());
        program.chain(words.iter().copied()).map(str::to_owned).collect::<Vec<_>>()
    };
    let config = json!({
        "target": "db",
        "directory": Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/migrations/alembic"),
        "runner": {
            "preset": "alembic",
            "current": words(&["current"]),
            "up": words(&["upgrade", "{to}"]),
            "down": words(&["downgrade", "{revision}"]),
            "env": env,
        },
    });
    Runner::from_config(serde_json::from_value(config).unwrap(), &build_context(&database.url())).unwrap()
}

async fn prepare(step: &Runner, test: &TestContext) -> RunnerUndo {
    match step.prepare(&test.forward()).await {
        Ok(Prepared::Change { undo, .. }) => undo,
        Ok(other) => panic!("{other:?}"),
        Err(error) => panic!("{}", said(&error)),
    }
}

#[tokio::test]
async fn upgrades_and_goes_back_to_exactly_the_revision_found() {
    let (Some(database), Some(alembic)) = (any_database(), alembic()) else { return };
    let step = runner(&database, &alembic, &json!({}));
    let test = TestContext::new("schema");
    // From nothing.
    let undo = prepare(&step, &test).await;
    let output = step.apply(&test.forward(), &undo).await.unwrap_or_else(|error| panic!("{}", said(&error)));
    assert_eq!((output.from.as_str(), output.to.as_str()), ("", "2b"));
    step.rollback(&test.back(), &undo, Some(&output)).await.unwrap_or_else(|error| panic!("{}", said(&error)));
    assert_eq!(database.text("select count(*) from alembic_version"), "0");
    assert_eq!(database.text("select to_regclass('first') is null"), "t");
    // From a revision, which somebody else then leaves.
    database.execute("create table first (id int primary key); insert into alembic_version values ('1a')");
    let undo = prepare(&step, &test).await;
    let output = step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!(output.from, "1a");
    database.execute("update alembic_version set version_num = '9z'");
    let error = step.rollback(&test.back(), &undo, Some(&output)).await.unwrap_err();
    assert!(said(&error).contains("9z"), "{}", said(&error));
    database.execute("update alembic_version set version_num = '2b'");
    step.rollback(&test.back(), &undo, Some(&output)).await.unwrap();
    step.rollback(&test.back(), &undo, Some(&output)).await.unwrap();
    assert_eq!(database.text("select version_num from alembic_version"), "1a");
}

#[tokio::test]
async fn a_failure_is_told_without_the_password_and_undone() {
    let (Some(database), Some(alembic)) = (any_database(), alembic()) else { return };
    let step = runner(&database, &alembic, &json!({ "FAIL": "1" }));
    let test = TestContext::new("schema");
    let undo = prepare(&step, &test).await;
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    let text = said(&error);
    assert!(text.contains("upgrade head` failed: exit code 1") && text.contains("a failure in the middle"), "{text}");
    assert!(!text.contains(PASSWORD), "{text}");
    step.settle(&test.back(), &undo).await.unwrap();
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(database.text("select to_regclass('first') is null and to_regclass('second') is null"), "t");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_crash_left_running_is_ended() {
    let (Some(database), Some(alembic)) = (any_database(), alembic()) else { return };
    let step = runner(&database, &alembic, &json!({ "HANG": "1" }));
    let test = TestContext::new("schema");
    let undo = prepare(&step, &test).await;
    let applying = tokio::spawn({
        let (step, cx, undo) = (step.clone(), test.forward(), undo.clone());
        async move { step.apply(&cx, &undo).await }
    });
    let sleeping = "select count(*) from pg_stat_activity where datname = current_database() and query like '%pg_sleep(600)%' and pid <> pg_backend_pid()";
    for _ in 0..300 {
        if database.text(sleeping) != "0" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(database.text(sleeping), "1");
    if let Err(error) = step.settle(&test.back(), &undo).await {
        let left =
            "select (pid, application_name, state, wait_event, backend_start, query)::text from pg_stat_activity";
        panic!("{} {}", said(&error), database.text(left));
    }
    assert_eq!(database.text(sleeping), "0");
    applying.await.unwrap().unwrap_err();
    step.rollback(&test.clone().interrupted().back(), &undo, None).await.unwrap();
    assert_eq!(database.text("select to_regclass('first') is null and to_regclass('second') is null"), "t");
}
