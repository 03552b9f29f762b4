//! What a journal keeps of a run: every decision and every effect, in order.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use jiff::Timestamp;
use semver::Version;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::context::Direction;
use crate::error::StepError;
use crate::names::{Actor, CheckId, LockName, PipelineName, RunId, Seq, StepId};
use crate::step::Change;
use crate::transition::RunState;
use crate::verdict::Verdict;

/// Numbers the format of the entries that this code writes; the first entry of a run names it.
pub const ENTRY_FORMAT: u32 = 1;

/// Carries an entry with its place in the chain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The entry's number within its run, from zero.
    pub seq: Seq,
    /// When the driver wrote it.
    pub at: Timestamp,
    /// The digest of the record before; empty for the first.
    pub prev: String,
    /// What happened.
    pub entry: Entry,
    /// SHA-256 over `seq`, `at`, `prev` and the entry.
    pub digest: String,
}

/// Holds data of a step together with the kind and format that wrote it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Versioned {
    /// The kind of step.
    pub kind: String,
    /// The format that the kind gave the data.
    pub format: u32,
    /// The data.
    pub value: Value,
}

/// Says at which point of a run a check is asked.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Before anything is changed.
    Pre,
    /// To have a figure to compare with later.
    Baseline,
    /// Just before a step.
    Before(StepId),
    /// Just after a step.
    After(StepId),
    /// Just before the first irreversible step: the pre-checks asked again.
    Pivot,
    /// Beside the running steps.
    Guard,
    /// When every step is applied.
    Verify,
    /// When everything is undone.
    RollbackVerify,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Phase::Pre => f.write_str("pre-check"),
            Phase::Baseline => f.write_str("baseline"),
            Phase::Before(step) => write!(f, "check before `{step}`"),
            Phase::After(step) => write!(f, "check after `{step}`"),
            Phase::Pivot => f.write_str("check before the pivot"),
            Phase::Guard => f.write_str("guard"),
            Phase::Verify => f.write_str("verification"),
            Phase::RollbackVerify => f.write_str("verification of the rollback"),
        }
    }
}

/// Says why a run left its way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "cause", rename_all = "snake_case")]
pub enum Cause {
    /// A step failed.
    Step {
        /// The step.
        step: StepId,
        /// What it said.
        error: StepError,
    },
    /// A check failed or stayed unknown.
    Check {
        /// When it was asked.
        phase: Phase,
        /// The check.
        check: CheckId,
        /// What it answered.
        verdict: Verdict,
    },
    /// An operator asked for it.
    Operator {
        /// Who.
        actor: Actor,
        /// Why, in their words.
        reason: String,
    },
    /// A time budget would not have been kept.
    Budget {
        /// Which, and by how much.
        message: String,
    },
    /// A run of another machine has claimed a target.
    Claimed {
        /// Which, by whom, and since when.
        message: String,
        /// What to do about it.
        hint: String,
    },
    /// Nobody confirmed the upgrade in time.
    NotConfirmed {
        /// When the time was up.
        deadline: Timestamp,
    },
    /// A call did not return after its cancellation.
    Unresponsive {
        /// The step.
        step: StepId,
        /// The direction of the call.
        direction: Direction,
    },
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Step { step, error } => write!(f, "step `{step}` failed: {error}"),
            Cause::Check { phase, check, verdict } => {
                write!(f, "{phase} `{check}`: {}: {}", verdict.status, verdict.message)
            }
            Cause::Operator { actor, reason } => write!(f, "{actor}: {reason}"),
            Cause::Budget { message } => f.write_str(message),
            Cause::Claimed { message, hint } => write!(f, "{message}; {hint}"),
            Cause::NotConfirmed { deadline } => write!(f, "not confirmed by {deadline}"),
            Cause::Unresponsive { step, direction } => {
                write!(f, "step `{step}` ({direction}) did not return after its cancellation")
            }
        }
    }
}

/// Says whether the system is well after a rollback.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// Everything is as it was found, and the checks pass.
    Restored,
    /// Everything is as it was found, and a check does not pass.
    RestoredButUnhealthy,
}

/// Says what an operator decided about a step whose undo failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resolution {
    /// Undo it again.
    Retry,
    /// It was put back by hand.
    Skip,
    /// It stays as it is, and so does everything that it needs.
    Abandon,
}

/// Asks the driver of a run for something; durable until it is answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// Names the request: a UUID version 7.
    pub id: String,
    /// When it was made.
    pub at: Timestamp,
    /// Who asks.
    pub actor: Actor,
    /// What is asked.
    pub demand: Demand,
}

impl Request {
    /// Makes a request of this process.
    pub fn new(demand: Demand) -> Self {
        Self { id: uuid::Uuid::now_v7().to_string(), at: Timestamp::now(), actor: Actor::current(), demand }
    }
}

/// Lists what can be asked of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "demand", rename_all = "snake_case")]
pub enum Demand {
    /// Finish the running steps, then hold.
    Stop {
        /// Why.
        reason: String,
    },
    /// Cancel what runs and put everything back.
    Rollback {
        /// Why.
        reason: String,
    },
    /// Commit what is applied and verified.
    Confirm {
        /// Why.
        reason: String,
    },
    /// Go on with a run that is held.
    Resume,
    /// Decide about a step whose undo failed.
    Resolve {
        /// The step.
        step: StepId,
        /// The decision.
        resolution: Resolution,
        /// Why.
        reason: String,
    },
}

/// Describes the run in its first entry.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// The format of the entries that follow.
    pub format: u32,
    /// The run.
    pub run: RunId,
    /// What is upgraded.
    pub pipeline: PipelineName,
    /// The environment, if the pipeline names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub environment: Option<String>,
    /// The version found, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Version>,
    /// The version that the pipeline leads to, if it names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Version>,
    /// The names under which the run holds its targets.
    pub locks: Vec<LockName>,
    /// What the run is bound to.
    pub definition: Definition,
    /// Who started it.
    pub actor: Actor,
    /// The version of this library that started it.
    pub engine: String,
}

/// Binds a run to its pipeline.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Definition {
    /// Digest of `shape`.
    pub fingerprint: String,
    /// Digest of the definition without its environment's overlay, for `require_committed_in`.
    pub base_fingerprint: String,
    /// Graph, kinds, configuration and the digests of the files they name.
    pub shape: Value,
    /// The canonical pipeline file, from which the run can be built again; null for one built in
    /// Rust.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub document: Value,
    /// The directory that relative paths start from.
    pub base_dir: PathBuf,
    /// The resolved variables that are not secret.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub variables: BTreeMap<String, Value>,
}

/// Records one thing that happened in a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Entry {
    /// The run exists. Always the first entry.
    RunCreated(Box<Header>),
    /// A driver took the run up: at its start, on a resume.
    DriverAttached {
        /// Who.
        actor: Actor,
        /// The version of the library that drives.
        engine: String,
        /// The lease's epoch.
        epoch: u64,
    },
    /// The run is bound to another definition from here on.
    DefinitionAdopted {
        /// The new one.
        definition: Box<Definition>,
        /// What differs, a line each.
        difference: Vec<String>,
        /// Who adopted it.
        actor: Actor,
    },
    /// A target was found to be this very one.
    TargetIdentified {
        /// The target.
        target: LockName,
        /// What tells it from another of the same name.
        identity: String,
    },
    /// The run changed its state.
    RunEntered {
        /// The new state.
        state: RunState,
        /// Why, where it is not the ordinary way.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cause: Option<Cause>,
        /// For *probation*: when it ends. Absent: only by a confirmation.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        deadline: Option<Timestamp>,
        /// For *rolled_back*: whether the system is well.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        health: Option<Health>,
    },
    /// A check answered.
    CheckReported {
        /// When it was asked.
        phase: Phase,
        /// The check.
        check: CheckId,
        /// What it answered.
        verdict: Verdict,
        /// How long it took, in milliseconds.
        elapsed_ms: u64,
    },
    /// A guard's limit was broken for longer than it may be, or is kept again.
    GuardChanged {
        /// The guard.
        guard: CheckId,
        /// Whether it is broken now.
        breached: bool,
        /// What follows.
        action: GuardAction,
        /// What it saw last.
        verdict: Verdict,
    },
    /// A step's undo record is durable; its `apply` follows.
    StepPrepared {
        /// The step.
        step: StepId,
        /// What undoing needs.
        undo: Versioned,
        /// What will change.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        changes: Vec<Change>,
    },
    /// A step was done already.
    StepUnchanged {
        /// The step.
        step: StepId,
        /// What later steps see.
        output: Versioned,
        /// Why there is nothing to do.
        reason: String,
    },
    /// A step's condition did not hold.
    StepSkipped {
        /// The step.
        step: StepId,
        /// Why.
        reason: String,
    },
    /// A step marked a point from which it can go on.
    StepCheckpoint {
        /// The step.
        step: StepId,
        /// The direction it was driven in.
        direction: Direction,
        /// What it marked.
        checkpoint: Versioned,
    },
    /// A call on a step failed.
    StepFailed {
        /// The step.
        step: StepId,
        /// The direction of the call.
        direction: Direction,
        /// Which attempt it was, from one.
        attempt: u32,
        /// What it said.
        error: StepError,
        /// When it is tried again; absent when it is not.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        retry_at: Option<Timestamp>,
        /// How long the call took, in milliseconds.
        elapsed_ms: u64,
    },
    /// A step's `apply` finished.
    StepApplied {
        /// The step.
        step: StepId,
        /// What later steps see.
        output: Versioned,
        /// How long it took, in milliseconds.
        elapsed_ms: u64,
    },
    /// A step's `rollback` is about to be called.
    StepUndoing {
        /// The step.
        step: StepId,
    },
    /// A step is as it was found.
    StepUndone {
        /// The step.
        step: StepId,
        /// How long it took, in milliseconds.
        elapsed_ms: u64,
    },
    /// An operator decided about a step whose undo failed.
    StepResolved {
        /// The step.
        step: StepId,
        /// The decision.
        resolution: Resolution,
        /// Who decided.
        actor: Actor,
        /// Why.
        reason: String,
    },
    /// What a step's undo needed is removed.
    StepCommitted {
        /// The step.
        step: StepId,
    },
    /// The driver took a request up.
    RequestReceived {
        /// The request.
        request: Request,
    },
    /// The driver answered a request.
    RequestAnswered {
        /// The request's id.
        id: String,
        /// Why it was refused; absent when it was granted.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        refused: Option<String>,
    },
    /// A rollback takes longer than its budget. It goes on.
    BudgetAlarm {
        /// Which budget, and by how much.
        message: String,
    },
}

/// Says what follows when a guard's limit is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "file", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum GuardAction {
    /// The run is rolled back.
    #[default]
    Rollback,
    /// The run is held.
    Hold,
    /// It is reported.
    Warn,
}
