//! What is asked of the new side before it gets more traffic, or all.
//!
//! ```text
//!              pass × passes            and the pause is over
//!   asking ─────────────────▶ content ───────────────────────▶ over
//!     │  ▲                       │
//!     │  └───── fail, unknown ───┘
//!     │
//!     └── fail × failures, unknown × unknowns ──▶ the step fails
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::time::{Instant, sleep_until, timeout};
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::units::Span;
use upgrade_core::verdict::{Limit, Status, Verdict};

use crate::error::cancelled;

/// Describes a check that the new side must pass.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AnalysisConfig {
    /// The kind of check: `prometheus.query`, `http.probe`, any other.
    pub uses: String,
    /// What it is called in messages. Default: its kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Its configuration. The names of the sides in braces stand for the `pod-template-hash` of their pods.
    #[serde(default)]
    pub with: Map<String, Value>,
    /// What is other in its configuration when the side that was there is asked. If present, both sides are
    /// asked each time, and limits that are relative compare the new one with the other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stable: Option<Map<String, Value>>,
    /// Limits to the figures that it measures, by their names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub limits: BTreeMap<String, Limit>,
    /// How long after one question the next is asked. Default 10 s.
    #[serde(default = "ten_seconds")]
    pub every: Span,
    /// How long one answer may take; one that takes longer is unknown. Default 30 s.
    #[serde(default = "half_a_minute")]
    pub timeout: Span,
    /// How many answers in a row must pass. Default 1.
    #[serde(default = "one")]
    pub passes: u32,
    /// How many answers that fail, with none that passes between them, end the step. Default 1.
    #[serde(default = "one")]
    pub failures: u32,
    /// How many answers in a row may be unknown before that ends the step. Default 3.
    #[serde(default = "three")]
    pub unknowns: u32,
}

fn ten_seconds() -> Span {
    Span::from_secs(10)
}

fn half_a_minute() -> Span {
    Span::from_secs(30)
}

fn one() -> u32 {
    1
}

fn three() -> u32 {
    3
}

/// Names the two sides and what their pods are known by.
pub(super) struct SideNames<'a> {
    pub(super) new: (&'static str, &'a str),
    pub(super) old: (&'static str, &'a str),
}

/// Asks the checks of a step about its new side.
#[derive(Clone, Default)]
pub(super) struct Analysis {
    items: Vec<Item>,
}

#[derive(Clone)]
struct Item {
    name: String,
    config: AnalysisConfig,
    asks: Asks,
}

#[derive(Clone)]
enum Asks {
    /// A kind of check, made when it is known what the sides are known by.
    Kind(BuildContext),
    /// A check that a program gave.
    Made(Arc<dyn Check>),
}

impl fmt::Debug for Analysis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.items.iter().map(|item| &item.name)).finish()
    }
}

impl Analysis {
    /// Makes the checks from their configuration; `sides` are the names of the new and the old side.
    ///
    /// # Errors
    /// A kind is unknown, a configuration is wrong, or a limit is relative to nothing.
    pub(super) fn new(
        configs: &[AnalysisConfig],
        sides: [&'static str; 2],
        cx: &BuildContext,
    ) -> Result<Self, BuildError> {
        let names = SideNames { new: (sides[0], "0"), old: (sides[1], "0") };
        let mut items = Vec::new();
        for (at, config) in configs.iter().enumerate() {
            let name = config.id.clone().unwrap_or_else(|| config.uses.clone());
            let item = Item { name, config: config.clone(), asks: Asks::Kind(cx.clone()) };
            item.possible(&names).map_err(|error| {
                let key = error.key.as_deref().map(|key| format!(".{key}")).unwrap_or_default();
                error.at(format!("analysis.{at}{key}"))
            })?;
            items.push(item);
        }
        Ok(Self { items })
    }

    /// Adds a check that a program made; it is asked with `config`, but for `uses`, `with` and `stable`.
    pub(super) fn add(&mut self, name: &str, check: Arc<dyn Check>, config: AnalysisConfig) {
        self.items.push(Item { name: name.to_owned(), config, asks: Asks::Made(check) });
    }

    /// Asks all of them, for `least` at least, until each is content.
    ///
    /// # Errors
    /// One of them fails or stays unknown as often as it may not; the call is cancelled.
    pub(super) async fn passes(
        &self,
        cx: &Context,
        sides: &SideNames<'_>,
        least: Duration,
        what: &str,
    ) -> Result<(), StepError> {
        let until = Instant::now() + least;
        let all = try_join_all(self.items.iter().map(|item| item.passes(cx, sides, until, what)));
        tokio::select! {
            done = async { all.await?; sleep_until(until).await; Ok(()) } => done,
            () = cx.cancelled().cancelled() => Err(cancelled()),
        }
    }
}

impl Item {
    fn possible(&self, sides: &SideNames<'_>) -> Result<(), BuildError> {
        let zero = |key: &str| BuildError::new(format!("`{key}` is one at least")).at(key);
        for (key, count) in
            [("passes", self.config.passes), ("failures", self.config.failures), ("unknowns", self.config.unknowns)]
        {
            if count == 0 {
                return Err(zero(key));
            }
        }
        if self.config.every.0.is_zero() {
            return Err(BuildError::new("there must be time between two questions").at("every"));
        }
        let check = self.new_side(sides)?;
        match self.old_side(sides) {
            Some(old) => drop(old?),
            None if check.needs_baseline() || self.config.limits.values().any(Limit::is_relative) => {
                return Err(BuildError::new("a limit is relative, and there is nothing to compare with")
                    .at("stable")
                    .with_hint(
                        "say what is asked of the other side: `stable: { url: … }`, or make the limit absolute",
                    ));
            }
            None => {}
        }
        Ok(())
    }

    fn new_side(&self, sides: &SideNames<'_>) -> Result<Arc<dyn Check>, BuildError> {
        match &self.asks {
            Asks::Made(check) => Ok(check.clone()),
            Asks::Kind(cx) => cx.check(&self.config.uses, filled(&Value::Object(self.config.with.clone()), sides)),
        }
    }

    fn old_side(&self, sides: &SideNames<'_>) -> Option<Result<Arc<dyn Check>, BuildError>> {
        let (Some(other), Asks::Kind(cx)) = (&self.config.stable, &self.asks) else { return None };
        let mut with = self.config.with.clone();
        with.extend(other.clone());
        Some(cx.check(&self.config.uses, filled(&Value::Object(with), sides)))
    }

    async fn passes(&self, cx: &Context, sides: &SideNames<'_>, until: Instant, what: &str) -> Result<(), StepError> {
        let unusable = |error: BuildError| StepError::permanent(format!("`{}` cannot be asked: {error}", self.name));
        let new = self.new_side(sides).map_err(unusable)?;
        let old = self.old_side(sides).transpose().map_err(unusable)?;
        let mut streak = Streak::default();
        loop {
            let asked = Instant::now();
            let verdict = self.ask(cx, &*new, old.as_deref()).await;
            cx.progress(0, 0, format!("{what}: `{}`: {}: {}", self.name, verdict.status, verdict.message));
            match streak.with(verdict.status, &self.config) {
                Standing::Broken => return Err(self.broken(verdict, what)),
                Standing::Content if Instant::now() >= until => return Ok(()),
                _ => sleep_until(asked + self.config.every.0).await,
            }
        }
    }

    async fn ask(&self, cx: &Context, new: &dyn Check, old: Option<&dyn Check>) -> Verdict {
        let baseline = match old {
            None => BTreeMap::new(),
            Some(old) => {
                let verdict = self.once(cx, old).await;
                if verdict.status == Status::Unknown {
                    return Verdict { message: format!("of the other side: {}", verdict.message), ..verdict };
                }
                verdict.measurements
            }
        };
        self.once(&cx.with_baseline(baseline.clone()), new).await.held_to(&self.config.limits, &baseline)
    }

    async fn once(&self, cx: &Context, check: &dyn Check) -> Verdict {
        match timeout(self.config.timeout.0, check.check(cx)).await {
            Ok(Ok(verdict)) => verdict,
            Ok(Err(error)) => {
                let verdict = Verdict::unknown(error.message().to_owned());
                match error.hint() {
                    Some(hint) => verdict.with_hint(hint.to_owned()),
                    None => verdict,
                }
            }
            Err(_) => Verdict::unknown(format!("no answer within {}", self.config.timeout)),
        }
    }

    fn broken(&self, verdict: Verdict, what: &str) -> StepError {
        let figures: Vec<_> = verdict.measurements.iter().map(|(name, value)| format!("{name}: {value}")).collect();
        let hint =
            verdict.hint.unwrap_or_else(|| "the limits stand under `analysis`; see what is measured there".into());
        let error = if verdict.status == Status::Unknown {
            StepError::unknown(format!("{what}: `{}` cannot be measured: {}", self.name, verdict.message))
        } else {
            StepError::permanent(format!("{what}: `{}` failed: {}", self.name, verdict.message))
        };
        let error = error.with_hint(hint);
        if figures.is_empty() { error } else { error.with_detail(figures.join("\n")) }
    }
}

/// Counts answers in a row.
#[derive(Default)]
struct Streak {
    passes: u32,
    failures: u32,
    unknowns: u32,
}

/// Says what a row of answers amounts to.
#[derive(Debug, PartialEq, Eq)]
enum Standing {
    Asking,
    Content,
    Broken,
}

impl Streak {
    fn with(&mut self, status: Status, config: &AnalysisConfig) -> Standing {
        match status {
            Status::Pass | Status::Warn => *self = Self { passes: self.passes + 1, ..Self::default() },
            Status::Fail => *self = Self { failures: self.failures + 1, ..Self::default() },
            // Nobody knows: neither does a failure before it count for nothing.
            Status::Unknown => {
                *self = Self { passes: 0, failures: self.failures, unknowns: self.unknowns + 1 };
            }
        }
        if self.failures >= config.failures || self.unknowns >= config.unknowns {
            Standing::Broken
        } else if self.passes >= config.passes {
            Standing::Content
        } else {
            Standing::Asking
        }
    }
}

/// Writes what the sides are known by in place of their names.
fn filled(value: &Value, sides: &SideNames<'_>) -> Value {
    match value {
        Value::String(text) => {
            let of = |(name, hash): (&str, &str), text: String| text.replace(&format!("{{{name}}}"), hash);
            of(sides.old, of(sides.new, text.clone())).into()
        }
        Value::Array(list) => list.iter().map(|each| filled(each, sides)).collect(),
        Value::Object(map) => {
            map.iter().map(|(key, each)| (key.clone(), filled(each, sides))).collect::<Map<_, _>>().into()
        }
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(more: &Value) -> AnalysisConfig {
        let mut config = json!({ "uses": "toy" });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(config).unwrap()
    }

    #[test]
    fn answers_count_in_a_row_and_unknown_is_neither() {
        use Standing::{Asking, Broken, Content};
        use Status::{Fail, Pass, Unknown, Warn};

        let strict = config(&json!({}));
        let patient = config(&json!({ "passes": 2, "failures": 2, "unknowns": 2 }));
        for (config, answers, standing) in [
            (&strict, vec![Pass], Content),
            (&strict, vec![Fail], Broken),
            (&strict, vec![Unknown, Unknown], Asking),
            (&strict, vec![Unknown, Unknown, Unknown], Broken),
            (&patient, vec![Pass, Warn], Content),
            (&patient, vec![Pass, Unknown, Pass], Asking),
            (&patient, vec![Pass, Fail, Pass], Asking),
            (&patient, vec![Fail, Unknown, Fail], Broken),
            (&patient, vec![Fail, Pass, Fail], Asking),
            (&patient, vec![Unknown, Fail, Unknown], Asking),
        ] {
            let mut streak = Streak::default();
            let last = answers.iter().map(|status| streak.with(*status, config)).last().unwrap();
            assert_eq!(last, standing, "{answers:?}");
        }
    }

    #[test]
    fn sides_are_named_in_texts_wherever_they_stand() {
        let sides = SideNames { new: ("canary", "abc"), old: ("stable", "def") };
        let with = json!({ "query": "up{hash=\"{canary}\"} / up{hash=\"{stable}\"}", "list": ["{canary}"], "n": 1 });
        let expected = json!({ "query": "up{hash=\"abc\"} / up{hash=\"def\"}", "list": ["abc"], "n": 1 });
        assert_eq!(filled(&with, &sides), expected);
    }

    #[test]
    fn what_cannot_be_asked_is_refused_where_it_stands() {
        let sides = ["canary", "stable"];
        for (more, key) in [
            (json!({}), "analysis.0.uses"),
            (json!({ "passes": 0 }), "analysis.0.passes"),
            (json!({ "unknowns": 0 }), "analysis.0.unknowns"),
            (json!({ "every": "0s" }), "analysis.0.every"),
        ] {
            let error = Analysis::new(&[config(&more)], sides, &BuildContext::new("/")).unwrap_err();
            assert_eq!(error.key.as_deref(), Some(key), "{error}");
        }
    }
}
