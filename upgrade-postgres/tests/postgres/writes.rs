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
use upgrade_postgres::steps::{Sql, Writes, WritesOutput, WritesUndo};
use upgrade_testbed::postgres::{Database, Version};

use crate::world::{any_database, build_context, build_context_with, database, target};

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
    let willful =
        Role::new(&database, "grant insert on notes to ROLE; alter role ROLE set default_transaction_read_only = off");
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
        // Of another step of the same run: the contexts share it.
        let allow = writes(&cx, "allowed");
        let of_allow = undo_of(&allow, &test).await;
        allow.apply(&test.forward(), &of_allow).await.unwrap();
        assert_eq!(database.text(SETTING), "{work_mem=5MB}");
        for client in &clients {
            client.after(&client.written, 5).await;
        }
        allow.rollback(&test.back(), &of_allow, None).await.unwrap();
        assert_eq!(database.text(SETTING), "{work_mem=5MB,default_transaction_read_only=on}");
        for client in &clients {
            client.after(&client.refused, 5).await;
        }
    } else {
        stop.rollback(&test.back(), &undo, Some(&output)).await.unwrap();
        assert_eq!(database.text(SETTING), "{work_mem=5MB}");
        for client in &clients {
            client.after(&client.written, 5).await;
        }
        assert_eq!(database.text("select to_regnamespace('_upgrade') is null"), "t");
    }
    for client in clients {
        client.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_writes_while_writes_are_stopped_and_everybody_can_afterwards() {
    with_clients(Version::V15, false).await;
    with_clients(Version::V18, false).await;
}
