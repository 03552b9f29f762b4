//! Workloads: Deployments, StatefulSets, DaemonSets and ReplicaSets, how far their rollouts are and what hinders
//! them.

pub(crate) mod autoscaler;
pub mod failure;
pub(crate) mod members;
pub mod progress;
pub mod references;
pub(crate) mod revision;
pub mod status;
pub mod template;

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::kind::Kind;

/// Names a workload as `kubectl` does: `deployment/web`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct WorkloadName {
    /// What it is.
    pub kind: WorkloadKind,
    /// Its name.
    pub name: String,
}

/// Says what kind of workload it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkloadKind {
    /// A Deployment.
    Deployment,
    /// A StatefulSet.
    StatefulSet,
    /// A DaemonSet.
    DaemonSet,
    /// A ReplicaSet.
    ReplicaSet,
}

impl WorkloadKind {
    /// Returns the kind of its objects.
    pub fn kind(self) -> Kind {
        match self {
            Self::Deployment => Kind::deployment(),
            Self::StatefulSet => Kind::stateful_set(),
            Self::DaemonSet => Kind::daemon_set(),
            Self::ReplicaSet => Kind::replica_set(),
        }
    }
}

impl FromStr for WorkloadName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let hint = || {
            format!(
                "`{text}` names no workload: write deployment/NAME, statefulset/NAME, daemonset/NAME or replicaset/NAME"
            )
        };
        let (kind, name) = text.split_once('/').ok_or_else(hint)?;
        let kind = match kind.to_ascii_lowercase().as_str() {
            "deployment" | "deployments" | "deploy" => WorkloadKind::Deployment,
            "statefulset" | "statefulsets" | "sts" => WorkloadKind::StatefulSet,
            "daemonset" | "daemonsets" | "ds" => WorkloadKind::DaemonSet,
            "replicaset" | "replicasets" | "rs" => WorkloadKind::ReplicaSet,
            _ => return Err(hint()),
        };
        crate::target::check_name(name, "workload").map_err(|_| hint())?;
        Ok(Self { kind, name: name.to_owned() })
    }
}

impl TryFrom<String> for WorkloadName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<WorkloadName> for String {
    fn from(name: WorkloadName) -> Self {
        name.to_string()
    }
}

impl fmt::Display for WorkloadName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind.kind(), self.name)
    }
}

impl JsonSchema for WorkloadName {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "WorkloadName".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "description": "A workload, as kubectl names it: `deployment/web`, `statefulset/db`, `daemonset/agent`.",
            "pattern": "^[A-Za-z]+/[^/]+$",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workloads_are_named_as_kubectl_does() {
        for (text, whole) in
            [("deploy/web", "deployment/web"), ("sts/db", "statefulset/db"), ("DaemonSet/a", "daemonset/a")]
        {
            assert_eq!(text.parse::<WorkloadName>().unwrap().to_string(), whole);
        }
        for bad in ["web", "pod/web", "deployment/", "deployment/a/b"] {
            assert!(bad.parse::<WorkloadName>().unwrap_err().contains("deployment/NAME"), "{bad}");
        }
    }
}
