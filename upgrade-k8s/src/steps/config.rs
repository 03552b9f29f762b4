//! `k8s.config`: changes ConfigMaps and Secrets together with the workloads that read them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use upgrade_core::context::{Context, blocking};
use upgrade_core::error::StepError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::secret::{ExposeSecret as _, SecretRef};
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;
use upgrade_core::units::Span;

use super::rollout::{Order, RolloutConfig, RolloutStep, RolloutUndo, WorkloadConfig};
use crate::error::KubeError;
use crate::object::{Object, ObjectName, digest, patch};
use crate::restoration::{Restoration, States};
use crate::server::ApiServer;
use crate::target::{Cluster, check_name};
use crate::workload::references::{Holder, read_by};
use crate::workload::{WorkloadKind, WorkloadName};

/// The annotation of pods that tells with which configuration they were started.
const STAMP: &str = "upgrade-rs.github.io/config";

/// Configures `k8s.config`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConfigStepConfig {
    /// The cluster. Default: the one that `kubectl` would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The namespace. Default: the target's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Keys of ConfigMaps, by the ConfigMap's name; null takes one away. One that is not there is made.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub config_maps: BTreeMap<String, BTreeMap<String, Option<String>>>,
    /// Files that keys of ConfigMaps take their text from, by the ConfigMap's name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub files: BTreeMap<String, BTreeMap<String, PathBuf>>,
    /// Keys of Secrets, by the Secret's name: where each value is read; null takes one away.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub secrets: BTreeMap<String, BTreeMap<String, Option<SecretRef>>>,
    /// The workloads that are rolled out with it. Default: all of the namespace that read one of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workloads: Option<Vec<WorkloadName>>,
    /// Whether their rollouts begin at once, or each when the one before is complete.
    #[serde(default)]
    pub order: Order,
    /// How long the rollouts may take, each one with `order: sequence`. Default 10 m.
    #[serde(default = "crate::steps::ten_minutes")]
    pub deadline: Span,
    /// How often a container may be started again before its rollout counts as hopeless. Default 0.
    #[serde(default)]
    pub restarts: u64,
}

/// Changes ConfigMaps and Secrets together with the workloads that read them.
#[derive(Debug, Clone)]
pub struct ConfigStep {
    config: ConfigStepConfig,
    cluster: Arc<Cluster>,
    namespace: String,
}

/// Holds what putting all of it back needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigUndo {
    /// The objects that change, or are made.
    pub objects: Vec<Restoration>,
    /// Immutable objects that another one takes the place of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub renamed: Vec<Renamed>,
    /// What the pods are marked with.
    pub stamp: String,
    /// The workloads; none where nothing reads the objects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutUndo>,
}

/// Names an immutable object, and the one that takes its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renamed {
    /// What it is.
    pub holder: Holder,
    /// Its name.
    pub from: String,
    /// The name of the other one.
    pub to: String,
}

/// Tells what is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigOutput {
    /// The names under which the objects are there now, by the names asked for.
    pub names: BTreeMap<String, String>,
    /// The workloads that were rolled out.
    pub workloads: Vec<WorkloadName>,
}

/// What is asked for one object: texts, and none for what goes.
type Texts = BTreeMap<String, Option<String>>;

impl ConfigStep {
    /// Makes the step from its configuration.
    ///
    /// # Errors
    /// There is no such target, or nothing is asked for, or a key is asked for twice.
    pub fn from_config(mut config: ConfigStepConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let cluster = Cluster::named(config.target.as_deref(), cx)?;
        let namespace = config.namespace.clone().unwrap_or_else(|| cluster.namespace().to_owned());
        check_name(&namespace, "namespace")?;
        for name in config.config_maps.keys() {
            check_name(name, "config_maps")?;
        }
        for name in config.secrets.keys() {
            check_name(name, "secrets")?;
        }
        let count = config.config_maps.values().map(BTreeMap::len).sum::<usize>()
            + config.files.values().map(BTreeMap::len).sum::<usize>()
            + config.secrets.values().map(BTreeMap::len).sum::<usize>();
        if count == 0 {
            return Err(BuildError::new("nothing changes")
                .at("config_maps")
                .with_hint("name a key: `config_maps: { shop: { MODE: new } }`"));
        }
        for (name, files) in &mut config.files {
            check_name(name, "files")?;
            for (key, path) in files {
                if config.config_maps.get(name).is_some_and(|texts| texts.contains_key(key)) {
                    return Err(BuildError::new(format!("{key} of {name} has a text and a file"))
                        .at(format!("files.{name}.{key}"))
                        .with_hint("leave one of them out"));
                }
                *path = cx.path(&*path);
            }
        }
        Ok(Self { config, cluster, namespace })
    }

    /// Reads what is asked for: the files, and the secrets.
    async fn asked(&self, cx: &Context) -> Result<Vec<(Holder, String, Texts)>, StepError> {
        let mut maps = self.config.config_maps.clone();
        for (name, files) in self.config.files.clone() {
            let texts = blocking(move || {
                let read = |path: &PathBuf| {
                    std::fs::read_to_string(path).map_err(|error| {
                        StepError::permanent(format!("{} cannot be read", path.display()))
                            .with_cause(&error)
                            .with_hint("correct its name in `files`; a ConfigMap's key holds text")
                    })
                };
                files.iter().map(|(key, path)| Ok((key.clone(), Some(read(path)?)))).collect::<Result<Texts, _>>()
            });
            maps.entry(name).or_default().extend(texts.await?);
        }
        let mut all: Vec<_> = maps.into_iter().map(|(name, texts)| (Holder::ConfigMap, name, texts)).collect();
        for (name, references) in &self.config.secrets {
            let mut texts = Texts::new();
            for (key, reference) in references {
                let value = match reference {
                    Some(reference) => Some(cx.secret(reference).await?.expose_secret().to_owned()),
                    None => None,
                };
                texts.insert(key.clone(), value);
            }
            all.push((Holder::Secret, name.clone(), texts));
        }
        Ok(all)
    }

    async fn plan(&self, cx: &Context) -> Result<Prepared<ConfigUndo, ConfigOutput>, StepError> {
        let server = self.cluster.connect(cx).await?;
        let (mut objects, mut renamed, mut changes) = (Vec::new(), Vec::new(), Vec::new());
        let mut touched = BTreeSet::new();
        let mut stamped = Vec::new();
        for (holder, name, texts) in self.asked(cx).await? {
            let object = ObjectName::new(holder.kind(), &self.namespace, &name);
            let present = server.get(&object).await?;
            let (object, present, states) = match present {
                Some(present) if present.at("/immutable") == &Value::Bool(true) => {
                    let Some(states) = self.replaced(&server, &object, &present, holder, &texts).await? else {
                        continue;
                    };
                    let to = text(&states.after["metadata"]["name"]);
                    renamed.push(Renamed { holder, from: name.clone(), to: to.clone() });
                    (ObjectName::new(holder.kind(), &self.namespace, &to), None, states)
                }
                Some(_) => {
                    let (present, after) = server
                        .try_change(&object, |present| Ok(patch(present, parts(present, holder, &texts))))
                        .await?;
                    let states = States::new(Some(&present), &after, &shape(&texts));
                    (object, Some(present), states)
                }
                None => {
                    let body = made(&object, holder, &texts);
                    let after = server
                        .try_create(&object, &body)
                        .await
                        .map_err(|error| no_namespace(error, &self.namespace))?;
                    (object, None, States::new(None, &after, &shape(&texts)))
                }
            };
            if states.are_equal() {
                continue;
            }
            let (effect, summary) = match &present {
                None => (Effect::Create, format!("keys {}", texts.keys().cloned().collect::<Vec<_>>().join(", "))),
                Some(_) => (Effect::Modify, states.differences().join("; ")),
            };
            changes.push(Change::new(effect, object.to_string()).with_summary(summary));
            // The same contents are the same stamp, in every namespace.
            stamped.push(json!([object.kind.kind, object.name, states.after["data"]]));
            touched.insert((holder, name));
            objects.push(Restoration::record(cx, object, present.as_ref(), &states).await?);
        }
        let names = self.names(&renamed);
        if objects.is_empty() {
            let output = ConfigOutput { names, workloads: Vec::new() };
            return Ok(Prepared::unchanged(output, "they hold these values already"));
        }
        let stamp = digest(&Value::Array(stamped));
        let readers = self.readers(&server, &touched).await?;
        let mut rollout = None;
        if !readers.is_empty() {
            let step = self.rollout(readers, &stamp, &renamed)?;
            if let Prepared::Change { undo, changes: more, .. } = step.prepare(cx).await? {
                changes.extend(more);
                rollout = Some(undo);
            }
        }
        Ok(Prepared::change(ConfigUndo { objects, renamed, stamp, rollout }, changes))
    }

    /// Makes another object of an immutable one, under a name that its contents give; none where nothing
    /// changes.
    async fn replaced(
        &self,
        server: &ApiServer,
        object: &ObjectName,
        present: &Object,
        holder: Holder,
        texts: &Texts,
    ) -> Result<Option<States>, StepError> {
        let mut body = present.as_written().0;
        let unchanged = body["data"].clone();
        for (path, value) in parts(present, holder, texts) {
            body[path.trim_start_matches('/')] = value.unwrap_or(Value::Null);
        }
        let whole = server
            .try_create(&self.beside(object, "tried"), &renamed_body(&body, &self.beside(object, "tried")))
            .await?;
        let data = whole.at("/data");
        if *data == unchanged {
            return Ok(None);
        }
        let digits: String = digest(data).trim_start_matches("sha256:").chars().take(8).collect();
        let other = self.beside(object, &digits);
        let mut after = whole.as_written();
        after.0["metadata"]["name"] = json!(other.name);
        Ok(Some(States::new(None, &after, &shape(texts))))
    }

    fn beside(&self, object: &ObjectName, end: &str) -> ObjectName {
        let start: String = object.name.chars().take(240).collect();
        ObjectName::new(object.kind.clone(), &self.namespace, &format!("{}-{end}", start.trim_end_matches(['-', '.'])))
    }

    fn names(&self, renamed: &[Renamed]) -> BTreeMap<String, String> {
        let config = &self.config;
        let asked = config.config_maps.keys().chain(config.files.keys()).map(|name| (Holder::ConfigMap, name));
        let asked = asked.chain(config.secrets.keys().map(|name| (Holder::Secret, name)));
        let now = |holder: Holder, name: &String| {
            let other = renamed.iter().find(|each| each.holder == holder && each.from == *name);
            other.map_or_else(|| name.clone(), |each| each.to.clone())
        };
        asked.map(|(holder, name)| (format!("{}/{name}", holder.kind()), now(holder, name))).collect()
    }

    /// Finds the workloads that read objects.
    async fn readers(
        &self,
        server: &ApiServer,
        touched: &BTreeSet<(Holder, String)>,
    ) -> Result<Vec<WorkloadName>, StepError> {
        if let Some(named) = &self.config.workloads {
            return Ok(named.clone());
        }
        let mut readers = Vec::new();
        for kind in [WorkloadKind::Deployment, WorkloadKind::StatefulSet, WorkloadKind::DaemonSet] {
            let (all, _) = server.list(&kind.kind(), Some(&self.namespace), "", "").await?;
            let reading = all.iter().filter(|each| !read_by(each.at("/spec/template")).is_disjoint(touched));
            readers.extend(reading.map(|each| WorkloadName { kind, name: each.name().to_owned() }));
        }
        Ok(readers)
    }

    /// The step that rolls workloads out.
    fn rollout(
        &self,
        workloads: impl IntoIterator<Item = WorkloadName>,
        stamp: &str,
        renamed: &[Renamed],
    ) -> Result<RolloutStep, StepError> {
        let names: BTreeMap<_, _> =
            renamed.iter().map(|each| ((each.holder, each.from.clone()), each.to.clone())).collect();
        let of = |workload| WorkloadConfig {
            annotations: [(STAMP.to_owned(), Some(stamp.to_owned()))].into(),
            references: names.clone(),
            ..WorkloadConfig::of(workload)
        };
        let config = RolloutConfig {
            target: None,
            namespace: Some(self.namespace.clone()),
            workloads: workloads.into_iter().map(of).collect(),
            order: self.config.order,
            deadline: self.config.deadline,
            restarts: self.config.restarts,
        };
        RolloutStep::on(self.cluster.clone(), config)
            .map_err(|error| StepError::permanent(error.to_string()).with_hint("correct `workloads`"))
    }

    fn rollout_of<'a>(&self, undo: &'a ConfigUndo) -> Result<Option<(RolloutStep, &'a RolloutUndo)>, StepError> {
        let Some(rollout) = &undo.rollout else { return Ok(None) };
        let workloads = rollout.workloads.iter().map(|each| each.workload.clone());
        Ok(Some((self.rollout(workloads, &undo.stamp, &undo.renamed)?, rollout)))
    }
}

/// The parts of an object that change.
fn parts(present: &Object, holder: Holder, texts: &Texts) -> Vec<(String, Option<Value>)> {
    let mut data = present.at("/data").as_object().cloned().unwrap_or_default();
    let mut added = Map::new();
    for (key, text) in texts {
        match (text, holder) {
            (None, _) => drop(data.remove(key)),
            (Some(text), Holder::ConfigMap) => drop(data.insert(key.clone(), json!(text))),
            (Some(text), Holder::Secret) => drop(added.insert(key.clone(), json!(text))),
        }
    }
    let of = |map: Map<String, Value>| (!map.is_empty()).then_some(Value::Object(map));
    // The server keeps what is written as `stringData` in `data`, encoded.
    let mut parts = vec![("/data".to_owned(), of(data))];
    parts.extend(of(added).map(|added| ("/stringData".to_owned(), Some(added))));
    parts
}

/// An object that was not there.
fn made(object: &ObjectName, holder: Holder, texts: &Texts) -> Value {
    let data: Map<_, _> = texts.iter().filter_map(|(key, text)| Some((key.clone(), json!(text.as_ref()?)))).collect();
    let field = if holder == Holder::Secret { "stringData" } else { "data" };
    json!({ "apiVersion": "v1", "kind": object.kind.kind, field: data,
        "metadata": { "name": object.name, "namespace": object.namespace } })
}

fn renamed_body(body: &Value, object: &ObjectName) -> Value {
    let mut body = body.clone();
    body["metadata"]["name"] = json!(object.name);
    body
}

/// What of an object is asked for; the values are the server's.
fn shape(texts: &Texts) -> Value {
    let data: Map<_, _> =
        texts.iter().filter(|(_, text)| text.is_some()).map(|(key, _)| (key.clone(), Value::Null)).collect();
    json!({ "data": data })
}

fn no_namespace(error: KubeError, namespace: &str) -> StepError {
    if error.is_missing() {
        return StepError::permanent(format!("there is no namespace {namespace}"))
            .with_hint("correct `namespace`, or create it in an earlier step with k8s.apply");
    }
    error.into()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

#[async_trait]
impl Step for ConfigStep {
    const KIND: &'static str = "k8s.config";
    type Undo = ConfigUndo;
    type Output = ConfigOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<ConfigUndo, ConfigOutput>, StepError> {
        self.plan(cx).await
    }

    async fn apply(&self, cx: &Context, undo: &ConfigUndo) -> Result<ConfigOutput, StepError> {
        let server = self.cluster.connect(cx).await?;
        for each in &undo.objects {
            each.carry_out(&server, cx).await?;
        }
        let mut workloads = Vec::new();
        if let Some((step, rollout)) = self.rollout_of(undo)? {
            step.apply(cx, rollout).await?;
            workloads.extend(rollout.workloads.iter().map(|each| each.workload.clone()));
        }
        Ok(ConfigOutput { names: self.names(&undo.renamed), workloads })
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        let object = |holder: Holder, name: &String| {
            self.cluster.resource(&ObjectName::new(holder.kind(), &self.namespace, name))
        };
        let maps: BTreeSet<_> = self.config.config_maps.keys().chain(self.config.files.keys()).collect();
        let maps = maps.into_iter().map(|name| object(Holder::ConfigMap, name));
        let secrets = self.config.secrets.keys().map(|name| object(Holder::Secret, name));
        let workloads = self
            .config
            .workloads
            .iter()
            .flatten()
            .map(|each| self.cluster.resource(&ObjectName::new(each.kind.kind(), &self.namespace, &each.name)));
        maps.chain(secrets).chain(workloads).collect()
    }
}

#[async_trait]
impl Rollback for ConfigStep {
    async fn rollback(&self, cx: &Context, undo: &ConfigUndo, _: Option<&ConfigOutput>) -> Result<(), StepError> {
        let server = self.cluster.connect(cx).await?;
        // Pods that are started again read what they read before; what was made goes when nobody reads it.
        for each in undo.objects.iter().filter(|each| each.uid.is_some()) {
            each.put_back(&server, cx).await?;
        }
        if let Some((step, rollout)) = self.rollout_of(undo)? {
            step.rollback(cx, rollout, None).await?;
        }
        for each in undo.objects.iter().filter(|each| each.uid.is_none()) {
            each.put_back(&server, cx).await?;
        }
        Ok(())
    }
}
