//! The node's own upgrade: a command on this machine, a Job on the node, or what a program brings itself.

use std::path::PathBuf;

use async_trait::async_trait;
use serde_json::{Value, json};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::secret::ExposeSecret as _;

use super::config::NodeCommandConfig;
use super::standing::FoundNode;
use crate::naming;
use crate::program;
use crate::server::ApiServer;
use crate::steps::job::{OneOff, Work};

/// Upgrades one node that is drained, and undoes that.
///
/// # Guarantees
/// What `k8s.node` promises: the node is cordoned and drained when `upgrade` or `undo` is called. `upgrade`
/// is not called again for a node once it returned well and that is on record; `undo` is called for every
/// node for which `upgrade` was called, whatever came of it. Up to `at_once` nodes are worked on side by side.
///
/// # Assumptions
/// `upgrade` copes with a call before it that did all, part or nothing; so does `undo`, of both. After a
/// crash, `settle` is called before either.
///
/// # Errors
/// As with a step: what is transient is tried again, anything else fails the step, and no further node is
/// begun.
#[async_trait]
pub trait NodeUpgrade: Send + Sync + 'static {
    /// Says in one line what is done to each node, for the plan.
    fn describe(&self) -> String;

    /// Describes the configuration as far as it makes this another upgrade; no secrets.
    fn definition(&self) -> Value {
        Value::Null
    }

    /// Tells whether it can be undone; without that, the step is irreversible.
    fn can_be_undone(&self) -> bool;

    /// Asks whether it could be done; changes nothing.
    async fn prepare(&self, _cx: &Context, _server: &ApiServer, _node: &FoundNode) -> Result<(), StepError> {
        Ok(())
    }

    /// Upgrades the node.
    async fn upgrade(&self, cx: &Context, server: &ApiServer, node: &FoundNode) -> Result<(), StepError>;

    /// Brings the node back to what was found.
    async fn undo(&self, cx: &Context, server: &ApiServer, node: &FoundNode) -> Result<(), StepError>;

    /// Ends what an interrupted call left running. Processes with the marker in their environment
    /// ([`Context::MARKER`]) are ended without it.
    async fn settle(&self, _cx: &Context) -> Result<(), StepError> {
        Ok(())
    }

    /// Removes what only undo needed.
    async fn commit(&self, _cx: &Context, _server: &ApiServer, _node: &FoundNode) -> Result<(), StepError> {
        Ok(())
    }
}

/// Runs a command on this machine for each node.
#[derive(Debug)]
pub(super) struct NodeCommand {
    pub(super) config: NodeCommandConfig,
    pub(super) directory: PathBuf,
}

impl NodeCommand {
    async fn run(&self, cx: &Context, argv: &[String], node: &FoundNode) -> Result<(), StepError> {
        let mut env = variables(node);
        for (name, value) in &self.config.env {
            env.push((name.clone(), value.resolve(cx).await?.expose_secret().to_owned()));
        }
        program::run(cx, &node.object().to_string(), &for_node(argv, node), &env, &self.directory).await.map(drop)
    }
}

/// Puts a node into the arguments of a command.
pub(super) fn for_node(argv: &[String], node: &FoundNode) -> Vec<String> {
    let put = |word: &String| {
        let word = word.replace("{node}", &node.name).replace("{address}", &node.address);
        word.replace("{version}", node.version.trim_start_matches('v'))
    };
    argv.iter().map(put).collect()
}

/// Puts a node into the environment of a command.
pub(super) fn variables(node: &FoundNode) -> Vec<(String, String)> {
    let version = node.version.trim_start_matches('v');
    [("UPGRADE_NODE", &*node.name), ("UPGRADE_NODE_ADDRESS", &node.address), ("UPGRADE_NODE_VERSION", version)]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
}

#[async_trait]
impl NodeUpgrade for NodeCommand {
    fn describe(&self) -> String {
        let line = format!("run `{}`", program::line(&self.config.run));
        if self.config.undo.is_empty() {
            line
        } else {
            format!("{line}, undone by `{}`", program::line(&self.config.undo))
        }
    }

    fn can_be_undone(&self) -> bool {
        !self.config.undo.is_empty()
    }

    async fn upgrade(&self, cx: &Context, _: &ApiServer, node: &FoundNode) -> Result<(), StepError> {
        self.run(cx, &self.config.run, node).await
    }

    async fn undo(&self, cx: &Context, _: &ApiServer, node: &FoundNode) -> Result<(), StepError> {
        self.run(cx, &self.config.undo, node).await
    }
}

/// Runs a Job on each node.
#[derive(Debug)]
pub(super) struct NodeJob {
    pub(super) namespace: String,
    pub(super) work: Work,
    pub(super) undo: Option<Work>,
}

impl NodeJob {
    /// Names a Job of a node. Names of nodes often differ only in their ends, which would be cut off.
    fn job<'a>(&self, server: &'a ApiServer, cx: &'a Context, node: &FoundNode, role: &str) -> OneOff<'a> {
        let short: String = node.uid.chars().take(8).collect();
        let name = naming::beside(&node.name, &format!("{role}-{short}"), cx);
        OneOff::new(server, cx, &self.namespace, &name)
    }
}

#[async_trait]
impl NodeUpgrade for NodeJob {
    fn describe(&self) -> String {
        let line = format!("run the Job `{}` on it", self.work.line());
        match &self.undo {
            Some(undo) => format!("{line}, undone by `{}`", undo.line()),
            None => line,
        }
    }

    fn definition(&self) -> Value {
        json!({ "namespace": self.namespace })
    }

    fn can_be_undone(&self) -> bool {
        self.undo.is_some()
    }

    async fn prepare(&self, cx: &Context, server: &ApiServer, node: &FoundNode) -> Result<(), StepError> {
        self.job(server, cx, node, "job").try_out(&self.work.clone().on(&node.name)).await?;
        match &self.undo {
            Some(undo) => self.job(server, cx, node, "undo").try_out(&undo.clone().on(&node.name)).await,
            None => Ok(()),
        }
    }

    async fn upgrade(&self, cx: &Context, server: &ApiServer, node: &FoundNode) -> Result<(), StepError> {
        self.job(server, cx, node, "job").run(&self.work.clone().on(&node.name)).await.map(drop)
    }

    async fn undo(&self, cx: &Context, server: &ApiServer, node: &FoundNode) -> Result<(), StepError> {
        // A step without it is irreversible, and never asked.
        let Some(undo) = &self.undo else { return Ok(()) };
        self.job(server, cx, node, "job")
            .undo_by(&self.job(server, cx, node, "undo"), &undo.clone().on(&node.name))
            .await
    }

    async fn commit(&self, cx: &Context, server: &ApiServer, node: &FoundNode) -> Result<(), StepError> {
        match self.job(server, cx, node, "job").remove().await {
            // Ours is gone, and somebody else's is not ours to remove.
            Err(error) if error.as_conflict().is_some() => Ok(()),
            done => done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_told_its_node() {
        let node = FoundNode {
            name: "n1".into(),
            uid: "u".into(),
            address: "10.0.0.1".into(),
            version: "v1.30.1".into(),
            unschedulable: false,
            taints: Vec::new(),
        };
        let argv = ["ssh", "root@{address}", "install", "kubelet={version}", "{node}", "{other}"].map(str::to_owned);
        let told = ["ssh", "root@10.0.0.1", "install", "kubelet=1.30.1", "n1", "{other}"].map(str::to_owned);
        assert_eq!(for_node(&argv, &node), told);
    }
}
