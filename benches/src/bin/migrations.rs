//! A thousand migrations through the executor and the file journal, against what people use.
//!
//! `cargo run --release -p upgrade-benches --bin migrations [DIRECTORY]`
//!
//! Against one process of psql that reads one script of all of them, each in a transaction of its
//! own, on a server with fsync; and against sqlx's own migrator. They take turns, and the median of
//! the rounds' ratios counts.

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::migrate::Migrator;
use sqlx::{Connection, PgConnection};
use upgrade_benches::{Outcome, median, spread};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::executor::{Executor, Interrupt, Outcome as Ending, RunOptions};
use upgrade_core::journal::FileJournal;
use upgrade_core::pipeline::Pipeline;
use upgrade_core::registry::{AnyTarget, BuildContext};
use upgrade_core::secret::SecretRef;
use upgrade_core::step::Step;
use upgrade_core::testkit::TestContext;
use upgrade_postgres::steps::{Migrate, MigrateConfig};
use upgrade_postgres::{Database, DatabaseConfig};
use upgrade_testbed::postgres::{Server, Version, own};

const ROUNDS: usize = 7;
const MIGRATIONS: usize = 1000;

fn main() -> Outcome<()> {
    let directory = std::env::args().nth(1).map_or_else(std::env::temp_dir, Into::into);
    let Some(server) = own(Version::V15, &[]) else { return Err("there is no PostgreSQL 15".into()) };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // As a task, so that the work runs where a service's would: on a worker of the runtime.
    runtime.block_on(async move { tokio::spawn(async move { compare(&directory, &server).await }).await? })
}

async fn compare(directory: &Path, server: &Server) -> Outcome<()> {
    let home = tempfile::tempdir_in(directory)?;
    let directory = home.path().join("migrations");
    std::fs::create_dir(&directory)?;
    let mut script = String::new();
    for n in 1..=MIGRATIONS {
        let up = format!(
            "create table t{n} (id bigint primary key, name text not null);\ninsert into t{n} values ({n}, 'x');\n"
        );
        std::fs::write(directory.join(format!("{n}_t{n}.up.sql")), &up)?;
        std::fs::write(directory.join(format!("{n}_t{n}.down.sql")), format!("drop table t{n};\n"))?;
        write!(script, "begin;\n{up}commit;\n")?;
    }
    let script_path = home.path().join("all.sql");
    std::fs::write(&script_path, script)?;
    println!("{MIGRATIONS} migrations ({ROUNDS} rounds, journal on {})", directory.display());

    let mut fresh: Vec<[f64; 3]> = Vec::new();
    let mut idle: Vec<[f64; 3]> = Vec::new();
    for round in 0..=ROUNDS {
        let (one, two, three) = (server.database(), server.database(), server.database());
        let psql = psql(server, &one.url(), &script_path)?;
        let sqlx = sqlx_migrates(&two.url(), &directory).await?;
        let executor = Executor::new(Arc::new(FileJournal::open(home.path().join(format!("journal{round}")))?));
        let url = home.path().join(format!("url{round}"));
        std::fs::write(&url, three.url())?;
        let ours = run(&executor, &url, &directory).await?;
        let idle_sqlx = sqlx_migrates(&two.url(), &directory).await?;
        let idle_run = run(&executor, &url, &directory).await?;
        let idle_step = no_op(&url, &directory).await?;
        // The first round warms up.
        if round > 0 {
            fresh.push([psql, sqlx, ours].map(|time| time.as_secs_f64()));
            idle.push([idle_sqlx, idle_run, idle_step].map(|time| time.as_secs_f64()));
        }
    }
    let each = |times: &[[f64; 3]], place: usize| median(times.iter().map(|time| time[place]).collect());
    for (place, name) in ["psql, one process", "sqlx's migrator", "postgres.migrate in a run"].iter().enumerate() {
        println!("  fresh: {name:28} {:8.1} ms", each(&fresh, place) * 1e3);
    }
    for (place, name) in ["sqlx's migrator", "a whole run", "the step alone"].iter().enumerate() {
        println!("  no-op: {name:28} {:8.1} ms", each(&idle, place) * 1e3);
    }
    let ratio = |over: usize, under: usize| spread(fresh.iter().map(|time| time[over] / time[under]).collect());
    println!("  ours / psql                         {} ×   (target ≤ 1.15)", ratio(2, 0));
    println!("  sqlx / psql                         {} ×", ratio(1, 0));
    println!("  no-op in the step                   (target ≤ 15 ms)");
    Ok(())
}

fn psql(server: &Server, url: &str, script: &Path) -> Outcome<Duration> {
    let began = Instant::now();
    let status = Command::new(server.bin("psql"))
        .args(["-q", "-X", "-v", "ON_ERROR_STOP=1", "-f"])
        .arg(script)
        .arg(url)
        .stdout(Stdio::null())
        .status()?;
    if status.success() { Ok(began.elapsed()) } else { Err("psql failed".into()) }
}

async fn sqlx_migrates(url: &str, directory: &Path) -> Outcome<Duration> {
    let began = Instant::now();
    let migrator = Migrator::new(directory).await?;
    let mut connection = PgConnection::connect(url).await?;
    migrator.run_direct(None, &mut connection, false).await?;
    Ok(began.elapsed())
}

fn step(url: &Path, directory: &Path) -> Outcome<Migrate> {
    let reference = SecretRef::file(url.to_str().ok_or("the path is not UTF-8")?);
    let cx = BuildContext::new("/");
    let database = Database::from_config(DatabaseConfig::new(reference), &cx)?;
    let cx = cx.with_target("db", AnyTarget::new("postgres", database));
    Ok(Migrate::from_config(MigrateConfig::new("db", directory), &cx)?)
}

async fn run(executor: &Executor, url: &Path, directory: &Path) -> Outcome<Duration> {
    let began = Instant::now();
    let pipeline = Pipeline::builder("bench").step("schema", step(url, directory)?).build()?;
    let report = executor.run(&pipeline, &RunOptions::default(), &Interrupt::new()).await?;
    match report.outcome {
        Ending::Committed => Ok(began.elapsed()),
        other => Err(format!("the run ended as {other:?}").into()),
    }
}

/// Asks the step alone, of a database that has everything.
async fn no_op(url: &Path, directory: &Path) -> Outcome<Duration> {
    let step = step(url, directory)?;
    let cx: Context = TestContext::new("schema").forward();
    let began = Instant::now();
    let prepared: Result<_, StepError> = step.prepare(&cx).await;
    prepared?;
    Ok(began.elapsed())
}
