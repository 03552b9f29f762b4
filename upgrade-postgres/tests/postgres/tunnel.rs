//! A database that only another target leads to: sessions, and all that is opened beside them, go
//! through it.

#![cfg(test)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;
use sqlx::{Connection, PgConnection};
use upgrade_core::context::Context;
use upgrade_core::error::{Class, StepError};
use upgrade_core::executor::{Executor, Interrupt, RunOptions};
use upgrade_core::file::{LoadOptions, parse};
use upgrade_core::journal::MemoryJournal;
use upgrade_core::names::LockName;
use upgrade_core::pipeline::Pipeline;
use upgrade_core::registry::{AnyTarget, BuildContext, Registry};
use upgrade_core::target::Target;
use upgrade_core::testkit::TestContext;
use upgrade_core::tunnel::{Passage, Tunnel};
use upgrade_postgres::{Database, DatabaseConfig};
use upgrade_testbed::postgres;

use crate::forwarder::Forwarder;
use crate::world::{any_database, registry};

/// Stands for a cluster in whose network the database is `db.internal:5432`.
#[derive(Clone, Default)]
struct Cluster {
    leads_to: Option<(String, u16)>,
    opened: Arc<AtomicUsize>,
    open: Arc<AtomicUsize>,
    ways: Arc<Mutex<Vec<std::net::SocketAddr>>>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ClusterConfig {}

struct Held {
    _way: Forwarder,
    open: Arc<AtomicUsize>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl Tunnel for Cluster {
    async fn open(&self, _: &Context, host: &str, port: u16) -> Result<Passage, StepError> {
        if (host, port) != ("db.internal", 5432) {
            return Err(StepError::permanent(format!("nothing listens at {host}:{port}")).with_hint("name a service"));
        }
        let Some((host, port)) = &self.leads_to else {
            return Err(StepError::transient("the cluster does not answer").with_hint("look at the cluster"));
        };
        let way = Forwarder::to(host, *port).await;
        let address = way.address();
        self.opened.fetch_add(1, Ordering::SeqCst);
        self.open.fetch_add(1, Ordering::SeqCst);
        self.ways.lock().unwrap().push(address);
        Ok(Passage::new(address, Held { _way: way, open: Arc::clone(&self.open) }))
    }
}

#[async_trait]
impl Target for Cluster {
    fn lock(&self) -> LockName {
        LockName::new("cluster", "test").unwrap()
    }

    async fn identity(&self, _: &Context) -> Result<String, StepError> {
        Ok("the test's".into())
    }
}

fn cluster(database: &postgres::Database) -> Cluster {
    Cluster { leads_to: Some((database.host().to_owned(), database.port())), ..Cluster::default() }
}

fn with_cluster(cluster: &Cluster) -> Registry {
    let (mut registry, cluster) = (registry(), cluster.clone());
    registry.tunnel("test.cluster", "Leads into a network of the test's", move |_: ClusterConfig, _: &BuildContext| {
        Ok(cluster.clone())
    });
    registry
}

/// Makes the target as it stands in a file: its host is known only behind the tunnel.
fn behind(database: &postgres::Database, cluster: &Cluster, parameters: &str) -> Database {
    let cx = BuildContext::new("/").with_target("cluster", AnyTarget::tunnel("test.cluster", cluster.clone()));
    Database::from_config(config(database, parameters), &cx).unwrap()
}

fn config(database: &postgres::Database, parameters: &str) -> DatabaseConfig {
    let directory = std::env::temp_dir().join("upgrade-postgres-urls");
    std::fs::create_dir_all(&directory).unwrap();
    let path = directory.join(format!("tunnel-{}", database.name()));
    let password = postgres::PASSWORD;
    std::fs::write(&path, format!("postgres://tester:{password}@db.internal/{}{parameters}", database.name())).unwrap();
    let reference = upgrade_core::secret::SecretRef::file(path.to_str().unwrap());
    DatabaseConfig { via: Some("cluster".into()), ..DatabaseConfig::new(reference) }
}

fn pipeline(database: &postgres::Database, cluster: &Cluster, targets: &str) -> Result<Pipeline, String> {
    let db = json!({ "uses": "postgres", "with": config(database, "") });
    let document = format!(
        "upgrade: tunnel\ntargets:\n{}\nsteps:\n- id: make\n  uses: postgres.sql\n  with: {{ target: db, statement: create table made (n int), undo: drop table made }}\n",
        targets.replace("DB", &db.to_string()),
    );
    parse(&document, "pipeline.yaml".as_ref(), "/".as_ref(), &LoadOptions::default(), &with_cluster(cluster))
        .map_err(|error| error.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_reaches_the_database_through_it_wherever_it_stands_in_the_file() {
    for targets in ["  db: DB\n  cluster: { uses: test.cluster }", "  cluster: { uses: test.cluster }\n  db: DB"] {
        let Some(database) = any_database() else { return };
        let cluster = cluster(&database);
        let pipeline = pipeline(&database, &cluster, targets).unwrap();
        let executor = Executor::new(Arc::new(MemoryJournal::new()));
        let report = executor.run(&pipeline, &RunOptions::default(), &Interrupt::new()).await.unwrap();
        assert_eq!(database.text("select count(*) from made"), "0", "{report:?}");
        assert!(cluster.opened.load(Ordering::SeqCst) >= 3, "every session has its own");
        assert_eq!(cluster.open.load(Ordering::SeqCst), 0, "none is left open");
    }
}

#[test]
fn what_leads_nowhere_is_refused_while_the_file_is_read() {
    let Some(database) = any_database() else { return };
    let cluster = cluster(&database);
    let error = pipeline(&database, &cluster, "  db: DB").map(drop).unwrap_err();
    assert!(error.contains("there is no target `cluster`"), "{error}");
    let other = json!({ "uses": "postgres", "with": { "url": "postgres://db/other" } });
    let error = pipeline(&database, &cluster, &format!("  db: DB\n  cluster: {other}")).map(drop).unwrap_err();
    assert!(error.contains("nothing can be reached through target `cluster`"), "{error}");

    let cx = BuildContext::new("/").with_target("cluster", AnyTarget::tunnel("test.cluster", cluster));
    let config =
        DatabaseConfig { via: Some("cluster".into()), ..DatabaseConfig::new("postgres:///db?host=/run/postgresql") };
    let error = Database::from_config(config, &cx).unwrap_err();
    assert!(error.message.contains("a socket of this machine"), "{error:?}");
    assert_eq!(error.key.as_deref(), Some("via"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_tunnel_says_is_what_is_told() {
    let Some(database) = any_database() else { return };
    let cx = TestContext::new("step").forward();
    let error = behind(&database, &Cluster::default(), "").connect(&cx).await.unwrap_err();
    assert_eq!((error.class(), error.message()), (Class::Transient, "the cluster does not answer"));
    assert_eq!(error.hint(), Some("look at the cluster"));
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_and_watching_go_through_it_as_well_and_it_stays_open_for_them() {
    let Some(database) = any_database() else { return };
    database.execute("create table t (n int)");
    let cluster = cluster(&database);
    let db = behind(&database, &cluster, "");
    let test = TestContext::new("alter");
    let cx = test.forward();
    let mut session = db.connect(&cx).await.unwrap();
    // Neither name nor port leads anywhere from here: what is not sent through the tunnel is lost.
    let canceller = session.canceller();
    tokio::spawn({
        let test = test.clone();
        async move {
            tokio::time::sleep(Duration::from_millis(300)).await;
            test.cancellation().cancel();
        }
    });
    let began = Instant::now();
    let slept = canceller.cancels(&cx, async {
        sqlx::raw_sql("select pg_sleep(60)").execute(session.connection()).await?;
        Ok(())
    });
    let error = StepError::from(slept.await.unwrap_err());
    assert!(error.message().contains("cancelled"), "{error:?}");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    session.close().await;
    assert_eq!(cluster.open.load(Ordering::SeqCst), 0);

    let test = TestContext::new("alter");
    let cx = test.forward();
    let mut reader = PgConnection::connect(&database.url()).await.unwrap();
    sqlx::raw_sql("begin; select * from t").execute(&mut reader).await.unwrap();
    let altering = tokio::spawn(async move {
        let mut session = db.connect(&cx).await?;
        db.lock_policy()
            .transaction(&cx, &mut session, "altering t", move |connection, _| {
                Box::pin(async move {
                    sqlx::raw_sql("alter table t add column m int").execute(connection).await?;
                    Ok(())
                })
            })
            .await
            .map_err(StepError::from)
    });
    tokio::time::sleep(Duration::from_millis(1500)).await;
    sqlx::raw_sql("commit").execute(&mut reader).await.unwrap();
    altering.await.unwrap().unwrap();
    assert!(test.reported().iter().any(|progress| progress.message.contains("behind pid")), "{:?}", test.reported());
}
