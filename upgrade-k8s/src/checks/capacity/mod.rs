//! `k8s.capacity`: whether nodes and quotas have room for the pods that an upgrade adds.

mod demand;
mod room;

use std::collections::BTreeSet;
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

use self::demand::Demand;
use self::room::Node;
use super::joined;
use crate::kind::Kind;
use crate::object::{Object, ObjectName};
use crate::quantity::{Amounts, Quantity};
use crate::server::ApiServer;
use crate::target::{Cluster, check_name};
use crate::workload::{WorkloadKind, WorkloadName};

/// The pods that ask for something.
const ALIVE: &str = "status.phase!=Succeeded,status.phase!=Failed";

/// Configures `k8s.capacity`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CapacityCheckConfig {
    /// The cluster. Default: the one that `kubectl` would use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The namespace. Default: the target's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// The workloads whose rollouts need room beside them: `deployment/web`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub workloads: Vec<WorkloadName>,
    /// How many more pods of `requests` need room: those of a Job, of a Deployment that is not there yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pods: Option<u64>,
    /// What each of `pods` asks for: `{ cpu: 500m, memory: 256Mi }`.
    #[serde(skip_serializing_if = "Amounts::is_empty")]
    pub requests: Amounts,
}

/// Asks whether there is room.
#[derive(Debug)]
pub struct CapacityCheck {
    config: CapacityCheckConfig,
    cluster: Arc<Cluster>,
    namespace: String,
}

impl CapacityCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// There is no such target, or nothing needs room.
    pub fn from_config(config: CapacityCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let cluster = Cluster::named(config.target.as_deref(), cx)?;
        let namespace = config.namespace.clone().unwrap_or_else(|| cluster.namespace().to_owned());
        check_name(&namespace, "namespace")?;
        if config.workloads.is_empty() && config.pods.is_none() {
            return Err(BuildError::new("nothing needs room").at("workloads").with_hint(
                "name what is rolled out: `workloads: [deployment/web]`, or so many pods: `pods: 3` with `requests`",
            ));
        }
        if config.pods.is_none() && !config.requests.is_empty() {
            return Err(BuildError::new("nothing says how many pods ask for that").at("pods"));
        }
        let negative = config.requests.iter().find(|(_, amount)| **amount < Quantity::default());
        if let Some((resource, amount)) = negative {
            return Err(BuildError::new(format!("nobody asks for {amount}")).at(format!("requests.{resource}")));
        }
        Ok(Self { config, cluster, namespace })
    }

    /// Finds out what is added; notes the workloads that are not there.
    async fn demands(&self, server: &ApiServer, faults: &mut Vec<String>) -> Result<Vec<Demand>, CheckError> {
        let mut all = Vec::new();
        let ranges = match server.find_kind(None, "limitranges").await? {
            Some(kind) if !self.config.workloads.is_empty() => {
                server.list(&kind, Some(&self.namespace), "", "").await?.0
            }
            _ => Vec::new(),
        };
        for name in &self.config.workloads {
            let object = ObjectName::new(name.kind.kind(), &self.namespace, &name.name);
            let Some(present) = server.get(&object).await? else {
                faults.push(format!("{name} does not exist"));
                continue;
            };
            let surge = demand::surge(name.kind, &present);
            if surge > 0 {
                all.push(Demand::read(name.to_string(), surge, present.at("/spec/template"), &ranges)?);
                all.last_mut().expect("it was pushed").on =
                    (name.kind == WorkloadKind::DaemonSet).then(|| vec![present.uid().to_owned()]);
            }
        }
        if let Some(pods) = self.config.pods.filter(|pods| *pods > 0) {
            all.push(Demand::of(pods, self.config.requests.clone()));
        }
        Ok(all)
    }
}

/// Replaces the uid of a DaemonSet by the nodes that its pods are on: each of them gets one pod more.
fn settle_on_nodes(demand: &mut Demand, pods: &[Object]) {
    let Some(uid) = demand.on.take().and_then(|uids| uids.into_iter().next()) else { return };
    let own = pods.iter().filter(|pod| pod.is_owned_by(&uid)).map(|pod| pod.text("/spec/nodeName"));
    let nodes: BTreeSet<_> = own.filter(|node| !node.is_empty()).map(str::to_owned).collect();
    demand.pods = nodes.len() as u64;
    demand.on = Some(nodes.into_iter().collect());
}

/// Adds up amounts under the names that figures have.
fn figures(verdict: Verdict, what: &str, amounts: &Amounts) -> Verdict {
    amounts.iter().fold(verdict, |verdict, (resource, amount)| {
        let unit = match resource.as_str() {
            "cpu" => "_cores",
            "memory" | "ephemeral-storage" => "_bytes",
            _ => "",
        };
        verdict.with_measurement(format!("{what}_{resource}{unit}"), amount.as_f64())
    })
}

fn free(nodes: &[Node], demands: &[Demand], resources: &Amounts) -> Amounts {
    let mut all: Amounts = resources.keys().map(|resource| (resource.clone(), Quantity::default())).collect();
    for node in room::open(nodes, demands) {
        for (resource, sum) in &mut all {
            *sum = *sum + node.free.get(resource).copied().unwrap_or_default();
        }
    }
    all
}

fn needed(demands: &[Demand]) -> Amounts {
    let mut all = Amounts::new();
    for demand in demands {
        let each = demand.requests.iter().map(|(resource, amount)| (resource.clone(), *amount * demand.pods));
        demand::add(&mut all, &each.collect());
    }
    all
}

#[async_trait]
impl Check for CapacityCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let server = self.cluster.connect(cx).await?;
        let mut faults = Vec::new();
        let mut demands = self.demands(&server, &mut faults).await?;
        if demands.is_empty() && faults.is_empty() {
            return Ok(
                Verdict::pass("no pod is added: each goes before the next comes").with_measurement("needed_pods", 0.0)
            );
        }
        let pods = server.list(&Kind::pod(), None, "", ALIVE).await?.0;
        for demand in &mut demands {
            settle_on_nodes(demand, &pods);
        }
        let mut nodes = room::nodes(&server.list(&Kind::node(), None, "", "").await?.0, &pods)?;
        let quotas = match server.find_kind(None, "resourcequotas").await? {
            Some(kind) => server.list(&kind, Some(&self.namespace), "", "").await?.0,
            None => Vec::new(),
        };
        let needed = needed(&demands);
        let free = free(&nodes, &demands, &needed);
        let mut unseen: BTreeSet<_> = demands
            .iter()
            .flat_map(|demand| demand.unseen.iter().map(|what| format!("{what} of {}", demand.who)))
            .collect();
        faults.extend(room::quotas(&demands, &quotas, &mut unseen)?);
        faults.extend(room::place(&demands, &mut nodes));
        let said: Vec<_> = demands.iter().map(|demand| format!("{} more of {}", demand.pods, demand.who)).collect();
        let verdict = match joined(&faults) {
            Some(faults) => Verdict::fail(faults).with_hint(
                "add or uncordon nodes, raise the quota, ask for less, or let old pods go first: `maxSurge: 0`",
            ),
            None if !unseen.is_empty() => {
                let unseen: Vec<_> = unseen.into_iter().collect();
                Verdict::warn(format!(
                    "there is room for {}, as far as looked at: not {}",
                    said.join(", "),
                    unseen.join(", ")
                ))
                .with_hint("see by hand that the nodes with room are those where these pods may run")
            }
            None => Verdict::pass(format!("there is room for {}", said.join(", "))),
        };
        Ok(figures(figures(verdict, "free", &free), "needed", &needed))
    }

    fn kind(&self) -> &str {
        "k8s.capacity"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}
