//! What can be asked of a Job, and what cannot.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use upgrade_core::registry::BuildError;
use upgrade_core::text_or_secret::TextOrSecret;
use upgrade_core::units::Span;

use crate::target::check_name;

/// Configures `k8s.job`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JobConfig {
    /// The cluster. Default: the one that `kubectl` would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The namespace. Default: the target's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// What the Job is called; the run adds what makes the name its own.
    pub name: String,
    /// The image. Either this or `template`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// What runs, in place of the image's entrypoint.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// Its arguments, in place of the image's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Variables of its environment: texts, or references to secrets. Everybody who may read the Job sees
    /// what they hold: what the cluster has in a Secret is better named in `env_from`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, TextOrSecret>,
    /// Secrets and ConfigMaps all of whose keys become variables: `secret/db`, `configmap/shop`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env_from: Vec<EnvSource>,
    /// The service account of its pod. Default: the namespace's `default`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_account: Option<String>,
    /// A whole pod template, `metadata` and `spec`, for everything else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<Map<String, Value>>,
    /// How long it may take, its retries included. Default 10 m.
    #[serde(default = "crate::steps::ten_minutes")]
    pub deadline: Span,
    /// How often the cluster starts another pod after one has failed. Default 0: a migration is not repeated
    /// by itself.
    #[serde(default)]
    pub retries: u32,
    /// The Job that undoes it. Must cope with one that did all, part or nothing, and with being run twice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undo: Option<UndoJobConfig>,
}

/// Configures the Job that undoes another one; what it leaves out is as in that, but for the command.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct UndoJobConfig {
    /// The image. Default: the step's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// What runs, in place of the image's entrypoint.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// Its arguments, in place of the image's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Variables of its environment. Default: the step's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub env: Option<BTreeMap<String, TextOrSecret>>,
    /// Secrets and ConfigMaps all of whose keys become variables. Default: the step's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub env_from: Option<Vec<EnvSource>>,
    /// The service account of its pod. Default: the step's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_account: Option<String>,
    /// A whole pod template, `metadata` and `spec`, in place of all of these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<Map<String, Value>>,
    /// How long it may take, its retries included. Default: the step's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Span>,
    /// How often the cluster starts another pod after one has failed. Default: the step's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retries: Option<u32>,
}

/// Names a Secret or a ConfigMap all of whose keys become variables: `secret/db`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum EnvSource {
    /// A Secret.
    Secret(String),
    /// A ConfigMap.
    ConfigMap(String),
}

impl FromStr for EnvSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` names no source of variables: write secret/NAME or configmap/NAME");
        let (kind, name) = text.split_once('/').ok_or_else(wrong)?;
        check_name(name, "env_from").map_err(|_| wrong())?;
        match kind.to_ascii_lowercase().as_str() {
            "secret" | "secrets" => Ok(Self::Secret(name.to_owned())),
            "configmap" | "configmaps" | "cm" => Ok(Self::ConfigMap(name.to_owned())),
            _ => Err(wrong()),
        }
    }
}

impl TryFrom<String> for EnvSource {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<EnvSource> for String {
    fn from(source: EnvSource) -> Self {
        source.to_string()
    }
}

impl fmt::Display for EnvSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Secret(name) => write!(f, "secret/{name}"),
            Self::ConfigMap(name) => write!(f, "configmap/{name}"),
        }
    }
}

impl JsonSchema for EnvSource {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "EnvSource".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "description": "A Secret or a ConfigMap, as kubectl names it: `secret/db`, `configmap/shop`.",
            "pattern": "^[A-Za-z]+/[^/]+$",
        })
    }
}

/// Holds what one Job runs, nothing left out.
#[derive(Debug, Clone)]
pub(in crate::steps) struct Work {
    pub(super) pod: Pod,
    pub(super) deadline: Span,
    pub(super) retries: u32,
    /// The node that it is run on, and is the master of; none where the scheduler chooses one.
    pub(super) node: Option<String>,
}

/// Says what runs in the pod.
#[derive(Debug, Clone)]
pub(super) enum Pod {
    /// One container.
    Container {
        image: String,
        command: Vec<String>,
        args: Vec<String>,
        env: BTreeMap<String, TextOrSecret>,
        env_from: Vec<EnvSource>,
        service_account: Option<String>,
    },
    /// A pod template as it was written.
    Template(Map<String, Value>),
}

impl Work {
    /// Says on which node it is run.
    pub(in crate::steps) fn on(mut self, node: &str) -> Self {
        self.node = Some(node.to_owned());
        self
    }

    /// Says in one line what runs, without what variables hold.
    pub(in crate::steps) fn line(&self) -> String {
        super::manifest::line(&self.pod)
    }
}

impl JobConfig {
    /// Says what runs.
    ///
    /// # Errors
    /// Keys are missing or contradict each other.
    pub(in crate::steps) fn work(&self) -> Result<Work, BuildError> {
        let pod = match (&self.image, &self.template) {
            (None, None) => {
                return Err(BuildError::new("it does not say what runs")
                    .at("image")
                    .with_hint("name an `image` with its `command`, or write a whole pod `template`"));
            }
            (_, Some(template)) => {
                let others = [
                    ("image", self.image.is_some()),
                    ("command", !self.command.is_empty()),
                    ("args", !self.args.is_empty()),
                    ("env", !self.env.is_empty()),
                    ("env_from", !self.env_from.is_empty()),
                    ("service_account", self.service_account.is_some()),
                ];
                checked_template("", template, &others)?
            }
            (Some(image), None) => Pod::Container {
                image: image.clone(),
                command: self.command.clone(),
                args: self.args.clone(),
                env: self.env.clone(),
                env_from: self.env_from.clone(),
                service_account: self.service_account.clone(),
            },
        };
        check("", &pod, self.deadline)?;
        Ok(Work { pod, deadline: self.deadline, retries: self.retries, node: None })
    }

    /// Says what is run to undo it, if anything is.
    ///
    /// # Errors
    /// Keys are missing or contradict each other.
    pub(in crate::steps) fn undo_work(&self) -> Result<Option<Work>, BuildError> {
        let Some(undo) = &self.undo else { return Ok(None) };
        let pod = match (&undo.template, undo.image.as_ref().or(self.image.as_ref())) {
            (Some(template), _) => {
                let others = [
                    ("image", undo.image.is_some()),
                    ("command", !undo.command.is_empty()),
                    ("args", !undo.args.is_empty()),
                    ("env", undo.env.is_some()),
                    ("env_from", undo.env_from.is_some()),
                    ("service_account", undo.service_account.is_some()),
                ];
                checked_template("undo.", template, &others)?
            }
            (None, None) => {
                return Err(BuildError::new("it does not say what runs")
                    .at("undo.image")
                    .with_hint("name an `image` with its `command`, or write a whole pod `template`"));
            }
            (None, Some(image)) => {
                if undo.image.is_none() && undo.command.is_empty() && undo.args.is_empty() {
                    return Err(BuildError::new("it would run what it undoes")
                        .at("undo.command")
                        .with_hint("write `command: [program, argument]`, or `args`"));
                }
                Pod::Container {
                    image: image.clone(),
                    command: undo.command.clone(),
                    args: undo.args.clone(),
                    env: undo.env.clone().unwrap_or_else(|| self.env.clone()),
                    env_from: undo.env_from.clone().unwrap_or_else(|| self.env_from.clone()),
                    service_account: undo.service_account.clone().or_else(|| self.service_account.clone()),
                }
            }
        };
        let deadline = undo.deadline.unwrap_or(self.deadline);
        check("undo.", &pod, deadline)?;
        Ok(Some(Work { pod, deadline, retries: undo.retries.unwrap_or(self.retries), node: None }))
    }
}

fn checked_template(at: &str, template: &Map<String, Value>, others: &[(&str, bool)]) -> Result<Pod, BuildError> {
    if let Some((key, _)) = others.iter().find(|(_, given)| *given) {
        return Err(BuildError::new("a `template` says all of the pod itself")
            .at(format!("{at}{key}"))
            .with_hint("write it into the template, or drop the template"));
    }
    let key = format!("{at}template");
    let containers = template.get("spec").and_then(|spec| spec.get("containers")).and_then(Value::as_array);
    if containers.is_none_or(Vec::is_empty) {
        return Err(BuildError::new("it is no pod template: it has no `spec.containers`")
            .at(key)
            .with_hint("write `template: { spec: { containers: [{ name: migrate, image: \"shop/web:2\" }] } }`"));
    }
    if template["spec"].get("restartPolicy").is_some_and(|policy| policy != "Never") {
        return Err(BuildError::new("a container that is started again on its node would run twice unseen")
            .at(key)
            .with_hint("drop `restartPolicy`: it is Never; `retries` says how often the cluster tries again"));
    }
    Ok(Pod::Template(template.clone()))
}

fn check(at: &str, pod: &Pod, deadline: Span) -> Result<(), BuildError> {
    if deadline.0.is_zero() {
        return Err(BuildError::new("it would have no time at all").at(format!("{at}deadline")));
    }
    let Pod::Container { image, env, service_account, .. } = pod else { return Ok(()) };
    if image.trim().is_empty() {
        return Err(BuildError::new("there is no image").at(format!("{at}image")));
    }
    if let Some(name) = env.keys().find(|name| name.is_empty() || name.contains(['=', '\0'])) {
        let message = format!("`{}` is not the name of a variable", name.escape_debug());
        return Err(BuildError::new(message).at(format!("{at}env")));
    }
    service_account.as_ref().map_or(Ok(()), |name| check_name(name, &format!("{at}service_account")))
}
