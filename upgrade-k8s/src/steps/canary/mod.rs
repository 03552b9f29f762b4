//! `k8s.canary`: a second Deployment gets more and more of the traffic, as long as what is measured allows it.
//!
//! ```text
//!            5 %        25 %       50 %       100 %
//!   found ───▶ analysis ──▶ analysis ──▶ analysis ──▶ analysis ──▶ done
//!     ▲            │            │            │            │          │
//!     │            └────────────┴─────┬──────┴────────────┘          │
//!     │  rollback:  all traffic to the first Deployment; then the ◀──┤
//!     │             second one is removed                            │
//!     └─ commit: the first Deployment takes the new template and ◀───┘
//!                all traffic; the second one is removed
//! ```
//!
//! The first Deployment keeps all of its pods until commit, so that all traffic can go back to it at any
//! moment. Weights are given by the number of pods (a Service leads to both), or by a route of the Gateway
//! API (a Service each, and weights between them).

mod drive;
mod plan;
mod route;

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::target::Target;
use upgrade_core::units::{Share, Span};

use super::analysis::{Analysis, AnalysisConfig};
use super::pair::{Pair, PairConfig, PairUndo};
use crate::object::ObjectName;
use crate::target::check_name;
use crate::workload::progress::Patience;
use crate::workload::references::References;
use crate::workload::template::TemplateChanges;

/// How the two sides are called in the configuration of an analysis.
const SIDES: [&str; 2] = ["canary", "stable"];

/// Configures `k8s.canary`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CanaryConfig {
    /// The cluster. Default: the one that `kubectl` would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The namespace. Default: the target's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// The Deployment.
    pub deployment: String,
    /// The Service that leads to its pods.
    pub service: String,
    /// The HTTPRoute of the Gateway API that leads to the Service. If absent, weights are given by the
    /// number of pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    /// New images, by container; `*` means every container that has no line of its own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub images: BTreeMap<String, String>,
    /// Environment variables, by container, then by name; null takes one away.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, BTreeMap<String, Option<String>>>,
    /// Annotations of the pods; null takes one away.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, Option<String>>,
    /// How many of a hundred requests the new pods get, one after the other; the last is 100. Default
    /// 5, 25, 50, 100.
    #[serde(default = "weights")]
    pub weights: Vec<WeightConfig>,
    /// How long each weight stays at least. Default 1 m.
    #[serde(default = "a_minute")]
    pub pause: Span,
    /// The checks that must pass at each weight before the next.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub analysis: Vec<AnalysisConfig>,
    /// How many pods more there may be than the first Deployment has, as a share of those. Default 100%.
    #[serde(default = "as_many")]
    pub max_surge: Share,
    /// How long new pods may take to become ready, at each weight. Default 10 m.
    #[serde(default = "crate::steps::ten_minutes")]
    pub deadline: Span,
    /// How often a container may be started again before it counts as hopeless. Default 0.
    #[serde(default)]
    pub restarts: u64,
}

/// Says how many of a hundred requests go to the new pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "a weight is a number from 1 to 100, or `{ weight: 25, pause: 10m }`")]
pub enum WeightConfig {
    /// So many, as long as `pause` says.
    Weight(u8),
    /// So many, so long.
    Paused(PausedWeightConfig),
}

/// Says how many of a hundred requests go to the new pods, and how long at least.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PausedWeightConfig {
    /// How many of a hundred.
    pub weight: u8,
    /// How long it stays at least.
    pub pause: Span,
}

impl WeightConfig {
    fn weight(self) -> u8 {
        match self {
            Self::Weight(weight) | Self::Paused(PausedWeightConfig { weight, .. }) => weight,
        }
    }
}

fn weights() -> Vec<WeightConfig> {
    [5, 25, 50, 100].map(WeightConfig::Weight).to_vec()
}

fn a_minute() -> Span {
    Span::from_secs(60)
}

fn as_many() -> Share {
    Share(1.0)
}

/// Lets a second Deployment have more and more of the traffic, as long as what is measured allows it.
#[derive(Debug, Clone)]
pub struct Canary {
    config: CanaryConfig,
    pair: Pair,
    analysis: Analysis,
}

/// Holds what the way back, and the commit, need.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CanaryUndo {
    /// The two Deployments and the Service.
    pub pair: PairUndo,
    /// The route, where weights are given by one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<RouteUndo>,
}

/// Holds what putting a route back needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteUndo {
    /// The route.
    pub object: ObjectName,
    /// What tells it from another of that name.
    pub uid: String,
    /// The name of the Service that is made before the second Deployment.
    pub service: String,
    /// The `backendRefs` of each of its rules, as they were found; null where a rule has none.
    pub backends: Vec<Value>,
}

/// Tells what has the traffic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CanaryOutput {
    /// The Deployment that is made, until commit.
    pub deployment: String,
    /// The images of its containers.
    pub images: BTreeMap<String, String>,
}

impl Canary {
    /// Makes the step from its configuration.
    ///
    /// # Errors
    /// There is no such target, nothing is asked for, the weights do not lead to 100 or need too many pods,
    /// or a check of the analysis cannot be made.
    pub fn from_config(config: CanaryConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        if let Some(route) = &config.route {
            check_name(route, "route")?;
        }
        check_weights(&config)?;
        let pair = PairConfig {
            target: config.target.as_deref(),
            namespace: config.namespace.as_deref(),
            deployment: &config.deployment,
            services: vec![("service", &config.service)],
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

fn check_weights(config: &CanaryConfig) -> Result<(), BuildError> {
    let weights: Vec<_> = config.weights.iter().map(|each| each.weight()).collect();
    let wrong = |message: String| BuildError::new(message).at("weights");
    if weights.last() != Some(&100) {
        return Err(wrong("the weights do not end with 100".into())
            .with_hint("what is not promoted would be replaced at commit all the same: `[5, 25, 50, 100]`"));
    }
    if weights[0] == 0 || !weights.is_sorted_by(|a, b| a < b) {
        return Err(wrong(format!("the weights do not grow from one to 100: {weights:?}")));
    }
    if config.max_surge.0 <= 0.0 {
        return Err(BuildError::new("without a pod more there is no canary").at("max_surge"));
    }
    if config.route.is_some() {
        return Ok(());
    }
    let too_many = weights.iter().filter(|weight| **weight < 100).find(|weight| {
        let weight = f64::from(**weight);
        weight / (100.0 - weight) > config.max_surge.0
    });
    match too_many {
        None => Ok(()),
        Some(weight) => Err(wrong(format!(
            "{weight}% by the number of pods needs {:.0}% more pods, and `max_surge` is {}",
            f64::from(*weight) / f64::from(100 - *weight) * 100.0,
            config.max_surge
        ))
        .with_hint("take weights up to 50, then 100; or raise `max_surge`; or give weights by a `route`")),
    }
}

#[async_trait]
impl Step for Canary {
    const KIND: &'static str = "k8s.canary";
    type Undo = CanaryUndo;
    type Output = CanaryOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<CanaryUndo, CanaryOutput>, StepError> {
        self.plan(cx).await
    }

    async fn apply(&self, cx: &Context, undo: &CanaryUndo) -> Result<CanaryOutput, StepError> {
        self.forward(cx, undo).await
    }

    async fn commit(&self, cx: &Context, undo: &CanaryUndo) -> Result<(), StepError> {
        self.finish(cx, undo).await
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        let route = self
            .config
            .route
            .as_ref()
            .map(|route| self.pair.cluster.part(route::HTTP_ROUTES, &format!("{}/{route}", self.pair.namespace)));
        self.pair.targets().into_iter().chain(route).collect()
    }
}

#[async_trait]
impl Rollback for Canary {
    async fn rollback(&self, cx: &Context, undo: &CanaryUndo, _: Option<&CanaryOutput>) -> Result<(), StepError> {
        self.back(cx, undo).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn weights_that_lead_nowhere_or_need_too_many_pods_are_refused() {
        let config = |more: Value| -> CanaryConfig {
            let mut config = json!({ "deployment": "web", "service": "web" });
            config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            serde_json::from_value(config).unwrap()
        };
        check_weights(&config(json!({}))).unwrap();
        check_weights(&config(json!({ "weights": [75, 100], "max_surge": "300%" }))).unwrap();
        check_weights(&config(json!({ "weights": [75, 100], "route": "web" }))).unwrap();
        check_weights(&config(json!({ "weights": [{ "weight": 10, "pause": "5m" }, 100] }))).unwrap();
        for (more, says) in [
            (json!({ "weights": [] }), "end with 100"),
            (json!({ "weights": [5, 25] }), "end with 100"),
            (json!({ "weights": [25, 5, 100] }), "grow"),
            (json!({ "weights": [0, 100] }), "grow"),
            (json!({ "weights": [75, 100] }), "300% more pods"),
        ] {
            let error = check_weights(&config(more)).unwrap_err();
            assert!(error.message.contains(says), "{error}");
        }
        let wrong: Result<CanaryConfig, _> =
            serde_json::from_value(json!({ "deployment": "web", "service": "web", "weights": ["5%"] }));
        assert!(wrong.unwrap_err().to_string().contains("a number from 1 to 100"));
    }
}
