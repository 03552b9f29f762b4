//! What was applied is undone, whatever became of directory, connection or statement.

#![cfg(test)]

use serde_json::json;
use upgrade_core::step::{Rollback, Step};
use upgrade_core::testkit::TestContext;

use super::directory::{apply, apply_and_commit, directory, migrate, prepare, refused, said, undo, write};
use crate::world::any_database;

#[tokio::test]
async fn the_down_script_that_went_with_the_up_script_undoes_it() {
    let Some(database) = any_database() else { return };
    let home = directory(&[
        ("1_a.up.sql", "create table a (id int);"),
        ("1_a.down.sql", "drop table a;"),
        ("2_b.up.sql", "create table b (id int);"),
        ("2_b.down.sql", "drop table b;"),
    ]);
    let before = database.schema();
    let step = migrate(&database, home.path(), json!({}));
    let test = TestContext::new("schema");
    let (record, _) = apply(&step, &test).await.unwrap();
    // The release is gone, and another one has another down script.
    write(home.path(), "1_a.down.sql", "drop table something_else;");
    std::fs::remove_file(home.path().join("2_b.down.sql")).unwrap();
    undo(&step, &test, &record).await;
    undo(&step, &test, &record).await;
    assert_eq!(database.schema(), before);
}

#[tokio::test]
async fn an_unfinished_script_outside_of_a_transaction_leaves_no_invalid_index() {
    let Some(database) = any_database() else { return };
    database.execute("create table a (id int, other int); insert into a values (1, 1), (1, 2)");
    let home = directory(&[
        (
            "1_i.up.sql",
            "-- no-transaction\ncreate index concurrently first on a (other);\n\
             create unique index concurrently second on a (id);\n",
        ),
        ("1_i.down.sql", "-- no-transaction\ndrop index concurrently second;\ndrop index concurrently first;\n"),
    ]);
    let before = database.schema();
    let step = migrate(&database, home.path(), json!({}));
    let test = TestContext::new("schema");
    let (record, _) = prepare(&step, &test.forward()).await.unwrap();
    let error = step.apply(&test.forward(), &record).await.unwrap_err();
    assert!(said(&error).contains("1_i.up.sql, line 3, failed: could not create unique index"), "{}", said(&error));
    assert_eq!(database.text("select count(*) from pg_index where not indisvalid"), "0");
    // Mended, it goes on where it stopped.
    database.execute("delete from a where other = 2");
    step.apply(&test.forward(), &record).await.unwrap();
    assert_eq!(database.text("select count(*) from pg_indexes where tablename = 'a'"), "2");
    undo(&step, &test, &record).await;
    assert_eq!(database.schema(), before);
    // Not mended, what there is of it is undone.
    database.execute("insert into a values (1, 2)");
    let (record, _) = prepare(&step, &test.forward()).await.unwrap();
    step.apply(&test.forward(), &record).await.unwrap_err();
    undo(&step, &test, &record).await;
    assert_eq!(database.schema(), before);
}

#[tokio::test]
async fn an_index_that_a_crash_left_invalid_is_dropped_and_built_again() {
    let Some(database) = any_database() else { return };
    database.execute("create table a (id int); insert into a values (1), (1); create table b (id int)");
    let home = directory(&[
        ("1_i.up.sql", "-- no-transaction\ncreate index concurrently i on a (id);\n"),
        ("1_i.down.sql", "drop index i;\n"),
    ]);
    let step = migrate(&database, home.path(), json!({}));
    let test = TestContext::new("schema");
    let (record, _) = prepare(&step, &test.forward()).await.unwrap();
    // As a crash in the middle of the statement leaves it: the note, and an INVALID index of that name.
    step.apply(&test.forward(), &record).await.unwrap();
    database.execute(
        "delete from _sqlx_migrations; \
         update _upgrade.ledger set value = '{\"state\": \"started\", \"done\": 0, \"running\": {\"statement\": \
           \"create index concurrently i on a (id)\", \"indexes\": []}}' where item = 'migration 1'; \
         update pg_index set indisvalid = false where indexrelid = 'i'::regclass",
    );
    let old = database.text("select 'i'::regclass::oid");
    step.apply(&test.forward(), &record).await.unwrap();
    assert_eq!(database.text("select indisvalid from pg_index where indexrelid = 'i'::regclass"), "t");
    assert_ne!(database.text("select 'i'::regclass::oid"), old);
    // And one that was finished after all is not built twice.
    database.execute(
        "delete from _sqlx_migrations; \
         update _upgrade.ledger set value = '{\"state\": \"started\", \"done\": 0, \"running\": {\"statement\": \
           \"create index concurrently i on a (id)\", \"indexes\": []}}' where item = 'migration 1'",
    );
    let old = database.text("select 'i'::regclass::oid");
    step.apply(&test.forward(), &record).await.unwrap();
    assert_eq!(database.text("select 'i'::regclass::oid"), old);
    undo(&step, &test, &record).await;
    assert_eq!(database.text("select count(*) from pg_namespace where nspname = '_upgrade'"), "0");
}

#[tokio::test]
async fn an_older_version_can_be_asked_for_and_that_be_undone() {
    let Some(database) = any_database() else { return };
    let home = directory(&[
        ("V1__a.sql", "create table a (id int);"),
        ("U1__a.sql", "drop table a;"),
        ("V2__v.sql", "create view v as select 1 as one;"),
        ("U2__v.sql", "drop view v;"),
        ("V3__f.sql", "create function f() returns int language sql as 'select 1';"),
        ("U3__f.sql", "drop function f();"),
    ]);
    apply_and_commit(&migrate(&database, home.path(), json!({}))).await;
    let (schema, rows) =
        (database.schema(), "select version || checksum || coalesce(down, '') from _upgrade_migrations order by 1");
    let all = database.text(rows);
    let step = migrate(&database, home.path(), json!({ "to": "1" }));
    // The history keeps the down scripts: the files of newer versions may be gone.
    std::fs::remove_file(home.path().join("U3__f.sql")).unwrap();
    let test = TestContext::new("schema");
    let (record, output) = apply(&step, &test).await.unwrap();
    assert_eq!((output.migrations, output.to.unwrap().as_str().to_owned()), (2, "1".to_owned()));
    assert_eq!(database.text("select version from _upgrade_migrations"), "1");
    assert_eq!(database.text("select to_regclass('v') is null and to_regproc('f') is null"), "t");
    undo(&step, &test, &record).await;
    assert_eq!((database.schema(), database.text(rows)), (schema, all));
    // What a downgrade discards no rollback brings back.
    let zero = migrate(&database, home.path(), json!({ "to": 0 }));
    refused(&zero, &["discards table a", "accept_data_loss"]).await;
    let zero = migrate(&database, home.path(), json!({ "to": 0, "undo": { "accept_data_loss": "it is a test" } }));
    apply_and_commit(&zero).await;
    assert_eq!(database.text("select count(*) from _upgrade_migrations"), "0");
}

#[tokio::test]
async fn settings_of_one_script_do_not_reach_the_next() {
    let Some(database) = any_database() else { return };
    database
        .execute("create schema odd; create role migrating_test_role; grant all on schema odd to migrating_test_role");
    let home = directory(&[
        ("1_a.up.sql", "select pg_catalog.set_config('search_path', '', false);\ncreate table public.a (id int);"),
        ("1_a.down.sql", "drop table a;"),
        ("2_b.up.sql", "set search_path = odd;\nset role migrating_test_role;\ncreate table b (id int);"),
        ("2_b.down.sql", "drop table odd.b;"),
        ("3_c.up.sql", "create table c (id int);"),
        ("3_c.down.sql", "drop table c;"),
    ]);
    let step = migrate(&database, home.path(), json!({}));
    let test = TestContext::new("schema");
    let applied = apply(&step, &test).await;
    let seen = database.text("select string_agg(oid::regclass::text || ' ' || (relowner::regrole = 'tester'::regrole), ',' order by relname) from pg_class where relkind = 'r' and relname in ('a', 'b', 'c')");
    let undone = match &applied {
        Ok((record, _)) => step.rollback(&test.back(), record, None).await,
        Err(_) => Ok(()),
    };
    database.execute("drop schema odd cascade; drop role migrating_test_role");
    applied.unwrap();
    undone.unwrap();
    assert_eq!(seen, "a true,odd.b false,c true");
}

#[tokio::test]
async fn what_somebody_else_built_on_top_is_left_alone() {
    let Some(database) = any_database() else { return };
    let home = directory(&[("1_a.up.sql", "create table a (id int);"), ("1_a.down.sql", "drop table a;")]);
    let step = migrate(&database, home.path(), json!({}));
    let test = TestContext::new("schema");
    let (record, _) = apply(&step, &test).await.unwrap();
    database.execute("insert into _sqlx_migrations values (2, 'theirs', now(), true, 'x', 0)");
    let error = step.rollback(&test.back(), &record, None).await.unwrap_err();
    assert!(error.as_conflict().unwrap().present.contains("version 2 on top"), "{}", said(&error));
    assert_eq!(database.text("select to_regclass('a') is not null"), "t");
    database.execute("delete from _sqlx_migrations where version = 2; update _sqlx_migrations set checksum = 'y'");
    let error = step.rollback(&test.back(), &record, None).await.unwrap_err();
    assert!(error.as_conflict().unwrap().subject.contains("migration 1"), "{}", said(&error));
    step.rollback(&test.clone().on_conflict(upgrade_core::context::OnConflict::Overwrite).back(), &record, None)
        .await
        .unwrap();
    assert_eq!(database.text("select to_regclass('a') is null"), "t");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_without_a_down_script_goes_back_to_the_backup() {
    use upgrade_core::step::Prepared;
    use upgrade_postgres::steps::Backup;

    let Some(database) = any_database() else { return };
    database.execute("create table a (id int primary key, b text); insert into a values (1, 'x'), (2, 'y')");
    let home = directory(&[
        ("1_a.up.sql", "alter table a add column c int;"),
        ("1_a.down.sql", "alter table a drop column c;"),
        ("2_b.sql", "alter table a drop column b;"),
    ]);
    let before = (database.schema(), database.contents());
    let kept = tempfile::tempdir().unwrap();
    let config = json!({ "target": "db", "to": kept.path().join("backup"), "prove": "list" });
    let backup =
        Backup::from_config(serde_json::from_value(config).unwrap(), &crate::world::build_context(&database.url()))
            .unwrap();
    let backing = TestContext::new("backup");
    let Prepared::Change { undo: made, .. } = backup.prepare(&backing.forward()).await.unwrap() else { panic!() };
    let output = backup.apply(&backing.forward(), &made).await.unwrap();

    let with = json!({ "undo": { "restore": "backup", "accept_data_loss": "nobody writes in this test" } });
    let step = migrate(&database, home.path(), with);
    let test = TestContext::new("schema");
    refused(&step, &["step `backup` has no output"]).await;
    let test = test.output("backup".parse().unwrap(), &output);
    let (record, changes) = prepare(&step, &test.forward()).await.unwrap();
    assert!(changes[1].undo_loses.as_ref().unwrap().contains("nobody writes in this test"), "{changes:?}");
    step.apply(&test.forward(), &record).await.unwrap();
    backup.commit(&backing.commit(), &made).await.unwrap();
    undo(&step, &test, &record).await;
    assert_eq!((database.schema(), database.contents()), before);
    // A crash after the exchange: the next call knows that it had begun.
    undo(&step, &test, &record).await;
    assert_eq!((database.schema(), database.contents()), before);
}

#[test]
fn an_undo_record_of_the_first_format_is_read_and_written_as_it_was() {
    use upgrade_postgres::steps::Migrate;

    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/postgres.migrate.undo.v1.json");
    let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let record = Migrate::read_undo(1, golden.clone()).unwrap();
    assert_eq!(serde_json::to_value(record).unwrap(), golden);
    Migrate::read_undo(2, golden).unwrap_err();
}
