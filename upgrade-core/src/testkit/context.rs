//! The context that a test gives to a step or a check.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use semver::Version;
use serde::Serialize;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::context::{Backend, Baseline, Context, Direction, OnConflict, Parts, Progress};
use crate::error::StepError;
use crate::names::{RunId, StepId};
use crate::sealed::{MemorySealed, SealedStorage};
use crate::secret::Secrets;

/// Makes contexts as a run would, all of the same run: forward, back and commit.
///
/// What steps write through one context (sealed contents, checkpoints, resolved secrets) is there
/// for the next one, as it would be after a crash.
///
/// ```
/// use upgrade_core::testkit::TestContext;
///
/// let test = TestContext::new("copy").kind("host.file").attempt(2);
/// let cx = test.forward();
/// assert_eq!(cx.attempt(), 2);
/// assert!(!cx.cancelled().is_cancelled());
/// test.cancellation().cancel();
/// assert!(cx.cancelled().is_cancelled());
/// ```
#[derive(Clone)]
pub struct TestContext {
    run: RunId,
    subject: String,
    kind: String,
    attempt: u32,
    interrupted: bool,
    dry_run: bool,
    cancelled: CancellationToken,
    on_conflict: OnConflict,
    environment: Option<String>,
    from: Option<Version>,
    to: Option<Version>,
    outputs: BTreeMap<StepId, Value>,
    baseline: Baseline,
    is_baseline: bool,
    secrets: Secrets,
    sealed: Arc<dyn SealedStorage>,
    memory: Arc<Memory>,
}

impl TestContext {
    /// Makes the contexts of a step or check with this id, in a run of their own.
    pub fn new(subject: impl Into<String>) -> Self {
        Self {
            run: RunId::generate(),
            subject: subject.into(),
            kind: "test".to_owned(),
            attempt: 1,
            interrupted: false,
            dry_run: false,
            cancelled: CancellationToken::new(),
            on_conflict: OnConflict::Stop,
            environment: None,
            from: None,
            to: None,
            outputs: BTreeMap::new(),
            baseline: Baseline::default(),
            is_baseline: false,
            secrets: Secrets::default(),
            sealed: Arc::new(MemorySealed::default()),
            memory: Arc::new(Memory::default()),
        }
    }

    /// Makes the contexts of another step or check of the same run.
    #[must_use]
    pub fn beside(&self, subject: impl Into<String>) -> Self {
        Self { subject: subject.into(), memory: Arc::new(Memory::default()), ..self.clone() }
    }

    /// Names the kind that is called.
    #[must_use]
    pub fn kind(mut self, kind: impl Into<String>) -> Self {
        self.kind = kind.into();
        self
    }

    /// Counts the attempt, from one.
    #[must_use]
    pub fn attempt(mut self, attempt: u32) -> Self {
        self.attempt = attempt;
        self
    }

    /// Says that a crash cut off the attempt before.
    #[must_use]
    pub fn interrupted(mut self) -> Self {
        self.interrupted = true;
        self
    }

    /// Makes the call a plan's.
    #[must_use]
    pub fn dry_run(mut self) -> Self {
        self.dry_run = true;
        self
    }

    /// Says what is done about foreign changes.
    #[must_use]
    pub fn on_conflict(mut self, on_conflict: OnConflict) -> Self {
        self.on_conflict = on_conflict;
        self
    }

    /// Names the environment that is upgraded.
    #[must_use]
    pub fn environment(mut self, environment: impl Into<String>) -> Self {
        self.environment = Some(environment.into());
        self
    }

    /// Names the versions that the run leads from and to.
    #[must_use]
    pub fn versions(mut self, from: Version, to: Version) -> Self {
        self.from = Some(from);
        self.to = Some(to);
        self
    }

    /// Gives an earlier step an output.
    ///
    /// # Panics
    /// The output cannot be written as JSON.
    #[must_use]
    pub fn output(mut self, step: StepId, output: &impl Serialize) -> Self {
        let value = serde_json::to_value(output).expect("an output of a test is JSON");
        self.outputs.insert(step, value);
        self
    }

    /// Gives a figure measured before the run.
    #[must_use]
    pub fn baseline(mut self, name: impl Into<String>, value: f64) -> Self {
        self.baseline.figures.insert(name.into(), value);
        self
    }

    /// Gives a text read before the run.
    #[must_use]
    pub fn baseline_fact(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.baseline.facts.insert(name.into(), value.into());
        self
    }

    /// Asks before the run: what is answered is the baseline.
    #[must_use]
    pub fn is_baseline(mut self) -> Self {
        self.is_baseline = true;
        self
    }

    /// Resolves secrets from elsewhere than `env` and `file`.
    #[must_use]
    pub fn secrets(mut self, secrets: Secrets) -> Self {
        self.secrets = secrets;
        self
    }

    /// Keeps sealed contents elsewhere than in memory.
    #[must_use]
    pub fn sealed(mut self, sealed: Arc<dyn SealedStorage>) -> Self {
        self.sealed = sealed;
        self
    }

    /// Returns the context of a `prepare`, an `apply` or a check.
    pub fn forward(&self) -> Context {
        self.context(Direction::Forward)
    }

    /// Returns the context of a `rollback`.
    pub fn back(&self) -> Context {
        self.context(Direction::Back)
    }

    /// Returns the context of a `commit`.
    pub fn commit(&self) -> Context {
        self.context(Direction::Commit)
    }

    /// Returns the token that every context made here watches.
    pub fn cancellation(&self) -> &CancellationToken {
        &self.cancelled
    }

    /// Forgets a cancellation: contexts made from now on are not cancelled.
    pub fn renew(&mut self) {
        self.cancelled = CancellationToken::new();
    }

    /// Returns the checkpoints written so far, with the direction of each.
    pub fn checkpoints(&self) -> Vec<(Direction, Value)> {
        let checkpoints = self.memory.checkpoints.lock().unwrap_or_else(PoisonError::into_inner);
        checkpoints.clone()
    }

    /// Returns the progress reported so far.
    pub fn reported(&self) -> Vec<Progress> {
        self.memory.progress.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn context(&self, direction: Direction) -> Context {
        let last = self.checkpoints().into_iter().rev().find(|(of, _)| *of == direction);
        Context::new(Parts {
            run: self.run.clone(),
            subject: self.subject.clone(),
            kind: self.kind.clone(),
            direction,
            attempt: self.attempt,
            interrupted: self.interrupted,
            dry_run: self.dry_run,
            cancelled: self.cancelled.clone(),
            deadline: None,
            on_conflict: self.on_conflict,
            environment: self.environment.clone(),
            from: self.from.clone(),
            to: self.to.clone(),
            outputs: Arc::new(self.outputs.clone()),
            baseline: self.baseline.clone(),
            is_baseline: self.is_baseline,
            checkpoint: last.map(|(_, value)| value),
            secrets: self.secrets.clone(),
            sealed: self.sealed.clone(),
            backend: Arc::new(MemoryBackend { direction, memory: self.memory.clone() }),
        })
    }
}

#[derive(Default)]
struct Memory {
    checkpoints: Mutex<Vec<(Direction, Value)>>,
    progress: Mutex<Vec<Progress>>,
}

struct MemoryBackend {
    direction: Direction,
    memory: Arc<Memory>,
}

#[async_trait]
impl Backend for MemoryBackend {
    async fn checkpoint(&self, value: Value) -> Result<(), StepError> {
        let mut checkpoints = self.memory.checkpoints.lock().unwrap_or_else(PoisonError::into_inner);
        checkpoints.push((self.direction, value));
        Ok(())
    }

    fn progress(&self, progress: Progress) {
        self.memory.progress.lock().unwrap_or_else(PoisonError::into_inner).push(progress);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_later_context_sees_what_an_earlier_one_wrote() {
        let test = TestContext::new("copy");
        let first = test.forward();
        first.checkpoint(&3).await.unwrap();
        let sealed = first.seal(b"found").await.unwrap();
        first.progress(1, 2, "copying");
        assert_eq!(test.forward().last_checkpoint::<u32>().unwrap(), Some(3));
        assert_eq!(test.back().last_checkpoint::<u32>().unwrap(), None);
        assert_eq!(test.back().unseal(&sealed).await.unwrap(), b"found");
        assert_eq!(test.reported().len(), 1);
        let other = test.beside("link");
        assert_eq!((other.forward().run(), other.forward().subject()), (first.run(), "link"));
        assert!(other.checkpoints().is_empty());
    }
}
