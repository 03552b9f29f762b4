//! How long a run with a journal of 100,000 entries takes to go on, and what memory that needs.
//!
//! `cargo run --release -p upgrade-benches --bin resume [DIRECTORY]`
//!
//! Each resume is a process of its own, started on the journal of a run that was cut off before
//! its last step. Measured is the whole way: lease, journal read and verified, definition
//! compared, the new driver on record, and the call of the step that comes next.

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde_json::{Value, json};
use upgrade_benches::nothing::{self, Nothing};
use upgrade_benches::{Outcome, spread, status_mib};
use upgrade_core::context::{Context, Direction};
use upgrade_core::entry::{ENTRY_FORMAT, Entry, Header, Versioned};
use upgrade_core::error::StepError;
use upgrade_core::executor::{Executor, Interrupt, RunOptions};
use upgrade_core::journal::{FileJournal, Journal};
use upgrade_core::names::{Actor, LockName, PipelineName, RunId, Seq, StepId};
use upgrade_core::pipeline::Pipeline;
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::transition::RunState;

const ENTRIES: usize = 100_000;
const ROUNDS: usize = 7;

/// When the resume was asked for; the pipeline is at hand by then.
static START: OnceLock<Instant> = OnceLock::new();

/// Tells how long it took to come here, and ends the process.
struct Arrived;

#[async_trait]
impl Step for Arrived {
    const KIND: &'static str = "bench.arrived";
    type Undo = u64;
    type Output = u64;

    async fn prepare(&self, _cx: &Context) -> Result<Prepared<u64, u64>, StepError> {
        match (START.get().map(Instant::elapsed), status_mib("VmHWM:")) {
            (Some(elapsed), Ok(peak)) => println!("{} {peak}", elapsed.as_secs_f64()),
            other => eprintln!("not measured: {other:?}"),
        }
        std::process::exit(0)
    }

    async fn apply(&self, _cx: &Context, undo: &u64) -> Result<u64, StepError> {
        Ok(*undo)
    }

    fn definition(&self) -> Value {
        json!({})
    }
}

#[async_trait]
impl Rollback for Arrived {
    async fn rollback(&self, _cx: &Context, _undo: &u64, _output: Option<&u64>) -> Result<(), StepError> {
        Ok(())
    }
}

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async move {
        tokio::spawn(async move {
            match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
                ["--resume", directory, run, steps] => resume(directory.as_ref(), run, steps.parse()?).await,
                [] => compare(&std::env::temp_dir()).await,
                [directory, ..] => compare(directory.as_ref()).await,
            }
        })
        .await?
    })
}

async fn compare(directory: &Path) -> Outcome<()> {
    println!("resuming a run of {ENTRIES} entries (targets: < 0.5 s, < 64 MiB; {ROUNDS} rounds)");
    for steps in [100, 10_000] {
        let home = tempfile::tempdir_in(directory)?;
        let run = write(home.path(), steps).await?;
        let (mut seconds, mut peaks) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let child = Command::new(std::env::current_exe()?)
                .arg("--resume")
                .arg(home.path())
                .args([run.as_str(), &steps.to_string()])
                .output()?;
            let text = String::from_utf8(child.stdout)?;
            let (time, peak) = text
                .trim()
                .split_once(' ')
                .ok_or_else(|| format!("the resume failed: {}", String::from_utf8_lossy(&child.stderr)))?;
            seconds.push(time.parse::<f64>()?);
            peaks.push(peak.parse::<f64>()?);
        }
        println!("  {steps:6} steps   s   {}   MiB at most {}", spread(seconds), spread(peaks));
    }
    Ok(())
}

fn pipeline(steps: usize) -> Outcome<Pipeline> {
    let mut builder = Pipeline::builder("bench");
    for at in 0..steps {
        builder = builder.step(nothing::name(at), Nothing);
    }
    Ok(builder.step("arrived", Arrived).build()?)
}

/// Writes what a run leaves that died before its last step, its steps full of checkpoints.
async fn write(home: &Path, steps: usize) -> Outcome<RunId> {
    let pipeline = pipeline(steps)?;
    let journal = FileJournal::open(home)?;
    let run = RunId::generate();
    let locks = vec![LockName::pipeline(&PipelineName::try_from("bench".to_owned())?)];
    let lease = journal.acquire(&locks, Duration::ZERO).await?;
    let header = Header {
        format: ENTRY_FORMAT,
        run: run.clone(),
        pipeline: PipelineName::try_from("bench".to_owned())?,
        environment: None,
        from: None,
        to: None,
        locks,
        definition: pipeline.define()?,
        actor: Actor::current(),
        engine: "bench".into(),
    };
    let entered = Entry::RunEntered { state: RunState::Applying, cause: None, deadline: None, health: None };
    let attached = Entry::DriverAttached { actor: Actor::current(), engine: "bench".into(), epoch: lease.epoch() };
    let mut at =
        journal.append(&lease, &run, 0, &[Entry::RunCreated(Box::new(header)), attached, entered]).await?.len();
    let checkpoints = (ENTRIES - at) / steps - 2;
    for number in 0..steps {
        let step = StepId::try_from(nothing::name(number))?;
        let value = |value: Value| Versioned { kind: Nothing::KIND.into(), format: Nothing::FORMAT, value };
        let mut entries = vec![Entry::StepPrepared { step: step.clone(), undo: value(json!(1)), changes: Vec::new() }];
        entries.extend((0..checkpoints).map(|done| Entry::StepCheckpoint {
            step: step.clone(),
            direction: Direction::Forward,
            checkpoint: value(json!({ "done": done })),
        }));
        entries.push(Entry::StepApplied { step, output: value(json!(1)), elapsed_ms: 17 });
        at += journal.append(&lease, &run, at as Seq, &entries).await?.len();
    }
    Ok(run)
}

async fn resume(directory: &Path, run: &str, steps: usize) -> Outcome<()> {
    let executor = Executor::new(Arc::new(FileJournal::open(directory)?));
    let run = RunId::try_from(run)?;
    let pipeline = pipeline(steps)?;
    START.get_or_init(Instant::now);
    let report = executor.resume(&pipeline, &run, &RunOptions::default(), &Interrupt::new()).await?;
    Err(format!("the step was not reached: {:?}", report.outcome).into())
}
