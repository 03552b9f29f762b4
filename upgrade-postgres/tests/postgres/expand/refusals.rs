//! What cannot be kept in step is refused in the plan, with a remedy; and how other failures read.

#![cfg(test)]

use serde_json::{Value, json};
use upgrade_core::error::{Class, StepError};
use upgrade_core::step::Prepared;
use upgrade_testbed::postgres::Database;

use super::Run;
use crate::world::{any_database, step};

fn rename() -> Value {
    json!({ "rename": { "column": "c", "to": "d" } })
}

async fn refused(database: &Database, change: &Value) -> StepError {
    let before = database.schema();
    let error = Run::new(database, "t", change).prepare().await.expect_err(&change.to_string());
    assert_eq!(error.class(), Class::Permanent, "{error}");
    assert!(error.hint().is_some(), "{error}");
    assert_eq!(database.schema(), before);
    error
}

#[tokio::test]
async fn what_cannot_be_kept_in_step_is_refused_with_a_remedy() {
    for (setup, what, remedy) in [
        ("create table t (id int, c int) partition by list (c)", "not an ordinary table", "partitioned"),
        (
            "create table p (c int) partition by list (c); create table t partition of p default",
            "partition",
            "migration",
        ),
        ("create table p (c int); create table t (x int) inherits (p)", "inherit", "migration"),
        ("create table t (c int generated always as identity)", "identity", "DROP IDENTITY"),
        ("create table t (x int, c int generated always as (x + 1) stored)", "generated", "migration"),
        (
            "create table t (c int, x int generated always as (c + 1) stored)",
            "default value for column x",
            "generated column",
        ),
        ("create table t (c int); create view v as select c from t", "view v", "drop the view"),
        (
            "create table t (c int unique); create table u (c int references t (c))",
            "constraint u_c_fkey",
            "postgres.foreign_key",
        ),
        ("create table t (c int, exclude (c with =))", "constraint t_c_excl", "drop it"),
        ("create table t (c int); create publication pub for table t", "published", "publication"),
        (
            "create table t (id int, c int); create table s (c int); create trigger u before update of c on t for each row \
          execute function suppress_redundant_updates_trigger()",
            "trigger u",
            "drop the trigger",
        ),
        ("create table t (c int); create rule r as on delete to t do instead nothing", "rules", "triggers"),
        (
            "create table t (c int not null unique); alter table t replica identity using index t_c_key",
            "t_c_key",
            "replica identity",
        ),
        (
            "create table t (c int); create function f() returns trigger language plpgsql as 'begin NEW.c := 1; return NEW; end'; \
             create trigger speaks before insert on t for each row execute function f()",
            "trigger speaks",
            "drop the trigger",
        ),
        (
            "create table t (c int); create function f() returns trigger language plpgsql as 'begin return NEW; end'; \
             create trigger \"~~~last\" before insert on t for each row execute function f()",
            "would fire after ours",
            "rename it",
        ),
        ("create table t (a int, c int); create statistics s on a, c from t", "statistics object s", "drop it"),
        ("create table t (c int); create policy p on t using (c > 0)", "policy p", "drop it"),
        ("create table t (c int, d int)", "has a column \"d\" already", "another name"),
        ("create table t (x int)", "has no column \"c\"", "correct `column`"),
        ("select 1", "is not there", "correct `table`"),
    ] {
        let Some(database) = any_database() else { return };
        database.execute(setup);
        let error = refused(&database, &rename()).await;
        let hint = error.hint().unwrap();
        assert!(error.message().contains(what), "{setup}: {error}");
        assert!(hint.contains(remedy), "{setup}: {hint}");
    }
}

#[tokio::test]
async fn mistakes_show_before_anything_is_changed() {
    let Some(database) = any_database() else { return };
    database.execute("create table t (id int, c int default 5)");
    for (change, what) in [
        (json!({ "retype": { "column": "c", "type": "no_such", "as": "d" } }), "type \"no_such\" does not exist"),
        (
            json!({ "retype": { "column": "c", "type": "text", "up": "e", "as": "d", "default": "null" } }),
            "column \"e\" does not exist",
        ),
        (json!({ "retype": { "column": "c", "type": "text", "down": "c", "as": "d" } }), "column \"c\" does not exist"),
        (json!({ "retype": { "column": "c", "type": "text", "up": "c::text", "as": "d" } }), "has the default 5"),
        (json!({ "add": { "column": "d", "type": "int", "default": "'x'" } }), "invalid input syntax"),
        (
            json!({ "retype": { "column": "c", "type": "text; drop table t --", "as": "d" } }),
            "cannot insert multiple commands",
        ),
    ] {
        let error = refused(&database, &change).await;
        assert!(error.message().contains(what), "{change}: {error}");
    }
}

#[tokio::test]
async fn a_configuration_that_contradicts_itself_names_its_key() {
    let Some(database) = any_database() else { return };
    for (with, key) in [
        (json!({}), "table"),
        (json!({ "rename": { "column": "a", "to": "b" }, "not_null": { "column": "a", "up": "1" } }), "table"),
        (json!({ "rename": { "column": "a", "to": "a" } }), "rename.to"),
        (json!({ "retype": { "column": "a", "type": "int" } }), "retype.as"),
        (json!({ "not_null": { "column": "a", "up": "1" } }), "not_null.as"),
        (json!({ "not_null": { "column": "a", "up": " ", "as": "b" } }), "not_null.up"),
        (json!({ "add": { "column": "a", "type": "int", "not_null": true } }), "add.not_null"),
        (json!({ "add": { "column": "a", "type": "int" }, "schema": "v2" }), "schema"),
        (json!({ "rename": { "column": "a", "to": "b" }, "batch": 0 }), "batch"),
    ] {
        let mut config = json!({ "target": "db", "table": "t" });
        config.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
        let error = step(&database, "postgres.expand", config).err().unwrap_or_else(|| panic!("{with}"));
        assert_eq!(error.key.as_deref(), Some(key), "{with}: {error}");
    }
}

#[tokio::test]
async fn a_plan_does_not_fail_because_an_earlier_step_has_not_run() {
    let Some(database) = any_database() else { return };
    let mut run = Run::new(&database, "t", &rename());
    run.test = run.test.dry_run();
    let Prepared::Change { changes, .. } = run.prepare().await.unwrap() else { panic!() };
    assert!(changes[0].summary.as_ref().unwrap().contains("looked at when the step runs"), "{changes:?}");
}

#[tokio::test]
async fn the_plan_says_what_is_made_and_what_is_dropped() {
    let Some(database) = any_database() else { return };
    database.execute("create table t (id int, c int check (c > 0)); create index by_c on t (c)");
    let mut run = Run::new(&database, "t", &json!({ "retype": { "column": "c", "type": "bigint" }, "schema": "v2" }));
    let Prepared::Change { changes, .. } = run.prepare().await.unwrap() else { panic!() };
    let text: Vec<_> = changes
        .iter()
        .map(|change| format!("{} {}", change.subject, change.summary.as_deref().unwrap_or("")))
        .collect();
    let text = text.join("\n");
    for said in ["bigint", "at commit", "\"v2\".\"t\"", "index by_c", "constraint t_c_check", "filled in batches"] {
        assert!(text.contains(said), "{said}: {text}");
    }
}

#[tokio::test]
async fn values_that_do_not_fit_fail_the_step_and_rolling_back_loses_nothing() {
    for (setup, change, what, hint) in [
        (
            "create table t (id int, c text); insert into t values (1, 'seven')",
            json!({ "retype": { "column": "c", "type": "int", "as": "d" } }),
            "invalid input syntax for type integer",
            None,
        ),
        (
            "create table t (id int, c text); insert into t values (1, 'seven')",
            json!({ "retype": { "column": "c", "type": "varchar(3)", "as": "d" } }),
            "value too long",
            None,
        ),
        (
            "create table t (id int, c text unique); insert into t values (1, 'a'), (2, 'A')",
            json!({ "retype": { "column": "c", "type": "text", "up": "lower(c)", "as": "d" } }),
            "could not create unique index",
            Some("makes equal values of different ones"),
        ),
        (
            "create table t (id int, c int); insert into t values (1, null)",
            json!({ "not_null": { "column": "c", "up": "null", "as": "d" } }),
            "violates check constraint",
            None,
        ),
    ] {
        let Some(database) = any_database() else { return };
        database.execute(setup);
        let before = (database.schema(), database.contents());
        let mut run = Run::new(&database, "t", &change);
        let error = run.apply().await.unwrap_err();
        assert!(error.message().contains(what), "{error}");
        assert!(hint.is_none_or(|hint| error.hint().unwrap().contains(hint)), "{error}");
        run.rollback().await.unwrap();
        assert_eq!((database.schema(), database.contents()), before);
    }
}

#[tokio::test]
async fn what_was_made_on_a_column_since_holds_its_end_until_it_is_gone() {
    let Some(database) = any_database() else { return };
    database.execute("create table t (id int, c int)");
    let mut run = Run::new(&database, "t", &rename());
    run.apply().await.unwrap();
    for column in ["d", "c"] {
        database.execute(&format!("create view v as select {column} from t"));
        let error = if column == "d" { run.rollback().await } else { run.commit().await }.unwrap_err();
        assert!(error.hint().unwrap().contains("drop it"), "{error} {:?}", error.hint());
        assert!(error.detail().unwrap().contains("view v"), "{error}");
        database.execute("drop view v");
    }
    run.commit().await.unwrap();
}

#[tokio::test]
async fn two_changes_of_one_table_do_not_overlap() {
    let Some(database) = any_database() else { return };
    database.execute("create table t (id int, c int, e int)");
    let mut run = Run::new(&database, "t", &rename());
    run.apply().await.unwrap();
    let error = refused(&database, &json!({ "rename": { "column": "e", "to": "f" } })).await;
    assert!(error.message().contains("another change"), "{error}");
    run.rollback().await.unwrap();
}

#[tokio::test]
async fn a_trigger_that_somebody_switched_off_is_a_conflict() {
    let Some(database) = any_database() else { return };
    database.execute("create table t (id int, c int)");
    let mut run = Run::new(&database, "t", &rename());
    run.apply().await.unwrap();
    database.execute("alter table t disable trigger user");
    for error in [run.rollback().await.unwrap_err(), run.commit().await.unwrap_err()] {
        assert!(error.as_conflict().is_some(), "{error}");
    }
    database.execute(
        "do $$ declare n name; begin select tgname into n from pg_trigger where tgrelid = 't'::regclass; \
                      execute format('alter table t enable always trigger %I', n); end $$",
    );
    run.rollback().await.unwrap();
}

#[tokio::test]
async fn a_user_who_may_not_is_told_before_anything_is_changed() {
    let Some(database) = any_database() else { return };
    let role = format!("{}_owner", database.name());
    database.execute(&format!(
        "create role {role} login password 'of-the-owner'; grant create on schema public to {role}; \
         grant create on database {} to {role}; \
         create table other (c int); create table t (c int); insert into t values (1); alter table t owner to {role}; \
         create function f() returns trigger language plpgsql as 'begin return NEW; end'",
        database.name()
    ));
    let url = database.url().replacen("tester:secret-of-tester", &format!("{role}:of-the-owner"), 1);
    let run = |table: &str| {
        let config = json!({ "target": "db", "table": table, "rename": { "column": "c", "to": "d" } });
        let step = upgrade_postgres::steps::Expand::from_config(
            serde_json::from_value(config).unwrap(),
            &crate::world::build_context(&url),
        );
        Run { step: step.unwrap(), test: upgrade_core::testkit::TestContext::new("expand"), undo: None }
    };
    let error = run("other").prepare().await.unwrap_err();
    assert!(error.message().contains("does not own"), "{error}");
    // An owner who is no superuser can make the change, but would fire the triggers of others.
    let mut owned = run("t");
    owned.apply().await.unwrap();
    owned.rollback().await.unwrap();
    database.execute("create trigger audit after update on t for each row execute function f()");
    let error = run("t").prepare().await.unwrap_err();
    assert!(error.message().contains("would fire trigger audit"), "{error}");
    database.execute(&format!("drop owned by {role} cascade; drop role {role}"));
}
