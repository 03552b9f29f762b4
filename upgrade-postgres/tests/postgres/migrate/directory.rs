//! Directories of migrations, and steps that apply them.

#![cfg(test)]

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::step::{Change, Prepared, Rollback, Step};
use upgrade_core::testkit::TestContext;
use upgrade_postgres::steps::{Migrate, MigrateOutput, MigrateUndo};
use upgrade_testbed::postgres::Database;

use crate::world::{any_database, build_context};

/// Writes files into a directory of their own.
pub(super) fn directory(files: &[(&str, &str)]) -> TempDir {
    let home = tempfile::tempdir().unwrap();
    for (name, text) in files {
        write(home.path(), name, text);
    }
    home
}

pub(super) fn write(home: &Path, name: &str, text: &str) {
    let path = home.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

/// Writes many small migrations, each of which fails if it is done twice.
pub(super) fn many(count: usize) -> TempDir {
    let home = tempfile::tempdir().unwrap();
    for n in 1..=count {
        write(
            home.path(),
            &format!("{n}_t{n}.up.sql"),
            &format!("create table t{n} (id int);\ninsert into done values ({n});\n"),
        );
        write(
            home.path(),
            &format!("{n}_t{n}.down.sql"),
            &format!("drop table t{n};\ndelete from done where id = {n};\n"),
        );
    }
    home
}

/// Makes the step.
pub(super) fn migrate(database: &Database, dir: &Path, more: Value) -> Migrate {
    migrate_at(&database.url(), dir, more)
}

pub(super) fn migrate_at(url: &str, dir: &Path, more: Value) -> Migrate {
    let mut config = json!({ "target": "db", "directory": dir });
    let Value::Object(more) = more else { panic!("{more} is no mapping") };
    config.as_object_mut().unwrap().extend(more);
    Migrate::from_config(serde_json::from_value(config).unwrap(), &build_context(url)).unwrap()
}

pub(super) async fn prepare(step: &Migrate, cx: &Context) -> Result<(MigrateUndo, Vec<Change>), StepError> {
    match step.prepare(cx).await? {
        Prepared::Change { undo, changes } => Ok((undo, changes)),
        other => panic!("there was something to do: {other:?}"),
    }
}

/// Prepares and applies.
pub(super) async fn apply(step: &Migrate, test: &TestContext) -> Result<(MigrateUndo, MigrateOutput), StepError> {
    let (undo, _) = prepare(step, &test.forward()).await?;
    let output = step.apply(&test.forward(), &undo).await?;
    Ok((undo, output))
}

pub(super) async fn apply_and_commit(step: &Migrate) {
    let test = TestContext::new("schema");
    let (undo, _) = apply(step, &test).await.unwrap();
    step.commit(&test.commit(), &undo).await.unwrap();
}

/// Says all that an error says, for the assertions.
pub(super) fn said(error: &StepError) -> String {
    let mut text = format!("{:?} {error}", error.class());
    for cause in error.causes() {
        let _ = write!(text, " | {cause}");
    }
    let _ = write!(text, " | hint: {}", error.hint().unwrap_or("NONE"));
    if let Some(detail) = error.detail() {
        let _ = write!(text, " | {detail}");
    }
    text
}

/// Asks that a step is refused when it is prepared, in these words.
pub(super) async fn refused(step: &Migrate, words: &[&str]) {
    let error = step.prepare(&TestContext::new("schema").forward()).await.expect_err("it is refused");
    let text = said(&error);
    for word in words {
        assert!(text.contains(word), "{word} is not in: {text}");
    }
    assert!(error.hint().is_some(), "{text}");
}

/// Undoes what was applied.
pub(super) async fn undo(step: &Migrate, test: &TestContext, undo: &MigrateUndo) {
    step.rollback(&test.back(), undo, None).await.unwrap_or_else(|error| panic!("{}", said(&error)));
}

#[tokio::test]
async fn a_plan_says_what_the_rules_find_in_each_script() {
    let Some(database) = any_database() else { return };
    let home = tempfile::tempdir().unwrap();
    for (name, text) in [
        ("1_people.up.sql", "create table people (name text);"),
        ("1_people.down.sql", "drop table people;"),
        ("2_index.up.sql", "select 1;\ncreate index by_name on people (name);"),
        ("2_index.down.sql", "drop index by_name;"),
    ] {
        std::fs::write(home.path().join(name), text).unwrap();
    }
    let planned = async |more: Value| {
        let step = migrate(&database, home.path(), more);
        let (_, changes) = prepare(&step, &TestContext::new("schema").dry_run().forward()).await.unwrap();
        changes.into_iter().map(|change| change.summary.unwrap_or_default()).collect::<Vec<_>>()
    };
    let found = planned(json!({})).await;
    assert!(found[1].contains("error in line 2, require-concurrent-index-creation: "), "{found:?}");
    let allowed =
        json!({ "lint": { "allow": [{ "rule": "require-concurrent-index-creation", "reason": "it is empty" }] } });
    assert!(!planned(allowed).await[1].contains("require-concurrent"), "{found:?}");
    // Where it is not a plan, the rules were asked before.
    let (_, changes) =
        prepare(&migrate(&database, home.path(), json!({})), &TestContext::new("schema").forward()).await.unwrap();
    assert!(!changes[1].summary.as_deref().unwrap_or_default().contains("line 2"), "{changes:?}");
}
