//! What is refused before anything is changed, and how scripts that fail are told.

#![cfg(test)]

use serde_json::json;
use upgrade_core::error::Class;
use upgrade_core::step::Step;
use upgrade_core::testkit::TestContext;

use super::directory::{apply_and_commit, directory, migrate, prepare, refused, said, undo, write};
use crate::world::{any_database, step};

#[tokio::test]
async fn files_and_history_that_contradict_each_other_are_refused() {
    let Some(database) = any_database() else { return };
    let home = directory(&[
        ("1_a.up.sql", "create table a ();"),
        ("1_a.down.sql", "drop table a;"),
        ("5_e.up.sql", "create table e ();"),
        ("5_e.down.sql", "drop table e;"),
    ]);
    let step = |more| migrate(&database, home.path(), more);
    apply_and_commit(&step(json!({}))).await;

    write(home.path(), "1_a.up.sql", "create table a (id int);");
    refused(&step(json!({})), &["1_a.up.sql: version 1 was applied from another text", "as a new migration"]).await;
    write(home.path(), "1_a.up.sql", "create table a ();");

    write(home.path(), "3_c.up.sql", "create table c ();");
    write(home.path(), "3_c.down.sql", "drop table c;");
    refused(&step(json!({})), &["3_c.up.sql: version 3 is not applied, but the newer 5 is", "out_of_order: true"])
        .await;
    apply_and_commit(&step(json!({ "out_of_order": true }))).await;

    std::fs::remove_file(home.path().join("3_c.up.sql")).unwrap();
    std::fs::remove_file(home.path().join("3_c.down.sql")).unwrap();
    refused(&step(json!({})), &["version 3 was applied, and there is no file for it", "ignore_missing: true"]).await;
    write(home.path(), "6_f.up.sql", "create table f ();");
    write(home.path(), "6_f.down.sql", "drop table f;");
    apply_and_commit(&step(json!({ "ignore_missing": true }))).await;
    assert_eq!(database.text("select version from _sqlx_migrations order by 1"), "1\n3\n5\n6");
    refused(&step(json!({ "ignore_missing": true, "to": 4 })), &["no migration of version 4", "the newest is 6"]).await;
}

#[tokio::test]
async fn a_script_that_would_end_its_transaction_is_refused_with_its_line() {
    let Some(database) = any_database() else { return };
    let home = directory(&[("1_a.up.sql", "create table a ();\n\ncommit;\n"), ("1_a.down.sql", "drop table a;")]);
    let step = migrate(&database, home.path(), json!({}));
    refused(&step, &["1_a.up.sql, line 3: `commit`", "-- no-transaction"]).await;
    write(home.path(), "1_a.up.sql", "create table a ();");
    write(home.path(), "1_a.down.sql", "begin; drop table a; end;");
    refused(&step, &["1_a.down.sql, line 1: `begin`"]).await;
}

#[tokio::test]
async fn a_migration_without_a_down_script_needs_a_word_on_its_undo() {
    let Some(database) = any_database() else { return };
    let home = directory(&[("1_a.sql", "create table a ();")]);
    refused(&migrate(&database, home.path(), json!({})), &["1_a.sql: there is no down script", "irreversible: REASON"])
        .await;
    let with = |more: serde_json::Value| {
        let mut with = json!({ "target": "db", "directory": home.path() });
        with.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        step(&database, "postgres.migrate", with)
    };
    let made = with(json!({ "irreversible": "the table is filled by others at once" })).unwrap();
    assert_eq!(made.irreversible_reason(), Some("the table is filled by others at once"));
    let error = with(json!({ "undo": { "restore": "backup" } })).unwrap_err();
    assert!(error.message.contains("written after the backup would be lost"), "{error:?}");
    let error = with(json!({ "undo": { "writes": "stop" } })).unwrap_err();
    assert_eq!(error.key.as_deref(), Some("undo.writes"));
    let error = with(json!({ "irreversible": " " })).unwrap_err();
    assert_eq!(error.key.as_deref(), Some("irreversible"));
    let error = with(json!({ "directory": null })).unwrap_err();
    assert_eq!(error.key.as_deref(), Some("directory"));
}

#[tokio::test]
async fn a_script_that_fails_is_told_with_file_and_line_and_leaves_what_was_before_it() {
    let Some(database) = any_database() else { return };
    let home = directory(&[
        ("1_a.up.sql", "create table a (id int);"),
        ("1_a.down.sql", "drop table a;"),
        ("2_b.up.sql", "create table b (id int);\n\ninsert into a\n  values ('x');\n"),
        ("2_b.down.sql", "drop table b;"),
    ]);
    let before = database.schema();
    let step = migrate(&database, home.path(), json!({}));
    let test = TestContext::new("schema");
    let (record, _) = prepare(&step, &test.forward()).await.unwrap();
    let error = step.apply(&test.forward(), &record).await.unwrap_err();
    let text = said(&error);
    assert!(
        text.contains("2_b.up.sql, line 4, failed: invalid input syntax for type integer: \"x\" (22P02)"),
        "{text}"
    );
    assert_eq!(error.class(), Class::Permanent);
    assert_eq!(database.text("select version from _sqlx_migrations"), "1");
    assert_eq!(database.text("select to_regclass('b') is null"), "t");
    undo(&step, &test, &record).await;
    assert_eq!(database.schema(), before);

    write(home.path(), "2_b.up.sql", "create index concurrently i on a (id);\n");
    write(home.path(), "2_b.down.sql", "drop index i;");
    let (record, _) = prepare(&step, &test.forward()).await.unwrap();
    let error = step.apply(&test.forward(), &record).await.unwrap_err();
    assert!(error.hint().unwrap().contains("begin the file with `-- no-transaction`"), "{}", said(&error));
    undo(&step, &test, &record).await;
    assert_eq!(database.schema(), before);
}

#[tokio::test]
async fn a_script_changed_after_it_was_prepared_does_not_run() {
    let Some(database) = any_database() else { return };
    let home = directory(&[("1_a.up.sql", "create table a ();"), ("1_a.down.sql", "drop table a;")]);
    let step = migrate(&database, home.path(), json!({}));
    let test = TestContext::new("schema");
    let (record, _) = prepare(&step, &test.forward()).await.unwrap();
    write(home.path(), "1_a.up.sql", "create table other ();");
    let error = step.apply(&test.forward(), &record).await.unwrap_err();
    assert!(error.message().contains("1_a.up.sql was changed after the step was prepared"), "{}", said(&error));
    undo(&step, &test, &record).await;
    assert_eq!(database.text("select count(*) from pg_namespace where nspname = '_upgrade'"), "0");
}

#[tokio::test]
async fn the_plan_tells_what_an_undo_discards_and_which_locks_are_taken() {
    let Some(database) = any_database() else { return };
    database.execute("create table big (id int primary key)");
    let home = directory(&[
        ("1_a.up.sql", "create table a (id int);"),
        ("1_a.down.sql", "drop table a;"),
        ("2_b.up.sql", "alter table big add column b int;"),
        ("2_b.down.sql", "alter table big drop column b;"),
        ("3_c.up.sql", "create function c() returns int language sql as 'select 1';"),
        ("3_c.down.sql", "drop function c();"),
    ]);
    let before = database.schema();
    let step = migrate(&database, home.path(), json!({ "dry_run": true }));
    let (_, changes) = prepare(&step, &TestContext::new("schema").dry_run().forward()).await.unwrap();
    let lost: Vec<_> = changes.iter().map(|change| change.undo_loses.as_deref()).collect();
    assert_eq!(lost, [Some("table a"), Some("column big.b"), None]);
    let summary = |at: usize| changes[at].summary.clone().unwrap();
    assert!(summary(0).contains("no strong lock"), "{}", summary(0));
    assert!(summary(1).contains("AccessExclusiveLock on big"), "{}", summary(1));
    assert!(summary(2).contains("no strong lock"), "{}", summary(2));
    assert_eq!(database.schema(), before);
    let pending = step.pending(&TestContext::new("schema").dry_run().forward()).await.unwrap();
    assert_eq!(
        pending.iter().map(|script| script.file.as_str()).collect::<Vec<_>>(),
        ["1_a.up.sql", "2_b.up.sql", "3_c.up.sql"]
    );

    // In a plan, what fails now may be what an earlier step makes possible.
    write(home.path(), "2_b.up.sql", "select 1;\nselect 2;\nalter table not_yet add column b int;");
    let (_, changes) = prepare(&step, &TestContext::new("schema").dry_run().forward()).await.unwrap();
    assert!(changes[1].summary.as_ref().unwrap().contains("fails now: 2_b.up.sql, line 3, failed"), "{changes:?}");
    let error = prepare(&step, &TestContext::new("schema").forward()).await.unwrap_err();
    assert!(error.message().contains("not_yet"), "{}", said(&error));
    // Nor does a plan fail because the directory comes with a release.
    let later = migrate(&database, &home.path().join("later"), json!({}));
    let (_, changes) = prepare(&later, &TestContext::new("schema").dry_run().forward()).await.unwrap();
    assert!(changes[0].summary.as_ref().unwrap().contains("not there now"), "{changes:?}");
    refused(&later, &["cannot be read", "check `directory`"]).await;
}
