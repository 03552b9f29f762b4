//! `k8s.node`: nodes cordoned, drained and upgraded, a few at a time, and their cordon put back as it was found.

mod config;
mod drain;
mod drive;
mod standing;
mod work;

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use upgrade_core::AnyStep;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::leftovers;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Change, Effect, Prepared, Step};
use upgrade_core::target::Target;
use upgrade_core::undoable::{OptionalRollback, Undoable};

pub use config::{DrainConfig, NodeCommandConfig, NodeConfig, NodeJobConfig};
pub use standing::FoundNode;
pub use work::NodeUpgrade;

use self::config::is_version;
use self::drain::Plan;
use self::drive::refuse_other;
use self::standing::{not_ready, object, version};
use self::work::{NodeCommand, NodeJob};
use super::job::JobConfig;
use crate::kind::Kind;
use crate::object::Object;
use crate::server::ApiServer;
use crate::target::{Cluster, check_name};

/// Upgrades nodes, a few at a time: what cannot be undone, or [`UndoableNode`].
#[derive(Clone)]
pub struct NodeStep {
    config: NodeConfig,
    cluster: Arc<Cluster>,
    directory: PathBuf,
    upgrade: Option<Arc<dyn NodeUpgrade>>,
}

/// Holds a [`NodeStep`] that can be undone: one that only drains, or whose own upgrade of a node can be undone.
pub type UndoableNode = Undoable<NodeStep>;

/// Holds what was found of every node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeUndo {
    /// The nodes, in the order in which they are upgraded.
    pub nodes: Vec<FoundNode>,
}

/// Tells which nodes were upgraded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeOutput {
    /// The nodes.
    pub nodes: Vec<UpgradedNode>,
    /// Nodes that were gone before it was their turn.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gone: Vec<String>,
}

/// Tells how a node is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradedNode {
    /// Its name.
    pub name: String,
    /// The version of its kubelet.
    pub version: String,
}

impl std::fmt::Debug for NodeStep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NodeStep").field("config", &self.config).finish_non_exhaustive()
    }
}

impl NodeStep {
    /// Makes the step from its configuration, without regard to whether it can be undone.
    ///
    /// # Errors
    /// There is no such target, or keys are missing or contradict each other.
    pub fn from_config(config: NodeConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let cluster = Cluster::named(config.target.as_deref(), cx)?;
        config.check()?;
        let upgrade: Option<Arc<dyn NodeUpgrade>> = if let Some(command) = &config.command {
            let directory = cx.path(command.directory.clone().unwrap_or_default());
            Some(Arc::new(NodeCommand { config: command.clone(), directory }))
        } else if let Some(job) = &config.job {
            let namespace = job.namespace.clone().unwrap_or_else(|| cluster.namespace().to_owned());
            check_name(&namespace, "job.namespace")?;
            let job: JobConfig = job.job();
            let within = |error: BuildError| {
                let key = format!("job.{}", error.key.as_deref().unwrap_or_default());
                error.at(key)
            };
            let (work, undo) = (job.work().map_err(within)?, job.undo_work().map_err(within)?);
            Some(Arc::new(NodeJob { namespace, work, undo }))
        } else {
            None
        };
        let directory = cx.path(PathBuf::new());
        Ok(Self { config, cluster, directory, upgrade })
    }

    /// Makes a step whose nodes are upgraded by a program's own means.
    ///
    /// # Errors
    /// As [`NodeStep::from_config`]; the configuration has a `command` or a `job` as well.
    pub fn upgraded_by(config: NodeConfig, upgrade: impl NodeUpgrade, cx: &BuildContext) -> Result<Self, BuildError> {
        let both = [("command", config.command.is_some()), ("job", config.job.is_some())];
        if let Some((key, _)) = both.iter().find(|(_, given)| *given) {
            return Err(BuildError::new("nodes are upgraded by something else already").at(*key));
        }
        Ok(Self { upgrade: Some(Arc::new(upgrade)), ..Self::from_config(config, cx)? })
    }

    /// Makes the step from its configuration: irreversible where nodes have an upgrade of their own without `undo`.
    ///
    /// # Errors
    /// As [`NodeStep::from_config`].
    pub fn any_from_config(config: NodeConfig, cx: &BuildContext) -> Result<AnyStep, BuildError> {
        Self::from_config(config, cx).map(AnyStep::optionally_reversible)
    }

    async fn find(&self, server: &ApiServer) -> Result<Vec<Object>, StepError> {
        let mut nodes = Vec::new();
        if let Some(selector) = &self.config.selector {
            nodes = server.list(&Kind::node(), None, selector, "").await?.0;
            nodes.sort_by(|a, b| a.name().cmp(b.name()));
            if nodes.is_empty() {
                return Err(StepError::permanent(format!("no node has the labels {selector}"))
                    .with_hint("correct `selector`: `kubectl get nodes --show-labels`"));
            }
        }
        for name in &self.config.nodes {
            nodes.push(server.require(&object(name)).await?);
        }
        Ok(nodes)
    }

    /// Asks whether a node can be upgraded, and says what would be done with it.
    async fn foresee(
        &self,
        server: &ApiServer,
        cx: &Context,
        node: &Object,
        found: &FoundNode,
    ) -> Result<Change, StepError> {
        refuse_other(node, cx)?;
        let plan = Plan::of(server, cx, &found.name, &self.config.drain).await?;
        let asked = async {
            if let Some(why) = not_ready(node) {
                return Err(StepError::permanent(format!("node {} is {why} before it is upgraded", found.name))
                    .with_hint("repair it first, or leave it out"));
            }
            plan.allow(&found.name)?;
            match &self.upgrade {
                Some(upgrade) => upgrade.prepare(cx, server, found).await,
                None => Ok(()),
            }
        };
        let mut summary = vec![match &self.config.version {
            Some(wanted) => format!("{} -> {}", found.version, wanted),
            None => found.version.clone(),
        }];
        let stay = if plan.of_daemon_sets == 0 {
            String::new()
        } else {
            format!(", {} of DaemonSets stay", plan.of_daemon_sets)
        };
        summary.push(format!("{} pods are evicted{stay}", plan.goes));
        summary.extend(self.upgrade.as_ref().map(|upgrade| upgrade.describe()));
        summary.extend(found.unschedulable.then(|| "it stays cordoned, as it is".to_owned()));
        match asked.await {
            // What hinders it may be gone when the steps before have run.
            Err(error) if cx.is_dry_run() => summary.push(format!("not as it is now: {}", error.message())),
            done => done?,
        }
        let change = Change::new(Effect::Run, found.object().to_string()).with_summary(summary.join("; "));
        Ok(if self.config.drain.force || self.config.drain.delete_emptydir_data {
            change.undo_loses("pods without a controller, and what is in emptyDir volumes of evicted pods")
        } else {
            change
        })
    }
}

#[async_trait]
impl Step for NodeStep {
    const KIND: &'static str = "k8s.node";
    type Undo = NodeUndo;
    type Output = NodeOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<NodeUndo, NodeOutput>, StepError> {
        let server = self.cluster.connect(cx).await?;
        let (mut nodes, mut changes, mut already) = (Vec::new(), Vec::new(), Vec::new());
        for node in self.find(&server).await? {
            let is_there = self.config.version.as_ref().is_some_and(|wanted| is_version(version(&node), wanted));
            if is_there && not_ready(&node).is_none() {
                already.push(UpgradedNode { name: node.name().to_owned(), version: version(&node).to_owned() });
                continue;
            }
            let found = FoundNode::of(&node);
            changes.push(self.foresee(&server, cx, &node, &found).await?);
            nodes.push(found);
        }
        if nodes.is_empty() {
            let reason = format!("{} nodes are of that version", already.len());
            return Ok(Prepared::unchanged(NodeOutput { nodes: already, gone: Vec::new() }, reason));
        }
        Ok(Prepared::change(NodeUndo { nodes }, changes))
    }

    async fn apply(&self, cx: &Context, undo: &NodeUndo) -> Result<NodeOutput, StepError> {
        self.forward(cx, undo).await
    }

    async fn settle(&self, cx: &Context, _: &NodeUndo) -> Result<(), StepError> {
        leftovers::end(cx).await?;
        match &self.upgrade {
            Some(upgrade) => upgrade.settle(cx).await,
            None => Ok(()),
        }
    }

    async fn commit(&self, cx: &Context, undo: &NodeUndo) -> Result<(), StepError> {
        let server = self.cluster.connect(cx).await?;
        for node in &undo.nodes {
            if let Some(upgrade) = &self.upgrade {
                upgrade.commit(cx, &server, node).await?;
            }
            node.forget(&server, cx).await?;
        }
        Ok(())
    }

    fn definition(&self) -> Value {
        let upgrade = self.upgrade.as_ref().map(|upgrade| upgrade.definition());
        json!({ "config": self.config, "upgrade": upgrade })
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        // Which nodes a selector means is not known yet, and two runs that drain nodes hinder each other anyway.
        vec![self.cluster.part("nodes", "all")]
    }
}

#[async_trait]
impl OptionalRollback for NodeStep {
    fn irreversible_because(&self) -> Option<&'static str> {
        let can = self.upgrade.as_ref().is_none_or(|upgrade| upgrade.can_be_undone());
        (!can).then_some("the node's own upgrade has no `undo`")
    }

    async fn rollback(&self, cx: &Context, undo: &NodeUndo, _: Option<&NodeOutput>) -> Result<(), StepError> {
        self.back(cx, undo).await
    }
}
