//! What can be asked of nodes, and what cannot.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use upgrade_core::registry::BuildError;
use upgrade_core::text_or_secret::TextOrSecret;
use upgrade_core::units::Span;

use crate::steps::job::{EnvSource, JobConfig, UndoJobConfig};
use crate::target::check_name;

/// Configures `k8s.node`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NodeConfig {
    /// The cluster. Default: the one that `kubectl` would use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The nodes, in this order. Either this or `selector`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<String>,
    /// A label selector: the nodes that have these labels, by name. Either this or `nodes`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// How many nodes are out of service at once. Default 1.
    pub at_once: usize,
    /// How nodes are drained.
    pub drain: DrainConfig,
    /// The node's own upgrade, as a command on this machine. Either this or `job`; with neither, nodes are
    /// only drained, and awaited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<NodeCommandConfig>,
    /// The node's own upgrade, as a privileged Job on the node. Either this or `command`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job: Option<NodeJobConfig>,
    /// The kubelet's version that a node must have afterwards: `1.31.2`. A node that has it already is left
    /// alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// How long a node may take to be ready afterwards, and of that version. Default 10 m.
    pub ready_within: Span,
    /// A command on this machine that must end with 0 before a node serves again; `{node}`, `{address}` and
    /// `{version}` as in `command`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub verify: Vec<String>,
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            target: None,
            nodes: Vec::new(),
            selector: None,
            at_once: 1,
            drain: DrainConfig::default(),
            command: None,
            job: None,
            version: None,
            ready_within: crate::steps::ten_minutes(),
            verify: Vec::new(),
        }
    }
}

/// Says how a node is drained; the names are those of `kubectl drain`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DrainConfig {
    /// How long draining one node may take. Default 10 m.
    pub deadline: Span,
    /// How long a pod may take to end. Default: its own setting.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grace_period: Option<Span>,
    /// Evicts pods that no controller makes anew, too: they are gone then.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
    /// Evicts pods with `emptyDir` volumes, too: what is in them is gone then.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub delete_emptydir_data: bool,
}

impl Default for DrainConfig {
    fn default() -> Self {
        let deadline = crate::steps::ten_minutes();
        Self { deadline, grace_period: None, force: false, delete_emptydir_data: false }
    }
}

/// Configures a node's own upgrade as a command on this machine.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NodeCommandConfig {
    /// The program and its arguments; `{node}` stands for the node's name, `{address}` for its address and
    /// `{version}` for the version of its kubelet that was found. No shell reads them.
    pub run: Vec<String>,
    /// The program and its arguments that undo it. Must cope with a command that did all, part or nothing,
    /// and with being run twice.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub undo: Vec<String>,
    /// Variables added to the environment: texts, or references to secrets.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, TextOrSecret>,
    /// The working directory; the directory of the pipeline file if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub directory: Option<PathBuf>,
}

/// Configures a node's own upgrade as a Job whose pod is on the node. With `image`, it is given the machine:
/// privileged, in the machine's namespaces, its root at `/host`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NodeJobConfig {
    /// The namespace. Default: the target's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// The image. Either this or `template`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// What runs, in place of the image's entrypoint.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// Its arguments, in place of the image's own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Variables of its environment: texts, or references to secrets.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, TextOrSecret>,
    /// Secrets and ConfigMaps all of whose keys become variables: `secret/db`, `configmap/shop`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub env_from: Vec<EnvSource>,
    /// The service account of its pod. Default: the namespace's `default`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_account: Option<String>,
    /// A whole pod template, `metadata` and `spec`, for everything else.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template: Option<Map<String, Value>>,
    /// How long it may take, its retries included. Default 10 m.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Span>,
    /// How often the cluster starts another pod after one has failed. Default 0.
    pub retries: u32,
    /// The Job that undoes it. Must cope with one that did all, part or nothing, and with being run twice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub undo: Option<UndoJobConfig>,
}

impl NodeJobConfig {
    /// Returns it as `k8s.job` has it.
    pub(super) fn job(&self) -> JobConfig {
        JobConfig {
            target: None,
            namespace: self.namespace.clone(),
            name: "node".into(),
            image: self.image.clone(),
            command: self.command.clone(),
            args: self.args.clone(),
            env: self.env.clone(),
            env_from: self.env_from.clone(),
            service_account: self.service_account.clone(),
            template: self.template.clone(),
            deadline: self.deadline.unwrap_or_else(crate::steps::ten_minutes),
            retries: self.retries,
            undo: self.undo.clone(),
        }
    }
}

impl NodeConfig {
    /// Refuses what contradicts itself.
    pub(super) fn check(&self) -> Result<(), BuildError> {
        match (self.nodes.is_empty(), &self.selector) {
            (true, None) => {
                return Err(BuildError::new("it does not say which nodes")
                    .at("nodes")
                    .with_hint("name them, or write a `selector`: `selector: node-role.kubernetes.io/worker`"));
            }
            (false, Some(_)) => return Err(BuildError::new("either `nodes` or `selector`, not both").at("selector")),
            (true, Some(selector)) if selector.trim().is_empty() => {
                return Err(BuildError::new("an empty selector means every node, the control plane's too")
                    .at("selector")
                    .with_hint("say so by a label that all have: `kubernetes.io/os=linux`"));
            }
            _ => {}
        }
        for (at, name) in self.nodes.iter().enumerate() {
            check_name(name, &format!("nodes.{at}"))?;
            if self.nodes[..at].contains(name) {
                return Err(BuildError::new(format!("{name} is there twice")).at(format!("nodes.{at}")));
            }
        }
        if self.at_once == 0 {
            return Err(BuildError::new("no node would ever be upgraded").at("at_once"));
        }
        for (key, span) in [("drain.deadline", self.drain.deadline), ("ready_within", self.ready_within)] {
            if span.0.is_zero() {
                return Err(BuildError::new("it would have no time at all").at(key));
            }
        }
        if self.version.as_deref().is_some_and(|version| plain(version).is_empty()) {
            return Err(BuildError::new("there is no version").at("version").with_hint("write it as `1.31.2`"));
        }
        if self.command.is_some() && self.job.is_some() {
            return Err(BuildError::new("either `command` or `job`, not both").at("job"));
        }
        if let Some(command) = &self.command {
            if command.run.first().is_none_or(String::is_empty) {
                return Err(BuildError::new("there is no command")
                    .at("command.run")
                    .with_hint("write `run: [ssh, \"{address}\", program, argument]`"));
            }
            if let Some(name) = command.env.keys().find(|name| name.is_empty() || name.contains(['=', '\0'])) {
                let message = format!("`{}` is not the name of a variable", name.escape_debug());
                return Err(BuildError::new(message).at("command.env"));
            }
        }
        let undo = self.command.as_ref().map(|command| &command.undo);
        for (key, argv) in [("command.undo", undo), ("verify", Some(&self.verify))] {
            if argv.and_then(|argv| argv.first()).is_some_and(String::is_empty) {
                return Err(BuildError::new("the program has no name").at(key));
            }
        }
        Ok(())
    }
}

/// Returns a version without the `v` before it.
fn plain(version: &str) -> &str {
    version.trim().trim_start_matches('v')
}

/// Tells whether a kubelet's version is the one that is wanted, whatever a vendor appends: `v1.31.2-eks-1`.
pub(super) fn is_version(kubelet: &str, wanted: &str) -> bool {
    let rest = plain(kubelet).strip_prefix(plain(wanted));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '+']))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_contradicts_itself_names_its_key() {
        for (config, key) in [
            (json!({}), "nodes"),
            (json!({ "nodes": ["a"], "selector": "b" }), "selector"),
            (json!({ "selector": " " }), "selector"),
            (json!({ "nodes": ["a/b"] }), "nodes.0"),
            (json!({ "nodes": ["a", "a"] }), "nodes.1"),
            (json!({ "nodes": ["a"], "at_once": 0 }), "at_once"),
            (json!({ "nodes": ["a"], "drain": { "deadline": "0s" } }), "drain.deadline"),
            (json!({ "nodes": ["a"], "ready_within": "0s" }), "ready_within"),
            (json!({ "nodes": ["a"], "version": "v" }), "version"),
            (json!({ "nodes": ["a"], "command": { "run": ["x"] }, "job": { "image": "x" } }), "job"),
            (json!({ "nodes": ["a"], "command": {} }), "command.run"),
            (json!({ "nodes": ["a"], "command": { "run": ["x"], "undo": [""] } }), "command.undo"),
            (json!({ "nodes": ["a"], "command": { "run": ["x"], "env": { "A=B": "" } } }), "command.env"),
            (json!({ "nodes": ["a"], "verify": [""] }), "verify"),
        ] {
            let read: NodeConfig = serde_json::from_value(config.clone()).unwrap();
            assert_eq!(read.check().unwrap_err().key.as_deref(), Some(key), "{config}");
        }
    }

    #[test]
    fn what_a_vendor_appends_to_a_version_does_not_count() {
        for (kubelet, wanted, is) in [
            ("v1.31.2", "1.31.2", true),
            ("v1.31.2", "v1.31.2", true),
            ("v1.31.2-eks-7f9249a", "1.31.2", true),
            ("v1.31.2+k3s1", "1.31.2", true),
            ("v1.31.20", "1.31.2", false),
            ("v1.30.2", "1.31.2", false),
            ("", "1.31.2", false),
        ] {
            assert_eq!(is_version(kubelet, wanted), is, "{kubelet} {wanted}");
        }
    }
}
