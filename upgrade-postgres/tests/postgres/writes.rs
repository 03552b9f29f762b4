//! `postgres.writes` under clients that write: none does while writes are stopped, all can afterwards.

#![cfg(test)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use serde_json::json;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, PgConnection};
use upgrade_core::error::Class;
use upgrade_core::registry::BuildContext;
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::testkit::TestContext;
use upgrade_core::undoable::OptionalRollback;
use upgrade_postgres::steps::{Sql, Writes, WritesUndo};
use upgrade_testbed::postgres::{Database, Version};

use crate::world::{any_database, build_context, database};

const SETTING: &str = "select setconfig::text from pg_db_role_setting \
     where setdatabase = (select oid from pg_database where datname = current_database()) and setrole = 0";

/// A role that can log in, and goes with the test.
struct Role<'a> {
    database: &'a Database,
    name: String,
}

impl<'a> Role<'a> {
    fn new(database: &'a Database, grants: &str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("role_{}_{}", database.name(), NUMBER.fetch_add(1, Ordering::Relaxed));
        database.execute(&format!("create role {name} login password 'secret-of-role'"));
        let role = Self { database, name };
        database.execute(&grants.replace("ROLE", &role.name).replace("DATABASE_NAME", database.name()));
        role
    }

    fn options(&self) -> PgConnectOptions {
        let options: PgConnectOptions = self.database.url().parse().unwrap();
        options.username(&self.name).password("secret-of-role")
    }

    fn url(&self) -> String {
        let mut url = url::Url::parse(&self.database.url()).unwrap();
        url.set_username(&self.name).unwrap();
        url.set_password(Some("secret-of-role")).unwrap();
        url.into()
    }

    async fn connect(&self) -> PgConnection {
        self.options().connect().await.unwrap()
    }
}

impl Drop for Role<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let (role, own) = (&self.name, "tester");
            self.database.execute(&format!(
                "begin read write; reassign owned by {role} to {own}; drop owned by {role}; drop role {role}; commit"
            ));
        }
    }
}

fn writes(cx: &BuildContext, state: &str) -> Writes {
    let config = json!({ "target": "db", "state": state, "grace": "500ms" });
    Writes::from_config(serde_json::from_value(config).unwrap(), cx).unwrap()
}

async fn undo_of(step: &Writes, test: &TestContext) -> WritesUndo {
    match step.prepare(&test.forward()).await.unwrap() {
        Prepared::Change { undo, .. } => undo,
        other => panic!("{other:?}"),
    }
}

/// Writes as a service with a pool does: a connection that broke, or refuses, is replaced.
struct Client {
    written: Arc<AtomicU32>,
    refused: Arc<AtomicU32>,
    stop: Arc<AtomicBool>,
    running: tokio::task::JoinHandle<()>,
}

impl Client {
    fn start(options: PgConnectOptions) -> Self {
        let (written, refused, stop) =
            (Arc::<AtomicU32>::default(), Arc::<AtomicU32>::default(), Arc::<AtomicBool>::default());
        let (count, refusals, end) = (written.clone(), refused.clone(), stop.clone());
        let running = tokio::spawn(async move {
            let mut connection: Option<PgConnection> = None;
            while !end.load(Ordering::SeqCst) {
                let Some(open) = &mut connection else {
                    connection = options.connect().await.ok();
                    continue;
                };
                match sqlx::query("insert into notes (note) values ('from a client')").execute(open).await {
                    Ok(_) => {
                        count.fetch_add(1, Ordering::SeqCst);
                    }
                    // A pool keeps a connection on which only a statement has failed.
                    Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("25006") => {
                        refusals.fetch_add(1, Ordering::SeqCst);
                    }
                    Err(_) => connection = None,
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        Self { written, refused, stop, running }
    }

    /// Waits until it has written, or been refused, that often from now on.
    async fn after(&self, counter: &AtomicU32, times: u32) {
        let from = counter.load(Ordering::SeqCst);
        let waiting = async {
            while counter.load(Ordering::SeqCst) < from + times {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), waiting).await.expect("the client goes on");
    }

    async fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.running.await.unwrap();
    }
}

const NOTES: &str = "create table notes (id int generated always as identity, note text)";

/// Lets clients write while writes are stopped, allowed, and put back.
async fn with_clients(version: Version, forward: bool) {
    let Some(database) = database(version) else { return };
    database.execute(NOTES);
    database.execute(&format!("alter database {} set work_mem = '5MB'", database.name()));
    let role = Role::new(&database, "grant insert on notes to ROLE");
    let willful = Role::new(
        &database,
        "grant insert on notes to ROLE; \
         alter role ROLE in database DATABASE_NAME set default_transaction_read_only = off",
    );
    let clients: Vec<_> = [&role, &role, &willful].into_iter().map(|role| Client::start(role.options())).collect();
    for client in &clients {
        client.after(&client.written, 5).await;
    }

    let cx = build_context(&database.url());
    let (stop, test) = (writes(&cx, "stopped"), TestContext::new("stop"));
    let undo = undo_of(&stop, &test).await;
    let output = stop.apply(&test.forward(), &undo).await.unwrap();
    assert!(output.ended >= 3, "{output:?}");
    let written = database.text("select count(*) from notes");
    for client in &clients {
        client.after(&client.refused, 20).await;
    }
    assert_eq!(database.text("select count(*) from notes"), written, "nobody wrote");
    assert_eq!(database.text(SETTING), "{work_mem=5MB,default_transaction_read_only=on}");

    if forward {
        let (allow, of_run) = (writes(&cx, "allowed"), test.beside("allow"));
        let of_allow = undo_of(&allow, &of_run).await;
        allow.apply(&of_run.forward(), &of_allow).await.unwrap();
        assert_eq!(database.text(SETTING), "{work_mem=5MB}");
        for client in &clients {
            client.after(&client.written, 5).await;
        }
        allow.rollback(&of_run.back(), &of_allow, None).await.unwrap();
        assert_eq!(database.text(SETTING), "{work_mem=5MB,default_transaction_read_only=on}");
        for client in &clients {
            client.after(&client.refused, 5).await;
        }
    }
    stop.rollback(&test.back(), &undo, Some(&output)).await.unwrap();
    assert_eq!(database.text(SETTING), "{work_mem=5MB}");
    for client in &clients {
        client.after(&client.written, 5).await;
    }
    assert_eq!(database.text("select to_regnamespace('_upgrade') is null"), "t");
    for client in clients {
        client.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_writes_while_writes_are_stopped_and_everybody_can_afterwards() {
    with_clients(Version::V15, false).await;
    with_clients(Version::V18, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_later_step_allows_writes_and_its_undo_stops_them_again() {
    with_clients(Version::V15, true).await;
}

#[tokio::test]
async fn the_run_writes_on_and_others_are_told_why_they_cannot() {
    let Some(database) = any_database() else { return };
    database.execute(NOTES);
    let cx = build_context(&database.url());
    let (stop, test) = (writes(&cx, "stopped"), TestContext::new("stop"));
    let undo = undo_of(&stop, &test).await;
    let sql =
        json!({ "target": "db", "statement": "insert into notes (note) values ('of the run')", "undo": "select 1" });
    let sql = Sql::from_config(serde_json::from_value(sql).unwrap(), &cx).unwrap().undoable().unwrap();
    stop.apply(&test.forward(), &undo).await.unwrap();
    // Once more, as after a crash: nothing is done twice.
    stop.apply(&test.clone().interrupted().forward(), &undo).await.unwrap();

    let of_run = test.beside("data");
    let Prepared::Change { undo: of_sql, .. } = sql.prepare(&of_run.forward()).await.unwrap() else { panic!() };
    sql.apply(&of_run.forward(), &of_sql).await.unwrap();
    assert_eq!(database.text("select note from notes"), "of the run");
    // Another run is somebody else.
    let other = TestContext::new("stop");
    let error = sql.prepare(&other.forward()).await.unwrap_err();
    assert_eq!(
        (error.class(), error.message()),
        (Class::Permanent, "writes are switched off: default_transaction_read_only is on")
    );
    let error = writes(&cx, "allowed").prepare(&other.forward()).await.unwrap_err();
    assert!(error.message().contains("no step of this run"), "{error}");
    // It finds nothing to stop, either.
    let again = stop.prepare(&other.forward()).await.unwrap();
    assert!(matches!(&again, Prepared::Unchanged { reason, .. } if reason.contains("somebody else")), "{again:?}");

    sql.commit(&of_run.commit(), &of_sql).await.unwrap();
    stop.commit(&test.commit(), &undo).await.unwrap();
    stop.commit(&test.commit(), &undo).await.unwrap();
    assert_eq!(database.text(SETTING), "");
    assert_eq!(database.text("select to_regnamespace('_upgrade') is null"), "t");
}

#[tokio::test]
async fn the_plan_shows_the_outage_and_whose_sessions_end() {
    let Some(database) = any_database() else { return };
    database.execute(NOTES);
    let role =
        Role::new(&database, "alter role ROLE in database DATABASE_NAME set default_transaction_read_only = off");
    let client = role.options().application_name("shop").connect().await.unwrap();
    let cx = build_context(&database.url());
    let test = TestContext::new("stop").dry_run();
    let Prepared::Change { changes, .. } = writes(&cx, "stopped").prepare(&test.forward()).await.unwrap() else {
        panic!()
    };
    let summary = changes[0].summary.as_deref().unwrap();
    assert!(summary.contains("until a later step allows them or the run ends"), "{summary}");
    assert!(summary.ends_with(&format!("1 sessions are ended: 1 of {} (shop)", role.name)), "{summary}");
    assert!(changes[1].subject.contains(&format!("of role {}", role.name)), "{changes:?}");
    assert_eq!(changes[1].summary.as_deref(), Some("off → on"));
    // What nothing has stopped yet can be planned to be allowed.
    let allowed = writes(&cx, "allowed").prepare(&test.forward()).await.unwrap();
    assert!(matches!(allowed, Prepared::Change { .. }), "{allowed:?}");
    assert_eq!(database.text(SETTING), "");
    client.close().await.unwrap();
}

#[tokio::test]
async fn a_transaction_has_the_grace_to_end() {
    let Some(database) = any_database() else { return };
    database.execute(NOTES);
    let role = Role::new(&database, "grant insert on notes to ROLE");
    let (mut quick, mut slow) = (role.connect().await, role.connect().await);
    for connection in [&mut quick, &mut slow] {
        sqlx::raw_sql("begin; insert into notes (note) values ('under way')").execute(connection).await.unwrap();
    }
    let cx = build_context(&database.url());
    let (stop, test) = (writes(&cx, "stopped"), TestContext::new("stop"));
    let undo = undo_of(&stop, &test).await;
    let (applied, committed) = tokio::join!(async { stop.apply(&test.forward(), &undo).await }, async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        sqlx::raw_sql("commit").execute(&mut quick).await
    });
    committed.unwrap();
    assert_eq!(applied.unwrap().ended, 2);
    assert!(sqlx::raw_sql("commit").execute(&mut slow).await.is_err(), "its time was over");
    assert_eq!(database.text("select count(*) from notes"), "1");
    stop.rollback(&test.back(), &undo, None).await.unwrap();
}

#[tokio::test]
async fn a_change_by_somebody_else_is_left_alone() {
    let Some(database) = any_database() else { return };
    database.execute(NOTES);
    let set = |value: &str| {
        database.execute(&format!(
            "begin read write; alter database {} set default_transaction_read_only = {value}; commit",
            database.name()
        ));
    };
    let cx = build_context(&database.url());
    let (stop, test) = (writes(&cx, "stopped"), TestContext::new("stop"));
    let undo = undo_of(&stop, &test).await;
    set("off");
    let error = stop.apply(&test.forward(), &undo).await.unwrap_err();
    let conflict = error.as_conflict().expect("it is a conflict");
    assert_eq!((conflict.found.as_str(), conflict.present.as_str()), ("not set", "off"));
    assert_eq!(database.text(SETTING), "{default_transaction_read_only=off}");
    // Nothing was done, so there is nothing to undo.
    stop.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(database.text(SETTING), "{default_transaction_read_only=off}");

    let undo = undo_of(&stop, &test).await;
    stop.apply(&test.forward(), &undo).await.unwrap();
    set("false");
    let error = stop.rollback(&test.back(), &undo, None).await.unwrap_err();
    assert!(error.as_conflict().is_some(), "{error}");
    let overwrite = test.clone().on_conflict(upgrade_core::context::OnConflict::Overwrite);
    stop.rollback(&overwrite.back(), &undo, None).await.unwrap();
    assert_eq!(database.text(SETTING), "{default_transaction_read_only=off}");
}

#[tokio::test]
async fn a_user_who_may_not_is_told_what_to_grant_before_anything_is_changed() {
    let Some(database) = any_database() else { return };
    database.execute(NOTES);
    let (owner, client) = (Role::new(&database, "select 1"), Role::new(&database, "select 1"));
    let (cx, test) = (build_context(&owner.url()), TestContext::new("stop"));
    let error = writes(&cx, "stopped").prepare(&test.forward()).await.unwrap_err();
    assert!(error.message().contains("does not own the database"), "{error}");
    database.execute(&format!("alter database {} owner to {}", database.name(), owner.name));
    let connection = client.connect().await;
    let error = writes(&cx, "stopped").prepare(&test.forward()).await.unwrap_err();
    assert!(
        error.message().contains(&format!("may not end sessions that could write: 1 of {}", client.name)),
        "{error}"
    );
    assert_eq!(error.hint(), Some(format!("`grant pg_signal_backend, pg_read_all_stats to {}`", owner.name).as_str()));
    database.execute(&format!("grant pg_signal_backend, pg_read_all_stats to {}", owner.name));
    let stop = writes(&cx, "stopped");
    let undo = undo_of(&stop, &test).await;
    assert_eq!(stop.apply(&test.forward(), &undo).await.unwrap().ended, 1);
    stop.rollback(&test.back(), &undo, None).await.unwrap();
    drop(connection);
    // A role's own setting takes more.
    let (name, here) = (&client.name, database.name());
    database.execute(&format!("alter role {name} in database {here} set default_transaction_read_only = off"));
    let error = stop.prepare(&test.forward()).await.unwrap_err();
    assert!(
        error.message().contains(&format!("roles with a setting of their own write on: {}", client.name)),
        "{error}"
    );
    database.execute(&format!("alter database {} owner to tester", database.name()));
}

#[tokio::test]
async fn what_belongs_to_the_whole_server_is_minded() {
    use upgrade_testbed::postgres::own;
    let Some(server) = own(Version::V15, &[("max_prepared_transactions", "2"), ("fsync", "off")]) else { return };
    let database = server.database();
    database.execute(NOTES);
    database.execute("begin; insert into notes (note) values ('later'); prepare transaction 'later'");
    let error = writes(&build_context(&database.url()), "stopped").prepare(&TestContext::new("s").forward()).await;
    let error = error.unwrap_err();
    assert_eq!(error.message(), "prepared transactions could still write: later");
    assert!(error.hint().unwrap().contains("commit prepared"), "{error}");
    database.execute("rollback prepared 'later'");

    // A role that writes everywhere by its own setting is stopped here, and is gone before the undo.
    database.execute("create role everywhere; alter role everywhere set default_transaction_read_only = off");
    let (stop, test) = (writes(&build_context(&database.url()), "stopped"), TestContext::new("stop"));
    let undo = undo_of(&stop, &test).await;
    stop.apply(&test.forward(), &undo).await.unwrap();
    let of_role = "select setconfig::text from pg_db_role_setting where setdatabase <> 0 and setrole <> 0";
    assert_eq!(database.text(of_role), "{default_transaction_read_only=on}");
    database.execute("begin read write; drop role everywhere; commit");
    stop.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(database.text("select count(*) from pg_db_role_setting where setdatabase <> 0"), "0");
}
