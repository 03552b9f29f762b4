//! `docker.logs`: errors in a container's log that were not there before the run.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use bollard::Docker;
use bollard::query_parameters::LogsOptionsBuilder;
use futures_util::StreamExt as _;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::{CheckError, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::units::Span;
use upgrade_core::verdict::Verdict;

use crate::containers::{self, id_of, message};
use crate::error::Doing;
use crate::target::Engine;

/// The fact that says when the baseline was read.
const ASKED: &str = "asked_at";
/// What the facts begin with that stand for kinds of errors.
const KIND: &str = "kind ";
/// How many kinds of errors are told apart.
const KINDS: usize = 500;
/// How long a line may be; the rest of it is not looked at.
const LINE: usize = 16 << 10;

/// Configures `docker.logs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LogsCheckConfig {
    /// The engine. Default: the one that the `docker` command would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The container; its successor of the same name counts as it.
    pub container: String,
    /// Words that make a line an error, in upper or lower case.
    #[serde(default = "errors")]
    pub errors: Vec<String>,
    /// Texts that make it none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignore: Vec<String>,
    /// How far back errors are looked for before the run: these are the known ones.
    #[serde(default = "window")]
    pub window: Span,
    /// How many lines of new kinds may come.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub max_new: u64,
}

fn errors() -> Vec<String> {
    ["error", "fatal", "panic", "exception"].map(str::to_owned).to_vec()
}

fn window() -> Span {
    Span::from_secs(3600)
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Compares the errors in a container's log with those before the run.
///
/// Two lines are of one kind if they differ in nothing but words with digits: times, ids, counts.
#[derive(Debug)]
pub struct LogsCheck {
    config: LogsCheckConfig,
    engine: Arc<Engine>,
}

/// Errors found: by kind, how many, and the first line of each.
#[derive(Debug, Default)]
struct Found {
    kinds: BTreeMap<String, (u64, String)>,
    lines: u64,
}

impl LogsCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// There is no such target, or nothing is looked for.
    pub fn from_config(config: LogsCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let engine = Engine::named(config.target.as_deref(), cx)?;
        if config.container.is_empty() {
            return Err(BuildError::new("there is no container").at("container"));
        }
        let empty = |texts: &[String]| texts.iter().any(|text| text.trim().is_empty());
        if config.errors.is_empty() || empty(&config.errors) {
            return Err(BuildError::new("there is no text to look for").at("errors").with_hint("drop `errors`"));
        }
        if empty(&config.ignore) {
            return Err(BuildError::new("every line holds an empty text").at("ignore"));
        }
        Ok(Self { config, engine })
    }

    async fn read(&self, client: &Docker, id: &str, since: Timestamp) -> Result<Found, StepError> {
        let since = i32::try_from(since.as_second()).unwrap_or(0);
        let options = LogsOptionsBuilder::new().stdout(true).stderr(true).since(since).build();
        let mut logs = client.logs(id, Some(options));
        let (mut found, mut line) = (Found::default(), Vec::new());
        while let Some(piece) = logs.next().await {
            let piece = piece.doing(|| format!("reading the log of container {}", self.config.container))?;
            for byte in message(&piece) {
                match byte {
                    b'\n' => found.look(&self.config, &std::mem::take(&mut line)),
                    _ if line.len() < LINE => line.push(*byte),
                    _ => {}
                }
            }
        }
        found.look(&self.config, &line);
        Ok(found)
    }
}

impl Found {
    fn look(&mut self, config: &LogsCheckConfig, line: &[u8]) {
        self.lines += 1;
        let line = String::from_utf8_lossy(line);
        let lower = line.to_lowercase();
        let holds = |texts: &[String]| texts.iter().any(|text| lower.contains(&text.to_lowercase()));
        if !holds(&config.errors) || holds(&config.ignore) {
            return;
        }
        let kind = kind_of(&lower);
        if let Some(known) = self.kinds.get_mut(&kind) {
            known.0 += 1;
        } else if self.kinds.len() < KINDS {
            self.kinds.insert(kind, (1, line.trim().to_owned()));
        }
    }
}

/// Names the kind of a line: a digest of it, so that no text of a log stands in a journal.
fn kind_of(line: &str) -> String {
    let mut shape = String::new();
    for word in line.split_inclusive(|c: char| !c.is_alphanumeric()) {
        if word.contains(|c: char| c.is_ascii_digit()) {
            shape.push('#');
        } else {
            shape.push_str(word);
        }
    }
    // What lies between two numbers is not told apart: `12:30` and `7:05:11` are both times.
    let shape: Vec<_> = shape.split('#').filter(|part| part.chars().any(char::is_alphabetic)).map(str::trim).collect();
    Sha256::digest(shape.join("#")).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

#[async_trait]
impl Check for LogsCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let name = &self.config.container;
        let now = Timestamp::now();
        let since = match (cx.is_baseline(), cx.baseline_fact(ASKED).and_then(|at| at.parse::<Timestamp>().ok())) {
            (true, _) => now - jiff::SignedDuration::try_from(self.config.window.0).unwrap_or_default(),
            (false, Some(asked)) => asked,
            (false, None) => {
                return Ok(Verdict::unknown("no log was read before the run that this could be compared with")
                    .with_hint("ask the same check, by its id, before the run"));
            }
        };
        let client = self.engine.connect(cx).await?;
        let Some(container) = containers::inspect(&client, name).await? else {
            let text = format!("there is no container {name}");
            return Ok(if cx.is_baseline() {
                Verdict::pass(text).with_fact(ASKED, now.to_string())
            } else {
                Verdict::fail(text).with_hint("start it, or correct its name (`docker ps --all`)")
            });
        };
        let found = self.read(&client, id_of(&container), since).await?;
        let known = |kind: &str| cx.baseline_fact(&format!("{KIND}{kind}")).is_some();
        let new: Vec<_> = found.kinds.iter().filter(|(kind, _)| !cx.is_baseline() && !known(kind)).collect();
        let count: u64 = new.iter().map(|(_, (count, _))| count).sum();
        let errors: u64 = found.kinds.values().map(|(count, _)| count).sum();
        let quoted = |line: &str| cx.mask(line).chars().take(200).collect::<String>();
        let mut verdict = if count > self.config.max_new {
            let lines: Vec<_> = new.iter().take(3).map(|(_, (_, line))| format!("`{}`", quoted(line))).collect();
            let more = if new.len() > 3 { format!(" and {} other kinds", new.len() - 3) } else { String::new() };
            Verdict::fail(format!("container {name} logs {count} new errors: {}{more}", lines.join(", ")))
                .with_hint(format!("read them: `docker logs --since {since} {name}`; harmless ones go to `ignore`"))
        } else if cx.is_baseline() {
            Verdict::pass(format!("container {name}: {errors} errors within {} are known", self.config.window))
        } else {
            Verdict::pass(format!("container {name}: no new errors in {} lines", found.lines.saturating_sub(1)))
        };
        if cx.is_baseline() {
            verdict = verdict.with_fact(ASKED, now.to_string());
            for (kind, (count, _)) in &found.kinds {
                verdict = verdict.with_fact(format!("{KIND}{kind}"), count.to_string());
            }
        }
        Ok(verdict.with_measurement("errors", errors as f64).with_measurement("new_errors", count as f64))
    }

    fn kind(&self) -> &str {
        "docker.logs"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn needs_baseline(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_differ_in_numbers_are_of_one_kind() {
        let kind = kind_of("2026-01-02t03:04:05z error: cannot reach db-1 after 30 s");
        assert_eq!(kind, kind_of("2025-11-12t13:14:15.123z error: cannot reach db-2 after 5 s"));
        assert_ne!(kind, kind_of("2025-11-12t13:14:15.123z error: cannot read db-2 after 5 s"));
        assert_ne!(kind_of("error"), kind_of("fatal"));
    }
}
