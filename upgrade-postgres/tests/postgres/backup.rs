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
do $$ begin
  if exists (select from pg_available_extensions where name = 'hstore') then
    create extension hstore schema "a b";
    create table tagged (tags "a b".hstore);
    insert into tagged values ('a=>1, "ü b"=>NULL');
  end if;
end $$;
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

/// Names every database of ours on a server of the test's own: none of them may be left.
pub(crate) fn ours(database: &Database) -> String {
    database.text("select datname from pg_database where datname like '\\_upgrade%'")
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
        assert!((5..=6).contains(&output.tables), "{output:?}");
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
        assert_eq!(ours(&database), "", "{version}");
        let parent = output.path.parent().unwrap();
        assert_eq!(listing(parent).len(), 1, "{version}: {:?}", listing(parent));
    }
}

const SMALL: &str = "create table notes (id int primary key, text text); \
    insert into notes select n, 'note ' || n from generate_series(1, 2000) n; create table other (a int); \
    create schema side; create table side.parts (a int) partition by list (a); \
    create table side.part_one partition of side.parts for values in (1); insert into side.parts values (1), (1);";

fn check(database: &Database, with: Value) -> std::sync::Arc<dyn upgrade_core::check::Check> {
    let mut with = with;
    with["target"] = json!("db");
    world::check(database, "postgres.backup_fresh", with).unwrap()
}

fn copied(from: &Path, to: &Path) {
    fs::create_dir_all(to.join("dump")).unwrap();
    for path in ["manifest.json"]
        .map(PathBuf::from)
        .into_iter()
        .chain(listing(&from.join("dump")).into_iter().map(|name| Path::new("dump").join(name)))
    {
        fs::copy(from.join(&path), to.join(&path)).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_backup_is_refused_whatever_was_damaged() {
    let Some(database) = world::any_database() else { return };
    database.execute(SMALL);
    let directory = tempfile::tempdir().unwrap();
    let step = backup(&database, json!({ "to": directory.path() }));
    let (_, output) = made(&step, &test("keep")).await;
    let cx = test("look").forward();
    let files: Vec<PathBuf> = [PathBuf::from("manifest.json")]
        .into_iter()
        .chain(listing(&output.path.join("dump")).into_iter().map(|name| Path::new("dump").join(name)))
        .collect();
    assert!(files.len() > 4, "{files:?}");
    let mut refused = 0;
    for file in &files {
        for damage in ["flipped", "truncated", "missing", "longer"] {
            let copies = tempfile::tempdir().unwrap();
            let copy = copies.path().join("copy");
            copied(&output.path, &copy);
            let path = copy.join(file);
            let mut bytes = fs::read(&path).unwrap();
            match damage {
                "flipped" => {
                    let middle = bytes.len() / 2;
                    bytes[middle] ^= 1;
                    fs::write(&path, bytes).unwrap();
                }
                "truncated" => fs::write(&path, &bytes[..bytes.len() - 1 - bytes.len() / 3]).unwrap(),
                "longer" => fs::write(&path, [bytes, b"{}".to_vec()].concat()).unwrap(),
                _ => fs::remove_file(&path).unwrap(),
            }
            let error = prepared(&restore(&database, json!({ "backup": copy })), &cx).await.unwrap_err();
            assert_eq!(error.class(), Class::Permanent, "{damage} {}: {error:?}", file.display());
            let at = if damage == "missing" && file == Path::new("manifest.json") { copies.path() } else { &copy };
            let verdict = check(&database, json!({ "path": at, "max_age": "1h" })).check(&cx).await.unwrap();
            assert_eq!(verdict.status, Status::Fail, "{damage} {}: {verdict:?}", file.display());
            assert!(verdict.hint.is_some());
            refused += 1;
        }
    }
    // A figure edited so that it is still a manifest.
    let copies = tempfile::tempdir().unwrap();
    let copy = copies.path().join("copy");
    copied(&output.path, &copy);
    let text = fs::read_to_string(copy.join("manifest.json")).unwrap();
    let edited = text.replace(r#""rows_estimate": "#, r#""rows_estimate": 1"#);
    assert_ne!(text, edited);
    fs::write(copy.join("manifest.json"), edited).unwrap();
    let error = prepared(&restore(&database, json!({ "backup": copy })), &cx).await.unwrap_err();
    assert!(error.message().contains("digest"), "{error:?}");
    // A file too much.
    fs::write(copy.join("manifest.json"), text).unwrap();
    fs::write(copy.join("dump/9999.dat"), "1\n").unwrap();
    let error = prepared(&restore(&database, json!({ "backup": copy })), &cx).await.unwrap_err();
    assert!(error.message().contains("does not know it"), "{error:?}");
    println!("{refused} damaged backups were refused");
    let other = "0".repeat(64);
    let error =
        prepared(&restore(&database, json!({ "backup": output.path, "sha256": other })), &cx).await.unwrap_err();
    assert!(error.message().contains("not 0000"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fresh_backup_of_this_database_is_asked_for() {
    let Some(database) = world::any_database() else { return };
    let other = world::any_database().unwrap();
    database.execute(SMALL);
    let directory = tempfile::tempdir().unwrap();
    let cx = test("look").forward();
    let ask = async |with: Value| check(&database, with).check(&cx).await.unwrap();
    let none = ask(json!({ "path": directory.path().join("none"), "max_age": "1h" })).await;
    assert!(none.status == Status::Fail && none.message.contains("there is no backup"), "{none:?}");
    made(&backup(&other, json!({ "to": directory.path() })), &test("theirs")).await;
    let none = ask(json!({ "path": directory.path(), "max_age": "1h" })).await;
    assert!(none.status == Status::Fail && none.message.contains("there is no backup"), "{none:?}");
    let (_, output) = made(&backup(&database, json!({ "to": directory.path() })), &test("keep")).await;
    let pass = ask(json!({ "path": directory.path(), "max_age": "1h" })).await;
    assert_eq!(pass.status, Status::Pass, "{pass:?}");
    assert_eq!(pass.facts["path"], output.path.display().to_string());
    let unproven = ask(json!({ "path": directory.path(), "max_age": "1h", "proven": "restore" })).await;
    assert!(unproven.status == Status::Fail && unproven.hint.unwrap().contains("prove: restore"));
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let old = ask(json!({ "path": output.path, "max_age": "1s" })).await;
    assert!(old.status == Status::Fail && old.message.contains("more than 1s"), "{old:?}");
    let theirs = listing(directory.path()).into_iter().find(|name| name.starts_with("theirs")).unwrap();
    let theirs = ask(json!({ "path": directory.path().join(theirs), "max_age": "1h" })).await;
    assert!(theirs.status == Status::Fail && theirs.message.contains("another server or name"), "{theirs:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_a_database_is_kept_alone() {
    let Some(database) = world::any_database() else { return };
    database.execute(SMALL);
    let directory = tempfile::tempdir().unwrap();
    let cx = test("part").forward();
    let (_, output) = made(
        &backup(&database, json!({ "to": directory.path(), "tables": ["notes"], "prove": "restore" })),
        &test("one"),
    )
    .await;
    assert_eq!(output.tables, 1);
    let (_, output) = made(
        &backup(&database, json!({ "to": directory.path(), "schemas": ["side"], "prove": "restore" })),
        &test("two"),
    )
    .await;
    assert_eq!(output.tables, 1);
    let error = prepared(&restore(&database, json!({ "backup": output.path })), &cx).await.unwrap_err();
    assert!(error.message().contains("only a part"), "{error:?}");
    assert!(error.hint().unwrap().contains("pg_restore --single-transaction"));
    let missing = backup(&database, json!({ "to": directory.path(), "tables": ["notes", "no.such"] }));
    let error = prepared(&missing, &cx).await.unwrap_err();
    assert!(error.message().contains(r#"there is no table "no"."such""#), "{error:?}");
    // In a plan, an earlier step may make it.
    prepared(&missing, &test("part").dry_run().forward()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_is_missing_or_too_old_is_named_before_anything_is_done() {
    let (Some(new), Some(old)) = (shared(Version::V18), shared(Version::V15)) else { return };
    let database = new.database();
    let directory = tempfile::tempdir().unwrap();
    let to = directory.path().join("to");
    let cx = test("keep").forward();
    let refused =
        async |tools: Value| prepared(&backup(&database, json!({ "to": to, "tools": tools })), &cx).await.unwrap_err();
    let error = refused(json!({ "pg_dump": old.bin("pg_dump") })).await;
    assert!(error.message().contains("older than what it has to work with: version 18"), "{error:?}");
    assert!(error.hint().unwrap().contains("postgresql-client-18"), "{error:?}");
    let error = refused(json!({ "pg_dump": "/no/pg_dump" })).await;
    assert!(error.class() == Class::Permanent && error.hint().unwrap().contains("/no/pg_dump"), "{error:?}");
    let error = refused(json!({ "pg_dump": new.bin("pg_dump"), "pg_restore": ["env", "true"] })).await;
    assert!(error.message().contains("does not answer as pg_restore does"), "{error:?}");
    assert!(!to.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_privilege_is_named_before_anything_is_done() {
    let Some(server) = own(Version::V15, &[("fsync", "off")]) else { return };
    let database = server.database();
    database.execute(SMALL);
    database.execute(
        "create role weak login password 'weak'; grant usage on schema side to weak; grant select on all tables in schema public, side to weak",
    );
    let directory = tempfile::tempdir().unwrap();
    let (_, output) = made(&backup(&database, json!({ "to": directory.path() })), &test("keep")).await;
    let cx = test("weak").forward();
    let url = database.url().replace("tester:secret-of-tester", "weak:weak");
    let context = world::build_context(&url);
    let step = |with: Value| Backup::from_config(serde_json::from_value(with).unwrap(), &context).unwrap();
    let to = directory.path();
    // What it may do is done.
    made(&step(json!({ "target": "db", "to": to })), &test("weak-one")).await;
    let error = prepared(&step(json!({ "target": "db", "to": to, "prove": "restore" })), &cx).await.unwrap_err();
    assert!(error.message().contains("\"weak\" may not create databases"), "{error:?}");
    assert!(error.hint().unwrap().contains("alter role \"weak\" createdb"), "{error:?}");
    let with = json!({ "target": "db", "backup": output.path });
    let exchange = Restore::from_config(serde_json::from_value(with).unwrap(), &context).unwrap();
    let error = prepared(&exchange, &cx).await.unwrap_err();
    assert!(error.message().contains("does not own the database"), "{error:?}");
    database.execute("revoke select on other from weak");
    let error = prepared(&step(json!({ "target": "db", "to": to })), &cx).await.unwrap_err();
    assert!(error.message().contains("may not read all of \"public\".\"other\""), "{error:?}");
    database.execute("grant select on other to weak; alter table other enable row level security");
    let error = prepared(&step(json!({ "target": "db", "to": to })), &cx).await.unwrap_err();
    assert!(error.hint().unwrap().contains("BYPASSRLS"), "{error:?}");
}

/// A file system of a few megabytes, where this user may mount one.
struct Small(PathBuf, #[allow(dead_code)] tempfile::TempDir);

impl Small {
    fn mount(size: &str) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().join("small");
        fs::create_dir(&at).unwrap();
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(&at)
            .status();
        mounted.is_ok_and(|status| status.success()).then_some(Self(at, directory))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_leaves_nothing_behind() {
    let Some(database) = world::any_database() else { return };
    let Some(small) = Small::mount("6m") else {
        eprintln!("skipped: no file system can be mounted here");
        return;
    };
    database.execute(
        "create table noise as select md5(n::text) || md5((n + 1)::text) as text from generate_series(1, 30000) n",
    );
    let step = backup(&database, json!({ "to": small.0 }));
    let test_context = test("keep");
    let undo = prepared(&step, &test_context.forward()).await.unwrap();
    database.execute(
        "insert into noise select md5(random()::text) || md5(random()::text) from generate_series(1, 400000) n",
    );
    let error = step.apply(&test_context.forward(), &undo).await.unwrap_err();
    assert_eq!(error.class(), Class::Permanent, "{error:?}");
    assert!(error.hint().unwrap().contains("free"), "{error:?}");
    assert_eq!(listing(&small.0), Vec::<String>::new());
    step.settle(&test_context.forward(), &undo).await.unwrap();
    step.rollback(&test_context.back(), &undo, None).await.unwrap();
    // Now it is known beforehand.
    database.execute("analyze noise");
    let error = prepared(&step, &test_context.forward()).await.unwrap_err();
    assert!(error.message().contains("the backup may need") && error.message().contains("free"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn old_backups_of_the_step_go_at_commit_and_no_others() {
    let Some(database) = world::any_database() else { return };
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("keep-by-hand")).unwrap();
    fs::write(directory.path().join("keep-by-hand/notes"), "mine").unwrap();
    made(&backup(&database, json!({ "to": directory.path() })), &test("another")).await;
    let mut paths = Vec::new();
    for _ in 0..4 {
        let test_context = test("keep");
        let step = backup(&database, json!({ "to": directory.path(), "keep": 2 }));
        let (undo, output) = made(&step, &test_context).await;
        paths.push(output.path);
        step.commit(&test_context.commit(), &undo).await.unwrap();
        step.commit(&test_context.commit(), &undo).await.unwrap();
    }
    let left: Vec<bool> = paths.iter().map(|path| path.exists()).collect();
    assert_eq!(left, [false, false, true, true]);
    assert_eq!(listing(directory.path()).len(), 4, "{:?}", listing(directory.path()));
    // What one of the two keeps, stays.
    let step = backup(&database, json!({ "to": directory.path(), "keep": 1, "keep_for": "1h" }));
    let (undo, _) = made(&step, &test("keep")).await;
    step.commit(&test("keep").commit(), &undo).await.unwrap();
    assert_eq!(listing(directory.path()).len(), 5, "{:?}", listing(directory.path()));
}

#[tokio::test(flavor = "multi_thread")]
async fn undoing_removes_what_the_run_made_and_nothing_of_others() {
    let Some(database) = world::any_database() else { return };
    let directory = tempfile::tempdir().unwrap();
    let to = directory.path().join("a/b");
    let step = backup(&database, json!({ "to": to }));
    let test_context = test("keep");
    let (undo, output) = made(&step, &test_context).await;
    let again = step.apply(&test_context.forward(), &undo).await.unwrap();
    assert_eq!(again, output);
    fs::write(output.path.join("notes"), "theirs").unwrap();
    let error = step.rollback(&test_context.back(), &undo, Some(&output)).await.unwrap_err();
    assert!(error.as_conflict().unwrap().present.contains("notes"), "{error:?}");
    assert_eq!(fs::read_to_string(output.path.join("notes")).unwrap(), "theirs");
    fs::remove_file(output.path.join("notes")).unwrap();
    step.rollback(&test_context.back(), &undo, Some(&output)).await.unwrap();
    step.rollback(&test_context.back(), &undo, Some(&output)).await.unwrap();
    assert_eq!(listing(directory.path()), Vec::<String>::new());
    let step = backup(&database, json!({ "to": to, "on_rollback": "keep" }));
    let (undo, output) = made(&step, &test("keep")).await;
    step.rollback(&test("keep").back(), &undo, Some(&output)).await.unwrap();
    assert!(output.path.join("manifest.json").exists());
}

#[test]
fn a_backup_is_exact_while_others_write() {
    let Some(database) = world::any_database() else { return };
    database.execute("create table counters (id int primary key, value int); insert into counters select n, 0 from generate_series(1, 20000) n");
    let directory = tempfile::tempdir().unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let (step, test_context) = (backup(&database, json!({ "to": directory.path(), "prove": "restore" })), test("keep"));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                database.execute("update counters set value = value + 1 where id % 10 = 3; insert into counters select max(id) + 1, 0 from counters");
            }
        });
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let done = runtime.block_on(async {
            let undo = prepared(&step, &test_context.forward()).await?;
            step.apply(&test_context.forward(), &undo).await
        });
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        done.unwrap_or_else(|error| panic!("{error:?}"));
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_by_the_server_is_a_backup_as_well() {
    let Some(server) = own(Version::V15, &[("fsync", "off")]) else { return };
    let database = server.database();
    database.execute(SMALL);
    let directory = tempfile::tempdir().unwrap();
    let step = backup(&database, json!({ "to": directory.path(), "method": "template" }));
    let test_backup = test("keep");
    let (undo, output) = made(&step, &test_backup).await;
    let before = all_of(&database);
    database.execute("drop table notes");
    let exchange = restore(&database, json!({ "backup": output.path }));
    let test_restore = test("bring-back");
    let found = prepared(&exchange, &test_restore.forward()).await.unwrap();
    exchange.apply(&test_restore.forward(), &found).await.unwrap();
    assert_eq!(all_of(&database), before);
    exchange.commit(&test_restore.commit(), &found).await.unwrap();
    let held = database.text("select count(*) from pg_database where datname like '\\_upgrade\\_backup%'");
    assert_eq!(held, "1");
    step.rollback(&test_backup.back(), &undo, Some(&output)).await.unwrap();
    assert_eq!((ours(&database), listing(directory.path())), (String::new(), Vec::new()));
    let held = world::target(&database.url()).connect_aside(&test("held").forward()).await.unwrap();
    let busy = prepared(&step, &test("keep").forward()).await.unwrap_err();
    held.close().await;
    assert!(busy.hint().unwrap().contains("method: dump"), "{busy:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_may_run_elsewhere() {
    let Some(server) = own(Version::V18, &[("fsync", "off")]) else { return };
    let database = server.database();
    database.execute(ODD);
    let before = all_of(&database);
    let directory = tempfile::tempdir().unwrap();
    let wrapped = |program: &str| json!(["env", "-u", "NOTHING", server.bin(program)]);
    let tools = json!({ "pg_dump": wrapped("pg_dump"), "pg_restore": wrapped("pg_restore") });
    let step = backup(&database, json!({ "to": directory.path(), "prove": "restore", "tools": tools }));
    let (_, output) = made(&step, &test("keep")).await;
    assert_eq!(listing(&output.path.join("dump")), ["archive.zst"]);
    database.execute("drop table empty");
    let exchange = restore(&database, json!({ "backup": output.path, "tools": tools }));
    let test_restore = test("bring-back");
    let found = prepared(&exchange, &test_restore.forward()).await.unwrap();
    exchange.apply(&test_restore.forward(), &found).await.unwrap();
    assert_eq!(all_of(&database), before);
    exchange.commit(&test_restore.commit(), &found).await.unwrap();
    assert_eq!(ours(&database), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_goes_back_to_its_runs_backup() {
    let Some(server) = own(Version::V15, &[("fsync", "off")]) else { return };
    let database = server.database();
    database.execute(ODD);
    let before = all_of(&database);
    let directory = tempfile::tempdir().unwrap();
    let (_, output) = made(&backup(&database, json!({ "to": directory.path() })), &test("keep")).await;
    database.execute("drop table empty; delete from parts");
    let (target, test_context) = (world::target(&database.url()), test("migrate"));
    for _ in 0..2 {
        upgrade_postgres::backup::replace::restore_into_place(
            &test_context.back(),
            &target,
            &output,
            &Default::default(),
        )
        .await
        .unwrap_or_else(|error| panic!("{error:?}"));
        assert_eq!(all_of(&database), before);
    }
    assert_eq!(ours(&database), "");
    assert_eq!(listing(directory.path()).len(), 1);
}
