//! `k8s.apply`: brings objects to what manifests say, by server-side apply.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::context::{Context, OnConflict, blocking};
use upgrade_core::error::{Class, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::sealed::SealedRef;
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;
use upgrade_core::units::Span;

use crate::error::{KubeError, not_cancelled};
use crate::kept::{keep, kept};
use crate::manifest::Manifest;
use crate::naming::put_marker;
use crate::object::{Object, ObjectName};
use crate::restoration::{At, Restoration, States};
use crate::server::ApiServer;
use crate::target::{Cluster, check_name};
use crate::workload::progress::{Patience, Rollouts};
use crate::workload::status::{self, Rollout};
use crate::workload::{WorkloadKind, WorkloadName};

/// Configures `k8s.apply`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ApplyConfig {
    /// The cluster. Default: the one that `kubectl` would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The namespace of what names none. Default: the target's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Files of YAML or JSON; of a directory, all that end in `.yaml`, `.yml` or `.json`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub manifests: Vec<PathBuf>,
    /// Objects written down in the pipeline itself; after those of files.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub objects: Vec<Value>,
    /// Whether fields are taken over that another field manager applies. Default: false, they are a conflict.
    #[serde(default)]
    pub force: bool,
    /// How long the rollouts of workloads among them may take. Default 10 m.
    #[serde(default = "crate::steps::ten_minutes")]
    pub deadline: Span,
    /// How often a container may be started again before its rollout counts as hopeless. Default 0.
    #[serde(default)]
    pub restarts: u64,
}

/// Brings objects to what manifests say.
#[derive(Debug, Clone)]
pub struct Apply {
    config: ApplyConfig,
    cluster: Arc<Cluster>,
    namespace: String,
}

/// Holds what putting the objects back needs, in the order in which they are applied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApplyUndo {
    /// Each object that changes.
    pub objects: Vec<AppliedObject>,
}

/// Holds one object of an [`ApplyUndo`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppliedObject {
    /// What putting it back needs.
    #[serde(flatten)]
    pub restoration: Restoration,
    /// The manifest, sealed: a file may be another one when a run is resumed.
    pub manifest: SealedRef,
    /// Tells whether it is a workload whose rollout was complete.
    #[serde(default)]
    pub was_complete: bool,
}

/// Tells what became of the objects.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApplyOutput {
    /// What was not there before.
    pub created: Vec<String>,
    /// What was changed.
    pub changed: Vec<String>,
}

impl Apply {
    /// Makes the step from its configuration.
    ///
    /// # Errors
    /// There is no such target, or nothing to apply.
    pub fn from_config(mut config: ApplyConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let cluster = Cluster::named(config.target.as_deref(), cx)?;
        let namespace = config.namespace.clone().unwrap_or_else(|| cluster.namespace().to_owned());
        check_name(&namespace, "namespace")?;
        if config.manifests.is_empty() && config.objects.is_empty() {
            return Err(BuildError::new("there is nothing to apply")
                .at("manifests")
                .with_hint("name files or directories: `manifests: [k8s/]`"));
        }
        for (at, object) in config.objects.iter().enumerate() {
            Manifest::of(object.clone(), "it".into()).map_err(|error| {
                BuildError::new(error.message()).at(format!("objects.{at}")).with_hint(error.hint().unwrap_or_default())
            })?;
        }
        config.manifests = config.manifests.iter().map(|path| cx.path(path)).collect();
        Ok(Self { config, cluster, namespace })
    }

    async fn manifests(&self) -> Result<Vec<Manifest>, StepError> {
        let paths = self.config.manifests.clone();
        let mut all = blocking(move || Manifest::read(&paths)).await?;
        for (at, object) in self.config.objects.iter().enumerate() {
            all.push(Manifest::of(object.clone(), format!("objects.{at}"))?);
        }
        // What others live in comes first; the order is theirs otherwise.
        all.sort_by_key(|each| match each.object.text("/kind") {
            "Namespace" => 0,
            "CustomResourceDefinition" => 1,
            _ => 2,
        });
        Ok(all)
    }

    async fn plan(&self, cx: &Context) -> Result<Prepared<ApplyUndo, ApplyOutput>, StepError> {
        let server = self.cluster.connect(cx).await?;
        let (mut objects, mut changes) = (Vec::<AppliedObject>::new(), Vec::new());
        let mut namespaces = Vec::new();
        for manifest in self.manifests().await? {
            let name = match manifest.name(&server, &self.namespace).await {
                Err(error) if cx.is_dry_run() && error.class() == Class::Permanent => {
                    changes.push(later(&manifest, error.message()));
                    continue;
                }
                name => name?,
            };
            if objects.iter().any(|each| each.restoration.object == name) {
                return Err(StepError::permanent(format!("{}: {name} is there twice", manifest.origin))
                    .with_hint("leave one of them out"));
            }
            if name.kind.kind == "Namespace" {
                namespaces.push(name.name.clone());
            }
            let mut body = body(&manifest.object, &name);
            let present = server.get(&name).await?;
            if present.is_none() {
                // By which it is told from one that somebody else makes meanwhile.
                put_marker(&mut body, cx);
            }
            // Where its namespace is yet to be made, nobody can be asked what would become of it.
            let is_later = present.is_none() && name.namespace.as_ref().is_some_and(|own| namespaces.contains(own));
            let tried = async {
                if is_later {
                    Ok(Object(body.clone()))
                } else {
                    server.apply(&name, &body, self.takes_over(cx), true).await
                }
            };
            let after = match tried.await {
                Err(error) if cx.is_dry_run() && error.is_missing() => {
                    changes.push(later(&manifest, "its namespace is not there yet"));
                    continue;
                }
                after => after.map_err(|error| refused(error, &name))?,
            };
            let states = States::new(present.as_ref(), &after, &body);
            if states.are_equal() {
                continue;
            }
            let (effect, summary) = match present {
                None => (Effect::Create, format!("of {}", manifest.origin)),
                Some(_) => (Effect::Modify, states.differences().join("; ")),
            };
            changes.push(Change::new(effect, name.to_string()).with_summary(summary));
            let was_complete = workload(&name).is_some_and(|(workload, _)| {
                present.as_ref().is_some_and(|object| status::of(workload.kind, object) == Rollout::Complete)
            });
            let sealed = keep(cx, &body).await?;
            let restoration = Restoration::record(cx, name, present.as_ref(), &states).await?;
            objects.push(AppliedObject { restoration, manifest: sealed, was_complete });
        }
        if objects.is_empty() {
            let output = ApplyOutput { created: Vec::new(), changed: Vec::new() };
            return Ok(Prepared::unchanged(output, "the objects are as the manifests say"));
        }
        Ok(Prepared::change(ApplyUndo { objects }, changes))
    }

    /// Tells whether fields of another manager are taken over.
    fn takes_over(&self, cx: &Context) -> bool {
        self.config.force || cx.on_conflict() == OnConflict::Overwrite
    }

    async fn forward(&self, cx: &Context, undo: &ApplyUndo) -> Result<ApplyOutput, StepError> {
        let server = self.cluster.connect(cx).await?;
        let mut output = ApplyOutput { created: Vec::new(), changed: Vec::new() };
        let total = undo.objects.len() as u64;
        for (done, each) in undo.objects.iter().enumerate() {
            let name = &each.restoration.object;
            cx.progress(done as u64, total, name.to_string());
            let states = each.restoration.states(cx).await?;
            let (_, at) = each.restoration.look(&server, cx, &states).await?;
            if at != At::Intended {
                let body: Value = kept(cx, &each.manifest, name).await?;
                not_cancelled(cx)?;
                server.apply(name, &body, self.takes_over(cx), false).await?;
            }
            let list = if each.restoration.uid.is_some() { &mut output.changed } else { &mut output.created };
            list.push(name.to_string());
        }
        self.follow(&server, undo.objects.iter()).await?;
        Ok(output)
    }

    async fn back(&self, cx: &Context, undo: &ApplyUndo) -> Result<(), StepError> {
        let server = self.cluster.connect(cx).await?;
        for each in undo.objects.iter().rev() {
            each.restoration.put_back(&server, cx).await?;
        }
        self.follow(&server, undo.objects.iter().filter(|each| each.was_complete)).await
    }

    /// Waits for the rollouts of the workloads among objects.
    async fn follow(&self, server: &ApiServer, objects: impl Iterator<Item = &AppliedObject>) -> Result<(), StepError> {
        let mut by_namespace: BTreeMap<String, BTreeMap<WorkloadName, String>> = BTreeMap::new();
        for each in objects {
            let Some((workload, namespace)) = workload(&each.restoration.object) else { continue };
            let object = server.require(&each.restoration.object).await?;
            by_namespace.entry(namespace).or_default().insert(workload, object.uid().to_owned());
        }
        let patience = Patience { deadline: self.config.deadline.0, restarts: self.config.restarts };
        for (namespace, awaited) in by_namespace {
            Rollouts::of(server, &namespace, awaited, "").complete(patience).await?;
        }
        Ok(())
    }
}

/// Says who else applies a field, where that is what a server refuses.
fn refused(error: KubeError, name: &ObjectName) -> StepError {
    match error.answer() {
        Some(answer) if error.is_in_conflict() => {
            StepError::permanent(format!("{name}: {}", answer.message.replace('\n', " ")))
                .with_hint("change it where that manager has it from, or say `force: true`")
        }
        _ => error.into(),
    }
}

/// Plans an object that an earlier step of the same run must first make room for.
fn later(manifest: &Manifest, why: &str) -> Change {
    let subject = format!("{} {}", manifest.object.text("/kind").to_lowercase(), manifest.object.name());
    Change::new(Effect::Create, subject).with_summary(format!("{why}: an earlier step must bring it"))
}

/// The object as it is applied: in its namespace, without what the server sets.
fn body(object: &Object, name: &ObjectName) -> Value {
    let mut body = object.as_written().0;
    if let (Some(namespace), Some(metadata)) = (&name.namespace, body["metadata"].as_object_mut()) {
        metadata.insert("namespace".into(), namespace.clone().into());
    }
    body
}

/// Names the workload that an object is, and its namespace.
fn workload(name: &ObjectName) -> Option<(WorkloadName, String)> {
    let kinds = [WorkloadKind::Deployment, WorkloadKind::StatefulSet, WorkloadKind::DaemonSet];
    let kind = kinds.into_iter().find(|kind| kind.kind() == name.kind)?;
    Some((WorkloadName { kind, name: name.name.clone() }, name.namespace.clone()?))
}

#[async_trait]
impl Step for Apply {
    const KIND: &'static str = "k8s.apply";
    type Undo = ApplyUndo;
    type Output = ApplyOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<ApplyUndo, ApplyOutput>, StepError> {
        self.plan(cx).await
    }

    async fn apply(&self, cx: &Context, undo: &ApplyUndo) -> Result<ApplyOutput, StepError> {
        self.forward(cx, undo).await
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![self.cluster.part("objects", &self.namespace)]
    }
}

#[async_trait]
impl Rollback for Apply {
    async fn rollback(&self, cx: &Context, undo: &ApplyUndo, _: Option<&ApplyOutput>) -> Result<(), StepError> {
        self.back(cx, undo).await
    }
}
