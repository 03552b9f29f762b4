//! `postgres.sql`: what it affects, what it refuses, and what it never writes down.

#![cfg(test)]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use upgrade_core::context::OnConflict;
use upgrade_core::error::{Class, StepError};
use upgrade_core::executor::{Executor, Interrupt, Outcome, RunOptions};
use upgrade_core::file::{LoadOptions, parse};
use upgrade_core::journal::FileJournal;
use upgrade_core::secret::Secrets;
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::testkit::TestContext;
use upgrade_core::undoable::OptionalRollback;
use upgrade_core::units::Span;
use upgrade_postgres::steps::{Sql, SqlConfig, SqlUndo, UndoableSql};
use upgrade_testbed::postgres::Database;

use crate::traffic::{connect, run};
use crate::world;

const SETTINGS: &str = "create table settings (name text primary key, value text, number int); \
    insert into settings values ('mode', 'old', 1), ('limit', '100', 2), ('colour', null, null);";

fn settings() -> Option<Database> {
    let database = world::any_database()?;
    database.execute(SETTINGS);
    Some(database)
}

fn sql(database: &Database, mut with: Value) -> UndoableSql {
    with["target"] = "db".into();
    let config: SqlConfig = serde_json::from_value(with).unwrap();
    Sql::from_config(config, &world::build_context(&database.url())).unwrap().undoable().unwrap()
}

async fn undo(step: &UndoableSql, test: &TestContext) -> SqlUndo {
    match step.prepare(&test.forward()).await.unwrap() {
        Prepared::Change { undo, .. } => undo,
        other => panic!("{other:?}"),
    }
}

async fn applied(step: &UndoableSql, test: &TestContext) -> Result<u64, StepError> {
    let found = undo(step, test).await;
    Ok(step.apply(&test.forward(), &found).await?.rows)
}

fn value(database: &Database, name: &str) -> String {
    database.text(&format!("select value from settings where name = '{name}'"))
}

#[tokio::test]
async fn another_number_of_rows_leaves_nothing() {
    let Some(database) = settings() else { return };
    for (rows, holds) in [
        (json!(3), true),
        (json!(2), false),
        (json!({ "min": 1, "max": 3 }), true),
        (json!({ "max": 2 }), false),
        (json!({ "min": 4 }), false),
    ] {
        let with = json!({ "statement": "update settings set value = 'all'", "rows": rows, "undo": "select 1" });
        let (step, test) = (sql(&database, with), TestContext::new("sql"));
        let found = undo(&step, &test).await;
        let done = step.apply(&test.forward(), &found).await;
        if holds {
            assert_eq!(done.unwrap().rows, 3);
        } else {
            let error = done.unwrap_err();
            assert_eq!(error.class(), Class::Permanent);
            assert!(error.message().contains("affects 3 rows, not"), "{error}");
            assert!(error.hint().unwrap().contains("nothing was changed"));
            assert_eq!(value(&database, "mode"), "old", "{rows}");
        }
        step.rollback(&test.back(), &found, None).await.unwrap();
        database.execute("truncate settings; insert into settings values ('mode', 'old', 1), ('limit', '100', 2), ('colour', null, null)");
        assert_eq!(database.text("select to_regnamespace('_upgrade')"), "NULL");
    }
}

#[tokio::test]
async fn an_undo_of_another_number_of_rows_is_not_made() {
    let Some(database) = settings() else { return };
    let with = json!({ "statement": "update settings set value = 'new' where name = 'mode'",
        "undo": "update settings set value = 'old'", "undo_rows": 1 });
    let (step, test) = (sql(&database, with), TestContext::new("sql"));
    let found = undo(&step, &test).await;
    step.apply(&test.forward(), &found).await.unwrap();
    let error = step.rollback(&test.back(), &found, None).await.unwrap_err();
    assert!(error.message().contains("the undo affects 3 rows, not 1"), "{error}");
    assert_eq!((value(&database, "mode"), value(&database, "limit")), ("new".into(), "100".into()));
}

#[tokio::test]
async fn unless_says_that_it_is_done() {
    let Some(database) = settings() else { return };
    let with = json!({ "statement": "update settings set value = 'new' where name = 'mode'", "undo": "select 1",
        "unless": "select value = 'new' from settings where name = 'mode'" });
    let (step, test) = (sql(&database, with), TestContext::new("sql"));
    assert_eq!(applied(&step, &test).await.unwrap(), 1);
    step.commit(
        &test.commit(),
        &undo(&sql(&database, json!({ "statement": "select 1", "undo": "select 1" })), &test).await,
    )
    .await
    .unwrap();
    let prepared = step.prepare(&TestContext::new("again").forward()).await.unwrap();
    assert!(matches!(&prepared, Prepared::Unchanged { reason, .. } if reason.contains("unless")), "{prepared:?}");
}

#[tokio::test]
async fn parameters_take_the_type_that_the_statement_needs() {
    let Some(database) = settings() else { return };
    let with = json!({ "statement": "update settings set value = $1, number = $2 + 1 where name = $3 or number = $2",
        "parameters": [null, 41, "it's \\ \"odd\" $1"], "rows": 0, "undo": "select 1" });
    assert_eq!(applied(&sql(&database, with), &TestContext::new("a")).await.unwrap(), 0);
    let with = json!({ "statement": "update settings set value = $1, number = $2 + 1 where name = $3",
        "parameters": ["it's \\ \"odd\" $1", 41, "mode"], "rows": 1,
        "undo": "update settings set value = $1, number = $2 where name = 'mode'", "undo_parameters": [null, 1] });
    let (step, test) = (sql(&database, with), TestContext::new("b"));
    let found = undo(&step, &test).await;
    step.apply(&test.forward(), &found).await.unwrap();
    assert_eq!(value(&database, "mode"), "it's \\ \"odd\" $1");
    assert_eq!(database.text("select number from settings where name = 'mode'"), "42");
    step.rollback(&test.back(), &found, None).await.unwrap();
    assert_eq!(value(&database, "mode"), "NULL");
}

fn read_all(directory: &Path, text: &mut String) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => read_all(&path, text),
            false => text.push_str(&String::from_utf8_lossy(&std::fs::read(&path).unwrap())),
        }
    }
}

#[tokio::test]
async fn a_secret_parameter_is_written_down_nowhere() {
    let Some(database) = settings() else { return };
    const CANARY: &str = "canary'9f\\31-sings";
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("token"), CANARY).unwrap();
    let document = format!(
        r#"
upgrade: secrets
targets: {{ db: {target} }}
steps:
  - id: kept
    uses: postgres.sql
    with:
      target: db
      statement: insert into settings (name, value) values ('token', $1)
      parameters: [{{ file: {token} }}]
      rows: 1
      undo: delete from settings where value = $1
      undo_parameters: [{{ file: {token} }}]
      undo_rows: 1
  - id: doubled
    uses: postgres.sql
    with:
      target: db
      statement: insert into settings (name) values ($1), ($1)
      parameters: [{{ file: {token} }}]
      undo: select 1
  - id: cast
    uses: postgres.sql
    with: {{ target: db, statement: select $1::int, parameters: [{{ file: {token} }}], undo: select 1 }}
"#,
        target = world::target_yaml(&database.url()),
        token = directory.path().join("token").display(),
    );
    for (without, message) in [("cast", "duplicate key"), ("doubled", "invalid input syntax")] {
        let mut document: Value = yaml_serde::from_str(&document).unwrap();
        document["steps"].as_array_mut().unwrap().retain(|step| step["id"] != without);
        let document = document.to_string();
        let pipeline =
            parse(&document, "pipeline.yaml".as_ref(), "/".as_ref(), &LoadOptions::default(), &world::registry())
                .unwrap();
        let state = directory.path().join(format!("state-{without}"));
        let executor =
            Executor::new(Arc::new(FileJournal::open(&state).unwrap())).with_secrets(Secrets::new(Path::new("/")));
        let report = executor.run(&pipeline, &RunOptions::default(), &Interrupt::new()).await.unwrap();
        let mut text = format!("{report:?}");
        assert!(matches!(report.outcome, Outcome::RolledBack { .. }), "{text}");
        assert!(text.contains(message), "{text}");
        read_all(&state, &mut text);
        assert!(text.contains("kept") && text.contains("values ('token', $1)"), "{text}");
        for bit in ["canary", "-sings"] {
            assert!(!text.contains(bit), "{without}: {text}");
        }
        assert_eq!(database.text("select count(*) from settings"), "3");
    }
}

#[tokio::test]
async fn a_state_changed_by_somebody_else_is_left_alone_or_overwritten() {
    let Some(database) = settings() else { return };
    let with = json!({ "statement": "update settings set value = 'new' where name = 'mode'",
        "undo": "update settings set value = 'old' where name = 'mode'",
        "state": "select value from settings where name = 'mode'" });
    let step = sql(&database, with);
    let other = "update settings set value = 'other' where name = 'mode'";

    let test = TestContext::new("before");
    let found = undo(&step, &test).await;
    database.execute(other);
    let error = step.apply(&test.forward(), &found).await.unwrap_err();
    assert!(error.as_conflict().is_some() && error.hint().is_some(), "{error:?}");
    step.rollback(&test.back(), &found, None).await.unwrap();
    assert_eq!(value(&database, "mode"), "other");
    let overwriting = TestContext::new("over").on_conflict(OnConflict::Overwrite);
    step.apply(&overwriting.forward(), &found).await.unwrap();
    assert_eq!(value(&database, "mode"), "new");

    database.execute(other);
    let error = step.rollback(&TestContext::new("over").back(), &found, None).await;
    error.unwrap();
    assert_eq!(value(&database, "mode"), "other", "another run's undo does nothing");
    step.rollback(&overwriting.back(), &found, None).await.unwrap();
    assert_eq!(value(&database, "mode"), "old");

    let test = TestContext::new("after");
    let found = undo(&step, &test).await;
    step.apply(&test.forward(), &found).await.unwrap();
    database.execute(other);
    let error = step.rollback(&test.back(), &found, None).await.unwrap_err();
    assert!(error.as_conflict().is_some(), "{error:?}");
    assert_eq!(value(&database, "mode"), "other");
}

#[tokio::test]
async fn what_cannot_run_in_a_transaction_says_where_it_can() {
    let Some(database) = settings() else { return };
    for statement in ["vacuum settings", "create index concurrently by_value on settings (value)"] {
        let with = json!({ "statement": statement, "undo": "select 1" });
        let (step, test) = (sql(&database, with), TestContext::new("sql"));
        let found = undo(&step, &test).await;
        let error = step.apply(&test.forward(), &found).await.unwrap_err();
        assert_eq!(error.class(), Class::Permanent);
        assert!(error.message().contains("cannot run inside a transaction block"), "{error}");
        let hint = error.hint().unwrap();
        assert!(hint.contains("postgres.index") && hint.contains("-- no-transaction"), "{hint}");
        step.rollback(&test.back(), &found, None).await.unwrap();
        assert_eq!(database.text("select to_regnamespace('_upgrade')"), "NULL");
    }
    for (key, statement) in [
        ("statement", "update settings set value = 'x';\ncommit;"),
        ("statement", "begin; select 1"),
        ("undo", "rollback"),
    ] {
        let mut with = json!({ "target": "db", "statement": "select 1", "undo": "select 1" });
        with[key] = statement.into();
        let error = world::step(&database, "postgres.sql", with).unwrap_err();
        assert_eq!(error.key.as_deref(), Some(key), "{error}");
        assert!(error.message.contains("a transaction") && error.hint.unwrap().contains("COMMIT"), "{statement}");
    }
    let with = json!({ "statement": "savepoint a; update settings set value = 'x'; rollback to savepoint a", "undo": "select 1" });
    applied(&sql(&database, with), &TestContext::new("savepoint")).await.unwrap();
    assert_eq!(value(&database, "mode"), "old");
    let body = "do $$ begin update settings set value = 'x' where name = 'limit'; end $$";
    applied(&sql(&database, json!({ "statement": body, "undo": "select 1" })), &TestContext::new("body"))
        .await
        .unwrap();
    assert_eq!(value(&database, "limit"), "x");
}

#[test]
fn without_an_undo_it_is_irreversible() {
    let Some(database) = settings() else { return };
    let with = |with: Value| world::step(&database, "postgres.sql", with);
    let step = with(json!({ "target": "db", "statement": "delete from settings" })).unwrap();
    assert!(step.irreversible_reason().is_some());
    assert!(
        with(json!({ "target": "db", "statement": "select 1", "undo": "select 1" }))
            .unwrap()
            .irreversible_reason()
            .is_none()
    );
    for (wrong, key) in [
        (json!({ "target": "db", "statement": "  " }), "statement"),
        (json!({ "target": "db", "statement": "select 1", "undo": "" }), "undo"),
        (json!({ "target": "db", "statement": "select 1", "undo_rows": 1 }), "undo_parameters"),
        (json!({ "target": "db", "statement": "select 1", "rows": "many" }), "rows"),
        (json!({ "target": "nothing", "statement": "select 1" }), "target"),
    ] {
        assert_eq!(with(wrong.clone()).unwrap_err().key.as_deref(), Some(key), "{wrong}");
    }
}

#[tokio::test]
async fn a_plan_does_not_need_the_table_to_be_there() {
    let Some(database) = world::any_database() else { return };
    let with = json!({ "statement": "update later set value = $1", "parameters": ["x"], "rows": 1, "undo": "select 1",
        "state": "select value from later", "unless": "select exists (select from later where value = 'x')" });
    let step = sql(&database, with);
    let prepared = step.prepare(&TestContext::new("plan").dry_run().forward()).await.unwrap();
    let Prepared::Change { changes, .. } = prepared else { panic!("{prepared:?}") };
    assert_eq!(changes[0].subject, "update later set value = $1");
    assert_eq!(changes[0].summary.as_deref(), Some("affects 1 rows, or it fails"));
    let error = step.prepare(&TestContext::new("run").forward()).await.unwrap_err();
    assert!(error.message().contains("\"later\" does not exist"), "{error}");
}

#[tokio::test]
async fn a_wrong_statement_leaves_nothing_of_the_ones_before_it() {
    let Some(database) = settings() else { return };
    let with = json!({ "statement": "update settings set value = 'x'; insert into settings values ('mode')", "undo": "select 1" });
    let error = applied(&sql(&database, with), &TestContext::new("sql")).await.unwrap_err();
    assert_eq!(error.class(), Class::Permanent);
    assert!(error.message().contains("duplicate key"), "{error}");
    assert_eq!(value(&database, "mode"), "old");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_that_is_held_is_waited_for_and_a_terminated_backend_does_it_once() {
    let Some(database) = settings() else { return };
    let with = json!({ "statement": "alter table settings add column at timestamptz; update settings set number = number + 1",
        "undo": "alter table settings drop column at; update settings set number = number - 1" });
    let (step, test) = (Arc::new(sql(&database, with)), TestContext::new("locked"));
    let found = Arc::new(undo(&step, &test).await);
    let mut reader = connect(&database).await;
    run(&mut reader, "begin; select * from settings").await;
    let applying = tokio::spawn({
        let (step, found, cx) = (step.clone(), found.clone(), test.forward());
        async move { step.apply(&cx, &found).await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    database.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity \
         where datname = current_database() and application_name like 'upgrade/locked/%'",
    );
    let error = applying.await.unwrap().unwrap_err();
    assert_eq!(error.class(), Class::Transient, "{error:?}");
    run(&mut reader, "rollback").await;
    for _ in 0..2 {
        step.apply(&test.forward(), &found).await.unwrap();
        assert_eq!(database.text("select sum(number) from settings"), "5");
    }
    for _ in 0..2 {
        step.rollback(&test.back(), &found, None).await.unwrap();
        assert_eq!(database.text("select sum(number) from settings"), "3");
    }
}

#[tokio::test]
async fn a_server_that_takes_no_writes_is_refused_before_anything_changes() {
    let Some(database) = settings() else { return };
    database.execute(&format!("alter database \"{}\" set default_transaction_read_only = on", database.name()));
    let step = sql(&database, json!({ "statement": "select 1", "undo": "select 1" }));
    let error = step.prepare(&TestContext::new("sql").forward()).await.unwrap_err();
    assert!(error.message().contains("default_transaction_read_only"), "{error}");
    assert!(error.hint().is_some());
    let slow =
        world::target_with(&database.url(), |config| config.statement_timeout = Some(Span(Duration::from_millis(100))));
    let config: SqlConfig = serde_json::from_value(
        json!({ "target": "db", "statement": "select 1", "unless": "select pg_sleep(10) is null" }),
    )
    .unwrap();
    database.execute(&format!(
        "begin read write; alter database \"{}\" reset default_transaction_read_only; commit",
        database.name()
    ));
    let step = Sql::from_config(config, &world::build_context_with(slow)).unwrap();
    let error = step.prepare(&TestContext::new("sql").forward()).await.unwrap_err();
    assert!(
        error.message().contains("statement timeout") && error.hint().unwrap().contains("`statement_timeout`"),
        "{error:?}"
    );
}
