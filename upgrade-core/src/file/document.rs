//! The keys of a pipeline file, as they are read and as the JSON Schema describes them.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::context::OnConflict;
use crate::entry::GuardAction;
use crate::pipeline::{Budget, Channel, CheckPolicy, CommitMode, Retry, StepPolicy};
use crate::units::Span;
use crate::verdict::Limit;

// Lists and what `with` holds are read one by one, so that each can be wrong for itself; here
// they only have to be known. Written as well as read, so that every key counts as used.

/// The upgrade of one system: checks, steps and guards, from one version to another.
#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "Upgrade pipeline")]
pub(super) struct Document {
    /// What is upgraded.
    pub(super) upgrade: String,
    /// The versions that the upgrade may start from: `>=1.0.0, <1.1.0`.
    #[schemars(with = "Option<String>")]
    from: Option<Value>,
    /// The version that the upgrade leads to.
    #[schemars(with = "Option<String>")]
    to: Option<Value>,
    /// Versions that no upgrade may skip.
    #[schemars(with = "Option<Vec<String>>")]
    required_stops: Option<Value>,
    /// How finished the version must be.
    pub(super) channel: Option<Channel>,
    /// How the present version is read; otherwise it is that of the last committed run.
    #[schemars(with = "Option<PresentItem>")]
    present: Option<Value>,
    /// The versions that other things must have.
    #[schemars(with = "Option<Vec<RequiresItem>>")]
    requires: Option<Value>,
    /// The environment, unless --env names another.
    pub(super) environment: Option<String>,
    /// Values for `${name}`; --var changes them. Secrets stand here only as references.
    #[schemars(with = "Option<BTreeMap<String, Value>>")]
    vars: Option<Value>,
    /// What is upgraded, by the names that steps and checks use.
    #[schemars(with = "Option<BTreeMap<String, TargetItem>>")]
    targets: Option<Value>,
    /// Asked before anything is changed.
    #[schemars(with = "Option<Vec<CheckItem>>")]
    checks: Option<Value>,
    /// The changes, each needing the one written before it unless `needs` says otherwise.
    #[schemars(with = "Option<Vec<StepItem>>")]
    steps: Option<Value>,
    /// Checks that are asked again and again while the run goes on.
    #[schemars(with = "Option<Vec<GuardItem>>")]
    guards: Option<Value>,
    /// Asked when every step is applied.
    #[schemars(with = "Option<Vec<CheckItem>>")]
    verify: Option<Value>,
    /// Asked after a rollback; otherwise `checks` are, those that had passed.
    #[schemars(with = "Option<Vec<CheckItem>>")]
    rollback_verify: Option<Value>,
    /// When the upgrade is committed; at once if nothing is said.
    pub(super) commit: Option<CommitMode>,
    /// How long the run and its rollback may take.
    pub(super) budget: Option<Budget>,
    /// How many steps may run side by side; four if nothing is said.
    pub(super) max_parallel: Option<usize>,
    /// What is different in an environment: laid over the file.
    #[schemars(with = "Option<BTreeMap<String, Option<BTreeMap<String, Value>>>>")]
    environments: Option<Value>,
    /// An environment in which the same definition must have been committed before.
    pub(super) require_committed_in: Option<String>,
}

/// A target: its kind and configuration.
#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct TargetItem {
    /// The kind.
    pub(super) uses: String,
    /// The kind's configuration.
    with: Option<Value>,
}

/// How the present version is read.
#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PresentItem {
    /// The kind of check.
    pub(super) uses: String,
    /// The kind's configuration.
    with: Option<Value>,
    /// The fact of the check that holds the version; `version` if nothing is said.
    pub(super) fact: Option<String>,
}

/// A version that something else must have.
#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RequiresItem {
    /// What must have the version.
    pub(super) name: String,
    /// The kind of check.
    pub(super) uses: String,
    /// The kind's configuration.
    with: Option<Value>,
    /// The fact of the check that holds the version; `version` if nothing is said.
    pub(super) fact: Option<String>,
    /// The versions that will do: `>=15, <17`.
    pub(super) version: String,
}

/// A check: a question with a verdict.
#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CheckItem {
    /// The check's name; its kind if nothing is said.
    pub(super) id: Option<String>,
    /// The kind.
    pub(super) uses: String,
    /// The kind's configuration.
    with: Option<Value>,
    /// How long one call may take; 30s if nothing is said.
    timeout: Option<Span>,
    /// How long a check that does not pass is asked again; once if nothing is said.
    within: Option<Span>,
    /// How long is waited between two calls; 1s if nothing is said.
    every: Option<Span>,
    /// What the check's figures are held to.
    limits: Option<BTreeMap<String, Limit>>,
}

/// A guard: a check repeated while the run goes on.
#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct GuardItem {
    /// The guard's name; its kind if nothing is said.
    pub(super) id: Option<String>,
    /// The kind of check.
    pub(super) uses: String,
    /// The kind's configuration.
    with: Option<Value>,
    /// How long one call may take; 30s if nothing is said.
    timeout: Option<Span>,
    /// What the check's figures are held to.
    limits: Option<BTreeMap<String, Limit>>,
    /// The step with which watching starts; the first if nothing is said.
    pub(super) from: Option<String>,
    /// The step after which watching ends; until the commit if nothing is said.
    pub(super) until: Option<String>,
    /// How often is measured; every 5s if nothing is said.
    pub(super) every: Option<Span>,
    /// How long a breach must last; it counts at once if nothing is said.
    pub(super) breach_for: Option<Span>,
    /// What follows a breach; the run is rolled back if nothing is said.
    pub(super) action: Option<GuardAction>,
    /// Steps during which is not watched: planned stops.
    pub(super) pause_during: Option<Names>,
}

/// A step: one change.
#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct StepItem {
    /// The step's name.
    pub(super) id: String,
    /// The kind.
    pub(super) uses: String,
    /// The kind's configuration.
    with: Option<Value>,
    /// The steps that must be applied first; the one written before if nothing is said.
    pub(super) needs: Option<Names>,
    /// How long one `prepare` or `apply` may take; 10m if nothing is said.
    timeout: Option<Span>,
    /// How long one `rollback` or `commit` may take; 10m if nothing is said.
    undo_timeout: Option<Span>,
    /// How long is waited for a cancelled call before the run is held; 30s if nothing is said.
    grace: Option<Span>,
    /// How often a transient failure is tried again.
    retry: Option<RetryItem>,
    /// How often a failed undo or commit is tried again.
    undo_retry: Option<RetryItem>,
    /// What is done about a foreign change.
    on_conflict: Option<OnConflict>,
    /// Whether the step runs at all: true, false or a reference to one of them.
    #[schemars(with = "Option<bool>")]
    when: Option<Value>,
    /// Asked just before the step.
    #[schemars(with = "Option<Vec<CheckItem>>")]
    before: Option<Value>,
    /// Asked just after the step.
    #[schemars(with = "Option<Vec<CheckItem>>")]
    after: Option<Value>,
    /// Why the step is not to be undone, though it could be.
    pub(super) irreversible: Option<String>,
}

/// How often and how quickly is tried again.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy)]
#[serde(deny_unknown_fields)]
pub(super) struct RetryItem {
    /// How often the call is made, the first time included.
    attempts: Option<std::num::NonZeroU32>,
    /// How long is waited after the first failure; doubled after each further one.
    delay: Option<Span>,
    /// The longest wait.
    max_delay: Option<Span>,
}

/// One name or several.
#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum Names {
    One(String),
    Several(Vec<String>),
}

impl Names {
    pub(super) fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(name) => vec![name],
            Self::Several(names) => names,
        }
    }
}

impl RetryItem {
    fn over(this: Option<Self>, default: Retry) -> Retry {
        let Some(item) = this else { return default };
        Retry {
            attempts: item.attempts.map_or(default.attempts, Into::into),
            delay: item.delay.unwrap_or(default.delay),
            max_delay: item.max_delay.unwrap_or(default.max_delay),
        }
    }
}

impl StepItem {
    pub(super) fn policy(&self) -> StepPolicy {
        let default = StepPolicy::default();
        StepPolicy {
            timeout: self.timeout.unwrap_or(default.timeout),
            undo_timeout: self.undo_timeout.unwrap_or(default.undo_timeout),
            grace: self.grace.unwrap_or(default.grace),
            retry: RetryItem::over(self.retry, default.retry),
            undo_retry: RetryItem::over(self.undo_retry, default.undo_retry),
            on_conflict: self.on_conflict.unwrap_or_default(),
        }
    }
}

impl CheckItem {
    pub(super) fn policy(&self) -> CheckPolicy {
        let default = CheckPolicy::default();
        CheckPolicy {
            timeout: self.timeout.unwrap_or(default.timeout),
            within: self.within.unwrap_or(default.within),
            every: self.every.unwrap_or(default.every),
            limits: self.limits.clone().unwrap_or_default(),
        }
    }
}

impl GuardItem {
    pub(super) fn policy(&self) -> CheckPolicy {
        let default = CheckPolicy::default();
        CheckPolicy {
            timeout: self.timeout.unwrap_or(default.timeout),
            limits: self.limits.clone().unwrap_or_default(),
            ..default
        }
    }
}
