//! The file journal against a bare append with fdatasync and against SQLite, and the journal in
//! PostgreSQL against plain inserts, each in one run.
//!
//! `cargo run --release -p upgrade-benches --bin journal [DIRECTORY | --postgres]`
//!
//! All contenders write the same lines of about 256 bytes, one at a time, each durable before the
//! next, on the same disk. They take turns in short rounds, and the median of the rounds' ratios
//! counts: a disk's mood changes within seconds.

use std::fs::OpenOptions;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use sqlx::{Connection as _, PgConnection};
use upgrade_benches::{Outcome, append_raw, median, status_mib};
use upgrade_core::entry::{Entry, Record};
use upgrade_core::journal::{FileJournal, Journal, Lease, conformance};
use upgrade_core::names::{LockName, RunId, Seq, StepId};
use upgrade_postgres::{JournalAddress, PostgresJournal};
use upgrade_testbed::postgres as server;

const ROUNDS: usize = 101;
const RECORDS: usize = 40;
const LONG: Seq = 100_000;

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // As a task, so that the work runs where a service's would: on a worker of the runtime.
    runtime.block_on(async move {
        tokio::spawn(async move {
            match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
                ["--load", directory, run] => load(directory.as_ref(), run).await,
                ["--postgres"] => postgres().await,
                [] => compare(&std::env::temp_dir()).await,
                [directory, ..] => compare(directory.as_ref()).await,
            }
        })
        .await?
    })
}

/// A step's entry that makes a line of about 256 bytes.
fn entry(number: usize) -> Outcome<Entry> {
    Ok(Entry::StepUndone { step: StepId::try_from(format!("step-{number:06}"))?, elapsed_ms: 17 })
}

async fn compare(directory: &Path) -> Outcome<()> {
    let home = tempfile::tempdir_in(directory)?;
    println!("durable records a second, one at a time ({ROUNDS} rounds of {RECORDS}, on {})", directory.display());
    let line = sample_line()?;
    println!("  a line has {} bytes", line.len());

    let raw = OpenOptions::new().create(true).append(true).open(home.path().join("raw"))?;
    let sqlite = open_sqlite(home.path())?;
    let journal = FileJournal::open(home.path().join("journal"))?;
    let run = RunId::generate();
    let lease = journal.acquire(&[LockName::new("bench", "journal")?], Duration::ZERO).await?;
    journal.append(&lease, &run, 0, &[conformance::created(&run, "bench")]).await?;

    let mut times: Vec<[Duration; 3]> = Vec::new();
    let mut at = 1;
    for round in 0..=ROUNDS {
        let time = [
            append_raw(&raw, &line, RECORDS)?,
            append_journal(&journal, &lease, &run, &mut at).await?,
            append_sqlite(&sqlite, &line)?,
        ];
        // The first round warms up.
        if round > 0 {
            times.push(time);
        }
    }
    for (place, name) in ["raw append + fdatasync", "FileJournal", "SQLite, WAL, synchronous=FULL"].iter().enumerate() {
        let each = median(times.iter().map(|time| time[place].as_secs_f64()).collect()) / RECORDS as f64;
        println!("  {name:30} {:8.0} /s   {:7.1} µs each", 1.0 / each, each * 1e6);
    }
    let ratio = |other: usize| median(times.iter().map(|time| time[other].div_duration_f64(time[1])).collect());
    println!("  FileJournal / raw              {:6.2} ×   (target ≥ 1.0)", ratio(0));
    println!("  FileJournal / SQLite           {:6.2} ×   (target ≥ 1.2)", ratio(2));
    drop(lease);
    long(&journal, &home.path().join("journal")).await?;
    postgres().await
}

/// The journal in a server of its own beside plain inserts there, each committed, into a table of
/// the same shape: what its lease, its head and its way between threads cost.
async fn postgres() -> Outcome<()> {
    let Some(server) = server::own(server::Version::V15, &[]) else { return Ok(()) };
    let database = server.database();
    let journal = PostgresJournal::open(JournalAddress::parse(&database.url())?).await?;
    database.execute("CREATE TABLE plain (LIKE upgrade_journal.records INCLUDING ALL)");
    let mut connection = PgConnection::connect(&database.url()).await?;
    let run = RunId::generate();
    let lease = journal.acquire(&[LockName::new("bench", "journal")?], Duration::ZERO).await?;
    journal.append(&lease, &run, 0, &[conformance::created(&run, "bench")]).await?;
    let text = serde_json::to_string(&entry(1000)?)?;
    let (mut at, mut times) = (1, Vec::new());
    for round in 0..=ROUNDS {
        let start = Instant::now();
        for number in 0..RECORDS {
            sqlx::query("INSERT INTO plain (run, seq, at, prev, entry, digest) VALUES ($1, $2, $3, $4, $5, $6)")
                .bind(run.as_str())
                .bind((round * RECORDS + number) as i64)
                .bind("2026-01-01T00:00:00.000000Z")
                .bind("0".repeat(64))
                .bind(&text)
                .bind("0".repeat(64))
                .execute(&mut connection)
                .await?;
        }
        let plain = start.elapsed();
        let kept = append_journal(&journal, &lease, &run, &mut at).await?;
        if round > 0 {
            times.push([plain, kept]);
        }
    }
    println!("durable records a second in PostgreSQL, one at a time ({ROUNDS} rounds of {RECORDS})");
    for (place, name) in ["plain INSERT, committed", "PostgresJournal"].iter().enumerate() {
        let each = median(times.iter().map(|time| time[place].as_secs_f64()).collect()) / RECORDS as f64;
        println!("  {name:30} {:8.0} /s   {:7.1} µs each", 1.0 / each, each * 1e6);
    }
    let ratio = median(times.iter().map(|[plain, kept]| plain.div_duration_f64(*kept)).collect());
    println!("  PostgresJournal / INSERT       {ratio:6.2} ×");
    Ok(())
}

fn sample_line() -> Outcome<Vec<u8>> {
    let record = Record {
        seq: 1000,
        at: jiff::Timestamp::now(),
        prev: "0".repeat(64),
        entry: entry(1000)?,
        digest: "0".repeat(64),
    };
    let mut line = serde_json::to_vec(&record)?;
    line.push(b'\n');
    Ok(line)
}

fn open_sqlite(home: &Path) -> Outcome<Connection> {
    let connection = Connection::open(home.join("journal.sqlite"))?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.execute("CREATE TABLE journal (seq INTEGER PRIMARY KEY, line BLOB NOT NULL)", [])?;
    Ok(connection)
}

fn append_sqlite(connection: &Connection, line: &[u8]) -> Outcome<Duration> {
    let mut insert = connection.prepare_cached("INSERT INTO journal (line) VALUES (?1)")?;
    let start = Instant::now();
    for _ in 0..RECORDS {
        insert.execute([line])?;
    }
    Ok(start.elapsed())
}

async fn append_journal(journal: &dyn Journal, lease: &Lease, run: &RunId, at: &mut Seq) -> Outcome<Duration> {
    let entries = (0..RECORDS).map(entry).collect::<Outcome<Vec<_>>>()?;
    let start = Instant::now();
    for entry in entries {
        journal.append(lease, run, *at, &[entry]).await?;
        *at += 1;
    }
    Ok(start.elapsed())
}

/// Loads a long journal in a process of its own, whose memory is then that of the load.
async fn long(journal: &FileJournal, directory: &Path) -> Outcome<()> {
    let run = RunId::generate();
    let lease = journal.acquire(&[LockName::new("bench", "long")?], Duration::ZERO).await?;
    journal.append(&lease, &run, 0, &[conformance::created(&run, "bench")]).await?;
    let mut at = 1;
    while at < LONG {
        let entries = (0..1000.min(LONG - at) as usize).map(entry).collect::<Outcome<Vec<_>>>()?;
        at += journal.append(&lease, &run, at, &entries).await?.len() as Seq;
    }
    drop(lease);
    println!("loading {LONG} entries (targets: < 0.5 s, < 64 MiB)");
    for _ in 0..3 {
        let status = Command::new(std::env::current_exe()?).arg("--load").arg(directory).arg(run.as_str()).status()?;
        if !status.success() {
            return Err("the load failed".into());
        }
    }
    Ok(())
}

async fn load(directory: &Path, run: &str) -> Outcome<()> {
    let journal = FileJournal::open(directory)?;
    let start = Instant::now();
    let records = journal.load(&RunId::try_from(run)?).await?;
    let elapsed = start.elapsed();
    println!(
        "  {} entries in {:.3} s, resident {:.1} MiB, at most {:.1} MiB",
        records.len(),
        elapsed.as_secs_f64(),
        status_mib("VmRSS:")?,
        status_mib("VmHWM:")?
    );
    Ok(())
}
