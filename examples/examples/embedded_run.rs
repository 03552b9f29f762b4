//! Upgrades a program's own data from within the program, with its progress on the terminal and
//! its journal in a directory. Old records are kept until the upgrade is committed.
//!
//! cargo run -p upgrade-examples --example embedded_run

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::{fs, io};

use async_trait::async_trait;
use upgrade_core::context::{Context, Progress};
use upgrade_core::entry::{Entry, Record};
use upgrade_core::error::StepError;
use upgrade_core::executor::{Executor, Interrupt, Observer, Outcome, RunOptions};
use upgrade_core::journal::FileJournal;
use upgrade_core::names::RunId;
use upgrade_core::pipeline::Pipeline;
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};

const RECORDS: u64 = 50;

/// Writes each `N.v1` as `N.v2` beside it; the old ones go when the upgrade is committed.
struct ConvertRecords {
    directory: PathBuf,
}

#[async_trait]
impl Step for ConvertRecords {
    const KIND: &'static str = "example.convert_records";
    type Undo = Vec<u64>;
    type Output = usize;

    async fn prepare(&self, _cx: &Context) -> Result<Prepared<Vec<u64>, usize>, StepError> {
        let records = self.old_records().map_err(|error| failed(&self.directory, &error))?;
        if records.is_empty() {
            return Ok(Prepared::unchanged(0, "every record is of the new format"));
        }
        let change = Change::new(Effect::Modify, self.directory.to_string_lossy())
            .with_summary(format!("{} records", records.len()));
        Ok(Prepared::change(records, [change]))
    }

    async fn apply(&self, cx: &Context, records: &Vec<u64>) -> Result<usize, StepError> {
        for (done, record) in records.iter().enumerate() {
            if cx.cancelled().is_cancelled() {
                return Err(StepError::transient("asked to stop").with_hint("resume the run: it goes on from here"));
            }
            let new = self.path(*record, "v2");
            let convert = || fs::write(&new, fs::read_to_string(self.path(*record, "v1"))?.to_uppercase());
            convert().map_err(|error| failed(&new, &error))?;
            cx.progress(done as u64 + 1, records.len() as u64, "converting");
        }
        Ok(records.len())
    }

    async fn commit(&self, _cx: &Context, records: &Vec<u64>) -> Result<(), StepError> {
        self.remove(records, "v1")
    }
}

#[async_trait]
impl Rollback for ConvertRecords {
    async fn rollback(&self, _cx: &Context, records: &Vec<u64>, _output: Option<&usize>) -> Result<(), StepError> {
        self.remove(records, "v2")
    }
}

impl ConvertRecords {
    fn path(&self, record: u64, format: &str) -> PathBuf {
        self.directory.join(format!("{record}.{format}"))
    }

    fn old_records(&self) -> io::Result<Vec<u64>> {
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            records.extend(name.strip_suffix(".v1").and_then(|number| number.parse::<u64>().ok()));
        }
        records.sort_unstable();
        Ok(records)
    }

    fn remove(&self, records: &[u64], format: &str) -> Result<(), StepError> {
        for record in records {
            let path = self.path(*record, format);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(&path, &error)),
                _ => {}
            }
        }
        Ok(())
    }
}

fn failed(path: &Path, error: &io::Error) -> StepError {
    StepError::permanent(format!("{} cannot be read or written", path.display()))
        .with_cause(error)
        .with_hint("see whether the directory can be written and has space")
}

/// Shows what happens and hands on what is durable.
struct Terminal {
    furthest: Arc<AtomicU64>,
    entries: mpsc::Sender<Entry>,
}

impl Observer for Terminal {
    fn entry(&mut self, _run: &RunId, record: &Record) {
        match &record.entry {
            Entry::StepPrepared { step, changes, .. } => println!("{step}: {} to do", changes.len()),
            Entry::StepApplied { step, elapsed_ms, .. } => println!("{step}: done in {elapsed_ms} ms"),
            Entry::RunEntered { state, .. } => println!("the run is {state:?}"),
            _ => {}
        }
        // Nobody listens any more: that is no reason to fail.
        let _ = self.entries.send(record.entry.clone());
    }

    fn progress(&mut self, progress: &Progress) {
        self.furthest.fetch_max(progress.done, Ordering::Relaxed);
        let total = progress.total.unwrap_or_default();
        eprint!("\r{} {}/{total}{}", progress.message, progress.done, if progress.done == total { "\n" } else { "" });
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let directory = tempfile::tempdir()?;
    let data = directory.path().join("data");
    fs::create_dir(&data)?;
    for record in 0..RECORDS {
        fs::write(data.join(format!("{record}.v1")), format!("record {record}"))?;
    }

    let (entries, received) = mpsc::channel();
    let furthest = Arc::new(AtomicU64::new(0));
    let journal = Arc::new(FileJournal::open(directory.path().join("journal"))?);
    let executor = Executor::new(journal).observer(Terminal { furthest: furthest.clone(), entries });
    let pipeline =
        Pipeline::builder("records").to("2.0.0").step("convert", ConvertRecords { directory: data.clone() }).build()?;
    let report = executor.run(&pipeline, &RunOptions::default(), &Interrupt::new()).await?;

    assert_eq!(report.outcome, Outcome::Committed);
    assert_eq!(fs::read_to_string(data.join("7.v2"))?, "RECORD 7");
    assert_eq!(fs::read_dir(&data)?.count() as u64, RECORDS, "the old records are gone");
    drop(executor);
    let applied = received.iter().filter(|entry| matches!(entry, Entry::StepApplied { .. })).count();
    assert_eq!(applied, 1, "the observer saw the step's end");
    assert!(furthest.load(Ordering::Relaxed) <= RECORDS);
    Ok(())
}
