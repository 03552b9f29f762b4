//! Runs of one step through the executor and the file journal.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde_json::{Value, json};
use upgrade_core::context::Context;
use upgrade_core::context::Direction;
use upgrade_core::entry::{Entry, Record};
use upgrade_core::error::StepError;
use upgrade_core::executor::{Executor, Interrupt, Observer, Outcome as Ending, RunOptions};
use upgrade_core::journal::FileJournal;
use upgrade_core::names::RunId;
use upgrade_core::pipeline::Pipeline;
use upgrade_core::step::{Prepared, Rollback, Step};

use crate::Outcome;

/// Carries out runs, and remembers when a step's way forward failed last.
pub struct Runs {
    executor: Executor,
    failed: Arc<Mutex<Option<Instant>>>,
}

struct Failures(Arc<Mutex<Option<Instant>>>);

impl Observer for Failures {
    fn entry(&mut self, _run: &RunId, record: &Record) {
        if matches!(&record.entry, Entry::StepFailed { direction: Direction::Forward, .. }) {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
    }
}

impl Runs {
    /// Keeps the journal in a directory.
    ///
    /// # Errors
    /// It cannot be made there.
    pub fn below(directory: &Path) -> Outcome<Self> {
        let failed = Arc::default();
        let journal = Arc::new(FileJournal::open(directory.join("journal"))?);
        let executor = Executor::new(journal).observer(Failures(Arc::clone(&failed)));
        Ok(Self { executor, failed })
    }

    /// Runs a step to its commit; returns how long that took.
    ///
    /// # Errors
    /// It ends otherwise.
    pub async fn commit(&self, step: impl Rollback) -> Outcome<Duration> {
        let pipeline = Pipeline::builder("bench").step("web", step).build()?;
        let began = Instant::now();
        match self.run(&pipeline).await? {
            Ending::Committed => Ok(began.elapsed()),
            other => Err(format!("the run ended as {other:?}").into()),
        }
    }

    /// Runs a step, and one after it that fails, so that both are undone.
    ///
    /// # Errors
    /// It ends otherwise.
    pub async fn there_and_back(&self, step: impl Rollback) -> Outcome<()> {
        let pipeline =
            Pipeline::builder("bench").step("web", step).step_with("fails", Fails, |options| options.needs(["web"]));
        self.back(&pipeline.build()?).await.map(drop)
    }

    /// Runs a step that fails by itself; returns when it was known to have failed.
    ///
    /// # Errors
    /// It does not fail, or is not undone.
    pub async fn fail(&self, step: impl Rollback) -> Outcome<Instant> {
        self.back(&Pipeline::builder("bench").step("web", step).build()?).await
    }

    async fn back(&self, pipeline: &Pipeline) -> Outcome<Instant> {
        match self.run(pipeline).await? {
            Ending::RolledBack { .. } => {}
            other => return Err(format!("the run ended as {other:?}").into()),
        }
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner).take();
        failed.ok_or_else(|| "nothing failed".into())
    }

    async fn run(&self, pipeline: &Pipeline) -> Outcome<Ending> {
        Ok(self.executor.run(pipeline, &RunOptions::default(), &Interrupt::new()).await?.outcome)
    }
}

/// Fails.
struct Fails;

#[async_trait]
impl Step for Fails {
    const KIND: &'static str = "bench.fails";
    type Undo = ();
    type Output = ();

    async fn prepare(&self, _cx: &Context) -> Result<Prepared<(), ()>, StepError> {
        Ok(Prepared::change((), []))
    }

    async fn apply(&self, _cx: &Context, _undo: &()) -> Result<(), StepError> {
        Err(StepError::permanent("it is meant to fail"))
    }

    fn definition(&self) -> Value {
        json!({})
    }
}

#[async_trait]
impl Rollback for Fails {
    async fn rollback(&self, _cx: &Context, _undo: &(), _output: Option<&()>) -> Result<(), StepError> {
        Ok(())
    }
}
