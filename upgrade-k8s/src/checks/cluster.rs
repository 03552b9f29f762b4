//! `k8s.cluster`: which version a cluster is of, and whether its nodes are ready and not too far from it.

use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use semver::{Version, VersionReq};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::CheckError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::verdict::Verdict;

use super::joined;
use crate::kind::Kind;
use crate::object::Object;
use crate::target::Cluster;

/// How many nodes a message names.
const NAMED: usize = 5;

/// Configures `k8s.cluster`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClusterCheckConfig {
    /// The cluster. Default: the one that `kubectl` would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The versions of the API server that pass: `">=1.27, <1.33"`. What a vendor appends does not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// How many nodes must be ready. Default: all there are, and at least one. 0 asks nothing of nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<u64>,
    /// How many minor versions a node may be behind the API server. Default 3.
    #[serde(default = "three")]
    pub skew: u64,
}

fn three() -> u64 {
    3
}

/// Asks a cluster how it is.
#[derive(Debug)]
pub struct ClusterCheck {
    config: ClusterCheckConfig,
    cluster: Arc<Cluster>,
    range: Option<VersionReq>,
}

/// What is remembered of a node.
#[derive(Debug)]
struct Node {
    name: String,
    is_ready: bool,
    is_cordoned: bool,
    version: String,
}

impl ClusterCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// There is no such target, or the range of versions is none.
    pub fn from_config(config: ClusterCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let cluster = Cluster::named(config.target.as_deref(), cx)?;
        let range = config.version.as_deref().map(|text| {
            text.parse().map_err(|error| {
                BuildError::new(format!("`{}` is not a range of versions: {error}", text.escape_debug()))
                    .at("version")
                    .with_hint("write it as `\">=1.27, <1.33\"`")
            })
        });
        Ok(Self { range: range.transpose()?, config, cluster })
    }

    fn faults(&self, server: &str, nodes: &[Node]) -> Vec<String> {
        let mut faults = Vec::new();
        let version = read_version(server);
        if let Some(range) = &self.range
            && !version.as_ref().is_some_and(|version| range.matches(version))
        {
            faults.push(format!("the API server is {server}, not {range}"));
        }
        let ready = nodes.iter().filter(|node| node.is_ready).count();
        match self.config.nodes {
            Some(0) => return faults,
            Some(least) if (ready as u64) < least => {
                faults.push(format!("{ready} nodes are ready, {least} is the least"));
                faults.extend(named("not ready", nodes.iter().filter(|node| !node.is_ready), |node| node.name.clone()));
            }
            Some(_) => {}
            None if nodes.is_empty() => faults.push("it has no nodes".into()),
            None => {
                faults.extend(named("not ready", nodes.iter().filter(|node| !node.is_ready), |node| node.name.clone()));
            }
        }
        let with_version = |node: &Node| format!("{} ({})", node.name, node.version);
        let behind = |node: &&Node| match (&version, read_version(&node.version)) {
            (Some(server), Some(node)) => server.major != node.major || server.minor > node.minor + self.config.skew,
            _ => false,
        };
        let ahead = |node: &&Node| match (&version, read_version(&node.version)) {
            (Some(server), Some(node)) => server.major == node.major && node.minor > server.minor,
            _ => false,
        };
        let label = format!("more than {} minor versions from the API server ({server})", self.config.skew);
        faults.extend(named(&label, nodes.iter().filter(behind), with_version));
        faults.extend(named(
            &format!("newer than the API server ({server})"),
            nodes.iter().filter(ahead),
            with_version,
        ));
        faults
    }
}

/// Reads what clusters call their versions: `v1.20.2`, `v1.29.3-gke.1282001`, `v1.20.2+k3s1`.
fn read_version(text: &str) -> Option<Version> {
    let text = text.strip_prefix('v').unwrap_or(text);
    let numbers = text.split(|c: char| !c.is_ascii_digit() && c != '.').next()?;
    let mut parts = numbers.split('.').map(|part| part.parse().ok());
    Some(Version::new(parts.next()??, parts.next().flatten().unwrap_or(0), parts.next().flatten().unwrap_or(0)))
}

fn named<'a>(what: &str, nodes: impl Iterator<Item = &'a Node>, say: impl Fn(&Node) -> String) -> Option<String> {
    let all: Vec<_> = nodes.map(say).collect();
    if all.is_empty() {
        return None;
    }
    let more = all.len().saturating_sub(NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    Some(format!("{what}: {}{more}", all[..all.len().min(NAMED)].join(", ")))
}

fn node(object: &Object) -> Node {
    let mut conditions = object.list("/status/conditions");
    Node {
        name: object.name().to_owned(),
        is_ready: conditions.any(|each| each["type"] == "Ready" && each["status"] == "True"),
        is_cordoned: object.at("/spec/unschedulable") == &Value::Bool(true),
        version: object.text("/status/nodeInfo/kubeletVersion").to_owned(),
    }
}

#[async_trait]
impl Check for ClusterCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let server = self.cluster.connect(cx).await?;
        let told = server.get_path("/version", &[], || "asking the cluster for its version".into()).await?;
        let version = told["gitVersion"].as_str().unwrap_or_default();
        // Not everybody may read nodes: who asks nothing of them needs no right to.
        let nodes: Vec<_> = if self.config.nodes == Some(0) {
            Vec::new()
        } else {
            server.list(&Kind::node(), None, "", "").await?.0.iter().map(node).collect()
        };
        let ready = nodes.iter().filter(|node| node.is_ready).count();
        let cordoned = nodes.iter().filter(|node| node.is_cordoned);
        let verdict = match joined(&self.faults(version, &nodes)) {
            Some(faults) => Verdict::fail(faults).with_hint(
                "`kubectl get nodes` shows them; bring nodes and API server to versions that go together before the upgrade",
            ),
            None => match named("cordoned", cordoned, |node| node.name.clone()) {
                Some(cordoned) => Verdict::warn(format!("Kubernetes {version}; {ready} nodes are ready, {cordoned}"))
                    .with_hint("`kubectl uncordon` them, if nobody works on them"),
                None => Verdict::pass(format!("Kubernetes {version}, {ready} nodes are ready")),
            },
        };
        Ok(verdict
            .with_measurement("nodes", nodes.len() as f64)
            .with_measurement("ready", ready as f64)
            .with_fact("version", version)
            .with_fact("platform", told["platform"].as_str().unwrap_or_default()))
    }

    fn kind(&self) -> &str {
        "k8s.cluster"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_vendors_write_them() {
        for (text, version) in [
            ("v1.20.2", Version::new(1, 20, 2)),
            ("v1.29.3-gke.1282001", Version::new(1, 29, 3)),
            ("v1.20.2+k3s1", Version::new(1, 20, 2)),
            ("1.30", Version::new(1, 30, 0)),
        ] {
            assert_eq!(read_version(text), Some(version), "{text}");
        }
        assert_eq!(read_version("unknown"), None);
    }

    #[test]
    fn many_nodes_are_counted_after_the_first() {
        let nodes: Vec<_> = (0..7)
            .map(|number| Node {
                name: format!("n{number}"),
                is_ready: false,
                is_cordoned: false,
                version: String::new(),
            })
            .collect();
        let said = named("not ready", nodes.iter(), |node| node.name.clone()).unwrap();
        assert_eq!(said, "not ready: n0, n1, n2, n3, n4 and 2 more");
    }
}
