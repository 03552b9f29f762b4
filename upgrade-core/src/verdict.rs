//! What a check answers, and the limits that its figures are held to.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::units::Share;

/// Ranks the answer of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// What was asked holds.
    Pass,
    /// It holds, and somebody should look.
    Warn,
    /// The measurement itself failed; never counted as a pass.
    Unknown,
    /// It does not hold.
    Fail,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Status::Pass => "pass",
            Status::Warn => "warn",
            Status::Unknown => "unknown",
            Status::Fail => "fail",
        })
    }
}

/// Carries the answer of a check, with the figures behind it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// The answer.
    pub status: Status,
    /// What was seen, in one line.
    pub message: String,
    /// What to do about it, in one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The figures measured, by name; the name ends in the unit (`p95_ms`, `free_bytes`).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub measurements: BTreeMap<String, f64>,
    /// Texts read along the way, by name: a version, an id.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub facts: BTreeMap<String, String>,
}

impl Verdict {
    /// Makes a verdict without figures.
    pub fn new(status: Status, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), hint: None, measurements: BTreeMap::new(), facts: BTreeMap::new() }
    }

    /// Makes a passing verdict.
    pub fn pass(message: impl Into<String>) -> Self {
        Self::new(Status::Pass, message)
    }

    /// Makes a verdict that passes and asks for attention.
    pub fn warn(message: impl Into<String>) -> Self {
        Self::new(Status::Warn, message)
    }

    /// Makes a failing verdict.
    pub fn fail(message: impl Into<String>) -> Self {
        Self::new(Status::Fail, message)
    }

    /// Makes the verdict of a measurement that failed.
    pub fn unknown(message: impl Into<String>) -> Self {
        Self::new(Status::Unknown, message)
    }

    /// Adds the line that tells what to do.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds a figure; one that is not finite turns the verdict *unknown*.
    #[must_use]
    pub fn with_measurement(mut self, name: impl Into<String>, value: f64) -> Self {
        let name = name.into();
        if value.is_finite() {
            self.measurements.insert(name, value);
        } else {
            self.worsen(Status::Unknown, format!("{name} is not a number"));
        }
        self
    }

    /// Adds a text read along the way.
    #[must_use]
    pub fn with_fact(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.facts.insert(name.into(), value.into());
        self
    }

    /// Holds the figures to limits: absolute ones, and ones relative to `baseline`.
    ///
    /// A limit whose figure is missing, or whose baseline is, makes the verdict *unknown*.
    #[must_use]
    pub fn held_to(mut self, limits: &BTreeMap<String, Limit>, baseline: &BTreeMap<String, f64>) -> Self {
        for (name, limit) in limits {
            let value = self.measurements.get(name).copied();
            if let Some((status, message)) = limit.judge(name, value, baseline.get(name).copied()) {
                self.worsen(status, message);
            }
        }
        self
    }

    fn worsen(&mut self, status: Status, message: String) {
        if status > self.status {
            self.status = status;
            self.message = message;
        } else if status == self.status && status != Status::Pass {
            self.message = format!("{}; {message}", self.message);
        }
    }
}

/// Bounds one figure of a check: absolutely, or against the figure measured before the run.
///
/// An increase is a share of the baseline: `20%` allows 1.2 times it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "file", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// The least that passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    /// The most that passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
    /// The most that it may grow over the baseline, as a share of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_increase: Option<Share>,
    /// The most that it may fall below the baseline, as a share of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_decrease: Option<Share>,
    /// The most that it may grow over the baseline, in the figure's own unit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_rise: Option<f64>,
}

impl Limit {
    /// Tells whether the limit needs a figure measured before the run.
    pub fn is_relative(&self) -> bool {
        self.max_increase.is_some() || self.max_decrease.is_some() || self.max_rise.is_some()
    }

    /// Judges a figure; `None` means that it is within the limit.
    pub fn judge(&self, name: &str, value: Option<f64>, baseline: Option<f64>) -> Option<(Status, String)> {
        let Some(value) = value.filter(|v| v.is_finite()) else {
            return Some((Status::Unknown, format!("{name} was not measured")));
        };
        if let Some(min) = self.min.filter(|min| value < *min) {
            return Some((Status::Fail, format!("{name} is {value:.4}, below {min}")));
        }
        if let Some(max) = self.max.filter(|max| value > *max) {
            return Some((Status::Fail, format!("{name} is {value:.4}, above {max}")));
        }
        if !self.is_relative() {
            return None;
        }
        let Some(base) = baseline.filter(|b| b.is_finite()) else {
            return Some((Status::Unknown, format!("{name} has no baseline to compare with")));
        };
        let above = |most: f64, how: String| {
            (value > most)
                .then(|| (Status::Fail, format!("{name} is {value:.4}, was {base:.4} before the run: more than {how}")))
        };
        self.max_increase
            .and_then(|share| above(base * (1.0 + share.0), format!("{share} more")))
            .or_else(|| self.max_rise.and_then(|rise| above(base + rise, format!("{rise} more"))))
            .or_else(|| {
                self.max_decrease.filter(|share| value < base * (1.0 - share.0)).map(|share| {
                    (
                        Status::Fail,
                        format!("{name} is {value:.4}, was {base:.4} before the run: more than {share} less"),
                    )
                })
            })
    }
}
