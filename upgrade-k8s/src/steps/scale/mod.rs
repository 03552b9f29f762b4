//! `k8s.scale`: gives Deployments, StatefulSets and ReplicaSets another number of pods, as one unit.
//!
//! What becomes of a number that is met on the way from the one found to the one intended, or back:
//!
//! ```text
//!  present ── is the goal ─────────────────────────────────▶ leave it
//!          ── is where we come from ───────────────────────▶ write the goal
//!          ── neither, an autoscaler's ── the goal is 0 ───▶ write the goal
//!          │                           └─ it is not ───────▶ leave it
//!          └─ neither, somebody's ─────────────────────────▶ conflict
//! ```

mod drive;

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::StepError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;
use upgrade_core::units::Span;

use super::rollout::Order;
use crate::object::{Object, ObjectName, patch};
use crate::server::{ApiServer, FIELD_MANAGER};
use crate::target::{Cluster, check_name};
use crate::workload::status::{self, Rollout};
use crate::workload::{WorkloadKind, WorkloadName, autoscaler, members};

/// Configures `k8s.scale`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ScaleConfig {
    /// The cluster. Default: the one that `kubectl` would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The namespace. Default: the target's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// What is scaled.
    pub workloads: Vec<ScaledWorkloadConfig>,
    /// Whether all begin at once, or each when the one before has its pods.
    #[serde(default)]
    pub order: Order,
    /// How long it may take, for each one with `order: sequence`. Default 10 m.
    #[serde(default = "crate::steps::ten_minutes")]
    pub deadline: Span,
    /// How often a container may be started again before waiting for its pod counts as hopeless. Default 0.
    #[serde(default)]
    pub restarts: u64,
    /// Scales also what a HorizontalPodAutoscaler scales. It rests while there are to be no pods, and has its
    /// own idea of any other number.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub despite_autoscaler: bool,
}

/// Says how many pods one workload shall have.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ScaledWorkloadConfig {
    /// The workload: `deployment/web`, `statefulset/db`, `replicaset/worker`.
    pub workload: WorkloadName,
    /// How many pods there shall be; 0 stops it.
    pub replicas: u32,
}

/// Gives workloads another number of pods, as one unit.
#[derive(Debug, Clone)]
pub struct Scale {
    config: ScaleConfig,
    cluster: Arc<Cluster>,
    namespace: String,
}

/// Holds what giving the workloads their pods back needs, in the order of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScaleUndo {
    /// The namespace.
    pub namespace: String,
    /// Each workload that changes.
    pub workloads: Vec<ScaledWorkload>,
}

/// Holds what giving one workload its pods back needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScaledWorkload {
    /// The workload.
    pub workload: WorkloadName,
    /// What tells it from another of that name.
    pub uid: String,
    /// How many pods there were to be.
    pub found: u32,
    /// How many there are to be.
    pub intended: u32,
    /// Tells whether there were as many as there were to be.
    pub was_complete: bool,
    /// Tells whether a HorizontalPodAutoscaler changes the number as well.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub autoscaled: bool,
}

/// Tells how many pods each workload had and has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScaleOutput {
    /// How many there were to be, by workload: what a later step gives it again.
    pub found: BTreeMap<String, u32>,
    /// How many there are to be, by workload.
    pub replicas: BTreeMap<String, u32>,
}

impl Scale {
    /// Makes the step from its configuration.
    ///
    /// # Errors
    /// There is no such target, or something is named that has no number of pods.
    pub fn from_config(config: ScaleConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let cluster = Cluster::named(config.target.as_deref(), cx)?;
        let namespace = config.namespace.clone().unwrap_or_else(|| cluster.namespace().to_owned());
        check_name(&namespace, "namespace")?;
        if config.workloads.is_empty() {
            return Err(BuildError::new("there is nothing to scale")
                .at("workloads")
                .with_hint("name one: `workloads: [{ workload: deployment/web, replicas: 0 }]`"));
        }
        for (at, each) in config.workloads.iter().enumerate() {
            if config.workloads[..at].iter().any(|before| before.workload == each.workload) {
                return Err(BuildError::new(format!("{} is named twice", each.workload)).at(format!("workloads.{at}")));
            }
            if each.workload.kind == WorkloadKind::DaemonSet {
                return Err(BuildError::new("a DaemonSet has a pod on each node, not a number of them")
                    .at(format!("workloads.{at}.workload"))
                    .with_hint("name a Deployment, a StatefulSet or a ReplicaSet"));
            }
        }
        Ok(Self { config, cluster, namespace })
    }

    fn object(&self, workload: &WorkloadName) -> ObjectName {
        ObjectName::new(workload.kind.kind(), &self.namespace, &workload.name)
    }

    /// Refuses what somebody else would scale back at once; tells whether an autoscaler scales it too.
    async fn refuse(
        &self,
        server: &ApiServer,
        cx: &Context,
        name: &WorkloadName,
        present: &Object,
    ) -> Result<bool, StepError> {
        if let Some(owner) = present.list("/metadata/ownerReferences").find(|owner| owner["controller"] == true) {
            let owner = format!(
                "{} {}",
                owner["kind"].as_str().unwrap_or_default(),
                owner["name"].as_str().unwrap_or_default()
            );
            return Err(StepError::permanent(format!("{name} belongs to {owner}, which would scale it back"))
                .with_hint(format!("scale {owner} instead")));
        }
        if cx.on_conflict() == OnConflict::Stop
            && let Some(manager) = manager_of_replicas(present)
        {
            return Err(StepError::permanent(format!(
                "{name}: {manager} applies the number of its pods, and would put it back"
            ))
            .with_hint("make the change where it comes from, or say `on_conflict: overwrite` on the step"));
        }
        match autoscaler::of(server, &self.namespace, name).await? {
            Some(scaler) if !self.config.despite_autoscaler => Err(StepError::permanent(format!(
                "{name}: the number of its pods belongs to HorizontalPodAutoscaler {scaler}"
            ))
            .with_hint(
                "change the autoscaler's limits, or say `despite_autoscaler: true`: it rests while there are 0",
            )),
            scaler => Ok(scaler.is_some()),
        }
    }
}

/// Tells who applies the number of pods again and again, as a controller does that keeps what a repository says.
fn manager_of_replicas(present: &Object) -> Option<String> {
    let applied = |each: &&Value| each["operation"] == "Apply" && each["manager"] != FIELD_MANAGER;
    let owns = |each: &&Value| each["fieldsV1"]["f:spec"].get("f:replicas").is_some();
    let found = present.list("/metadata/managedFields").filter(applied).find(owns)?;
    Some(found["manager"].as_str().unwrap_or_default().to_owned())
}

/// Returns how many pods there are to be.
fn replicas_of(object: &Object) -> u32 {
    // What is left out is one.
    object.at("/spec/replicas").as_u64().map_or(1, |replicas| u32::try_from(replicas).unwrap_or(u32::MAX))
}

#[async_trait]
impl Step for Scale {
    const KIND: &'static str = "k8s.scale";
    type Undo = ScaleUndo;
    type Output = ScaleOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<ScaleUndo, ScaleOutput>, StepError> {
        let server = self.cluster.connect(cx).await?;
        let (mut workloads, mut changes) = (Vec::new(), Vec::new());
        let mut output = ScaleOutput { found: BTreeMap::new(), replicas: BTreeMap::new() };
        for each in &self.config.workloads {
            let (name, object) = (&each.workload, self.object(&each.workload));
            let present = server.require(&object).await?;
            let autoscaled = self.refuse(&server, cx, name, &present).await?;
            // Whether the cluster would take it, and lets this user ask for it, is known before anything changes.
            let wanted = ("/spec/replicas".to_owned(), Some(each.replicas.into()));
            let (present, _) = server.try_change(&object, |present| Ok(patch(present, [wanted.clone()]))).await?;
            let found = replicas_of(&present);
            output.found.insert(name.to_string(), found);
            output.replicas.insert(name.to_string(), each.replicas);
            let mut was_complete = status::of(name.kind, &present) == Rollout::Complete;
            if was_complete && found == 0 {
                was_complete = members::pods_of(&server, name.kind, &present).await?.is_empty();
            }
            if found == each.replicas && was_complete {
                continue;
            }
            let summary = format!("replicas: {found} -> {}", each.replicas);
            changes.push(Change::new(Effect::Modify, object.to_string()).with_summary(summary));
            workloads.push(ScaledWorkload {
                workload: name.clone(),
                uid: present.uid().to_owned(),
                found,
                intended: each.replicas,
                was_complete,
                autoscaled,
            });
        }
        if workloads.is_empty() {
            return Ok(Prepared::unchanged(output, "they have as many pods already"));
        }
        Ok(Prepared::change(ScaleUndo { namespace: self.namespace.clone(), workloads }, changes))
    }

    async fn apply(&self, cx: &Context, undo: &ScaleUndo) -> Result<ScaleOutput, StepError> {
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
impl Rollback for Scale {
    async fn rollback(&self, cx: &Context, undo: &ScaleUndo, _: Option<&ScaleOutput>) -> Result<(), StepError> {
        self.back(cx, undo).await
    }
}
