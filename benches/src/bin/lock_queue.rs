//! A change of a table behind a long reader, under traffic: what the other readers notice of it, and
//! when it is done.
//!
//! `cargo run --release -p upgrade-benches --bin lock_queue`
//!
//! A server of its own; 400 short reads a second, each counted from when it was due, so that those
//! that queue count as long as they were late. A transaction reads the table and stays open for 10 s;
//! one second after it began, the change is made: as a plain `ALTER TABLE`, with a `lock_timeout` of
//! 500 ms in a loop, and through the library.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sqlx::{Connection, PgConnection};
use upgrade_benches::Outcome;
use upgrade_core::registry::BuildContext;
use upgrade_core::secret::SecretRef;
use upgrade_core::testkit::TestContext;
use upgrade_postgres::{Database, DatabaseConfig};
use upgrade_testbed::postgres::{Version, own};

const READS_A_SECOND: u32 = 400;
const CLIENTS: u32 = 40;
const READER: Duration = Duration::from_secs(10);
const HEAD_START: Duration = Duration::from_secs(1);
const ALTER: &str = "alter table orders add column note text";

#[derive(Clone, Copy)]
enum Way {
    Plain,
    Loop,
    Library,
}

struct Measured {
    reads: Vec<Duration>,
    done_after: Duration,
}

fn main() -> Outcome<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async { tokio::spawn(compare()).await? })
}

async fn compare() -> Outcome<()> {
    let Some(server) = own(Version::V15, &[("max_connections", "100")]) else { return Ok(()) };
    println!("ALTER TABLE behind a reader of 10 s, {READS_A_SECOND} reads a second, PostgreSQL {}", server.version());
    println!("  {:32} {:>10} {:>10} {:>10} {:>22}", "", "median", "p99", "longest", "done after the reader");
    let ways = [("plain", Way::Plain), ("lock_timeout 500 ms, every 1 s", Way::Loop), ("this library", Way::Library)];
    let mut p99 = Vec::new();
    for (name, way) in ways {
        let database = server.database();
        database.execute(
            "create table orders (id int primary key, total numeric); \
             insert into orders select n, n from generate_series(1, 10000) n; analyze orders",
        );
        let mut measured = measure(&database.url(), way).await?;
        measured.reads.sort();
        let at = |share: f64| {
            let place = (measured.reads.len() as f64 * share) as usize;
            milliseconds(measured.reads[place.min(measured.reads.len() - 1)])
        };
        let done = milliseconds(measured.done_after);
        println!("  {name:32} {:7.1} ms {:7.1} ms {:7.1} ms {done:19.0} ms", at(0.5), at(0.99), at(1.0));
        p99.push(at(0.99));
    }
    if let [plain, repeated, library] = p99[..] {
        println!("  p99 against this library: plain {:.0} ×, loop {:.1} ×", plain / library, repeated / library);
    }
    println!("  targets: p99 ≤ 50 ms, done ≤ 1000 ms after the reader");
    Ok(())
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

async fn measure(url: &str, way: Way) -> Outcome<Measured> {
    let stop = Arc::new(AtomicBool::new(false));
    let begun = Instant::now();
    let clients: Vec<_> =
        (0..CLIENTS).map(|number| tokio::spawn(read(url.to_owned(), number, Arc::clone(&stop)))).collect();
    tokio::time::sleep(Duration::from_secs(2)).await;

    let mut reader = PgConnection::connect(url).await?;
    sqlx::raw_sql("begin; select count(*) from orders").execute(&mut reader).await?;
    let reading = tokio::spawn(async move {
        tokio::time::sleep(READER).await;
        sqlx::raw_sql("commit").execute(&mut reader).await?;
        Ok::<_, sqlx::Error>(Instant::now())
    });
    tokio::time::sleep(HEAD_START).await;
    let from = begun.elapsed();
    match way {
        Way::Plain => {
            let mut connection = PgConnection::connect(url).await?;
            sqlx::raw_sql(ALTER).execute(&mut connection).await?;
        }
        Way::Loop => repeat(url).await?,
        Way::Library => through_the_library(url).await?,
    }
    let done = Instant::now();
    let freed = reading.await??;
    tokio::time::sleep(Duration::from_millis(500)).await;
    stop.store(true, Ordering::Relaxed);
    let mut reads = Vec::new();
    for client in clients {
        let all = client.await??;
        reads.extend(all.into_iter().filter(|(due, _)| *due >= begun + from).map(|(_, took)| took));
    }
    Ok(Measured { reads, done_after: done.saturating_duration_since(freed) })
}

/// Reads at its times, late or not.
async fn read(url: String, number: u32, stop: Arc<AtomicBool>) -> Outcome<Vec<(Instant, Duration)>> {
    let mut connection = PgConnection::connect(&url).await?;
    let every = Duration::from_secs(1) * CLIENTS / READS_A_SECOND;
    let mut due = Instant::now() + every * number / CLIENTS;
    let mut reads = Vec::new();
    let mut id = i64::from(number) * 37;
    while !stop.load(Ordering::Relaxed) {
        tokio::time::sleep_until(due.into()).await;
        id = (id + 7919) % 10_000 + 1;
        sqlx::query("select total from orders where id = $1::int8").bind(id).execute(&mut connection).await?;
        reads.push((due, due.elapsed()));
        due += every;
    }
    Ok(reads)
}

async fn repeat(url: &str) -> Outcome<()> {
    let mut connection = PgConnection::connect(url).await?;
    sqlx::raw_sql("set lock_timeout = '500ms'").execute(&mut connection).await?;
    loop {
        match sqlx::raw_sql(ALTER).execute(&mut connection).await {
            Ok(_) => return Ok(()),
            Err(error) if error.as_database_error().is_some_and(|error| error.code().as_deref() == Some("55P03")) => {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

async fn through_the_library(url: &str) -> Outcome<()> {
    let directory = tempfile::tempdir()?;
    let secret = directory.path().join("url");
    std::fs::write(&secret, url)?;
    let config = DatabaseConfig::new(SecretRef::file(secret.display().to_string()));
    let database = Database::from_config(config, &BuildContext::new(directory.path()))?;
    let cx = TestContext::new("alter").forward();
    let mut session = database.connect(&cx).await?;
    database
        .lock_policy()
        .transaction(&cx, &mut session, "altering orders", move |connection, _| {
            Box::pin(async move {
                sqlx::raw_sql(ALTER).execute(connection).await?;
                Ok(())
            })
        })
        .await?;
    session.close().await;
    Ok(())
}
