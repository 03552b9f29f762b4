//! What `k8s.helm` is told: the release, its chart and its values.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::secret::{ExposeSecret as _, SecretRef};
use upgrade_core::units::Span;

/// The fewest revisions that may be kept: an upgrade that is broken off, undone and repeated makes three.
const FEWEST: u32 = 5;

/// Configures `k8s.helm`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HelmConfig {
    /// The cluster. Default: the one that `kubectl` would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The namespace of the release. Default: the target's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// The name of the release.
    pub release: String,
    /// The chart: a directory or an archive, `repository/name`, or `oci://registry/name`.
    pub chart: String,
    /// The version of the chart; must be given unless it is a file or a directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chart_version: Option<String>,
    /// Files of values; what a later one says counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<PathBuf>,
    /// Values written down here; they count more than those of files.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub set: Map<String, Value>,
    /// Values that are secrets, by their place: `database.password: { env: DB_PASSWORD }`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub secrets: BTreeMap<String, SecretRef>,
    /// Whether values that the release was given before count where these say nothing. Default: false.
    #[serde(default)]
    pub reuse_values: bool,
    /// Whether a release that is not there is installed. Default: false, it must be there.
    #[serde(default)]
    pub install: bool,
    /// How long the release may take to be ready, each way. Default 10 m.
    #[serde(default = "crate::steps::ten_minutes")]
    pub deadline: Span,
    /// How many revisions Helm keeps; 0 for all, else at least 5. Default 10.
    #[serde(default = "ten")]
    pub history_max: u32,
    /// The program, 3.7 or later. Default: `helm`, looked for in `PATH`.
    #[serde(default = "helm")]
    pub program: String,
}

fn ten() -> u32 {
    10
}

fn helm() -> String {
    "helm".to_owned()
}

impl HelmConfig {
    /// Checks the keys, and makes paths absolute.
    pub(super) fn check(&mut self, cx: &BuildContext) -> Result<(), BuildError> {
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
        let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        let release = &self.release;
        if release.len() > 53 || !release.chars().all(fits) || !ends(release.chars().next()) {
            return Err(BuildError::new(format!("`{}` cannot be the name of a release", release.escape_debug()))
                .at("release")
                .with_hint("lower-case letters, digits, `-` and `.`, at most 53, a letter or digit first: `shop`"));
        }
        if self.chart.is_empty() || self.chart.starts_with('-') || self.chart.contains('\0') {
            return Err(BuildError::new("there is no chart")
                .at("chart")
                .with_hint("a directory, an archive, `repository/name` or `oci://registry/name`"));
        }
        if !is_remote(&self.chart) {
            let path = cx.path(&self.chart);
            let is_path = path.exists() || self.chart.starts_with(['.', '/']) || !self.chart.contains('/');
            if is_path {
                self.chart = path.display().to_string();
            }
        }
        if self.chart_path().is_none() && self.chart_version.is_none() {
            return Err(BuildError::new(format!("no version of {} is named", self.chart))
                .at("chart_version")
                .with_hint("name one: the newest may be another one when a run is resumed"));
        }
        if (1..FEWEST).contains(&self.history_max) {
            return Err(BuildError::new(format!("{} revisions are too few to go back", self.history_max))
                .at("history_max")
                .with_hint(format!("0 for all, or at least {FEWEST}")));
        }
        if self.program.is_empty() {
            return Err(BuildError::new("the program has no name").at("program").with_hint("drop it for `helm`"));
        }
        for place in self.secrets.keys() {
            put(&mut self.set.clone(), place, Value::Null).map_err(|why| {
                BuildError::new(format!("`{place}` cannot be set: {why}"))
                    .at("secrets")
                    .with_hint("keys joined by dots, none of which `set` gives another meaning: `database.password`")
            })?;
        }
        self.values = self.values.iter().map(|path| cx.path(path)).collect();
        Ok(())
    }

    /// Returns the chart, if it is a file or a directory.
    pub(super) fn chart_path(&self) -> Option<&Path> {
        Some(Path::new(&self.chart)).filter(|path| path.is_absolute())
    }

    /// Lists the files that make the release what it is.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        let mut all = self.values.clone();
        if let Some(path) = self.chart_path() {
            add_files(path, &mut all);
        }
        all
    }

    /// Returns the values written down here, the secrets among them.
    pub(super) async fn own_values(&self, cx: &Context) -> Result<Map<String, Value>, StepError> {
        let mut values = self.set.clone();
        for (place, secret) in &self.secrets {
            let secret = cx.secret(secret).await?;
            put(&mut values, place, secret.expose_secret().into())
                .map_err(|why| StepError::permanent(format!("`{place}` cannot be set: {why}")))?;
        }
        Ok(values)
    }
}

/// Lists the files of a chart that is one file or a directory of them.
fn add_files(path: &Path, all: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(path) else {
        return all.push(path.to_owned());
    };
    let mut inside: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    inside.sort();
    for each in inside {
        // A link may lead round in a circle; Helm follows it, and what it leads to has its own place.
        if !each.is_symlink() {
            add_files(&each, all);
        }
    }
}

fn is_remote(chart: &str) -> bool {
    ["oci://", "https://", "http://"].iter().any(|scheme| chart.starts_with(scheme))
}

/// Puts a value at a place: keys joined by dots.
fn put(values: &mut Map<String, Value>, place: &str, value: Value) -> Result<(), &'static str> {
    let (key, rest) = place.split_once('.').map_or((place, None), |(key, rest)| (key, Some(rest)));
    if key.is_empty() {
        return Err("a key of it is empty");
    }
    match rest {
        None if values.contains_key(key) => Err("`set` has it too"),
        None => {
            values.insert(key.to_owned(), value);
            Ok(())
        }
        Some(rest) => match values.entry(key).or_insert_with(|| Map::new().into()) {
            Value::Object(inner) => put(inner, rest, value),
            _ => Err("what it is in is no map"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(config: &Value) -> Result<HelmConfig, BuildError> {
        let mut all = json!({ "release": "shop", "chart": "./chart" });
        all.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
        let mut config: HelmConfig = serde_json::from_value(all).unwrap();
        config.check(&BuildContext::new("/base")).map(|()| config)
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_its_key() {
        for (config, key) in [
            (json!({ "release": "Shop" }), "release"),
            (json!({ "release": "-x" }), "release"),
            (json!({ "chart": "--debug" }), "chart"),
            (json!({ "chart": "bitnami/redis" }), "chart_version"),
            (json!({ "chart": "oci://registry/shop" }), "chart_version"),
            (json!({ "history_max": 1 }), "history_max"),
            (json!({ "program": "" }), "program"),
            (json!({ "secrets": { "a..b": { "env": "X" } } }), "secrets"),
            (json!({ "set": { "a": 1 }, "secrets": { "a.b": { "env": "X" } } }), "secrets"),
        ] {
            let error = check(&config).unwrap_err();
            assert_eq!(error.key.as_deref(), Some(key), "{config}");
            assert!(error.hint.is_some(), "{config}");
        }
        assert_eq!(check(&json!({})).unwrap().chart_path(), Some(Path::new("/base/./chart")));
        let remote =
            check(&json!({ "chart": "bitnami/redis", "chart_version": "1.0.0", "values": ["v.yaml"] })).unwrap();
        assert_eq!((remote.chart_path(), &*remote.values[0]), (None, Path::new("/base/v.yaml")));
    }

    #[test]
    fn secrets_go_to_their_places() {
        let mut values = json!({ "database": { "host": "db" } }).as_object().unwrap().clone();
        put(&mut values, "database.password", "p".into()).unwrap();
        put(&mut values, "token", "t".into()).unwrap();
        assert_eq!(Value::from(values), json!({ "database": { "host": "db", "password": "p" }, "token": "t" }));
    }
}
