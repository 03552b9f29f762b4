//! `k8s.blue_green`: a second Deployment beside the first, traffic switched to it, and the first kept until commit.
//!
//! The Service is pinned to one side before the other one is made, and led from one to the other by a single
//! write; how, is told in [`pair`](super::pair).
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

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;
use upgrade_core::units::Span;

use super::analysis::{Analysis, AnalysisConfig, SideNames};
use super::pair::{Pair, PairConfig, PairUndo, Planned};
use super::rollout::images_of;
use crate::workload::progress::Patience;
use crate::workload::references::References;
use crate::workload::template::TemplateChanges;

/// How the two sides are called in the configuration of an analysis.
const SIDES: [&str; 2] = ["green", "blue"];

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
    /// The checks that the new side must pass before the switch.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub analysis: Vec<AnalysisConfig>,
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
    pair: Pair,
    analysis: Analysis,
}

/// Holds what the way back, and the commit, need.
pub type BlueGreenUndo = PairUndo;

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
    /// There is no such target, nothing is asked for, or a check of the analysis cannot be made.
    pub fn from_config(config: BlueGreenConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        if config.preview.as_ref() == Some(&config.service) {
            return Err(BuildError::new("the preview is the Service with the traffic")
                .at("preview")
                .with_hint("name another Service of the same pods, or leave it out"));
        }
        let preview = config.preview.as_deref().map(|preview| ("preview", preview));
        let pair = PairConfig {
            target: config.target.as_deref(),
            namespace: config.namespace.as_deref(),
            deployment: &config.deployment,
            services: [("service", &*config.service)].into_iter().chain(preview).collect(),
            role: SIDES[0],
            template: TemplateChanges {
                images: config.images.clone(),
                env: config.env.clone(),
                annotations: config.annotations.clone(),
                references: References::new(),
            },
            patience: Patience { deadline: config.deadline.0, restarts: config.restarts },
        };
        let pair = Pair::new(pair, cx)?;
        let analysis = Analysis::new(&config.analysis, SIDES, cx)?;
        Ok(Self { config, pair, analysis })
    }

    /// Adds a check that a program made itself to the analysis; `how` says how often it is asked.
    #[must_use]
    pub fn with_check(mut self, name: &str, check: Arc<dyn Check>, how: AnalysisConfig) -> Self {
        self.analysis.add(name, check, how);
        self
    }
}

#[async_trait]
impl Step for BlueGreen {
    const KIND: &'static str = "k8s.blue_green";
    type Undo = BlueGreenUndo;
    type Output = BlueGreenOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<BlueGreenUndo, BlueGreenOutput>, StepError> {
        let server = self.pair.cluster.connect(cx).await?;
        let (undo, lines) = match self.pair.plan(&server, cx).await? {
            Planned::Beside(undo, lines) => (undo, lines),
            Planned::Already(there) => {
                let deployment = self.config.deployment.clone();
                let output = BlueGreenOutput { deployment, images: images_of(&there) };
                return Ok(Prepared::unchanged(output, "it runs with these settings already"));
            }
        };
        let changes = [
            Change::new(Effect::Create, format!("deployment {}/{}", undo.namespace, undo.green)).with_summary(lines),
            Change::new(Effect::Modify, self.pair.service(&self.config.service).to_string())
                .with_summary(format!("switched to it; {} is kept until commit", self.config.deployment)),
        ];
        Ok(Prepared::change(*undo, changes))
    }

    async fn apply(&self, cx: &Context, undo: &BlueGreenUndo) -> Result<BlueGreenOutput, StepError> {
        let sides = self.pair.sides(cx, undo).await?;
        sides.hold().await?;
        let green = sides.make(None).await?;
        let hash = sides.green_complete().await?;
        for preview in undo.services.iter().skip(1) {
            sides.pin(preview, &hash).await?;
        }
        sides.stay(self.config.stable.0).await?;
        let names = SideNames { new: (SIDES[0], &hash), old: (SIDES[1], &undo.blue) };
        self.analysis.passes(cx, &names, Duration::ZERO, &undo.green).await?;
        for service in &undo.services {
            sides.switch(service, &undo.green, &hash).await?;
        }
        Ok(BlueGreenOutput { deployment: undo.green.clone(), images: images_of(&green) })
    }

    async fn commit(&self, cx: &Context, undo: &BlueGreenUndo) -> Result<(), StepError> {
        let sides = self.pair.sides(cx, undo).await?;
        let hash = sides.renew().await?;
        sides.settle(&hash).await?;
        sides.end().await
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        self.pair.targets()
    }
}

#[async_trait]
impl Rollback for BlueGreen {
    async fn rollback(&self, cx: &Context, undo: &BlueGreenUndo, _: Option<&BlueGreenOutput>) -> Result<(), StepError> {
        let sides = self.pair.sides(cx, undo).await?;
        sides.release().await?;
        sides.end().await
    }
}
