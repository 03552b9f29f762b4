//! The way forward and back, of one node and of all of them.

use std::future::Future;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::time::{Instant, timeout_at};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use super::config::is_version;
use super::drain::{Plan, drain};
use super::standing::{FoundNode, Look, Standing, not_ready, other, version};
use super::work::{for_node, variables};
use super::{NodeOutput, NodeStep, NodeUndo, UpgradedNode};
use crate::error::not_cancelled;
use crate::kind::Kind;
use crate::object::Object;
use crate::program;
use crate::server::ApiServer;

impl NodeStep {
    /// Upgrades the nodes one after the other, a few at a time; after a failure, those that are under way end.
    pub(super) async fn forward(&self, cx: &Context, undo: &NodeUndo) -> Result<NodeOutput, StepError> {
        let server = &self.cluster.connect(cx).await?;
        let mut output = NodeOutput { nodes: Vec::new(), gone: Vec::new() };
        let total = undo.nodes.len() as u64;
        let ended = self.each(
            undo.nodes.iter(),
            true,
            |node| self.bring(server, cx, node),
            |node, reached| {
                match reached {
                    Some(version) => output.nodes.push(UpgradedNode { name: node.name.clone(), version }),
                    None => output.gone.push(node.name.clone()),
                }
                let done = (output.nodes.len() + output.gone.len()) as u64;
                cx.progress(done, total, format!("{} is done", node.name));
            },
        );
        ended.await?;
        output.nodes.sort_by_key(|node| undo.nodes.iter().position(|found| found.name == node.name));
        Ok(output)
    }

    /// Takes back every node that was begun, the last one first; what fails with one holds up no other.
    pub(super) async fn back(&self, cx: &Context, undo: &NodeUndo) -> Result<(), StepError> {
        let server = &self.cluster.connect(cx).await?;
        loop {
            let mut was_begun = false;
            let nodes = undo.nodes.iter().rev();
            self.each(nodes, false, |node| self.take_back(server, cx, node), |_, begun| was_begun |= begun).await?;
            // A request of a driver that died may come through only now: that is taken back as well.
            if !was_begun {
                return Ok(());
            }
        }
    }

    /// Works on nodes, `at_once` of them at a time; returns the first failure when all that was begun has ended.
    async fn each<'a, T, F: Future<Output = (&'a FoundNode, Result<T, StepError>)>>(
        &self,
        nodes: impl Iterator<Item = &'a FoundNode>,
        stops: bool,
        mut work: impl FnMut(&'a FoundNode) -> F,
        mut done: impl FnMut(&'a FoundNode, T),
    ) -> Result<(), StepError> {
        let (mut nodes, mut running, mut failure) = (nodes, FuturesUnordered::new(), None);
        loop {
            while running.len() < self.config.at_once && !(stops && failure.is_some()) {
                let Some(node) = nodes.next() else { break };
                running.push(work(node));
            }
            match running.next().await {
                Some((node, Ok(reached))) => done(node, reached),
                Some((_, Err(error))) => drop(failure.get_or_insert(error)),
                None => return failure.map_or(Ok(()), Err),
            }
        }
    }

    async fn bring<'a>(
        &self,
        server: &ApiServer,
        cx: &Context,
        found: &'a FoundNode,
    ) -> (&'a FoundNode, Result<Option<String>, StepError>) {
        (found, self.upgrade_one(server, cx, found).await)
    }

    /// Brings a node to its end, from wherever it is; returns its version, or none where it is gone.
    async fn upgrade_one(
        &self,
        server: &ApiServer,
        cx: &Context,
        found: &FoundNode,
    ) -> Result<Option<String>, StepError> {
        let mut is_first = true;
        loop {
            not_cancelled(cx)?;
            let (node, standing) = match found.look(server, cx).await? {
                Look::Here(node, standing) => (node, standing),
                // Its autoscaler was faster: there is nothing to upgrade.
                Look::Gone if is_first => return Ok(None),
                Look::Gone | Look::Another => return Err(found.gone()),
            };
            is_first = false;
            found.expect(&node, cx)?;
            match standing {
                None => {
                    refuse_other(&node, cx)?;
                    Plan::of(server, cx, &found.name, &self.config.drain).await?.allow(&found.name)?;
                    found.shift(server, cx, Some(Standing::Cordoned), false).await?;
                }
                Some(Standing::Cordoned | Standing::Returning) => {
                    drain(server, cx, &found.name, &self.config.drain).await?;
                    found.shift(server, cx, Some(Standing::Upgrading), false).await?;
                }
                Some(Standing::Upgrading) => {
                    if let Some(upgrade) = &self.upgrade {
                        cx.progress(0, None, format!("upgrading {}", found.name));
                        upgrade.upgrade(cx, server, found).await?;
                    }
                    found.shift(server, cx, Some(Standing::Upgraded), false).await?;
                }
                Some(Standing::Upgraded) => {
                    self.await_ready(server, cx, found, self.config.version.as_deref()).await?;
                    if !self.config.verify.is_empty() {
                        let argv = for_node(&self.config.verify, found);
                        let subject = found.object().to_string();
                        program::run(cx, &subject, &argv, &variables(found), &self.directory).await?;
                    }
                    found.shift(server, cx, Some(Standing::Done), self.upgrade.is_some()).await?;
                }
                Some(Standing::Done) => return Ok(Some(version(&node).to_owned())),
            }
        }
    }

    /// Takes one node back, from wherever it is; tells whether it was begun at all.
    async fn take_back<'a>(
        &self,
        server: &ApiServer,
        cx: &Context,
        found: &'a FoundNode,
    ) -> (&'a FoundNode, Result<bool, StepError>) {
        (found, self.undo_one(server, cx, found).await)
    }

    async fn undo_one(&self, server: &ApiServer, cx: &Context, found: &FoundNode) -> Result<bool, StepError> {
        let mut was_begun = false;
        loop {
            not_cancelled(cx)?;
            let (node, standing) = match found.look(server, cx).await? {
                Look::Here(node, standing) => (node, standing),
                Look::Gone => {
                    let message = format!("node {} is gone: there is nothing to put back", found.name);
                    tracing::warn!("{message}");
                    cx.progress(0, None, message);
                    return Ok(was_begun);
                }
                Look::Another => return Err(found.gone()),
            };
            let Some(standing) = standing else { return Ok(was_begun) };
            was_begun = true;
            found.expect(&node, cx)?;
            match (standing, &self.upgrade) {
                (Standing::Cordoned, _) | (_, None) => found.shift(server, cx, None, false).await?,
                (Standing::Done, Some(_)) => {
                    found.shift(server, cx, Some(Standing::Returning), false).await?;
                }
                (Standing::Returning, Some(_)) => {
                    drain(server, cx, &found.name, &self.config.drain).await?;
                    found.shift(server, cx, Some(Standing::Upgrading), false).await?;
                }
                (Standing::Upgrading | Standing::Upgraded, Some(upgrade)) => {
                    cx.progress(0, None, format!("taking {} back", found.name));
                    upgrade.undo(cx, server, found).await?;
                    let wanted = self.config.version.as_ref().map(|_| found.version.as_str());
                    self.await_ready(server, cx, found, wanted).await?;
                    found.shift(server, cx, None, true).await?;
                }
            }
        }
    }

    /// Waits until a node is ready, and of a version if one is wanted.
    async fn await_ready(
        &self,
        server: &ApiServer,
        cx: &Context,
        found: &FoundNode,
        wanted: Option<&str>,
    ) -> Result<(), StepError> {
        let until = Instant::now() + self.config.ready_within.0;
        let keep = |node: &Object| Some((node.uid().to_owned(), version(node).to_owned(), not_ready(node)));
        let mut nodes =
            server.follow(Kind::node(), None, "", keep).with_fields(format!("metadata.name={}", found.name));
        loop {
            let in_time = match timeout_at(until, nodes.changed()).await {
                Ok(changed) => changed.map(|()| true)?,
                Err(_) => false,
            };
            let Some((_, version, not_ready)) = nodes.objects().get(&found.uid) else { return Err(found.gone()) };
            let lacks = match (not_ready, wanted) {
                (Some(why), _) => why.clone(),
                (None, Some(wanted)) if !is_version(version, wanted) => {
                    format!("of version {version}, not {}", wanted.trim_start_matches('v'))
                }
                _ => return Ok(()),
            };
            if !in_time {
                let text = format!("node {} is {lacks}, after {}", found.name, self.config.ready_within);
                return Err(StepError::permanent(text).with_hint(format!(
                    "`kubectl describe node {}`, and its kubelet's journal; `ready_within` where it only needs longer",
                    found.name
                )));
            }
            cx.progress(0, None, format!("waiting for {}: it is {lacks}", found.name));
        }
    }
}

/// Refuses a node that another step has begun with.
pub(super) fn refuse_other(node: &Object, cx: &Context) -> Result<(), StepError> {
    let Some(who) = other(node, cx) else { return Ok(()) };
    Err(StepError::permanent(format!("node {} is in the hands of {who} (run/step)", node.name())).with_hint(
        "let that run end: `upgrade status`; of a run that nobody knows any more, remove its annotation \
         `upgrade-rs.github.io/node-…` from the node",
    ))
}
