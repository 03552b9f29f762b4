//! Several commands at once on one database, each with a journal of its own, as on machines that
//! know nothing of each other; and with one journal, waiting for each other.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use upgrade_testbed::postgres::{Database, Server, Version, shared};

const COMMANDS: usize = 3;

/// Writes migrations that each leave a trace: applying one twice shows, or fails.
fn write_migrations(directory: &Path, number: usize) {
    fs::create_dir_all(directory).unwrap();
    fs::write(directory.join("1_effects.up.sql"), "create table effects (migration int);").unwrap();
    fs::write(directory.join("1_effects.down.sql"), "drop table effects;").unwrap();
    for version in 2..=number {
        let up = format!("insert into effects values ({version}); create table t{version} (id int primary key);");
        let down = format!("drop table t{version}; delete from effects where migration = {version};");
        fs::write(directory.join(format!("{version}_table.up.sql")), up).unwrap();
        fs::write(directory.join(format!("{version}_table.down.sql")), down).unwrap();
    }
}

fn pipeline(to: Option<usize>) -> String {
    let mut text = String::from(
        "upgrade: tables\ntargets: { db: { uses: postgres, with: { url: { env: DATABASE_URL } } } }\n\
         steps:\n  - { id: schema, uses: postgres.migrate, with: { target: db, directory: migrations",
    );
    if let Some(to) = to {
        write!(text, ", to: {to}").unwrap();
    }
    text + " } }\n"
}

fn spawn(root: &Path, file: &str, state: &str, database: &Database) -> Child {
    Command::new(env!("CARGO_BIN_EXE_upgrade"))
        .current_dir(root)
        .args(["--state-dir", state, "run", file, "--wait", "60s"])
        .env("DATABASE_URL", database.url())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn all_succeed(children: Vec<Child>, round: &str) {
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert_eq!(
            output.status.code(),
            Some(0),
            "{round}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

/// One round: on an empty database or a half-migrated one, with one journal or one for each.
fn round(server: &Server, number: usize, half: bool, one_journal: bool) {
    let name = format!("half-migrated: {half}, one journal: {one_journal}");
    let database = server.database();
    let root = tempfile::tempdir().unwrap();
    write_migrations(&root.path().join("migrations"), number);
    fs::write(root.path().join("all.yaml"), pipeline(None)).unwrap();
    fs::write(root.path().join("half.yaml"), pipeline(Some(number / 2))).unwrap();
    if half {
        all_succeed(vec![spawn(root.path(), "half.yaml", "first", &database)], &name);
    }
    let state = |n: usize| if one_journal { "one".to_owned() } else { format!("state-{n}") };
    all_succeed((0..COMMANDS).map(|n| spawn(root.path(), "all.yaml", &state(n), &database)).collect(), &name);
    let counted = database.text("select count(*) || ' ' || count(distinct migration) from effects");
    assert_eq!(counted, format!("{0} {0}", number - 1), "{name}");
    assert_eq!(database.text("select count(*) from _sqlx_migrations where success"), number.to_string(), "{name}");
    assert_eq!(database.text("select count(*) from pg_namespace where nspname = '_upgrade'"), "0", "{name}");
}

fn rounds(rounds: usize, number: usize) {
    let Some(server) = shared(Version::V15) else { return };
    for _ in 0..rounds {
        for half in [false, true] {
            for one_journal in [false, true] {
                round(&server, number, half, one_journal);
            }
        }
    }
    println!("campaign: {rounds} rounds of {COMMANDS} commands, each four ways, {number} migrations: 0 errors");
}

#[test]
fn three_commands_at_once_apply_each_migration_once() {
    rounds(1, 40);
}

#[test]
#[ignore = "long: scripts/test --full"]
fn campaign_three_commands_at_once_apply_each_migration_once() {
    rounds(50, 100);
}

#[test]
#[ignore = "long: scripts/test --full"]
fn campaign_three_commands_at_once_apply_a_thousand_migrations_once() {
    rounds(2, 1000);
}
