//! What must hold before a run may be driven: versions, targets, locks, its definition.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use semver::Version;
use serde_json::Value;
use tokio::time::Instant;

use super::calls::Caller;
use super::clock::Clock;
use super::state::Run;
use super::{Executor, ExecutorError, RunOptions};
use crate::context::Context;
use crate::entry::{Definition, ENTRY_FORMAT, Entry, Header};
use crate::journal::{JournalError, Lease, RunSummary};
use crate::names::{Actor, LockName, RunId, StepId};
use crate::pipeline::shape::difference;
use crate::pipeline::version::{PresentVersion, check_path};
use crate::pipeline::{Pipeline, StepSource};
use crate::sealed::MemorySealed;
use crate::secret::Secrets;
use crate::target::Target;
use crate::transition::{RunState, StepState};

/// The version of this library, recorded with every driver.
pub(crate) const ENGINE: &str = env!("CARGO_PKG_VERSION");

/// How long the short lock that guards the admission itself is waited for.
const ADMISSION_PATIENCE: Duration = Duration::from_secs(10);

/// How often a busy target is tried again.
const RETRY: Duration = Duration::from_millis(100);

/// Holds what a new or resumed run is driven with.
pub(crate) struct Admitted {
    pub(crate) lease: Lease,
    pub(crate) run: Run,
    /// Entries that the driver makes durable first.
    pub(crate) entries: Vec<Entry>,
    /// Whether the first entry, that makes the run, is among those still to be written.
    pub(crate) is_new: bool,
}

/// Names the short lock under which runs are admitted.
fn admission() -> LockName {
    LockName::new("journal", "admission").expect("the name of the admission is a lock name")
}

fn refused(message: impl Into<String>, hint: impl Into<String>) -> ExecutorError {
    ExecutorError::Refused { message: message.into(), hint: Some(hint.into()) }
}

fn attached(lease: &Lease) -> Entry {
    Entry::DriverAttached { actor: Actor::current(), engine: ENGINE.into(), epoch: lease.epoch() }
}

/// Lists the targets of a pipeline, one for each lock name.
pub(super) fn targets(pipeline: &Pipeline) -> BTreeMap<LockName, Arc<dyn Target>> {
    let of_steps = pipeline.steps.values().map(|node| match &node.source {
        StepSource::Ready(step) => step.erased().targets(),
        StepSource::Deferred(step) => step.targets.clone(),
    });
    let all = of_steps.flatten().chain(pipeline.targets.iter().cloned());
    all.map(|target| (target.lock(), target)).collect()
}

impl Executor {
    /// Makes a new run, under its lease; nothing is journaled if anything forbids it.
    pub(crate) async fn admit_new(&self, pipeline: &Pipeline, options: &RunOptions) -> Result<Admitted, ExecutorError> {
        let definition = pipeline.define().map_err(ExecutorError::Pipeline)?;
        let targets = targets(pipeline);
        self.refuse_own_home(targets.keys())?;
        let mut locks: BTreeSet<LockName> = targets.keys().cloned().collect();
        locks.insert(LockName::pipeline(&pipeline.name));
        let locks: Vec<LockName> = locks.into_iter().collect();

        let lease = self.enter(pipeline, &locks, &definition, options.patience).await?;
        let runs = self.journal.runs().await?;
        self.clear_leftovers(&runs).await;
        let mut header = Header {
            format: ENTRY_FORMAT,
            run: RunId::generate(),
            pipeline: pipeline.name.clone(),
            environment: pipeline.environment.clone(),
            from: last_committed(pipeline, &runs),
            to: pipeline.to.clone(),
            locks,
            definition,
            actor: Actor::current(),
            engine: ENGINE.into(),
        };
        let cx = self.bare_context(pipeline, &header)?;
        if let Some(present) = &pipeline.present {
            header.from = Some(self.read_version(present, &cx, pipeline.name.as_str()).await?);
        }
        self.check_versions(pipeline, &header, &cx).await?;
        let mut entries = vec![Entry::RunCreated(Box::new(header.clone())), attached(&lease)];
        for (lock, target) in &targets {
            let identity = target.identity(&cx).await.map_err(ExecutorError::Pipeline)?;
            entries.push(Entry::TargetIdentified { target: lock.clone(), identity });
        }
        let run = Run::created(&header, Timestamp::now());
        Ok(Admitted { lease, run, entries, is_new: true })
    }

    /// Takes up a run that exists.
    pub(crate) async fn admit_again(
        &self,
        pipeline: &Pipeline,
        id: &RunId,
        options: &RunOptions,
        forward: bool,
    ) -> Result<Admitted, ExecutorError> {
        let header = self.journal.header(id).await?;
        let lease = self.journal.acquire(&header.locks, options.patience).await?;
        // Read under the lease: another driver may have gone on until just now.
        let run = Run::replay(self.journal.load(id).await?)?;
        let mut entries = vec![attached(&lease)];
        if run.state().is_final() {
            return Ok(Admitted { lease, run, entries: Vec::new(), is_new: false });
        }
        let adopted = self.same_definition(pipeline, &run, options, forward)?;
        let targets = targets(pipeline);
        if let Some(lock) = targets.keys().find(|lock| !is_held(&header, lock, adopted.is_some())) {
            return Err(refused(
                format!("the pipeline changes {lock}, which run {id} has not locked"),
                "go on with the targets that the run began with: what is new belongs into a run of its own",
            ));
        }
        entries.extend(adopted);
        let cx = self.bare_context(pipeline, &header)?;
        for (lock, target) in targets {
            let identity = target.identity(&cx).await.map_err(ExecutorError::Pipeline)?;
            match run.targets.get(&lock) {
                Some(known) if *known != identity => {
                    return Err(refused(
                        format!("target {lock} is now {identity}; the run was started on {known}"),
                        "go on where the run was started, or put this target back in its place",
                    ));
                }
                Some(_) => {}
                None => entries.push(Entry::TargetIdentified { target: lock, identity }),
            }
        }
        Ok(Admitted { lease, run, entries, is_new: false })
    }

    /// Says what would forbid a run now, without taking any lock, and reads the present version.
    pub(crate) async fn would_refuse(&self, pipeline: &Pipeline, header: &mut Header) -> Result<(), ExecutorError> {
        let targets = targets(pipeline);
        self.refuse_own_home(targets.keys())?;
        let runs = self.journal.runs().await?;
        header.from = last_committed(pipeline, &runs);
        let cx = self.bare_context(pipeline, header)?;
        if let Some(present) = &pipeline.present {
            header.from = Some(self.read_version(present, &cx, pipeline.name.as_str()).await?);
        }
        self.check_versions(pipeline, header, &cx).await?;
        let mut locks: Vec<LockName> = targets.into_keys().collect();
        locks.push(LockName::pipeline(&pipeline.name));
        if let Some((message, hint)) = blocking(&runs, &locks) {
            return Err(refused(message, hint));
        }
        committed_elsewhere(pipeline, &runs, &header.definition)
    }

    /// Compares what the run is bound to with the pipeline at hand.
    fn same_definition(
        &self,
        pipeline: &Pipeline,
        run: &Run,
        options: &RunOptions,
        forward: bool,
    ) -> Result<Option<Entry>, ExecutorError> {
        let known = &run.definition().shape;
        let without_files = |shape: &Value| {
            let mut shape = shape.clone();
            if let Some(map) = shape.as_object_mut() {
                map.shift_remove("files");
            }
            shape
        };
        let structure = pipeline.structure();
        let mut difference_lines = difference(&without_files(known), &structure);
        let applying = matches!(
            run.held_from().unwrap_or(run.state()),
            RunState::Checking | RunState::Applying | RunState::Verifying
        );
        let mut now: Option<Definition> = None;
        // Going back needs none of the files that the steps came with.
        if forward && applying {
            let definition = pipeline.define().map_err(ExecutorError::Pipeline)?;
            difference_lines = difference(known, &definition.shape);
            now = Some(definition);
        }
        // Relative paths would lead elsewhere, whatever else is the same.
        let (there, here) = (&run.definition().base_dir, &pipeline.source.base_dir);
        if !pipeline.source.document.is_null() && !same_directory(there, here) {
            difference_lines.push(format!("~ /base_dir: {} → {}", there.display(), here.display()));
        }
        if difference_lines.is_empty() {
            return Ok(None);
        }
        if !options.adopt {
            return Err(refused(
                format!(
                    "the pipeline is not the one that run {} was started with: {}",
                    run.id(),
                    difference_lines.join("; ")
                ),
                "resume without a file to use the one in the journal, put the files back, or take the change on record: --file FILE --adopt",
            ));
        }
        if let Some((id, how)) = begun_otherwise(run, known, &structure) {
            return Err(refused(
                format!("step `{id}` was begun and {how} in the new pipeline: it could not be undone"),
                "keep every step that was begun; add or change only those that come after",
            ));
        }
        let definition = match now {
            Some(definition) => definition,
            None => pipeline.define().map_err(ExecutorError::Pipeline)?,
        };
        let actor = Actor::current();
        Ok(Some(Entry::DefinitionAdopted { definition: Box::new(definition), difference: difference_lines, actor }))
    }

    /// Takes the lease of a new run, if no open run forbids it.
    async fn enter(
        &self,
        pipeline: &Pipeline,
        locks: &[LockName],
        definition: &Definition,
        patience: Duration,
    ) -> Result<Lease, ExecutorError> {
        let end = Instant::now() + patience;
        loop {
            // One at a time looks for open runs. A run that is just being made is not among them
            // yet: its lease, which covers every name that overlaps, keeps others out.
            let door = self.journal.acquire(&[admission()], ADMISSION_PATIENCE).await?;
            match self.journal.acquire(locks, Duration::ZERO).await {
                Ok(lease) => {
                    let runs = self.journal.runs().await?;
                    match blocking(&runs, locks) {
                        Some((message, hint)) if Instant::now() >= end => return Err(refused(message, hint)),
                        Some(_) => drop(lease),
                        None => {
                            committed_elsewhere(pipeline, &runs, definition)?;
                            drop(door);
                            return Ok(lease);
                        }
                    }
                }
                Err(JournalError::Held { .. }) if Instant::now() < end => {}
                Err(error @ JournalError::Held { .. }) => {
                    return Err(refused(error.to_string(), error.hint()));
                }
                Err(error) => return Err(error.into()),
            }
            drop(door);
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Refuses a pipeline that changes what the journal lives in.
    fn refuse_own_home<'a>(&self, mut targets: impl Iterator<Item = &'a LockName>) -> Result<(), ExecutorError> {
        let homes = self.journal.home();
        let changed = targets.find_map(|target| Some((target, homes.iter().find(|home| target.overlaps(home))?)));
        match changed {
            None => Ok(()),
            Some((target, home)) => Err(refused(
                format!("the journal lives in {home}, which this pipeline changes ({target})"),
                "keep the journal elsewhere, outside of everything that is upgraded: --state-dir DIR or --journal URL",
            )),
        }
    }

    async fn check_versions(&self, pipeline: &Pipeline, header: &Header, cx: &Context) -> Result<(), ExecutorError> {
        check_path(
            header.from.as_ref(),
            pipeline.to.as_ref(),
            pipeline.from.as_ref(),
            &pipeline.required_stops,
            pipeline.channel,
        )
        .map_err(|error| refused(error.to_string(), "choose the version with `--to`, or upgrade in the steps named"))?;
        for requirement in &pipeline.requires {
            let present = self.read_version(&requirement.present, cx, &requirement.name).await?;
            if !requirement.version.matches(&present) {
                return Err(refused(
                    format!("{} is {present}; this upgrade needs {}", requirement.name, requirement.version),
                    format!("bring {} to a version that will do first", requirement.name),
                ));
            }
        }
        Ok(())
    }

    async fn read_version(&self, present: &PresentVersion, cx: &Context, of: &str) -> Result<Version, ExecutorError> {
        let unreadable = |why: String| {
            let why = self.secrets.mask(&why);
            refused(format!("the present version of {of} cannot be read: {why}"), "look at what `present` asks for")
        };
        let verdict = present.check.check(cx).await.map_err(|error| unreadable(error.to_string()))?;
        let text = verdict.facts.get(&present.fact).ok_or_else(|| {
            unreadable(format!("the check answers \"{}\" and no fact `{}`", verdict.message, present.fact))
        })?;
        let text = text.trim().trim_start_matches('v');
        Version::parse(text).map_err(|error| unreadable(format!("`{text}` is not a version: {error}")))
    }

    /// Makes a context for what is read before a run exists.
    pub(crate) fn bare_context(&self, pipeline: &Pipeline, header: &Header) -> Result<Context, ExecutorError> {
        let run = Run::created(header, Timestamp::now());
        self.reader(pipeline).plain_context(&run, "admission", "admission").map_err(ExecutorError::Pipeline)
    }

    /// Resolves the secrets of a pipeline, and masks those that its programs inherit.
    pub(crate) fn secrets_of(&self, pipeline: &Pipeline) -> Secrets {
        self.secrets.expect(&pipeline.structure());
        self.secrets.clone().based_in(&pipeline.source.base_dir)
    }

    /// Makes a caller that changes nothing: for plans and for what is read before a run exists.
    pub(crate) fn reader(&self, pipeline: &Pipeline) -> Caller {
        Caller {
            pipeline: Arc::new(pipeline.clone()),
            secrets: self.secrets_of(pipeline),
            sealed: Arc::new(MemorySealed::default()),
            observers: self.observers.clone(),
            checkpoints: tokio::sync::mpsc::unbounded_channel().0,
            lease: None,
            clock: Clock::new(),
            dry_run: true,
        }
    }

    /// Removes found contents that a crash left behind after its run was over.
    async fn clear_leftovers(&self, runs: &[RunSummary]) {
        let over = |run: &&RunSummary| {
            matches!(run.state, Some(RunState::Committed | RunState::RolledBack | RunState::Rejected))
        };
        for run in runs.iter().rev().filter(over).take(8) {
            let Ok(sealed) = self.journal.sealed(&run.run).await else { continue };
            if let Err(error) = sealed.clear().await {
                tracing::warn!(run = %run.run, %error, "found contents of a finished run could not be removed");
            }
        }
    }
}

/// Tells whether a run has locked what its pipeline changes.
fn is_held(header: &Header, lock: &LockName, adopting: bool) -> bool {
    // A link on the way may lead elsewhere since the run began: the same pipeline then spells the
    // same path in another way.
    let moved = !adopting && lock.parts().0 == "path";
    moved || header.locks.iter().any(|held| held.covers(lock))
}

/// Finds a step that was begun and is another in a new pipeline.
fn begun_otherwise<'a>(run: &'a Run, old: &Value, new: &Value) -> Option<(&'a StepId, &'static str)> {
    let mut begun = run.steps().iter().filter(|(_, step)| step.undo.is_some() && step.state() != StepState::Undone);
    begun.find_map(|(id, _)| {
        let (old, new) = (&old["steps"][id.as_str()], &new["steps"][id.as_str()]);
        let (was, is) = (old["irreversible"].is_null(), new["irreversible"].is_null());
        let how = if new.is_null() {
            "is not"
        } else if old["kind"] != new["kind"] {
            "is of another kind"
        } else if was != is {
            "changes whether it can be undone"
        // What cannot be undone can only be tried again, perhaps as it should have been.
        } else if was && old["with"] != new["with"] {
            "is configured otherwise"
        } else {
            return None;
        };
        Some((id, how))
    })
}

fn same_directory(a: &Path, b: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    a == b || real(a) == real(b)
}

/// Says which open run stands in the way of a new one.
fn blocking(runs: &[RunSummary], locks: &[LockName]) -> Option<(String, String)> {
    for run in runs {
        if let Some(damage) = &run.damage {
            return Some((
                format!("the journal of run {} is damaged, so nobody knows what it left: {damage}", run.run),
                format!(
                    "restore its file from a copy, or look at it with `upgrade audit verify {}` and move it away",
                    run.run
                ),
            ));
        }
        let open = run.state.is_some_and(|state| !state.is_final());
        let shared = run.locks.iter().find(|held| locks.iter().any(|lock| lock.overlaps(held)));
        if let (true, Some(shared), Some(state)) = (open, shared, run.state) {
            return Some((
                format!("run {} is {state} and holds {shared}", run.run),
                match state {
                    RunState::Stuck => format!(
                        "decide about it first: `upgrade status {0}`, then `upgrade resolve {0} STEP …`",
                        run.run
                    ),
                    RunState::Probation => format!(
                        "commit it or roll it back first: `upgrade commit {0}` or `upgrade rollback {0}`",
                        run.run
                    ),
                    _ => format!("finish it first: `upgrade resume {0}` or `upgrade rollback {0}`", run.run),
                },
            ));
        }
    }
    None
}

/// Returns the version that the last committed run of this name and environment led to.
fn last_committed(pipeline: &Pipeline, runs: &[RunSummary]) -> Option<Version> {
    runs.iter()
        .rev()
        .find(|run| {
            run.state == Some(RunState::Committed)
                && run.pipeline.as_ref() == Some(&pipeline.name)
                && run.environment == pipeline.environment
        })
        .and_then(|run| run.to.clone())
}

fn committed_elsewhere(pipeline: &Pipeline, runs: &[RunSummary], definition: &Definition) -> Result<(), ExecutorError> {
    let Some(environment) = &pipeline.require_committed_in else { return Ok(()) };
    let there = runs.iter().any(|run| {
        run.state == Some(RunState::Committed)
            && run.pipeline.as_ref() == Some(&pipeline.name)
            && run.environment.as_ref() == Some(environment)
            && run.base_fingerprint == definition.base_fingerprint
    });
    if there {
        return Ok(());
    }
    Err(refused(
        format!("this definition of `{}` has not been committed in {environment} yet", pipeline.name),
        format!("run it there first: `upgrade run FILE --env {environment}`; the two runs must share one journal"),
    ))
}
