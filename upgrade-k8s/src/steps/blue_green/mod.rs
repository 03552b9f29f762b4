//! `k8s.blue_green`: a second Deployment beside the first, traffic switched to it, and the first kept until commit.
//!
//! A Service follows labels, and the pods of both bear those of the application. What tells them apart is
//! the label `pod-template-hash` that every ReplicaSet gives its pods: the Service is pinned by it to one
//! side before the other one is made, and led from one to the other by a single write.
//!
//! ```text
//!            pin            make green, await, preview           switch
//!   found ────────▶ blue ─────────────────────────────▶ blue ──────────────▶ green
//!     ▲              │                                                         │
//!     │   rollback:  └◀──── switch back, remove green, unpin ◀─────────────────┤
//!     │                                                                        │
//!     └── commit: the first Deployment takes the new template, switch to it, ◀─┘
//!                 remove green, unpin
//! ```

mod drive;
mod plan;
mod selector;

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

use super::rollout::WorkloadConfig;
use crate::kind::Kind;
use crate::object::ObjectName;
use crate::target::{Cluster, check_name};
use crate::workload::{WorkloadKind, WorkloadName};

pub(super) use selector::Selector;

/// Configures `k8s.blue_green`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BlueGreenConfig {
    /// The cluster. Default: the one that `kubectl` would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The namespace. Default: the target's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// The Deployment.
    pub deployment: String,
    /// The Service that leads to its pods, and is switched.
    pub service: String,
    /// A second Service of the same pods, led to the new ones before the switch, so that they can be tried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preview: Option<String>,
    /// New images, by container; `*` means every container that has no line of its own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub images: BTreeMap<String, String>,
    /// Environment variables, by container, then by name; null takes one away.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, BTreeMap<String, Option<String>>>,
    /// Annotations of the pods; null takes one away.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, Option<String>>,
    /// How long the new pods must have been ready before the switch. Default 0 s.
    #[serde(default)]
    pub stable: Span,
    /// How long the new pods may take to become ready. Default 10 m.
    #[serde(default = "crate::steps::ten_minutes")]
    pub deadline: Span,
    /// How often a container may be started again before it counts as hopeless. Default 0.
    #[serde(default)]
    pub restarts: u64,
}

/// Brings a new Deployment beside the old one, and switches a Service to it.
#[derive(Debug, Clone)]
pub struct BlueGreen {
    config: BlueGreenConfig,
    cluster: Arc<Cluster>,
    namespace: String,
}

/// Holds what the way back, and the commit, need.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlueGreenUndo {
    /// The namespace.
    pub namespace: String,
    /// The Deployment that was found.
    pub deployment: String,
    /// What tells it from another of that name.
    pub uid: String,
    /// The digest of its pod template.
    pub found: String,
    /// The digest of the template that is intended.
    pub intended: String,
    /// The template that is intended, sealed: its variables may be secret.
    pub template: SealedRef,
    /// The `pod-template-hash` of its pods.
    pub blue: String,
    /// The name of the Deployment that is made.
    pub green: String,
    /// The Services that are led, the one with the traffic first.
    pub services: Vec<LedService>,
}

/// Names a Service that is led from one side to the other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedService {
    /// Its name.
    pub name: String,
    /// What tells it from another of that name.
    pub uid: String,
    /// Its selector as it was found.
    pub selector: BTreeMap<String, String>,
}

/// Tells what has the traffic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlueGreenOutput {
    /// The Deployment that is made, until commit.
    pub deployment: String,
    /// The images of its containers.
    pub images: BTreeMap<String, String>,
}

impl BlueGreen {
    /// Makes the step from its configuration.
    ///
    /// # Errors
    /// There is no such target, or nothing is asked for.
    pub fn from_config(config: BlueGreenConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let cluster = Cluster::named(config.target.as_deref(), cx)?;
        let namespace = config.namespace.clone().unwrap_or_else(|| cluster.namespace().to_owned());
        check_name(&namespace, "namespace")?;
        check_name(&config.deployment, "deployment")?;
        check_name(&config.service, "service")?;
        if let Some(preview) = &config.preview {
            check_name(preview, "preview")?;
            if *preview == config.service {
                return Err(BuildError::new("the preview is the Service with the traffic")
                    .at("preview")
                    .with_hint("name another Service of the same pods, or leave it out"));
            }
        }
        let step = Self { config, cluster, namespace };
        if step.changes().template().is_empty() {
            return Err(BuildError::new(format!("nothing changes in {}", step.config.deployment))
                .at("images")
                .with_hint("say what: `images`, `env`, `annotations`"));
        }
        Ok(step)
    }

    fn changes(&self) -> WorkloadConfig {
        WorkloadConfig {
            images: self.config.images.clone(),
            env: self.config.env.clone(),
            annotations: self.config.annotations.clone(),
            ..WorkloadConfig::of(self.workload(&self.config.deployment))
        }
    }

    fn workload(&self, name: &str) -> WorkloadName {
        WorkloadName { kind: WorkloadKind::Deployment, name: name.to_owned() }
    }

    fn deployment(&self, name: &str) -> ObjectName {
        ObjectName::new(Kind::deployment(), &self.namespace, name)
    }

    fn service(&self, name: &str) -> ObjectName {
        ObjectName::new(Kind::service(), &self.namespace, name)
    }
}

#[async_trait]
impl Step for BlueGreen {
    const KIND: &'static str = "k8s.blue_green";
    type Undo = BlueGreenUndo;
    type Output = BlueGreenOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<BlueGreenUndo, BlueGreenOutput>, StepError> {
        self.plan(cx).await
    }

    async fn apply(&self, cx: &Context, undo: &BlueGreenUndo) -> Result<BlueGreenOutput, StepError> {
        self.forward(cx, undo).await
    }

    async fn commit(&self, cx: &Context, undo: &BlueGreenUndo) -> Result<(), StepError> {
        self.finish(cx, undo).await
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        let services = [Some(&self.config.service), self.config.preview.as_ref()].into_iter().flatten();
        let services = services.map(|name| self.cluster.resource(&self.service(name)));
        [self.cluster.resource(&self.deployment(&self.config.deployment))].into_iter().chain(services).collect()
    }
}

#[async_trait]
impl Rollback for BlueGreen {
    async fn rollback(&self, cx: &Context, undo: &BlueGreenUndo, _: Option<&BlueGreenOutput>) -> Result<(), StepError> {
        self.back(cx, undo).await
    }
}
