//! The checks, steps and guards of one upgrade, with the versions it leads from and to.

mod builder;
mod policy;
pub mod shape;
pub mod version;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use semver::{Version, VersionReq};
use serde_json::Value;

pub use self::builder::{Builder, CheckOptions, DeferredStep, GuardOptions, PipelineError, StepOptions};
pub use self::policy::{Budget, CheckPolicy, CommitMode, Retry, StepPolicy};
pub use self::version::{Channel, PresentVersion, Requirement};
use crate::check::Check;
use crate::entry::GuardAction;
use crate::erased::AnyStep;
use crate::error::StepError;
use crate::graph::Graph;
use crate::names::{CheckId, PipelineName, StepId};
use crate::target::Target;
use crate::units::Span;

/// Holds everything that one upgrade asks and does. Made by [`Pipeline::builder`] or loaded from
/// a file.
#[derive(Clone)]
pub struct Pipeline {
    pub(crate) name: PipelineName,
    pub(crate) environment: Option<String>,
    pub(crate) from: Option<VersionReq>,
    pub(crate) to: Option<Version>,
    pub(crate) required_stops: Vec<Version>,
    pub(crate) channel: Option<Channel>,
    pub(crate) present: Option<PresentVersion>,
    pub(crate) requires: Vec<Requirement>,
    pub(crate) require_committed_in: Option<String>,
    pub(crate) checks: Vec<CheckNode>,
    pub(crate) steps: BTreeMap<StepId, StepNode>,
    pub(crate) graph: Graph,
    pub(crate) guards: Vec<GuardNode>,
    pub(crate) verify: Vec<CheckNode>,
    pub(crate) rollback_verify: Option<Vec<CheckNode>>,
    pub(crate) commit: CommitMode,
    pub(crate) budget: Budget,
    pub(crate) max_parallel: usize,
    pub(crate) targets: Vec<Arc<dyn Target>>,
    pub(crate) source: Source,
}

/// Says where a pipeline came from, so that a run can be bound to it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Source {
    /// The canonical file; null for a pipeline built in Rust.
    pub(crate) document: Value,
    /// The canonical file without its environment's overlay.
    pub(crate) base_document: Value,
    pub(crate) base_dir: PathBuf,
    pub(crate) variables: BTreeMap<String, Value>,
}

/// Gives a step that is built when the outputs it refers to are there.
pub type DeferredBuild = Arc<dyn Fn(&BTreeMap<StepId, Value>) -> Result<AnyStep, StepError> + Send + Sync + 'static>;

/// Gives a condition that is judged when the outputs it refers to are there.
pub(crate) type DeferredCondition =
    Arc<dyn Fn(&BTreeMap<StepId, Value>) -> Result<bool, StepError> + Send + Sync + 'static>;

/// Holds a step, or what it will be built from.
#[derive(Clone)]
pub(crate) enum StepSource {
    Ready(AnyStep),
    Deferred(DeferredStep),
}

/// Places a step in a pipeline.
#[derive(Clone)]
pub(crate) struct StepNode {
    pub(crate) id: StepId,
    pub(crate) source: StepSource,
    pub(crate) needs: BTreeSet<StepId>,
    pub(crate) policy: StepPolicy,
    pub(crate) before: Vec<CheckNode>,
    pub(crate) after: Vec<CheckNode>,
    pub(crate) when: Option<When>,
}

/// Decides whether a step runs at all.
#[derive(Clone)]
pub(crate) struct When {
    pub(crate) text: String,
    pub(crate) holds: DeferredCondition,
}

impl StepNode {
    pub(crate) fn kind(&self) -> &str {
        match &self.source {
            StepSource::Ready(step) => step.erased().kind(),
            StepSource::Deferred(step) => &step.kind,
        }
    }

    pub(crate) fn irreversible_reason(&self) -> Option<&str> {
        match &self.source {
            StepSource::Ready(step) => step.irreversible_reason(),
            StepSource::Deferred(step) => step.irreversible.as_deref(),
        }
    }

    pub(crate) fn definition(&self) -> Value {
        match &self.source {
            StepSource::Ready(step) => step.erased().definition(),
            StepSource::Deferred(step) => step.definition.clone(),
        }
    }

    /// Builds the step; for one that is ready, returns it.
    pub(crate) fn build(&self, outputs: &BTreeMap<StepId, Value>) -> Result<AnyStep, StepError> {
        match &self.source {
            StepSource::Ready(step) => Ok(step.clone()),
            StepSource::Deferred(DeferredStep { build, irreversible, .. }) => {
                let step = build(outputs)?;
                // The plan named the pivot before anything ran; a step cannot change sides later.
                if step.irreversible_reason().is_some() != irreversible.is_some() {
                    return Err(StepError::permanent(format!(
                        "step `{}` turned out {} once its configuration was known",
                        self.id,
                        if irreversible.is_some() { "reversible" } else { "irreversible" }
                    )));
                }
                Ok(step)
            }
        }
    }
}

/// Places a check in a pipeline.
#[derive(Clone)]
pub(crate) struct CheckNode {
    pub(crate) id: CheckId,
    pub(crate) check: Arc<dyn Check>,
    pub(crate) policy: CheckPolicy,
}

impl CheckNode {
    pub(crate) fn needs_baseline(&self) -> bool {
        self.check.needs_baseline() || self.policy.limits.values().any(|limit| limit.is_relative())
    }
}

/// Places a guard in a pipeline.
#[derive(Clone)]
pub(crate) struct GuardNode {
    pub(crate) check: CheckNode,
    /// The step with which watching starts; the first step if absent.
    pub(crate) from: Option<StepId>,
    /// The step after which watching ends; at the commit if absent.
    pub(crate) until: Option<StepId>,
    pub(crate) every: Span,
    pub(crate) breach_for: Span,
    pub(crate) action: GuardAction,
    pub(crate) pause_during: BTreeSet<StepId>,
}

impl fmt::Debug for Pipeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pipeline")
            .field("name", &self.name)
            .field("to", &self.to)
            .field("steps", &self.graph.order())
            .finish_non_exhaustive()
    }
}

impl Pipeline {
    /// Starts a pipeline; `name` is what is upgraded.
    pub fn builder(name: impl Into<String>) -> Builder {
        Builder::new(name.into())
    }

    /// Returns what is upgraded.
    pub fn name(&self) -> &PipelineName {
        &self.name
    }

    /// Returns the environment, if the pipeline names one.
    pub fn environment(&self) -> Option<&str> {
        self.environment.as_deref()
    }

    /// Returns the version that the pipeline leads to, if it names one.
    pub fn to(&self) -> Option<&Version> {
        self.to.as_ref()
    }

    /// Returns the order of the steps.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Returns how the upgrade is committed.
    pub fn commit_mode(&self) -> CommitMode {
        self.commit
    }

    /// Returns the ids of the steps whose kind is `kind`.
    pub fn steps_of_kind(&self, kind: &str) -> Vec<&StepId> {
        self.steps.values().filter(|node| node.kind() == kind).map(|node| &node.id).collect()
    }

    pub(crate) fn step(&self, id: &StepId) -> Option<&StepNode> {
        self.steps.get(id)
    }

    /// Returns the checks asked after a rollback: those named, else the pre-checks.
    pub(crate) fn rollback_checks(&self) -> &[CheckNode] {
        self.rollback_verify.as_deref().unwrap_or(&self.checks)
    }
}
