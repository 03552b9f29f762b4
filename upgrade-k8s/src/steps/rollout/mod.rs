//! `k8s.rollout`: brings Deployments, StatefulSets and DaemonSets to other images or settings, as one unit.

mod drive;
mod plan;

pub(super) use plan::images_of;

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::sealed::SealedRef;
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::target::Target;
use upgrade_core::units::Span;

use crate::object::{Object, ObjectName};
use crate::server::ApiServer;
use crate::target::{Cluster, check_name};
use crate::workload::references::References;
use crate::workload::revision;
use crate::workload::template::TemplateChanges;
use crate::workload::{WorkloadKind, WorkloadName};

/// Configures `k8s.rollout`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RolloutConfig {
    /// The cluster. Default: the one that `kubectl` would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The namespace. Default: the target's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// What is rolled out.
    pub workloads: Vec<WorkloadConfig>,
    /// Whether all begin at once, or each when the one before is complete.
    #[serde(default)]
    pub order: Order,
    /// How long the rollouts may take, each one with `order: sequence`. Default 10 m.
    #[serde(default = "crate::steps::ten_minutes")]
    pub deadline: Span,
    /// How often a container may be started again before its rollout counts as hopeless. Default 0.
    #[serde(default)]
    pub restarts: u64,
}

/// Says in what order workloads are rolled out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// All at once.
    #[default]
    SideBySide,
    /// Each when the one before is complete; undone the other way round.
    Sequence,
}

/// Says what changes in one workload.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WorkloadConfig {
    /// The workload: `deployment/web`, `statefulset/db`, `daemonset/agent`.
    pub workload: WorkloadName,
    /// How many pods there shall be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u32>,
    /// The revision whose template it goes back to, before anything else changes in it: its number in
    /// `kubectl rollout history`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<u64>,
    /// New images, by container; `*` means every container that has no line of its own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub images: BTreeMap<String, String>,
    /// Environment variables, by container, then by name; null takes one away. What a variable holds is seen
    /// by everybody who may read the workload: secrets belong into a Secret.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, BTreeMap<String, Option<String>>>,
    /// Annotations of the pods; null takes one away.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, Option<String>>,
    /// ConfigMaps and Secrets that are read under another name; `k8s.config` asks for it.
    #[serde(skip)]
    #[schemars(skip)]
    pub(crate) references: References,
}

impl WorkloadConfig {
    /// Names a workload in which nothing changes yet.
    pub fn of(workload: WorkloadName) -> Self {
        Self {
            workload,
            replicas: None,
            revision: None,
            images: BTreeMap::new(),
            env: BTreeMap::new(),
            annotations: BTreeMap::new(),
            references: References::new(),
        }
    }

    /// Returns what changes in its pods.
    pub(crate) fn template(&self) -> TemplateChanges {
        let Self { images, env, annotations, references, .. } = self.clone();
        TemplateChanges { images, env, annotations, references }
    }
}

/// Brings workloads to other images or settings, as one unit.
#[derive(Debug, Clone)]
pub struct RolloutStep {
    config: RolloutConfig,
    cluster: Arc<Cluster>,
    namespace: String,
}

/// Holds what putting the workloads back needs, in the order of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RolloutUndo {
    /// The namespace.
    pub namespace: String,
    /// Each workload that changes.
    pub workloads: Vec<WorkloadUndo>,
}

/// Holds what putting one workload back needs; its template, which may hold secrets, is sealed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadUndo {
    /// The workload.
    pub workload: WorkloadName,
    /// What tells it from another of that name.
    pub uid: String,
    /// What was found.
    pub found: State,
    /// What is intended.
    pub intended: State,
    /// The template that was found.
    pub template: SealedRef,
    /// Tells whether the rollout of what was found was complete.
    pub was_complete: bool,
}

/// Tells one state of a workload from another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The digest of its pod template.
    pub template: String,
    /// How many pods there are to be; none where the step does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u64>,
}

/// Tells what runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RolloutOutput {
    /// The images of each workload's containers.
    pub images: BTreeMap<String, BTreeMap<String, String>>,
}

impl RolloutStep {
    /// Makes the step from its configuration.
    ///
    /// # Errors
    /// There is no such target, or nothing is asked for.
    pub fn from_config(config: RolloutConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let cluster = Cluster::named(config.target.as_deref(), cx)?;
        Self::on(cluster, config)
    }

    /// Makes the step on a cluster.
    ///
    /// # Errors
    /// Nothing is asked for.
    pub(crate) fn on(cluster: Arc<Cluster>, config: RolloutConfig) -> Result<Self, BuildError> {
        let namespace = config.namespace.clone().unwrap_or_else(|| cluster.namespace().to_owned());
        check_name(&namespace, "namespace")?;
        if config.workloads.is_empty() {
            return Err(BuildError::new("there is nothing to roll out")
                .at("workloads")
                .with_hint("name one: `workloads: [{ workload: deployment/web, images: { web: \"web:2\" } }]`"));
        }
        for (at, each) in config.workloads.iter().enumerate() {
            if each.template().is_empty() && each.replicas.is_none() && each.revision.is_none() {
                return Err(BuildError::new(format!("nothing changes in {}", each.workload))
                    .at(format!("workloads.{at}"))
                    .with_hint("say what: `images`, `env`, `annotations`, `replicas`, `revision`"));
            }
            if config.workloads[..at].iter().any(|before| before.workload == each.workload) {
                return Err(BuildError::new(format!("{} is named twice", each.workload)).at(format!("workloads.{at}")));
            }
            if each.workload.kind == WorkloadKind::ReplicaSet {
                return Err(BuildError::new("a ReplicaSet does not replace its pods: nothing would be rolled out")
                    .at(format!("workloads.{at}.workload"))
                    .with_hint("name the Deployment that owns it"));
            }
            if each.replicas.is_some() && each.workload.kind == WorkloadKind::DaemonSet {
                return Err(BuildError::new("a DaemonSet has a pod on each node, not a number of them")
                    .at(format!("workloads.{at}.replicas")));
            }
        }
        Ok(Self { config, cluster, namespace })
    }

    /// Returns the template that the changes are made in, where it is not the present one.
    async fn base(
        &self,
        server: &ApiServer,
        each: &WorkloadConfig,
        present: &Object,
    ) -> Result<Option<Value>, StepError> {
        match each.revision {
            Some(number) => revision::template(server, &each.workload, present, number).await.map(Some),
            None => Ok(None),
        }
    }

    fn object(&self, workload: &WorkloadName) -> ObjectName {
        ObjectName::new(workload.kind.kind(), &self.namespace, &workload.name)
    }
}

#[async_trait]
impl Step for RolloutStep {
    const KIND: &'static str = "k8s.rollout";
    type Undo = RolloutUndo;
    type Output = RolloutOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<RolloutUndo, RolloutOutput>, StepError> {
        self.plan(cx).await
    }

    async fn apply(&self, cx: &Context, undo: &RolloutUndo) -> Result<RolloutOutput, StepError> {
        self.forward(cx, undo).await
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        self.config.workloads.iter().map(|each| self.cluster.resource(&self.object(&each.workload))).collect()
    }
}

#[async_trait]
impl Rollback for RolloutStep {
    async fn rollback(&self, cx: &Context, undo: &RolloutUndo, _: Option<&RolloutOutput>) -> Result<(), StepError> {
        self.back(cx, undo).await
    }
}
