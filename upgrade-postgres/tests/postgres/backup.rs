//! `postgres.backup`, `postgres.restore` and `postgres.backup_fresh` on real servers.

#![cfg(test)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use upgrade_core::context::Context;
use upgrade_core::error::{Class, StepError};
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::testkit::TestContext;
use upgrade_core::verdict::Status;
use upgrade_postgres::steps::{Backup, BackupOutput, BackupUndo, Restore, RestoreUndo};
use upgrade_testbed::postgres::{Database, Server, Version, own, shared};

use crate::world;

/// Fills a database with what is easily lost: odd names, large objects, identities, partitions.
pub(crate) const ODD: &str = r#"
create schema "a b";
create type "a b"."mood ü" as enum ('glad', 'sad''');
create table "a b"."ü ""t""" (id int generated always as identity primary key, mood "a b"."mood ü", note text, raw bytea);
insert into "a b"."ü ""t""" (mood, note, raw)
  select 'sad''', repeat('ü', n % 7) || n, decode(md5(n::text), 'hex') from generate_series(1, 400) n;
create table parts (day date not null, amount numeric) partition by range (day);
create table parts_old partition of parts for values from (minvalue) to ('2026-01-01');
create table parts_new partition of parts for values from ('2026-01-01') to (maxvalue);
insert into parts select date '2025-12-01' + n, n / 3.0 from generate_series(1, 90) n;
create sequence tickets start 7;
select nextval('tickets');
create view sums as select day, sum(amount) from parts group by day;
create materialized view kept as select count(*) from parts;
create table empty (a int, b text);
create unlogged table fleeting (a int);
insert into fleeting values (1);
select lo_from_bytea(4711, decode(repeat('00ff', 4000), 'hex'));
"#;

pub(crate) fn backup(database: &Database, with: Value) -> Backup {
    let mut with = with;
    with["target"] = json!("db");
    Backup::from_config(serde_json::from_value(with).unwrap(), &world::build_context(&database.url())).unwrap()
}

pub(crate) fn restore(database: &Database, with: Value) -> Restore {
    let mut with = with;
    with["target"] = json!("db");
    Restore::from_config(serde_json::from_value(with).unwrap(), &world::build_context(&database.url())).unwrap()
}

pub(crate) fn tools(server: &Server) -> Value {
    json!({ "pg_dump": server.bin("pg_dump"), "pg_restore": server.bin("pg_restore") })
}

pub(crate) async fn prepared<S: Step>(step: &S, cx: &Context) -> Result<S::Undo, StepError> {
    match step.prepare(cx).await? {
        Prepared::Change { undo, .. } => Ok(undo),
        _ => panic!("a backup and a restore always have something to do"),
    }
}

async fn made(step: &Backup, test: &TestContext) -> (BackupUndo, BackupOutput) {
    let undo = prepared(step, &test.forward()).await.unwrap();
    let output = step.apply(&test.forward(), &undo).await.unwrap_or_else(|error| panic!("{error:?}"));
    (undo, output)
}

/// Names every database of ours on the server that belongs to `database`: none of them may be left.
pub(crate) fn ours(database: &Database) -> String {
    database.text(
        "select count(*) from pg_database where datname like '\\_upgrade%' and (\
       shobj_description(oid, 'pg_database') is null or true) and datdba is not null",
    )
}

pub(crate) fn all_of(database: &Database) -> String {
    format!(
        "{}\n{}\n{}",
        database.schema(),
        database.contents(),
        database.text(
            "select string_agg(format('%s %s', oid, md5(lo_get(oid))), ',' order by oid) from pg_largeobject_metadata \
             union all select format('%s %s', sequencename, last_value) from pg_sequences order by 1"
        )
    )
}

/// Lists what is in a directory, hidden or not.
pub(crate) fn listing(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return vec!["no directory".into()] };
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn test(step: &str) -> TestContext {
    TestContext::new(step)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_with_odd_contents_comes_back_as_it_was() {
    for version in Version::ALL {
        let Some(server) = own(version, &[("fsync", "off"), ("max_prepared_transactions", "2")]) else { continue };
        let database = server.database();
        database.execute(ODD);
        database.execute(&format!(
            "alter database {0} set search_path = \"a b\", public; alter database {0} connection limit 50; \
             comment on database {0} is 'the shop''s'; create role reader; grant connect on database {0} to reader; \
             revoke connect on database {0} from public; alter role reader in database {0} set work_mem = '7MB'; \
             create role \"ow ner\"; alter table empty owner to \"ow ner\"; grant select on parts to reader;",
            database.name()
        ));
        const LIKE: &str = "select format('%s %s %s %s %s', pg_get_userbyid(datdba), encoding, datcollate, datconnlimit, \
             shobj_description(d.oid, 'pg_database')) || (select string_agg(a::text, ' ' order by a::text) \
             from unnest(datacl) a) || (select string_agg(format('%s %s', setrole::regrole, setconfig), ' ' order by setrole) \
             from pg_db_role_setting where setdatabase = d.oid) from pg_database d where datname = current_database()";
        let (before, like) = (all_of(&database), database.text(LIKE));
        let oid = database.text("select oid from pg_database where datname = current_database()");
        let directory = tempfile::tempdir().unwrap();
        let test_backup = test("keep");
        let step = backup(
            &database,
            json!({ "to": directory.path().join("new/backups"), "prove": "restore", "tools": tools(&server), "jobs": 2 }),
        );
        let (_, output) = made(&step, &test_backup).await;
        assert_eq!(output.tables, 5, "{output:?}");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&output.path), 0o700);
        assert_eq!(mode(&output.path.join("manifest.json")), 0o600);
        assert_eq!(mode(&output.path.join("dump/toc.dat")), 0o600);
        assert_eq!(
            listing(output.path.parent().unwrap()).len(),
            1,
            "{version}: {:?}",
            listing(output.path.parent().unwrap())
        );

        database.execute(
            r#"delete from parts; drop table empty; update "a b"."ü ""t""" set note = 'lost'; select lo_unlink(4711)"#,
        );
        let changed = all_of(&database);
        let step =
            restore(&database, json!({ "backup": output.path, "sha256": output.sha256, "tools": tools(&server) }));
        let test_restore = test("bring-back");
        let undo: RestoreUndo = prepared(&step, &test_restore.forward()).await.unwrap();
        step.apply(&test_restore.forward(), &undo).await.unwrap_or_else(|error| panic!("{version}: {error:?}"));
        assert_eq!(all_of(&database), before, "{version}");
        assert_eq!(database.text(LIKE), like, "{version}");
        assert_ne!(database.text("select oid from pg_database where datname = current_database()"), oid);
        // Once more changes nothing.
        step.apply(&test_restore.forward(), &undo).await.unwrap();
        step.rollback(&test_restore.back(), &undo, None).await.unwrap_or_else(|error| panic!("{version}: {error:?}"));
        assert_eq!(all_of(&database), changed, "{version}");
        assert_eq!(database.text(LIKE), like, "{version}");
        assert_eq!(database.text("select oid from pg_database where datname = current_database()"), oid);
        step.rollback(&test_restore.back(), &undo, None).await.unwrap();

        let test_restore = test("for-good");
        let undo: RestoreUndo = prepared(&step, &test_restore.forward()).await.unwrap();
        step.apply(&test_restore.forward(), &undo).await.unwrap();
        step.commit(&test_restore.commit(), &undo).await.unwrap();
        step.commit(&test_restore.commit(), &undo).await.unwrap();
        assert_eq!((all_of(&database), database.text(LIKE)), (before, like), "{version}");
        assert_eq!(ours(&database), "0", "{version}");
        let parent = output.path.parent().unwrap();
        assert_eq!(listing(parent).len(), 1, "{version}: {:?}", listing(parent));
    }
}
