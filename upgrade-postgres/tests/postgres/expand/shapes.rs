//! What each shape shows of what is written through the other, value by value.

#![cfg(test)]

use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use upgrade_core::step::Prepared;
use upgrade_testbed::postgres::{Database, Version};

use super::{Run, nothing_left};
use crate::world::{any_database, database};

async fn expanded(setup: &str, change: Value) -> Option<(Database, Run)> {
    let database = any_database()?;
    database.execute(setup);
    let mut run = Run::new(&database, "t", &change);
    run.apply().await.unwrap_or_else(|error| panic!("{error}: {:?} {:?}", error.hint(), error.detail()));
    Some((database, run))
}

#[tokio::test]
async fn null_and_defaults_and_both_sides_go_by_the_stated_rules() {
    let Some((database, run)) = expanded(
        "create table t (id int primary key, c int default 500); insert into t values (1, 100), (2, null)",
        json!({ "retype": { "column": "c", "type": "numeric", "up": "c / 100.0", "down": "(d * 100)::int",
                            "default": "7.5", "as": "d" } }),
    )
    .await
    else {
        return;
    };
    database.execute(
        "insert into t (id) values (3); insert into t (id, c) values (4, null); insert into t (id, d) values (5, 1.25); \
         insert into t (id, c, d) values (6, 1, 2); insert into t (id, d) values (7, null); \
         insert into t (id, c) values (8, 800); update t set c = 900, d = 1 where id = 8; \
         insert into t (id, c) values (9, 900); update t set d = null where id = 9; \
         insert into t (id, d) values (10, 10); update t set c = null where id = 10; \
         insert into t (id, d) values (11, 0.001); update t set c = c where id = 11; \
         insert into t (id, c) values (1, 0) on conflict (id) do update set c = excluded.c + 1;",
    );
    let seen = database.text("select format('%s: %s %s', id, c, trim_scale(d)) from t order by id");
    assert_eq!(
        seen,
        "1: 1 0.01\n2:  \n3: 500 5\n4:  \n5: 125 1.25\n6: 200 2\n7: 500 5\n8: 100 1\n9:  \n10:  \n11: 0 0.001"
    );
    run.commit().await.unwrap();
    database.execute("insert into t (id) values (12)");
    assert_eq!(database.text("select d from t where id in (11, 12) order by id"), "0.001\n7.5");
    assert_eq!(
        database.text(
            "select attname from pg_attribute where attrelid = 't'::regclass and attnum > 0 and not attisdropped"
        ),
        "id\nd"
    );
    nothing_left(&database);
}

#[tokio::test]
async fn through_the_view_null_and_defaults_are_what_was_meant() {
    let Some((database, run)) = expanded(
        "create table t (id int primary key, c int default 500); create role upgrade_test_reader; \
         grant select, insert, update on t to upgrade_test_reader",
        json!({ "retype": { "column": "c", "type": "numeric", "up": "c / 100.0", "down": "(c * 100)::int", "default": "7.5" },
                "schema": "v2" }),
    )
    .await
    else {
        return;
    };
    database.execute(
        "insert into t (id) values (1); \
         set search_path to v2, public; \
         insert into t (id) values (2); insert into t (id, c) values (3, null), (4, 1.5); \
         update t set c = 2 where id = 1; \
         insert into t (id, c) values (4, 0) on conflict (id) do update set c = t.c + 1 + excluded.c; \
         set role upgrade_test_reader; select * from t; update t set c = c + 1 where id = 4; update t set c = c - 1 where id = 4; \
         update public.t set c = c where id = 1; reset role",
    );
    assert_eq!(
        database.text("select format('%s: %s', id, c) from public.t order by id"),
        "1: 200\n2: 750\n3: \n4: 250"
    );
    assert_eq!(
        database.text("select format('%s: %s', id, trim_scale(c)) from v2.t order by id"),
        "1: 2\n2: 7.5\n3: \n4: 2.5"
    );
    // Statements that new code prepared before go on after.
    let mut prepared = PgConnection::connect(&database.url()).await.unwrap();
    sqlx::query("set search_path to v2, public").execute(&mut prepared).await.unwrap();
    let mut sees = async || {
        let rows = sqlx::query("select * from t").fetch_all(&mut prepared).await.unwrap();
        sqlx::query("update t set c = c where id = $1").bind(1).execute(&mut prepared).await.unwrap();
        rows.len()
    };
    assert_eq!(sees().await, 4);
    run.commit().await.unwrap();
    assert_eq!(sees().await, 4);
    database.execute("drop owned by upgrade_test_reader; drop role upgrade_test_reader");
    assert_eq!(
        database.text("select format('%s: %s', id, trim_scale(c)) from t order by id"),
        "1: 2\n2: 7.5\n3: \n4: 2.5"
    );
    nothing_left(&database);
}

#[tokio::test]
async fn a_type_without_an_operator_for_equality_is_kept_in_step() {
    let Some((database, run)) = expanded(
        r#"create table t (id int primary key, c json); insert into t values (1, '{"a": 1}'), (2, null)"#,
        json!({ "retype": { "column": "c", "type": "jsonb", "as": "d" } }),
    )
    .await
    else {
        return;
    };
    database.execute(r#"update t set c = '{"a": 2}' where id = 2; update t set d = '[ 3]' where id = 1"#);
    assert_eq!(database.text("select format('%s %s', c, d) from t order by id"), "[3] [3]\n{\"a\": 2} {\"a\": 2}");
    run.rollback().await.unwrap();
    assert_eq!(database.text("select c from t order by id"), "[3]\n{\"a\": 2}");
    nothing_left(&database);
}

#[tokio::test]
async fn filling_fires_nobody_elses_triggers_and_writes_do() {
    let Some((database, run)) = expanded(
        "create table t (id int primary key, c text, touched int default 0); insert into t values (1, 'a'), (2, 'b'); \
         create function touch() returns trigger language plpgsql as 'begin NEW.touched := NEW.touched + 1; return NEW; end'; \
         create trigger touch before update on t for each row execute function touch()",
        json!({ "rename": { "column": "c", "to": "d" } }),
    )
    .await
    else {
        return;
    };
    assert_eq!(database.text("select sum(touched) from t"), "0");
    database.execute("update t set d = 'z' where id = 2");
    assert_eq!(database.text("select format('%s %s %s', c, d, touched) from t order by id"), "a a 0\nz z 1");
    run.rollback().await.unwrap();
    assert_eq!(database.text("select c from t order by id"), "a\nz");
}

#[tokio::test]
async fn a_column_is_added_without_writing_the_table_where_the_server_can_do_that() {
    for (add, rows, after) in [
        (json!({ "column": "d", "type": "int" }), 0, "1: \n2: \n3: "),
        (json!({ "column": "d", "type": "int", "default": "7", "not_null": true }), 0, "1: 7\n2: 7\n3: 7"),
        (json!({ "column": "d", "type": "int", "not_null": true, "up": "id * 2" }), 2, "1: 2\n2: 4\n3: 6"),
        (json!({ "column": "d", "type": "int", "default": "9", "up": "id * 2" }), 2, "1: 2\n2: 4\n3: 9"),
        (
            json!({ "column": "d", "type": "float", "default": "random() * 0 + 4", "not_null": true }),
            2,
            "1: 4\n2: 4\n3: 4",
        ),
    ] {
        let Some(database) = any_database() else { return };
        database.execute("create table t (id int primary key); insert into t values (1), (2)");
        let node = database.text("select pg_relation_filenode('t')");
        let mut run = Run::new(&database, "t", &json!({ "add": add }));
        let output = run.apply().await.unwrap();
        database.execute("insert into t values (3)");
        assert_eq!(output.rows, rows, "{add}");
        assert_eq!(database.text("select format('%s: %s', id, d) from t order by id"), after, "{add}");
        assert_eq!(database.text("select pg_relation_filenode('t')"), node, "{add}");
        run.commit().await.unwrap();
        let not_null = add["not_null"] == true;
        assert_eq!(
            database.text("select attnotnull from pg_attribute where attrelid = 't'::regclass and attname = 'd'"),
            if not_null { "t" } else { "f" }
        );
        nothing_left(&database);
    }
}

#[tokio::test]
async fn what_is_so_already_is_unchanged() {
    let Some(database) = any_database() else { return };
    database.execute("create table t (id int primary key, c numeric(12,2) not null, d int default 5)");
    for change in [
        json!({ "add": { "column": "d", "type": "integer", "default": "5" } }),
        json!({ "rename": { "column": "old", "to": "d" } }),
        json!({ "retype": { "column": "c", "type": "decimal(12,2)" }, "schema": "v2" }),
        json!({ "retype": { "column": "gone", "type": "numeric(12,2)", "as": "c" } }),
        json!({ "not_null": { "column": "c", "up": "0" }, "schema": "v2" }),
    ] {
        let prepared = Run::new(&database, "t", &change).prepare().await.unwrap();
        assert!(matches!(prepared, Prepared::Unchanged { .. }), "{change}: {prepared:?}");
    }
}

#[tokio::test]
async fn all_that_stands_on_a_column_is_there_again_under_its_name() {
    for version in Version::ALL {
        let Some(database) = database(version) else { continue };
        database.execute(
            "create table p (k int primary key); insert into p values (1), (2); \
             create table t (id serial primary key, c int not null default 1 check (c > 0), k int references p on delete cascade, \
               constraint once unique (c, k) deferrable initially deferred, constraint less check (c < id * 1000)); \
             insert into t (c, k) values (1, 1), (2, 2); \
             create index \"some\" on t (c) where c <> 3; create index other on t ((c + 1), id); comment on column t.c is 'it''s c'; \
             alter table t alter c set statistics 77",
        );
        let names = || {
            database.text(
                "select name from (select conname::text as name from pg_constraint where conrelid = 't'::regclass \
             union select indexrelid::regclass::text from pg_index where indrelid = 't'::regclass) n order by 1",
            )
        };
        let (before, schema) = (names(), database.schema());
        for change in [
            json!({ "retype": { "column": "c", "type": "bigint" }, "schema": "v2" }),
            json!({ "retype": { "column": "id", "type": "bigint" }, "schema": "v2" }),
            json!({ "retype": { "column": "k", "type": "bigint" }, "schema": "v2" }),
        ] {
            let mut run = Run::new(&database, "t", &change);
            run.apply().await.unwrap_or_else(|error| panic!("{change}: {error}: {:?}", error.detail()));
            run.rollback().await.unwrap();
            assert_eq!(database.schema(), schema, "{change}");
        }
        for change in [
            json!({ "retype": { "column": "c", "type": "bigint" }, "schema": "v2" }),
            json!({ "retype": { "column": "id", "type": "bigint" }, "schema": "v2" }),
            json!({ "retype": { "column": "k", "type": "bigint" }, "schema": "v2" }),
        ] {
            let mut run = Run::new(&database, "t", &change);
            run.apply().await.unwrap();
            run.commit().await.unwrap();
        }
        assert_eq!(names(), before);
        let sorted = |text: &str| {
            let mut lines: Vec<String> =
                text.lines().map(|line| line.trim().trim_end_matches(',').to_owned()).collect();
            lines.sort();
            lines.join("\n")
        };
        // But for the types, and the order of the columns, all is as it was.
        let expected = schema
            .replace("c integer", "c bigint")
            .replace("    k integer\n", "    k bigint\n")
            .replace("    k integer,", "    k bigint,")
            .replace("id integer", "id bigint");
        assert_eq!(sorted(&database.schema()), sorted(&expected), "{version}");
        database.execute("insert into t (c, k) values (9, 1)");
        assert_eq!(database.text("select max(id) from t"), "3");
        nothing_left(&database);
    }
}

#[tokio::test]
async fn rows_are_looked_at_only_to_find_what_is_left_and_to_validate() {
    let Some(database) = any_database() else { return };
    database.execute("create table t (id int, c int); insert into t select n, n from generate_series(1, 5000) n");
    let scans = || {
        let count = database
            .text("select pg_stat_clear_snapshot(), 1; select seq_scan from pg_stat_user_tables where relname = 't'");
        count.lines().last().unwrap().parse::<u32>().unwrap()
    };
    let settled = async || {
        // What a session counted is seen at the latest when it has ended.
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        scans()
    };
    let node = database.text("select pg_relation_filenode('t')");
    let before = settled().await;
    let change = json!({ "not_null": { "column": "c", "up": "0", "as": "d" }, "batch": 100_000 });
    let mut run = Run::new(&database, "t", &change);
    run.apply().await.unwrap();
    let applied = settled().await;
    // One to see that nothing is left to fill, one to validate: filling goes by pages, and SET NOT NULL, under the
    // strong lock, needs no look of its own.
    assert_eq!(applied - before, 2);
    run.commit().await.unwrap();
    assert_eq!(settled().await, applied);
    assert_eq!(database.text("select pg_relation_filenode('t')"), node);
}

#[tokio::test]
async fn names_may_hold_anything() {
    let Some(database) = any_database() else { return };
    database.execute(
        r#"create schema "odd.schema"; set search_path to "odd.schema";
           create table "Odd ""table'" (id int primary key, "Am ou""nt'$1" int default 3 check ("Am ou""nt'$1" <> 7), "new" int, "old" int, tg_op int);
           insert into "Odd ""table'" values (1, 10, 1, 1, 1), (2, null, 1, 1, 1);
           create unique index "by ON it" on "Odd ""table'" ("Am ou""nt'$1", id) where "Am ou""nt'$1" > 0"#,
    );
    let before = database.schema();
    let change = json!({ "retype": { "column": "Am ou\"nt'$1", "type": "bigint", "up": "\"Am ou\"\"nt'$1\" * \"new\" * tg_op",
                                     "down": "\"Am ou\"\"nt'$1\" * \"old\"", "default": "4" }, "schema": "V 2" });
    let table = r#""odd.schema"."Odd ""table'""#;
    for commits in [false, true] {
        let mut run = Run::new(&database, table, &change);
        run.apply().await.unwrap_or_else(|error| panic!("{error}: {:?}", error.detail()));
        database.execute(
            r#"set search_path to "V 2", "odd.schema"; update "Odd ""table'" set "Am ou""nt'$1" = 55 where id = 2"#,
        );
        assert_eq!(database.text(&format!(r#"select "Am ou""nt'$1" from {table} order by id"#)), "10\n55");
        database.execute(&format!(r#"update {table} set "Am ou""nt'$1" = null where id = 2"#));
        if commits {
            run.commit().await.unwrap();
        } else {
            run.rollback().await.unwrap();
            assert_eq!(database.schema(), before);
        }
    }
    assert!(database.schema().contains("CREATE UNIQUE INDEX \"by ON it\""));
    nothing_left(&database);
}
