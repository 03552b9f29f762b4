//! `k8s.pods`: whether pods are ready and stay up, whatever they belong to.

use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::CheckError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::verdict::Verdict;

use super::joined;
use super::workload::restarts;
use crate::kind::Kind;
use crate::object::Object;
use crate::target::{Cluster, check_name};
use crate::workload::failure::Pod;

/// Configures `k8s.pods`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PodsCheckConfig {
    /// The cluster. Default: the one that `kubectl` would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The namespace. Default: the target's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// The pods, by their labels: `app=web,tier in (front, back)`. Default: all of the namespace.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub selector: String,
    /// How many there must be at least. Default 1.
    #[serde(default = "one")]
    pub at_least: u64,
    /// How many of them may be not ready. Default 0.
    #[serde(default)]
    pub not_ready: u64,
    /// How often a container of theirs may have been started again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restarts: Option<u64>,
}

fn one() -> u64 {
    1
}

/// Asks how pods are.
#[derive(Debug)]
pub struct PodsCheck {
    config: PodsCheckConfig,
    cluster: Arc<Cluster>,
    namespace: String,
}

impl PodsCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// There is no such target, or the namespace cannot be one.
    pub fn from_config(config: PodsCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let cluster = Cluster::named(config.target.as_deref(), cx)?;
        let namespace = config.namespace.clone().unwrap_or_else(|| cluster.namespace().to_owned());
        check_name(&namespace, "namespace")?;
        Ok(Self { config, cluster, namespace })
    }
}

/// Says what is wrong with a pod that is not ready.
fn why(pod: &Object) -> String {
    let trouble = Pod::read(pod).and_then(|read| read.trouble);
    let said = match trouble {
        Some(trouble) => format!("{}: {}", trouble.reason, trouble.message),
        None => pod.text("/status/phase").to_lowercase(),
    };
    format!("pod {} ({})", pod.name(), said.trim_end_matches([':', ' ']))
}

#[async_trait]
impl Check for PodsCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let (config, server) = (&self.config, self.cluster.connect(cx).await?);
        let (all, _) = server.list(&Kind::pod(), Some(&self.namespace), &config.selector, "").await?;
        // Those that have ended, and those on their way out, are not asked to be ready.
        let ended = |pod: &&Object| matches!(pod.text("/status/phase"), "Succeeded" | "Failed") || pod.is_going();
        let live: Vec<_> = all.iter().filter(|pod| !ended(pod)).collect();
        let is_ready = |pod: &Object| {
            pod.list("/status/conditions").any(|each| each["type"] == "Ready" && each["status"] == "True")
        };
        let unready: Vec<_> = live.iter().filter(|pod| !is_ready(pod)).collect();
        let most = live.iter().max_by_key(|pod| restarts(pod));
        let count = most.map(|pod| restarts(pod)).unwrap_or_default();
        let mut faults = Vec::new();
        if (live.len() as u64) < config.at_least {
            faults.push(format!("there are {}, {} is the least", live.len(), config.at_least));
        }
        if unready.len() as u64 > config.not_ready {
            let first = unready.first().map(|pod| format!(", as {}", why(pod))).unwrap_or_default();
            faults.push(format!("{} of {} are not ready{first}", unready.len(), live.len()));
        }
        if let (Some(limit), Some(pod)) = (config.restarts.filter(|limit| count > *limit), most) {
            faults.push(format!(
                "a container of pod {} was started again {count} times, {limit} is the most",
                pod.name()
            ));
        }
        let which = if config.selector.is_empty() { String::new() } else { format!(" with {}", config.selector) };
        let verdict = match joined(&faults) {
            Some(faults) => Verdict::fail(format!("pods of {}{which}: {faults}", self.namespace)).with_hint(format!(
                "look at them: `kubectl get pods --namespace {} --selector '{}'`",
                self.namespace, config.selector
            )),
            None => {
                Verdict::pass(format!("{} pods of {}{which}, {} not ready", live.len(), self.namespace, unready.len()))
            }
        };
        Ok(verdict
            .with_measurement("pods", live.len() as f64)
            .with_measurement("not_ready", unready.len() as f64)
            .with_measurement("restarts", count as f64))
    }

    fn kind(&self) -> &str {
        "k8s.pods"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}
