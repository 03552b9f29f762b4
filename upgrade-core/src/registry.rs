//! The kinds of steps, checks and targets that a pipeline file can name.

use std::any::Any;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use semver::Version;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::check::Check;
use crate::erased::AnyStep;
use crate::file::nearest;
use crate::target::Target;
use crate::tunnel::Tunnel;

/// Says why a kind cannot be made from its configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct BuildError {
    /// What is wrong.
    pub message: String,
    /// The key of the configuration that is wrong, if it is one: `archive`, `rules.0.path`.
    pub key: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
}

impl BuildError {
    /// Makes an error about the configuration as a whole.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), key: None, hint: None }
    }

    /// Names the key that is wrong.
    #[must_use]
    pub fn at(mut self, key: impl Into<String>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Adds the line that tells what to do.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// Holds a target that a pipeline file names, in the adapter's own type as well.
#[derive(Clone)]
pub struct AnyTarget {
    pub(crate) target: Arc<dyn Target>,
    pub(crate) value: Arc<dyn Any + Send + Sync>,
    pub(crate) tunnel: Option<Arc<dyn Tunnel>>,
    pub(crate) kind: String,
}

impl AnyTarget {
    /// Takes a target of an adapter.
    pub fn new<T: Target>(kind: impl Into<String>, target: T) -> Self {
        let target = Arc::new(target);
        Self { target: target.clone(), value: target, tunnel: None, kind: kind.into() }
    }

    /// Takes a target of an adapter through which others are reached.
    pub fn tunnel<T: Target + Tunnel>(kind: impl Into<String>, target: T) -> Self {
        let target = Arc::new(target);
        Self { target: target.clone(), value: target.clone(), tunnel: Some(target), kind: kind.into() }
    }
}

/// Tells a factory what stands around the configuration that it is given.
#[derive(Clone, Default)]
pub struct BuildContext {
    pub(crate) base_dir: PathBuf,
    pub(crate) environment: Option<String>,
    pub(crate) to: Option<Version>,
    pub(crate) targets: BTreeMap<String, AnyTarget>,
    checks: Arc<BTreeMap<String, Kind<Arc<dyn Check>>>>,
}

impl BuildContext {
    /// Makes a context in which relative paths start from `base_dir`.
    pub fn new(base_dir: impl Into<PathBuf>) -> Self {
        Self { base_dir: base_dir.into(), ..Self::default() }
    }

    /// Returns the directory that relative paths start from.
    pub fn base_dir(&self) -> &Path {
        &self.base_dir
    }

    /// Makes a path of the configuration absolute.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.base_dir.join(path)
    }

    /// Returns the environment, if the pipeline names one.
    pub fn environment(&self) -> Option<&str> {
        self.environment.as_deref()
    }

    /// Returns the version that the pipeline leads to, if it names one.
    pub fn to(&self) -> Option<&Version> {
        self.to.as_ref()
    }

    /// Adds a target under the name that steps and checks know it by.
    #[must_use]
    pub fn with_target(mut self, name: impl Into<String>, target: AnyTarget) -> Self {
        self.targets.insert(name.into(), target);
        self
    }

    /// Lets steps ask the checks that a registry knows; a pipeline file does so of its own.
    #[must_use]
    pub fn with_checks(mut self, registry: &Registry) -> Self {
        self.checks = Arc::new(registry.checks.clone());
        self
    }

    /// Makes a check that a step asks itself, of whatever adapter it is.
    ///
    /// # Errors
    /// The kind is unknown (key `uses`) or the configuration is wrong (keys below `with`).
    pub fn check(&self, kind: &str, with: Value) -> Result<Arc<dyn Check>, BuildError> {
        make(&self.checks, "check", kind, with, self).map_err(|error| match &error.key {
            Some(key) if key == "uses" => error,
            Some(key) => {
                let key = format!("with.{key}");
                error.at(key)
            }
            None => error.at("with"),
        })
    }

    /// Returns a target that the pipeline names, in the adapter's own type.
    ///
    /// # Errors
    /// There is no such target, or it is of another adapter.
    pub fn target<T: Target>(&self, name: &str) -> Result<Arc<T>, BuildError> {
        let found = self.named(name).map_err(|error| error.at("target"))?;
        found.value.clone().downcast::<T>().map_err(|_| {
            BuildError::new(format!("target `{name}` is of kind `{}`, which this kind cannot use", found.kind))
                .at("target")
        })
    }

    /// Returns a target that the pipeline names, as a way to reach others.
    ///
    /// # Errors
    /// There is no such target, or nothing can be reached through it.
    pub fn tunnel(&self, name: &str) -> Result<Arc<dyn Tunnel>, BuildError> {
        let found = self.named(name).map_err(|error| error.at("via"))?;
        found.tunnel.clone().ok_or_else(|| {
            BuildError::new(format!(
                "nothing can be reached through target `{name}`, which is of kind `{}`",
                found.kind
            ))
            .at("via")
        })
    }

    fn named(&self, name: &str) -> Result<&AnyTarget, BuildError> {
        self.targets.get(name).ok_or_else(|| {
            let known: Vec<_> = self.targets.keys().map(String::as_str).collect();
            let hint = if known.is_empty() {
                "name it under `targets:`".to_owned()
            } else {
                format!("the targets of this pipeline: {}", known.join(", "))
            };
            BuildError::new(no_target(name)).with_hint(hint)
        })
    }
}

/// Says that the pipeline has no such target.
pub(crate) fn no_target(name: &str) -> String {
    format!("there is no target `{name}`")
}

pub(crate) type Make<T> = Arc<dyn Fn(Value, &BuildContext) -> Result<T, MakeError> + Send + Sync>;
type MakeSchema = fn(&mut SchemaGenerator) -> Schema;

/// Says why a configuration did not become a step: its shape, or what the factory said.
#[derive(Debug)]
pub(crate) enum MakeError {
    /// The path leads to the value that is wrong, or to the one that holds a wrong key.
    Shape {
        message: String,
        path: Vec<String>,
    },
    Build(BuildError),
}

/// Reads a value of a type, and says where in it the first mistake is.
pub(crate) fn from_value<C: DeserializeOwned>(value: Value) -> Result<C, MakeError> {
    use serde_path_to_error::Segment;

    serde_path_to_error::deserialize(value).map_err(|error| MakeError::Shape {
        path: (error.path().iter())
            .filter_map(|segment| match segment {
                Segment::Seq { index } => Some(index.to_string()),
                Segment::Map { key } => Some(key.clone()),
                Segment::Enum { variant } => Some(variant.clone()),
                Segment::Unknown => None,
            })
            .collect(),
        message: error.into_inner().to_string(),
    })
}

/// Holds one kind.
#[derive(Clone)]
pub(crate) struct Kind<T> {
    pub(crate) make: Make<T>,
    pub(crate) schema: MakeSchema,
    pub(crate) about: String,
}

impl<T> Kind<T> {
    fn new<C, F>(about: &str, factory: F) -> Self
    where
        C: DeserializeOwned + JsonSchema + 'static,
        F: Fn(C, &BuildContext) -> Result<T, BuildError> + Send + Sync + 'static,
    {
        Self {
            make: Arc::new(move |value, cx| {
                let config = from_value(value)?;
                factory(config, cx).map_err(MakeError::Build)
            }),
            schema: |generator| generator.subschema_for::<C>(),
            about: about.to_owned(),
        }
    }
}

/// Knows the kinds that a pipeline file can name.
///
/// An adapter registers its own with one call (`upgrade_host::register(&mut registry)`), and so
/// does a program for kinds of its own.
#[derive(Clone, Default)]
pub struct Registry {
    pub(crate) steps: BTreeMap<String, Kind<AnyStep>>,
    pub(crate) checks: BTreeMap<String, Kind<Arc<dyn Check>>>,
    pub(crate) targets: BTreeMap<String, Kind<AnyTarget>>,
}

impl Registry {
    /// Makes a registry that knows no kind.
    pub fn new() -> Self {
        Self::default()
    }

    /// Registers a kind of step: its name, one line about it, and how it is made.
    ///
    /// The factory may answer with a reversible or an irreversible step, by its configuration.
    /// `C` should deny unknown fields: a mistyped key is then an error with its line. A kind
    /// that is registered again is replaced.
    pub fn step<C, F>(&mut self, kind: &str, about: &str, factory: F) -> &mut Self
    where
        C: DeserializeOwned + JsonSchema + 'static,
        F: Fn(C, &BuildContext) -> Result<AnyStep, BuildError> + Send + Sync + 'static,
    {
        self.steps.insert(kind.to_owned(), Kind::new(about, factory));
        self
    }

    /// Registers a kind of check.
    pub fn check<C, F, K>(&mut self, kind: &str, about: &str, factory: F) -> &mut Self
    where
        C: DeserializeOwned + JsonSchema + 'static,
        F: Fn(C, &BuildContext) -> Result<K, BuildError> + Send + Sync + 'static,
        K: Check,
    {
        let make =
            move |config: C, cx: &BuildContext| factory(config, cx).map(|check| Arc::new(check) as Arc<dyn Check>);
        self.checks.insert(kind.to_owned(), Kind::new(about, make));
        self
    }

    /// Registers a kind of target.
    pub fn target<C, F, T>(&mut self, kind: &str, about: &str, factory: F) -> &mut Self
    where
        C: DeserializeOwned + JsonSchema + 'static,
        F: Fn(C, &BuildContext) -> Result<T, BuildError> + Send + Sync + 'static,
        T: Target,
    {
        let name = kind.to_owned();
        let make = move |config: C, cx: &BuildContext| factory(config, cx).map(|target| AnyTarget::new(&name, target));
        self.targets.insert(kind.to_owned(), Kind::new(about, make));
        self
    }

    /// Registers a kind of target through which others are reached.
    pub fn tunnel<C, F, T>(&mut self, kind: &str, about: &str, factory: F) -> &mut Self
    where
        C: DeserializeOwned + JsonSchema + 'static,
        F: Fn(C, &BuildContext) -> Result<T, BuildError> + Send + Sync + 'static,
        T: Target + Tunnel,
    {
        let name = kind.to_owned();
        let make =
            move |config: C, cx: &BuildContext| factory(config, cx).map(|target| AnyTarget::tunnel(&name, target));
        self.targets.insert(kind.to_owned(), Kind::new(about, make));
        self
    }

    /// Lists the kinds of steps, each with its line.
    pub fn step_kinds(&self) -> impl Iterator<Item = (&str, &str)> {
        self.steps.iter().map(|(name, kind)| (name.as_str(), kind.about.as_str()))
    }

    /// Lists the kinds of checks, each with its line.
    pub fn check_kinds(&self) -> impl Iterator<Item = (&str, &str)> {
        self.checks.iter().map(|(name, kind)| (name.as_str(), kind.about.as_str()))
    }

    /// Lists the kinds of targets, each with its line.
    pub fn target_kinds(&self) -> impl Iterator<Item = (&str, &str)> {
        self.targets.iter().map(|(name, kind)| (name.as_str(), kind.about.as_str()))
    }

    /// Makes a step from its configuration, as a pipeline file would.
    ///
    /// # Errors
    /// The kind is unknown or the configuration is wrong.
    pub fn make_step(&self, kind: &str, with: Value, cx: &BuildContext) -> Result<AnyStep, BuildError> {
        make(&self.steps, "step", kind, with, cx)
    }

    /// Makes a check from its configuration, as a pipeline file would.
    ///
    /// # Errors
    /// The kind is unknown or the configuration is wrong.
    pub fn make_check(&self, kind: &str, with: Value, cx: &BuildContext) -> Result<Arc<dyn Check>, BuildError> {
        make(&self.checks, "check", kind, with, cx)
    }
}

fn make<T>(
    kinds: &BTreeMap<String, Kind<T>>,
    what: &str,
    kind: &str,
    with: Value,
    cx: &BuildContext,
) -> Result<T, BuildError> {
    let known = kinds.get(kind).ok_or_else(|| {
        let hint = nearest::help("the kinds there are", kind, kinds.keys().map(String::as_str));
        BuildError::new(format!("`{kind}` is not a kind of {what}")).at("uses").with_hint(hint)
    })?;
    (known.make)(with, cx).map_err(|error| match error {
        MakeError::Shape { message, path } if path.is_empty() => BuildError::new(message),
        MakeError::Shape { message, path } => BuildError::new(message).at(path.join(".")),
        MakeError::Build(error) => error,
    })
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use serde::Deserialize;
    use serde_json::json;

    use super::*;
    use crate::context::Context;
    use crate::error::CheckError;
    use crate::testkit::TestContext;
    use crate::verdict::{Limit, Status, Verdict};

    #[derive(Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Figure {
        value: f64,
    }

    struct FigureCheck(f64);

    #[async_trait]
    impl Check for FigureCheck {
        async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
            let limit = Limit { max_rise: Some(1.0), ..Limit::default() };
            let baseline = cx.baseline("value").map(|value| ("value".to_owned(), value));
            let verdict = Verdict::pass("measured").with_measurement("value", self.0);
            Ok(verdict.held_to(&[("value".to_owned(), limit)].into(), &baseline.into_iter().collect()))
        }
    }

    #[tokio::test]
    async fn a_step_asks_checks_of_others_and_gives_them_what_to_compare_with() {
        let mut registry = Registry::new();
        registry.check("figure", "Measures", |config: Figure, _: &BuildContext| Ok(FigureCheck(config.value)));
        let build = BuildContext::new("/").with_checks(&registry);
        let check = build.check("figure", json!({ "value": 3.0 })).expect("a check");
        let cx = TestContext::new("step").forward();
        for (baseline, status) in [(None, Status::Unknown), (Some(2.5), Status::Pass), (Some(1.0), Status::Fail)] {
            let figures = baseline.map(|value| ("value".to_owned(), value)).into_iter().collect();
            let verdict = check.check(&cx.with_baseline(figures)).await.expect("a verdict");
            assert_eq!(verdict.status, status, "{verdict:?}");
        }
        for (kind, with, key) in [
            ("figures", json!({ "value": 3.0 }), "uses"),
            ("figure", json!({ "value": "x" }), "with.value"),
            ("figure", json!({ "valu": 3.0 }), "with.valu"),
        ] {
            let error = build.check(kind, with).err().expect("an error");
            assert_eq!(error.key.as_deref(), Some(key), "{error}");
            assert!(kind == "figure" || error.hint.is_some_and(|hint| hint.contains("did you mean `figure`?")));
        }
    }
}
