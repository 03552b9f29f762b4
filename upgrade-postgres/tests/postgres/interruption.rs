//! Backups and restores cut off: sessions ended, servers stopped, calls given up; and reached
//! through a tunnel.

#![cfg(test)]

use std::path::Path;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde_json::json;
use upgrade_core::context::Context;
use upgrade_core::error::{Class, StepError};
use upgrade_core::names::LockName;
use upgrade_core::registry::{AnyTarget, BuildContext};
use upgrade_core::secret::SecretRef;
use upgrade_core::step::{Rollback, Step};
use upgrade_core::target::Target;
use upgrade_core::testkit::TestContext;
use upgrade_core::tunnel::{Passage, Tunnel};
use upgrade_postgres::steps::{Backup, Restore};
use upgrade_postgres::{Database as Reached, DatabaseConfig};
use upgrade_testbed::postgres::{Database, Server, Version, own};

use crate::backup::{ODD, all_of, backup, listing, ours, prepared, restore, tools};
use crate::forwarder::Forwarder;

/// How a call is cut off.
#[derive(Debug, Clone, Copy)]
enum Cut {
    /// Every session of the step is ended by somebody else.
    Sessions,
    /// The server stops as if its machine had lost power, and is started again.
    Server,
    /// The driver is gone: the call is never polled again.
    Driver,
    /// The call is cancelled in order.
    Cancelled,
}

const MORE: &str = "create table bulk as select n, md5(n::text) text from generate_series(1, 30000) n; alter table bulk add primary key (n);";

/// Cuts `apply` off `times` times, spread over its length, and goes on or back each time.
async fn cut_off<S: Rollback>(
    server: &Server,
    database: &Database,
    make: impl Fn() -> S,
    cut: Cut,
    times: u32,
    mut look: impl FnMut(bool),
) {
    let whole = {
        let (step, test) = (make(), TestContext::new("cut"));
        let undo = prepared(&step, &test.forward()).await.unwrap();
        let began = Instant::now();
        step.apply(&test.forward(), &undo).await.unwrap_or_else(|error| panic!("{error:?}"));
        let whole = began.elapsed();
        step.rollback(&test.back(), &undo, None).await.unwrap_or_else(|error| panic!("{error:?}"));
        look(false);
        whole
    };
    let (mut cuts, mut forward) = (0, 0);
    for number in 0..times {
        let (step, mut test) = (make(), TestContext::new("cut"));
        let undo = prepared(&step, &test.forward()).await.unwrap_or_else(|error| panic!("{number}: {error:?}"));
        let (began, delay) = (Instant::now(), whole * number / times);
        let cx = test.forward();
        let applied = {
            let mut applying = Box::pin(step.apply(&cx, &undo));
            let early = tokio::select! {
                done = &mut applying => Some(done),
                () = tokio::time::sleep(delay) => None,
            };
            match (early, cut) {
                (Some(done), _) => Some(done),
                (None, Cut::Driver) => None,
                (None, Cut::Cancelled) => {
                    test.cancellation().cancel();
                    let asked = Instant::now();
                    let done = applying.await;
                    assert!(asked.elapsed() < Duration::from_secs(6), "{number}: {:?}", asked.elapsed());
                    Some(done)
                }
                (None, Cut::Sessions) => {
                    database.execute(
                        "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'upgrade/cut/%'",
                    );
                    Some(applying.await)
                }
                (None, Cut::Server) => {
                    tokio::task::block_in_place(|| server.stop_immediate());
                    let done = applying.await;
                    tokio::task::block_in_place(|| server.start());
                    Some(done)
                }
            }
        };
        let resumes = number % 2 == 0;
        match &applied {
            Some(Ok(_)) => {}
            Some(Err(error)) => {
                assert_eq!(error.class(), Class::Transient, "{cut:?} {delay:?}: {error:?}");
                cuts += 1;
            }
            None => cuts += 1,
        }
        test.renew();
        step.settle(&test.forward(), &undo).await.unwrap_or_else(|error| panic!("{cut:?} {delay:?}: {error:?}"));
        if resumes {
            step.apply(&test.forward(), &undo).await.unwrap_or_else(|error| panic!("{cut:?} {delay:?}: {error:?}"));
            forward += 1;
            look(true);
        }
        step.rollback(&test.back(), &undo, None).await.unwrap_or_else(|error| panic!("{cut:?} {delay:?}: {error:?}"));
        look(false);
        assert!(began.elapsed() < Duration::from_secs(60));
    }
    println!("{cut:?}: {times} times within {whole:?}: {cuts} cut off, {forward} resumed");
    assert!(cuts * 3 >= times, "{cut:?}: only {cuts} of {times} were cut off");
}

fn server() -> Option<Server> {
    own(Version::V15, &[("fsync", "off")])
}

async fn backups(cut: Cut, times: u32) {
    let Some(server) = server() else { return };
    let database = server.database();
    database.execute(ODD);
    database.execute(MORE);
    let directory = tempfile::tempdir().unwrap();
    let to = directory.path().join("to");
    let make = || backup(&database, json!({ "to": to, "prove": "restore", "tools": tools(&server) }));
    cut_off(&server, &database, make, cut, times, |done| {
        assert_eq!(ours(&database), "");
        let left = listing(directory.path());
        assert_eq!(left.len(), usize::from(done), "{left:?}");
    })
    .await;
}

async fn restores(cut: Cut, times: u32) {
    let Some(server) = server() else { return };
    let database = server.database();
    database.execute(ODD);
    database.execute(MORE);
    let kept = all_of(&database);
    let directory = tempfile::tempdir().unwrap();
    let test = TestContext::new("keep");
    let step = backup(&database, json!({ "to": directory.path(), "prove": "restore", "tools": tools(&server) }));
    let undo = prepared(&step, &test.forward()).await.unwrap();
    let backup = step.apply(&test.forward(), &undo).await.unwrap().path;
    database.execute("drop table empty; delete from bulk where n % 2 = 0; drop table fleeting");
    let changed = all_of(&database);
    let make = || restore(&database, json!({ "backup": backup, "analyze": false, "tools": tools(&server) }));
    cut_off(&server, &database, make, cut, times, |done| {
        assert_eq!(all_of(&database), if done { &*kept } else { &*changed });
        assert_eq!(ours(&database).lines().count(), usize::from(done), "{}", ours(&database));
        assert_eq!(listing(directory.path()).len(), 1, "{:?}", listing(directory.path()));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_whose_sessions_are_ended_resumes_or_goes_back() {
    backups(Cut::Sessions, 6).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_whose_sessions_are_ended_resumes_or_goes_back() {
    restores(Cut::Sessions, 6).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_whose_server_stops_resumes_or_goes_back() {
    restores(Cut::Server, 4).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "minutes: scripts/test --full"]
async fn campaign_backups_cut_off() {
    backups(Cut::Sessions, 30).await;
    backups(Cut::Server, 10).await;
    backups(Cut::Driver, 10).await;
    backups(Cut::Cancelled, 10).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "minutes: scripts/test --full"]
async fn campaign_restores_cut_off() {
    restores(Cut::Sessions, 30).await;
    restores(Cut::Server, 10).await;
    restores(Cut::Driver, 10).await;
    restores(Cut::Cancelled, 10).await;
}

/// Stands for a cluster in whose network the database is `db.internal:1`.
struct Cluster {
    host: String,
    port: u16,
}

#[async_trait]
impl Target for Cluster {
    fn lock(&self) -> LockName {
        LockName::new("cluster", "test").unwrap()
    }

    async fn identity(&self, _cx: &Context) -> Result<String, StepError> {
        Ok("cluster".into())
    }
}

#[async_trait]
impl Tunnel for Cluster {
    async fn open(&self, _cx: &Context, host: &str, port: u16) -> Result<Passage, StepError> {
        assert_eq!((host, port), ("db.internal", 1));
        let way = Forwarder::to(&self.host, self.port).await;
        Ok(Passage::new(way.address(), way))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_behind_a_tunnel_is_kept_and_put_back() {
    let Some(server) = server() else { return };
    let database = server.database();
    database.execute(ODD);
    let directory = tempfile::tempdir().unwrap();
    let url = directory.path().join("url");
    let elsewhere = database.url().replace(&format!("127.0.0.1:{}", server.port()), "db.internal:1");
    std::fs::write(&url, elsewhere).unwrap();
    let cluster = Cluster { host: server.host().to_owned(), port: server.port() };
    let context = BuildContext::new("/").with_target("way", AnyTarget::tunnel("cluster", cluster));
    let config =
        DatabaseConfig { via: Some("way".into()), ..DatabaseConfig::new(SecretRef::file(url.to_str().unwrap())) };
    let reached = Reached::from_config(config, &context).unwrap();
    let context = context.with_target("db", AnyTarget::new("postgres", reached));
    let before = all_of(&database);
    let to = directory.path().join("to");
    let with = json!({ "target": "db", "to": to, "prove": "restore", "tools": tools(&server) });
    let step = Backup::from_config(serde_json::from_value(with).unwrap(), &context).unwrap();
    let test = TestContext::new("keep");
    let undo = prepared(&step, &test.forward()).await.unwrap();
    let output = step.apply(&test.forward(), &undo).await.unwrap_or_else(|error| panic!("{error:?}"));
    database.execute("drop table empty");
    let with = json!({ "target": "db", "backup": output.path, "tools": tools(&server) });
    let step = Restore::from_config(serde_json::from_value(with).unwrap(), &context).unwrap();
    let test = TestContext::new("back");
    let undo = prepared(&step, &test.forward()).await.unwrap();
    step.apply(&test.forward(), &undo).await.unwrap_or_else(|error| panic!("{error:?}"));
    assert_eq!(all_of(&database), before);
    step.settle(&test.forward(), &undo).await.unwrap();
    step.commit(&test.commit(), &undo).await.unwrap();
    assert_eq!(ours(&database), "");
    assert_eq!(listing(Path::new(&to)).len(), 1);
}
