//! `k8s.budget`: whether `PodDisruptionBudgets` allow a pod to be evicted now.

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
use crate::object::Object;
use crate::target::{Cluster, check_name};

/// Configures `k8s.budget`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BudgetCheckConfig {
    /// The cluster. Default: the one that `kubectl` would use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The namespace; `*` means all. Default: the target's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// The budgets. Default: all there are.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub budgets: Vec<String>,
}

/// Asks what budgets allow.
#[derive(Debug)]
pub struct BudgetCheck {
    config: BudgetCheckConfig,
    cluster: Arc<Cluster>,
    /// None for all.
    namespace: Option<String>,
}

/// What a budget says.
#[derive(Debug, PartialEq, Eq)]
enum Allows {
    Some,
    None(String),
    /// Its controller has not looked at it yet.
    NotKnown,
}

impl BudgetCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// There is no such target, or a name cannot be one.
    pub fn from_config(config: BudgetCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let cluster = Cluster::named(config.target.as_deref(), cx)?;
        let namespace = match config.namespace.as_deref() {
            Some("*") => None,
            Some(namespace) => Some(namespace.to_owned()),
            None => Some(cluster.namespace().to_owned()),
        };
        if let Some(namespace) = &namespace {
            check_name(namespace, "namespace")?;
        }
        for (at, name) in config.budgets.iter().enumerate() {
            check_name(name, &format!("budgets.{at}"))?;
        }
        Ok(Self { config, cluster, namespace })
    }
}

fn allows(budget: &Object) -> Allows {
    if budget.number("/metadata/generation") > budget.number("/status/observedGeneration") {
        return Allows::NotKnown;
    }
    let number = |field: &str| budget.number(&format!("/status/{field}"));
    let (expected, healthy, least) = (number("expectedPods"), number("currentHealthy"), number("desiredHealthy"));
    if number("disruptionsAllowed") > 0 || expected == 0 {
        return Allows::Some;
    }
    Allows::None(if least >= expected {
        format!("all of its {expected} pods must stay: it never allows any")
    } else {
        format!("{healthy} of {expected} pods are healthy, {least} must be")
    })
}

#[async_trait]
impl Check for BudgetCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let server = self.cluster.connect(cx).await?;
        // `policy/v1` since 1.21, `policy/v1beta1` before.
        let found = match server.find_kind(None, "poddisruptionbudgets.policy").await? {
            Some(kind) => server.list(&kind, self.namespace.as_deref(), "", "").await?.0,
            None => Vec::new(),
        };
        let asked = |budget: &&Object| {
            self.config.budgets.is_empty() || self.config.budgets.iter().any(|name| name == budget.name())
        };
        let budgets: Vec<_> = found.iter().filter(asked).collect();
        let (mut faults, mut unknown, mut blocked) = (Vec::new(), Vec::new(), 0u32);
        for budget in &budgets {
            let name = format!("{}/{}", budget.namespace(), budget.name());
            match allows(budget) {
                Allows::Some => {}
                Allows::None(why) => {
                    blocked += 1;
                    faults.push(format!("{name} allows no disruption: {why}"));
                }
                Allows::NotKnown => unknown.push(name),
            }
        }
        let absent = self.config.budgets.iter().filter(|name| budgets.iter().all(|budget| budget.name() != **name));
        faults.extend(absent.map(|name| format!("there is no PodDisruptionBudget {name}")));
        let verdict = match joined(&faults) {
            Some(faults) => Verdict::fail(faults).with_hint(
                "bring its pods up, run more of them, or loosen the budget: no node can be drained like this",
            ),
            None if !unknown.is_empty() => {
                Verdict::unknown(format!("{}: nobody has looked at it yet", unknown.join(", ")))
                    .with_hint("ask again; if it stays so, the cluster's controller manager does not run")
            }
            None => Verdict::pass(format!("{} budgets allow a disruption", budgets.len())),
        };
        Ok(verdict.with_measurement("budgets", budgets.len() as f64).with_measurement("blocked", f64::from(blocked)))
    }

    fn kind(&self) -> &str {
        "k8s.budget"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_budget_without_pods_blocks_nobody_and_an_old_status_says_nothing() {
        let of = |generation: i64, status: Value| {
            allows(&Object(json!({ "metadata": { "generation": generation }, "status": status })))
        };
        let status = |allowed: i64, expected: i64, healthy: i64, least: i64| {
            json!({ "observedGeneration": 1, "disruptionsAllowed": allowed, "expectedPods": expected,
                "currentHealthy": healthy, "desiredHealthy": least })
        };
        assert_eq!(of(1, status(1, 3, 3, 2)), Allows::Some);
        assert_eq!(of(1, status(0, 0, 0, 1)), Allows::Some);
        assert_eq!(of(2, status(1, 3, 3, 2)), Allows::NotKnown);
        assert!(matches!(of(1, status(0, 3, 2, 2)), Allows::None(why) if why.contains("2 of 3")));
        assert!(matches!(of(1, status(0, 2, 2, 2)), Allows::None(why) if why.contains("never")));
    }
}
