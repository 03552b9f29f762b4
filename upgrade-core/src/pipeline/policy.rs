//! How long, how often and how: timeouts, retries, budgets, the commit.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::context::OnConflict;
use crate::units::Span;
use crate::verdict::Limit;

/// Says how often a call is tried and how long is waited in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "file", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Retry {
    /// How often the call is made, the first time included.
    pub attempts: u32,
    /// How long is waited after the first failure; doubled after each further one.
    pub delay: Span,
    /// The longest wait.
    pub max_delay: Span,
}

impl Default for Retry {
    fn default() -> Self {
        Self::FORWARD
    }
}

impl Retry {
    /// Tries three times: what a step's `apply` gets when the pipeline says nothing.
    pub const FORWARD: Self = Self { attempts: 3, delay: Span::from_millis(500), max_delay: Span::from_secs(30) };

    /// Tries five times: what a step's `rollback` and `commit` get when the pipeline says nothing.
    pub const BACK: Self = Self { attempts: 5, delay: Span::from_millis(200), max_delay: Span::from_secs(30) };

    /// Tries once.
    pub const ONCE: Self = Self { attempts: 1, ..Self::FORWARD };

    /// Returns how long to wait after the given attempt (from one) failed; `None` when that was
    /// the last.
    pub fn delay_after(&self, attempt: u32) -> Option<Duration> {
        if attempt >= self.attempts {
            return None;
        }
        let factor = 2u32.saturating_pow(attempt.saturating_sub(1));
        Some(self.delay.0.saturating_mul(factor).min(self.max_delay.0))
    }
}

/// Says how a step is driven.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepPolicy {
    /// How long one `prepare` or `apply` may take.
    pub timeout: Span,
    /// How long one `rollback`, `settle` or `commit` may take.
    pub undo_timeout: Span,
    /// How long is waited for a cancelled call to return before the run is held.
    pub grace: Span,
    /// How often a transient failure of `prepare` or `apply` is tried again.
    pub retry: Retry,
    /// How often a failed `rollback` or `commit` is tried again.
    pub undo_retry: Retry,
    /// What the step does about a foreign change.
    pub on_conflict: OnConflict,
}

impl Default for StepPolicy {
    fn default() -> Self {
        Self {
            timeout: Span::from_secs(600),
            undo_timeout: Span::from_secs(600),
            grace: Span::from_secs(30),
            retry: Retry::FORWARD,
            undo_retry: Retry::BACK,
            on_conflict: OnConflict::Stop,
        }
    }
}

/// Says how a check is asked.
#[derive(Debug, Clone, PartialEq)]
pub struct CheckPolicy {
    /// How long one call may take; past it the verdict is *unknown*.
    pub timeout: Span,
    /// How long a check that does not pass is asked again; once if zero.
    pub within: Span,
    /// How long is waited between two calls.
    pub every: Span,
    /// What the figures are held to.
    pub limits: BTreeMap<String, Limit>,
}

impl Default for CheckPolicy {
    fn default() -> Self {
        Self {
            timeout: Span::from_secs(30),
            within: Span::default(),
            every: Span::from_secs(1),
            limits: BTreeMap::new(),
        }
    }
}

/// Bounds a run in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "file", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// How long checking, applying and verifying may take together. A step starts only if its
    /// timeout and the estimated undo still fit; otherwise the run rolls back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<Span>,
    /// How long a rollback should take. It is never cut short: past it an alarm is recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback: Option<Span>,
}

/// Says when an upgrade that is applied and verified is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "file", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum CommitMode {
    /// At once.
    #[default]
    Now,
    /// After this long in probation, if the guards stayed clean.
    After(Span),
    /// When it is confirmed; rolled back if that does not happen within this long.
    ConfirmWithin(Span),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_longest() {
        let retry = Retry { attempts: 5, delay: Span::from_secs(1), max_delay: Span::from_secs(3) };
        let delays: Vec<_> = (1..=5).map(|n| retry.delay_after(n).map(|d| d.as_secs())).collect();
        assert_eq!(delays, [Some(1), Some(2), Some(3), Some(3), None]);
        assert_eq!(Retry { attempts: u32::MAX, ..retry }.delay_after(4_000_000_000), Some(Duration::from_secs(3)));
    }

    #[test]
    fn commit_modes_are_written_as_in_a_file() {
        assert_eq!(serde_json::to_string(&CommitMode::Now).unwrap(), "\"now\"");
        let after: CommitMode = serde_json::from_str(r#"{"after":"10m"}"#).unwrap();
        assert_eq!(after, CommitMode::After(Span::from_secs(600)));
    }
}
