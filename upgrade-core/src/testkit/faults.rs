//! Steps that fail, repeat themselves or tell when they are called, around the real ones.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use serde_json::Value;

use crate::context::Context;
use crate::entry::Versioned;
use crate::erased::{AnyPrepared, AnyStep, ErasedStep};
use crate::error::StepError;
use crate::names::{CheckId, StepId};
use crate::pipeline::{CheckNode, CheckPolicy, DeferredStep, Pipeline, StepSource};
use crate::target::Target;
use crate::verdict::Verdict;

/// Says when during a call something happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    Before,
    After,
}

/// Says what goes wrong with a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Prepare,
    Apply(When),
    /// As often as the number says.
    Undo(When, u32),
    Commit(When),
    /// Every call is made twice.
    Repeat,
}

type Told = Arc<Mutex<Box<dyn FnMut(&str) + Send>>>;

/// Wraps a step with a fault, and tells of each call before it is made.
struct Faulty {
    inner: Arc<dyn ErasedStep>,
    fault: Option<Fault>,
    /// Shared by every build of a step that is built anew for each call.
    count: Arc<AtomicU32>,
    tell: Option<Told>,
}

impl Faulty {
    fn fails(&self, fault: Fault) -> Result<(), StepError> {
        let wanted = match (self.fault, fault) {
            (Some(Fault::Undo(when, times)), Fault::Undo(now, _)) => {
                when == now && self.count.fetch_add(1, Ordering::SeqCst) < times
            }
            (Some(wanted), now) => wanted == now && self.count.fetch_add(1, Ordering::SeqCst) == 0,
            (None, _) => false,
        };
        if wanted { Err(StepError::permanent("a seeded fault")) } else { Ok(()) }
    }

    fn told(&self, call: &str) {
        if let Some(tell) = &self.tell {
            (tell.lock().unwrap_or_else(PoisonError::into_inner))(call);
        }
    }

    fn repeats(&self) -> bool {
        self.fault == Some(Fault::Repeat)
    }
}

#[async_trait]
impl ErasedStep for Faulty {
    fn kind(&self) -> &str {
        self.inner.kind()
    }
    fn format(&self) -> u32 {
        self.inner.format()
    }
    fn definition(&self) -> Value {
        self.inner.definition()
    }
    fn inputs(&self) -> Vec<PathBuf> {
        self.inner.inputs()
    }
    fn targets(&self) -> Vec<Arc<dyn Target>> {
        self.inner.targets()
    }

    async fn prepare(&self, cx: &Context) -> Result<AnyPrepared, StepError> {
        self.fails(Fault::Prepare)?;
        self.inner.prepare(cx).await
    }

    async fn apply(&self, cx: &Context, undo: &Versioned) -> Result<Versioned, StepError> {
        self.told("apply");
        self.fails(Fault::Apply(When::Before))?;
        let output = self.inner.apply(cx, undo).await?;
        let output = if self.repeats() { self.inner.apply(cx, undo).await? } else { output };
        self.fails(Fault::Apply(When::After))?;
        Ok(output)
    }

    async fn settle(&self, cx: &Context, undo: &Versioned) -> Result<(), StepError> {
        self.inner.settle(cx, undo).await
    }

    async fn rollback(&self, cx: &Context, undo: &Versioned, output: Option<&Versioned>) -> Result<(), StepError> {
        self.told("undo");
        self.fails(Fault::Undo(When::Before, 0))?;
        self.inner.rollback(cx, undo, output).await?;
        if self.repeats() {
            self.inner.rollback(cx, undo, output).await?;
        }
        self.fails(Fault::Undo(When::After, 0))
    }

    async fn commit(&self, cx: &Context, undo: &Versioned) -> Result<(), StepError> {
        self.fails(Fault::Commit(When::Before))?;
        self.inner.commit(cx, undo).await?;
        if self.repeats() {
            self.inner.commit(cx, undo).await?;
        }
        self.fails(Fault::Commit(When::After))
    }
}

/// Changes pipelines for a sweep.
impl Pipeline {
    /// Puts a fault on one step.
    pub(crate) fn with_fault(self, step: &StepId, fault: Fault) -> Self {
        self.wrapped(step, Some(fault), None)
    }

    /// Tells of every call on one step just before it is made.
    pub(crate) fn telling(self, step: &StepId, tell: impl FnMut(&str) + Send + 'static) -> Self {
        self.wrapped(step, None, Some(Arc::new(Mutex::new(Box::new(tell)))))
    }

    fn wrapped(mut self, step: &StepId, fault: Option<Fault>, tell: Option<Told>) -> Self {
        let count = Arc::new(AtomicU32::new(0));
        let wrap = move |any: AnyStep| {
            let faulty = Faulty { inner: any.erased().clone(), fault, count: count.clone(), tell: tell.clone() };
            AnyStep::from_erased(Arc::new(faulty), any.irreversible_reason().map(str::to_owned))
        };
        if let Some(node) = self.steps.get_mut(step) {
            node.source = match node.source.clone() {
                StepSource::Ready(any) => StepSource::Ready(wrap(any)),
                StepSource::Deferred(step) => {
                    let build = step.build.clone();
                    let build = Arc::new(move |outputs: &_| build(outputs).map(&wrap));
                    StepSource::Deferred(DeferredStep { build, ..step })
                }
            };
        }
        self
    }

    /// Adds a verification that fails, so that everything that was applied is undone.
    pub(crate) fn failing_at_the_end(mut self) -> Self {
        struct Fails;
        #[async_trait]
        impl crate::check::Check for Fails {
            async fn check(&self, _cx: &Context) -> Result<Verdict, StepError> {
                Ok(Verdict::fail("a seeded failure"))
            }
        }
        let id = CheckId::try_from("testkit.fails").expect("the name of the seeded check is a name");
        self.verify.push(CheckNode { id, check: Arc::new(Fails), policy: CheckPolicy::default() });
        self
    }

    /// Makes every undo fail for good at its first failure, so that an operator must decide.
    pub(crate) fn without_undo_retry(mut self) -> Self {
        for node in self.steps.values_mut() {
            node.policy.undo_retry.attempts = 1;
        }
        self
    }

    /// Lets no retry wait.
    pub(crate) fn impatient(mut self) -> Self {
        for node in self.steps.values_mut() {
            for retry in [&mut node.policy.retry, &mut node.policy.undo_retry] {
                retry.delay = crate::units::Span::from_millis(1);
            }
        }
        self
    }
}
