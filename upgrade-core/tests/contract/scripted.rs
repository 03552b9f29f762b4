//! Steps and checks that do what a test tells them, and note every call.

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Value, json};
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::entry::{Demand, Entry, Record, Resolution};
use upgrade_core::error::{CheckError, StepError};
use upgrade_core::executor::{Answer, Executor, ExecutorError, Interrupt, Report, RunOptions};
use upgrade_core::journal::{Journal, MemoryJournal};
use upgrade_core::names::{LockName, RunId, StepId};
use upgrade_core::pipeline::{Pipeline, Retry};
use upgrade_core::step::{Change, Prepared, Rollback, Step};
use upgrade_core::target::Target;
use upgrade_core::units::Span;
use upgrade_core::verdict::Verdict;

pub(crate) type Calls = Arc<Mutex<Vec<String>>>;
type Answered<T> = Pin<Box<dyn Future<Output = Result<T, StepError>> + Send>>;
type Body<T> = Arc<dyn Fn(Context) -> Answered<T> + Send + Sync>;

/// Does what a test says; what it says nothing about succeeds.
#[derive(Clone)]
pub(crate) struct Scripted {
    name: String,
    calls: Calls,
    prepare: Body<Prepared<Value, Value>>,
    apply: Body<Value>,
    settle: Body<()>,
    rollback: Body<()>,
    commit: Body<()>,
    definition: Value,
    inputs: Vec<PathBuf>,
    targets: Vec<Arc<dyn Target>>,
}

fn body<T, F, R>(answer: F) -> Body<T>
where
    F: Fn(Context) -> R + Send + Sync + 'static,
    R: Future<Output = Result<T, StepError>> + Send + 'static,
{
    Arc::new(move |cx| Box::pin(answer(cx)))
}

macro_rules! bodies {
    ($($name:ident => $call:ident: $type:ty),*) => {
        $(pub(crate) fn $name<F, R>(mut self, answer: F) -> Self
        where
            F: Fn(Context) -> R + Send + Sync + 'static,
            R: Future<Output = Result<$type, StepError>> + Send + 'static,
        {
            self.$call = body(answer);
            self
        })*
    };
}

impl Scripted {
    pub(crate) fn new(name: &str, calls: &Calls) -> Self {
        Self {
            name: name.to_owned(),
            calls: calls.clone(),
            prepare: body(|_| async { Ok(change()) }),
            apply: body(|_| async { Ok(json!("done")) }),
            settle: body(|_| async { Ok(()) }),
            rollback: body(|_| async { Ok(()) }),
            commit: body(|_| async { Ok(()) }),
            definition: Value::Null,
            inputs: Vec::new(),
            targets: Vec::new(),
        }
    }

    bodies! {
        preparing => prepare: Prepared<Value, Value>, applying => apply: Value, settling => settle: (),
        rolling_back => rollback: (), committing => commit: ()
    }

    pub(crate) fn defined(mut self, definition: Value) -> Self {
        self.definition = definition;
        self
    }

    pub(crate) fn reading(mut self, input: PathBuf) -> Self {
        self.inputs.push(input);
        self
    }

    pub(crate) fn on(mut self, target: impl Target) -> Self {
        self.targets.push(Arc::new(target));
        self
    }

    fn note(&self, call: &str) {
        self.calls.lock().unwrap().push(format!("{call} {}", self.name));
    }
}

#[async_trait]
impl Step for Scripted {
    const KIND: &'static str = "test.scripted";
    type Undo = Value;
    type Output = Value;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<Value, Value>, StepError> {
        self.note("prepare");
        (self.prepare)(cx.clone()).await
    }

    async fn apply(&self, cx: &Context, _: &Value) -> Result<Value, StepError> {
        self.note("apply");
        (self.apply)(cx.clone()).await
    }

    async fn settle(&self, cx: &Context, _: &Value) -> Result<(), StepError> {
        self.note("settle");
        (self.settle)(cx.clone()).await
    }

    async fn commit(&self, cx: &Context, _: &Value) -> Result<(), StepError> {
        self.note("commit");
        (self.commit)(cx.clone()).await
    }

    fn definition(&self) -> Value {
        self.definition.clone()
    }

    fn inputs(&self) -> Vec<PathBuf> {
        self.inputs.clone()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        self.targets.clone()
    }
}

#[async_trait]
impl Rollback for Scripted {
    async fn rollback(&self, cx: &Context, _: &Value, _: Option<&Value>) -> Result<(), StepError> {
        self.note("rollback");
        (self.rollback)(cx.clone()).await
    }
}

/// Answers with what a test says for the n-th call, from one.
#[derive(Clone)]
pub(crate) struct Answers {
    asked: Arc<AtomicU32>,
    answer: Arc<dyn Fn(u32) -> Verdict + Send + Sync>,
}

impl Answers {
    pub(crate) fn new(answer: impl Fn(u32) -> Verdict + Send + Sync + 'static) -> Self {
        Self { asked: Arc::default(), answer: Arc::new(answer) }
    }

    pub(crate) fn asked(&self) -> u32 {
        self.asked.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl Check for Answers {
    async fn check(&self, _: &Context) -> Result<Verdict, CheckError> {
        Ok((self.answer)(self.asked.fetch_add(1, Ordering::SeqCst) + 1))
    }
}

pub(crate) fn passing() -> Answers {
    Answers::new(|_| Verdict::pass("well"))
}

pub(crate) fn failing() -> Answers {
    Answers::new(|_| Verdict::fail("not well"))
}

/// A target with a name and an identity of the test's own.
pub(crate) struct Place(pub(crate) LockName, pub(crate) &'static str);

impl Place {
    pub(crate) fn path(path: &str) -> Self {
        Self(LockName::path(path.as_ref()).unwrap(), "the one")
    }
}

#[async_trait]
impl Target for Place {
    fn lock(&self) -> LockName {
        self.0.clone()
    }

    async fn identity(&self, _: &Context) -> Result<String, StepError> {
        Ok(self.1.to_owned())
    }
}

pub(crate) fn change() -> Prepared<Value, Value> {
    Prepared::change(json!("found"), [])
}

pub(crate) fn changing(change: Change) -> Prepared<Value, Value> {
    Prepared::change(json!("found"), [change])
}

pub(crate) fn nap(millis: u64) -> tokio::time::Sleep {
    tokio::time::sleep(Duration::from_millis(millis))
}

/// Tries `attempts` times, with little time in between.
pub(crate) fn tries(attempts: u32) -> Retry {
    Retry { attempts, delay: Span::from_millis(100), max_delay: Span::from_secs(10) }
}

pub(crate) fn step(name: &str) -> StepId {
    StepId::try_from(name).unwrap()
}

pub(crate) fn calls(calls: &Calls) -> Vec<String> {
    calls.lock().unwrap().clone()
}

pub(crate) fn why() -> String {
    "a test".to_owned()
}

pub(crate) fn rollback() -> Demand {
    Demand::Rollback { reason: why() }
}

pub(crate) fn resolve(name: &str, resolution: Resolution) -> Demand {
    Demand::Resolve { step: step(name), resolution, reason: why() }
}

/// One journal and everything that a test does on it.
#[derive(Clone, Default)]
pub(crate) struct Bench {
    pub(crate) journal: MemoryJournal,
    pub(crate) calls: Calls,
}

impl Bench {
    pub(crate) fn step(&self, name: &str) -> Scripted {
        Scripted::new(name, &self.calls)
    }

    pub(crate) fn executor(&self) -> Executor {
        Executor::new(Arc::new(self.journal.clone()))
    }

    pub(crate) async fn run(&self, pipeline: &Pipeline) -> Report {
        self.try_run(pipeline).await.unwrap()
    }

    pub(crate) async fn try_run(&self, pipeline: &Pipeline) -> Result<Report, ExecutorError> {
        self.executor().run(pipeline, &RunOptions::default(), &Interrupt::new()).await
    }

    /// Drives a run beside the test.
    pub(crate) fn spawn(&self, pipeline: &Pipeline) -> tokio::task::JoinHandle<Result<Report, ExecutorError>> {
        let (bench, pipeline) = (self.clone(), pipeline.clone());
        tokio::spawn(async move { bench.try_run(&pipeline).await })
    }

    pub(crate) async fn resume(&self, pipeline: &Pipeline) -> Result<Report, ExecutorError> {
        let run = self.last_run().await;
        let options = RunOptions { patience: Duration::from_secs(5), ..RunOptions::default() };
        self.executor().resume(pipeline, &run, &options, &Interrupt::new()).await
    }

    pub(crate) async fn demand(&self, pipeline: &Pipeline, demand: Demand) -> Answer {
        let run = self.last_run().await;
        let (options, interrupt) = (RunOptions::default(), Interrupt::new());
        self.executor().demand(pipeline, &run, demand, &options, &interrupt).await.unwrap()
    }

    /// Makes a demand of a run that nobody drives.
    pub(crate) async fn take_up(&self, pipeline: &Pipeline, demand: Demand) -> Report {
        match self.demand(pipeline, demand).await {
            Answer::Driven(report) => report,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn last_run(&self) -> RunId {
        self.journal.runs().await.unwrap().last().expect("there is a run").run.clone()
    }

    pub(crate) async fn records(&self) -> Vec<Record> {
        self.journal.load(&self.last_run().await).await.unwrap()
    }

    pub(crate) async fn entries(&self) -> Vec<Entry> {
        self.records().await.into_iter().map(|record| record.entry).collect()
    }

    pub(crate) fn calls(&self) -> Vec<String> {
        calls(&self.calls)
    }

    /// Tells how often a call was made.
    pub(crate) fn count(&self, call: &str) -> usize {
        self.calls().iter().filter(|made| *made == call).count()
    }

    /// Says at which place a call was made first.
    pub(crate) fn place(&self, call: &str) -> usize {
        self.calls().iter().position(|made| made == call).unwrap_or_else(|| panic!("no {call}: {:?}", self.calls()))
    }
}
