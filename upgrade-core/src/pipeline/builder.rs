//! Puts a pipeline together in Rust.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use semver::{Version, VersionReq};
use serde_json::Value;

use super::{
    Budget, Channel, CheckNode, CheckPolicy, CommitMode, DeferredBuild, GuardNode, Pipeline, PresentVersion,
    Requirement, Retry, Source, StepNode, StepPolicy, StepSource, When,
};
use crate::check::Check;
use crate::context::OnConflict;
use crate::entry::GuardAction;
use crate::erased::AnyStep;
use crate::error::StepError;
use crate::graph::{Graph, GraphError};
use crate::names::{CheckId, NameError, PipelineName, StepId};
use crate::step::{Rollback, Step};
use crate::target::Target;
use crate::units::Span;
use crate::verdict::Limit;

/// Says why a pipeline cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PipelineError {
    /// A name is not one.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The steps have no order.
    #[error(transparent)]
    Graph(#[from] GraphError),
    /// Two checks of one phase have the same id.
    #[error("two checks are called `{0}`")]
    CheckTwice(CheckId),
    /// A guard names a step that is not there.
    #[error("guard `{guard}` names step `{step}`, which is not a step of this pipeline")]
    GuardStep {
        /// The guard.
        guard: CheckId,
        /// The step.
        step: StepId,
    },
    /// A version or a range cannot be read.
    #[error("`{text}` is not a version{what}: {reason}")]
    Version {
        /// What was given.
        text: String,
        /// " range", or nothing.
        what: &'static str,
        /// Why not.
        reason: String,
    },
    /// A number is out of its range.
    #[error("{0}")]
    Number(&'static str),
}

/// Collects the parts of a pipeline; the first mistake is told by [`Builder::build`].
#[derive(Clone)]
pub struct Builder {
    name: String,
    pub(crate) pipeline: Pipeline,
    steps: Vec<(StepNode, bool)>,
    mistake: Option<PipelineError>,
}

/// Describes a step that is made when the outputs it depends on are there.
#[derive(Clone)]
pub struct DeferredStep {
    /// The kind of step that will be made.
    pub kind: String,
    /// Why it cannot be undone; absent if it can. The step that is made must agree.
    pub irreversible: Option<String>,
    /// What of its configuration is known before.
    pub definition: Value,
    /// What it changes, as far as that is known before.
    pub targets: Vec<Arc<dyn Target>>,
    /// Makes it from the outputs of earlier steps.
    pub build: DeferredBuild,
}

/// Adjusts one step of a pipeline.
#[derive(Clone, Default)]
pub struct StepOptions {
    needs: Option<Vec<String>>,
    policy: StepPolicy,
    before: Vec<(String, Arc<dyn Check>, CheckOptions)>,
    after: Vec<(String, Arc<dyn Check>, CheckOptions)>,
    when: Option<When>,
}

/// Adjusts one check of a pipeline.
#[derive(Clone, Default)]
pub struct CheckOptions {
    policy: CheckPolicy,
}

/// Adjusts one guard of a pipeline.
#[derive(Clone)]
pub struct GuardOptions {
    check: CheckOptions,
    from: Option<String>,
    until: Option<String>,
    every: Span,
    breach_for: Span,
    action: GuardAction,
    pause_during: Vec<String>,
}

impl CheckOptions {
    /// Bounds one call; past it the verdict is *unknown*.
    #[must_use]
    pub fn timeout(mut self, timeout: impl Into<Span>) -> Self {
        self.policy.timeout = timeout.into();
        self
    }

    /// Asks again for this long while the check does not pass, every `every`.
    #[must_use]
    pub fn within(mut self, within: impl Into<Span>, every: impl Into<Span>) -> Self {
        self.policy.within = within.into();
        self.policy.every = every.into();
        self
    }

    /// Holds a figure of the check to a limit.
    #[must_use]
    pub fn limit(mut self, measurement: impl Into<String>, limit: Limit) -> Self {
        self.policy.limits.insert(measurement.into(), limit);
        self
    }

    /// Takes over a whole policy.
    #[must_use]
    pub fn policy(mut self, policy: CheckPolicy) -> Self {
        self.policy = policy;
        self
    }
}

impl Default for GuardOptions {
    fn default() -> Self {
        Self {
            check: CheckOptions::default(),
            from: None,
            until: None,
            every: Span::from_secs(5),
            breach_for: Span::default(),
            action: GuardAction::Rollback,
            pause_during: Vec::new(),
        }
    }
}

impl GuardOptions {
    /// Adjusts the check behind the guard.
    #[must_use]
    pub fn check(mut self, options: CheckOptions) -> Self {
        self.check = options;
        self
    }

    /// Watches from the start of this step on; without it, from the first step on.
    #[must_use]
    pub fn from(mut self, step: impl Into<String>) -> Self {
        self.from = Some(step.into());
        self
    }

    /// Watches until this step is applied; without it, until the commit.
    #[must_use]
    pub fn until(mut self, step: impl Into<String>) -> Self {
        self.until = Some(step.into());
        self
    }

    /// Measures this often.
    #[must_use]
    pub fn every(mut self, every: impl Into<Span>) -> Self {
        self.every = every.into();
        self
    }

    /// Acts only when the breach has lasted this long.
    #[must_use]
    pub fn breach_for(mut self, span: impl Into<Span>) -> Self {
        self.breach_for = span.into();
        self
    }

    /// Says what follows a breach.
    #[must_use]
    pub fn action(mut self, action: GuardAction) -> Self {
        self.action = action;
        self
    }

    /// Does not watch while this step runs: a planned stop.
    #[must_use]
    pub fn pause_during(mut self, step: impl Into<String>) -> Self {
        self.pause_during.push(step.into());
        self
    }
}

impl StepOptions {
    /// Names what must be applied first. Without this the step needs the one written before it;
    /// with none it starts at once.
    #[must_use]
    pub fn needs<I: IntoIterator<Item = S>, S: Into<String>>(mut self, steps: I) -> Self {
        self.needs = Some(steps.into_iter().map(Into::into).collect());
        self
    }

    /// Bounds one `prepare` or `apply`.
    #[must_use]
    pub fn timeout(mut self, timeout: impl Into<Span>) -> Self {
        self.policy.timeout = timeout.into();
        self
    }

    /// Bounds one `rollback` or `commit`.
    #[must_use]
    pub fn undo_timeout(mut self, timeout: impl Into<Span>) -> Self {
        self.policy.undo_timeout = timeout.into();
        self
    }

    /// Says how long a cancelled call may take to return before the run is held.
    #[must_use]
    pub fn grace(mut self, grace: impl Into<Span>) -> Self {
        self.policy.grace = grace.into();
        self
    }

    /// Says how often a transient failure is tried again.
    #[must_use]
    pub fn retry(mut self, retry: Retry) -> Self {
        self.policy.retry = retry;
        self
    }

    /// Says how often a failed undo or commit is tried again.
    #[must_use]
    pub fn undo_retry(mut self, retry: Retry) -> Self {
        self.policy.undo_retry = retry;
        self
    }

    /// Says what the step does about a foreign change.
    #[must_use]
    pub fn on_conflict(mut self, on_conflict: OnConflict) -> Self {
        self.policy.on_conflict = on_conflict;
        self
    }

    /// Asks a check just before the step.
    #[must_use]
    pub fn before(mut self, id: impl Into<String>, check: impl Check, options: CheckOptions) -> Self {
        self.before.push((id.into(), Arc::new(check), options));
        self
    }

    /// Asks a check just after the step.
    #[must_use]
    pub fn after(mut self, id: impl Into<String>, check: impl Check, options: CheckOptions) -> Self {
        self.after.push((id.into(), Arc::new(check), options));
        self
    }

    /// Takes over a whole policy.
    #[must_use]
    pub fn policy(mut self, policy: StepPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// Runs the step only if `holds` says so, asked with the outputs of earlier steps just before
    /// it would be prepared; `text` is what the plan and the journal show.
    #[must_use]
    pub fn when(
        mut self,
        text: impl Into<String>,
        holds: impl Fn(&BTreeMap<StepId, Value>) -> Result<bool, StepError> + Send + Sync + 'static,
    ) -> Self {
        self.when = Some(When { text: text.into(), holds: Arc::new(holds) });
        self
    }
}

impl Builder {
    pub(crate) fn new(name: String) -> Self {
        Self {
            name,
            pipeline: Pipeline {
                name: PipelineName::try_from("unnamed").expect("the placeholder is a name"),
                environment: None,
                from: None,
                to: None,
                required_stops: Vec::new(),
                channel: None,
                present: None,
                requires: Vec::new(),
                require_committed_in: None,
                checks: Vec::new(),
                steps: BTreeMap::new(),
                graph: Graph::default(),
                guards: Vec::new(),
                verify: Vec::new(),
                rollback_verify: None,
                commit: CommitMode::Now,
                budget: Budget::default(),
                max_parallel: 4,
                targets: Vec::new(),
                source: Source {
                    base_dir: std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/")),
                    ..Source::default()
                },
            },
            steps: Vec::new(),
            mistake: None,
        }
    }

    fn note<T>(&mut self, result: Result<T, PipelineError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(mistake) => {
                self.mistake.get_or_insert(mistake);
                None
            }
        }
    }

    /// Says from which versions the upgrade may start, as a range in Cargo's notation.
    #[must_use]
    pub fn from(mut self, range: &str) -> Self {
        self.pipeline.from = self.note(VersionReq::parse(range).map_err(|e| PipelineError::Version {
            text: range.into(),
            what: " range",
            reason: e.to_string(),
        }));
        self
    }

    /// Says to which version the upgrade leads.
    #[must_use]
    pub fn to(mut self, version: &str) -> Self {
        self.pipeline.to = self.note(parse_version(version));
        self
    }

    /// Names a version that no upgrade may skip.
    #[must_use]
    pub fn required_stop(mut self, version: &str) -> Self {
        let stop = self.note(parse_version(version));
        self.pipeline.required_stops.extend(stop);
        self
    }

    /// Says how finished a version must be.
    #[must_use]
    pub fn channel(mut self, channel: Channel) -> Self {
        self.pipeline.channel = Some(channel);
        self
    }

    /// Says how the present version is read: a fact of a check.
    #[must_use]
    pub fn present(mut self, check: impl Check, fact: impl Into<String>) -> Self {
        self.pipeline.present = Some(PresentVersion { check: Arc::new(check), fact: fact.into() });
        self
    }

    /// Demands a version of something else.
    #[must_use]
    pub fn requires(mut self, requirement: Requirement) -> Self {
        self.pipeline.requires.push(requirement);
        self
    }

    /// Names the environment that is upgraded.
    #[must_use]
    pub fn environment(mut self, environment: impl Into<String>) -> Self {
        self.pipeline.environment = Some(environment.into());
        self
    }

    /// Demands that the same definition has been committed in another environment.
    #[must_use]
    pub fn require_committed_in(mut self, environment: impl Into<String>) -> Self {
        self.pipeline.require_committed_in = Some(environment.into());
        self
    }

    /// Asks a check before anything is changed.
    #[must_use]
    pub fn check(self, id: impl Into<String>, check: impl Check) -> Self {
        self.check_with(id, check, CheckOptions::default())
    }

    /// Asks a check before anything is changed, with options.
    #[must_use]
    pub fn check_with(mut self, id: impl Into<String>, check: impl Check, options: CheckOptions) -> Self {
        let node = self.node(id.into(), Arc::new(check), options);
        self.pipeline.checks.extend(node);
        self
    }

    /// Adds a step that can be undone; it needs the step added before it.
    #[must_use]
    pub fn step(self, id: impl Into<String>, step: impl Rollback) -> Self {
        self.step_with(id, step, |options| options)
    }

    /// Adds a step that can be undone, with options.
    #[must_use]
    pub fn step_with(
        self,
        id: impl Into<String>,
        step: impl Rollback,
        options: impl FnOnce(StepOptions) -> StepOptions,
    ) -> Self {
        self.any_step(id, AnyStep::reversible(step), options)
    }

    /// Adds a step that cannot be undone, with the reason that the plan shows.
    #[must_use]
    pub fn irreversible(self, id: impl Into<String>, step: impl Step, reason: impl Into<String>) -> Self {
        self.any_step(id, AnyStep::irreversible(step, reason), |options| options)
    }

    /// Adds a step whose type is known only at run time.
    #[must_use]
    pub fn any_step(
        self,
        id: impl Into<String>,
        step: AnyStep,
        options: impl FnOnce(StepOptions) -> StepOptions,
    ) -> Self {
        self.source_step(id.into(), StepSource::Ready(step), options(StepOptions::default()))
    }

    /// Adds a step that is made when the outputs it depends on are there.
    ///
    /// `kind` and `definition` describe it until then, for the plan and the run's fingerprint.
    /// When it is made, it may change only what its own [`DeferredStep::targets`], another step or
    /// [`Builder::target`] names: that is what the run has locked.
    #[must_use]
    pub fn deferred_step(self, id: impl Into<String>, step: DeferredStep, options: StepOptions) -> Self {
        self.source_step(id.into(), StepSource::Deferred(step), options)
    }

    pub(crate) fn source_step(mut self, id: String, source: StepSource, options: StepOptions) -> Self {
        let Some(id) = self.note(StepId::try_from(id).map_err(Into::into)) else { return self };
        let implicit = options.needs.is_none();
        let mut needs = BTreeSet::new();
        for name in options.needs.into_iter().flatten() {
            needs.extend(self.note(StepId::try_from(name).map_err(Into::into)));
        }
        let mut before = Vec::new();
        for (name, check, check_options) in options.before {
            before.extend(self.node(name, check, check_options));
        }
        let mut after = Vec::new();
        for (name, check, check_options) in options.after {
            after.extend(self.node(name, check, check_options));
        }
        let node = StepNode { id, source, needs, policy: options.policy, before, after, when: options.when };
        self.steps.push((node, implicit));
        self
    }

    /// Watches a check beside the running steps; a breach rolls the run back.
    #[must_use]
    pub fn guard(self, id: impl Into<String>, check: impl Check) -> Self {
        self.guard_with(id, check, GuardOptions::default())
    }

    /// Watches a check beside the running steps, with options.
    #[must_use]
    pub fn guard_with(mut self, id: impl Into<String>, check: impl Check, options: GuardOptions) -> Self {
        let Some(check) = self.node(id.into(), Arc::new(check), options.check) else { return self };
        let mut step = |name: Option<String>| name.and_then(|n| self.note(StepId::try_from(n).map_err(Into::into)));
        let guard = GuardNode {
            check,
            from: step(options.from),
            until: step(options.until),
            every: options.every,
            breach_for: options.breach_for,
            action: options.action,
            pause_during: options.pause_during.into_iter().filter_map(|name| step(Some(name))).collect(),
        };
        self.pipeline.guards.push(guard);
        self
    }

    /// Asks a check when every step is applied.
    #[must_use]
    pub fn verify(self, id: impl Into<String>, check: impl Check) -> Self {
        self.verify_with(id, check, CheckOptions::default())
    }

    /// Asks a check when every step is applied, with options.
    #[must_use]
    pub fn verify_with(mut self, id: impl Into<String>, check: impl Check, options: CheckOptions) -> Self {
        let node = self.node(id.into(), Arc::new(check), options);
        self.pipeline.verify.extend(node);
        self
    }

    /// Asks a check when everything is undone; without any, the pre-checks that had passed are asked.
    #[must_use]
    pub fn rollback_verify(mut self, id: impl Into<String>, check: impl Check, options: CheckOptions) -> Self {
        let node = self.node(id.into(), Arc::new(check), options);
        self.pipeline.rollback_verify.get_or_insert_default().extend(node);
        self
    }

    /// Asks nothing after a rollback.
    #[must_use]
    pub fn no_rollback_verify(mut self) -> Self {
        self.pipeline.rollback_verify = Some(Vec::new());
        self
    }

    /// Says when the upgrade is committed; at once if nothing is said.
    #[must_use]
    pub fn commit(mut self, mode: CommitMode) -> Self {
        self.pipeline.commit = mode;
        self
    }

    /// Bounds the run in time.
    #[must_use]
    pub fn budget(mut self, budget: Budget) -> Self {
        self.pipeline.budget = budget;
        self
    }

    /// Says how many steps may run side by side; four if nothing is said.
    #[must_use]
    pub fn max_parallel(mut self, count: usize) -> Self {
        if count == 0 {
            self.mistake.get_or_insert(PipelineError::Number("max_parallel must be at least 1"));
        }
        self.pipeline.max_parallel = count.max(1);
        self
    }

    /// Adds a target beside those that the steps name.
    #[must_use]
    pub fn target(mut self, target: Arc<dyn Target>) -> Self {
        self.pipeline.targets.push(target);
        self
    }

    fn node(&mut self, id: String, check: Arc<dyn Check>, options: CheckOptions) -> Option<CheckNode> {
        let id = self.note(CheckId::try_from(id).map_err(Into::into))?;
        Some(CheckNode { id, check, policy: options.policy })
    }

    /// Finishes the pipeline.
    ///
    /// # Errors
    /// The first mistake that was made on the way, or one that only the whole shows: two steps
    /// of one name, a circle, a step that is missing.
    pub fn build(mut self) -> Result<Pipeline, PipelineError> {
        if let Some(mistake) = self.mistake {
            return Err(mistake);
        }
        self.pipeline.name = PipelineName::try_from(self.name)?;
        let mut previous: Option<StepId> = None;
        for (node, implicit) in &mut self.steps {
            if *implicit {
                node.needs.extend(previous.take());
            }
            previous = Some(node.id.clone());
        }
        self.pipeline.graph = Graph::new(
            self.steps
                .iter()
                .map(|(node, _)| (node.id.clone(), node.needs.clone(), node.irreversible_reason().is_none())),
        )?;
        self.pipeline.steps = self.steps.into_iter().map(|(node, _)| (node.id.clone(), node)).collect();
        let pipeline = self.pipeline;
        let phases = [&pipeline.checks[..], &pipeline.verify, pipeline.rollback_verify.as_deref().unwrap_or_default()];
        let of_steps = pipeline.steps.values().flat_map(|node| [&node.before[..], &node.after]);
        for phase in phases.into_iter().chain(of_steps) {
            distinct(phase.iter())?;
        }
        distinct(pipeline.guards.iter().map(|guard| &guard.check))?;
        for guard in &pipeline.guards {
            for step in guard.from.iter().chain(&guard.until).chain(&guard.pause_during) {
                if !pipeline.steps.contains_key(step) {
                    return Err(PipelineError::GuardStep { guard: guard.check.id.clone(), step: step.clone() });
                }
            }
        }
        Ok(pipeline)
    }
}

fn parse_version(text: &str) -> Result<Version, PipelineError> {
    Version::parse(text.trim_start_matches('v')).map_err(|e| PipelineError::Version {
        text: text.into(),
        what: "",
        reason: e.to_string(),
    })
}

fn distinct<'a>(nodes: impl Iterator<Item = &'a CheckNode>) -> Result<(), PipelineError> {
    let mut seen = BTreeSet::new();
    for node in nodes {
        if !seen.insert(&node.id) {
            return Err(PipelineError::CheckTwice(node.id.clone()));
        }
    }
    Ok(())
}
