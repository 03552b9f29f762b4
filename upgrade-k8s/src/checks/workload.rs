//! `k8s.workload`: whether workloads are rolled out, ready, of the right images, and stay up.

use std::collections::{BTreeMap, BTreeSet};
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
use crate::kind::Kind;
use crate::object::{Object, ObjectName};
use crate::pods;
use crate::server::ApiServer;
use crate::target::{Cluster, check_name};
use crate::workload::failure::{Pod, Trouble};
use crate::workload::status::{self, Rollout};
use crate::workload::{WorkloadKind, WorkloadName};

/// Configures `k8s.workload`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WorkloadCheckConfig {
    /// The cluster. Default: the one that `kubectl` would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The namespace. Default: the target's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// The workloads: `deployment/web`, `statefulset/db`, `daemonset/agent`.
    pub workloads: Vec<WorkloadName>,
    /// Whether each must be rolled out completely. Default: yes, unless `ready` says how many pods are enough.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rolled_out: Option<bool>,
    /// How many pods of each must be ready. Default: as many as there shall be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<u64>,
    /// The images that they must be of, by container; `*` means every container that has no line of its own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub images: BTreeMap<String, String>,
    /// How often a container of theirs may have been started again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restarts: Option<u64>,
}

/// Asks how workloads are.
#[derive(Debug)]
pub struct WorkloadCheck {
    config: WorkloadCheckConfig,
    cluster: Arc<Cluster>,
    namespace: String,
}

/// What was found of one workload.
#[derive(Debug, Default)]
struct Found {
    faults: Vec<String>,
    ready: u64,
    wanted: u64,
    restarts: u64,
}

impl WorkloadCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// There is no such target, or no workload is named.
    pub fn from_config(config: WorkloadCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let cluster = Cluster::named(config.target.as_deref(), cx)?;
        let namespace = config.namespace.clone().unwrap_or_else(|| cluster.namespace().to_owned());
        check_name(&namespace, "namespace")?;
        if config.workloads.is_empty() {
            return Err(BuildError::new("there is no workload")
                .at("workloads")
                .with_hint("name one: `workloads: [deployment/web]`"));
        }
        Ok(Self { config, cluster, namespace })
    }

    async fn look(
        &self,
        server: &ApiServer,
        name: &WorkloadName,
        used: &mut BTreeSet<String>,
    ) -> Result<Found, CheckError> {
        let object = ObjectName::new(name.kind.kind(), &self.namespace, &name.name);
        let Some(present) = server.get(&object).await? else {
            return Ok(Found { faults: vec!["it does not exist".into()], ..Found::default() });
        };
        let own = self.pods_of(server, &present).await?;
        let mut found = Found {
            ready: ready(name.kind, &present),
            wanted: wanted(name.kind, &present),
            restarts: own.iter().map(restarts).max().unwrap_or_default(),
            ..Found::default()
        };
        let rollout = status::of(name.kind, &present);
        if self.config.rolled_out.unwrap_or(self.config.ready.is_none()) {
            match rollout {
                Rollout::Complete => {}
                Rollout::Going { waits_for, .. } => found.faults.push(format!("it is not rolled out: {waits_for}")),
                Rollout::GaveUp => {
                    found.faults.push("it is not rolled out: no progress within its `progressDeadlineSeconds`".into());
                }
            }
        }
        let least = self.config.ready.unwrap_or(found.wanted);
        if found.ready < least {
            found.faults.push(format!("{} pods are ready, {least} is the least", found.ready));
        }
        found.faults.extend(wrong_images(&present, &self.config.images, used));
        if let Some(most) = self.config.restarts.filter(|most| found.restarts > *most) {
            found.faults.push(format!("a container was started again {} times, {most} is the most", found.restarts));
        }
        if !found.faults.is_empty() {
            let trouble =
                own.iter().find_map(|pod| Pod::read(pod).and_then(|pod| pod.trouble.map(|what| (pod.name, what))));
            found.faults.extend(
                trouble.map(|(pod, Trouble { reason, message, .. })| format!("pod {pod}: {reason}: {message}")),
            );
        }
        Ok(found)
    }

    async fn pods_of(&self, server: &ApiServer, workload: &Object) -> Result<Vec<Object>, CheckError> {
        let labels = pods::label_selector(workload.at("/spec/selector"));
        let (pods, _) = server.list(&Kind::pod(), Some(&self.namespace), &labels, "").await?;
        Ok(pods.into_iter().filter(|pod| !pod.is_going()).collect())
    }
}

fn count(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}

fn ready(kind: WorkloadKind, object: &Object) -> u64 {
    count(object.number(match kind {
        WorkloadKind::DaemonSet => "/status/numberReady",
        _ => "/status/readyReplicas",
    }))
}

fn wanted(kind: WorkloadKind, object: &Object) -> u64 {
    count(match kind {
        WorkloadKind::DaemonSet => object.number("/status/desiredNumberScheduled"),
        // What is left out is one.
        _ => object.at("/spec/replicas").as_i64().unwrap_or(1),
    })
}

/// Counts how often the container that was started again most often was.
pub(super) fn restarts(pod: &Object) -> u64 {
    let statuses = pod.list("/status/initContainerStatuses").chain(pod.list("/status/containerStatuses"));
    statuses.filter_map(|status| status["restartCount"].as_u64()).max().unwrap_or_default()
}

/// Names the containers that are of other images; notes in `used` which lines have met a container.
fn wrong_images(object: &Object, images: &BTreeMap<String, String>, used: &mut BTreeSet<String>) -> Vec<String> {
    let containers = object.list("/spec/template/spec/containers").map(|each| (false, each));
    let all = containers.chain(object.list("/spec/template/spec/initContainers").map(|each| (true, each)));
    let mut faults = Vec::new();
    for (is_init, container) in all {
        let name = container["name"].as_str().unwrap_or_default();
        let line = images.get_key_value(name).or_else(|| images.get_key_value("*").filter(|_| !is_init));
        let Some((key, wanted)) = line else { continue };
        used.insert(key.clone());
        let image = container["image"].as_str().unwrap_or_default();
        if image != wanted {
            faults.push(format!("container {name} is of {image}, not of {wanted}"));
        }
    }
    faults
}

#[async_trait]
impl Check for WorkloadCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let server = self.cluster.connect(cx).await?;
        let (mut faults, mut used, mut said) = (Vec::new(), BTreeSet::new(), Vec::new());
        let (mut total, mut empty) = (Found::default(), Vec::new());
        for name in &self.config.workloads {
            let found = self.look(&server, name, &mut used).await?;
            faults.extend(joined(&found.faults).map(|faults| format!("{name}: {faults}")));
            said.push(format!("{name} {}/{}", found.ready, found.wanted));
            if found.wanted == 0 && self.config.ready != Some(0) {
                empty.push(name.to_string());
            }
            total.ready += found.ready;
            total.wanted += found.wanted;
            total.restarts = total.restarts.max(found.restarts);
        }
        let unmet = self.config.images.keys().filter(|key| !used.contains(*key));
        faults.extend(unmet.map(|key| format!("no workload has a container {key}")));
        let said = said.join(", ");
        let verdict = match joined(&faults) {
            Some(faults) => Verdict::fail(faults).with_hint(format!(
                "look at them: `kubectl describe --namespace {} {}`",
                self.namespace, self.config.workloads[0]
            )),
            None if !empty.is_empty() => Verdict::warn(format!("{} shall have no pods", empty.join(", ")))
                .with_hint("scale it up, or say `ready: 0` where that is meant"),
            None => Verdict::pass(format!("ready: {said}")),
        };
        Ok(verdict
            .with_measurement("ready", total.ready as f64)
            .with_measurement("wanted", total.wanted as f64)
            .with_measurement("restarts", total.restarts as f64)
            .with_fact("pods", said))
    }

    fn kind(&self) -> &str {
        "k8s.workload"
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
    fn images_are_asked_of_the_containers_that_are_named() {
        let object = Object(json!({ "spec": { "template": { "spec": {
            "containers": [{ "name": "web", "image": "web:2" }, { "name": "proxy", "image": "proxy:1" }],
            "initContainers": [{ "name": "wait", "image": "wait:1" }],
        } } } }));
        let of = |images: &[(&str, &str)]| {
            let images = images.iter().map(|(name, image)| ((*name).to_owned(), (*image).to_owned())).collect();
            let mut used = BTreeSet::new();
            (wrong_images(&object, &images, &mut used), used.len())
        };
        assert_eq!(of(&[("web", "web:2"), ("wait", "wait:1")]), (vec![], 2));
        assert_eq!(
            of(&[("*", "web:2"), ("wbe", "x")]),
            (vec!["container proxy is of proxy:1, not of web:2".into()], 1)
        );
    }
}
