//! How far one node is: written on the node itself, in the same request that changes its cordon.
//!
//! ```text
//!        cordon           drained          own upgrade ended well      Ready, version, verified: uncordon
//!  found ──────▶ cordoned ──────▶ upgrading ──────▶ upgraded ──────────▶ done
//!    ▲              │               │  ▲               │                  │ cordon again
//!    │   uncordon   │    own upgrade│  │drained        │                  ▼
//!    └──────────────┴───────◀───────┴──┼──────◀────────┘              returning
//!                        undone        └──────────────────────────────────┘
//! ```
//!
//! Taking back reads the way forward's state, which its checkpoints do not show; and a write that is either
//! wholly there or not leaves no moment in which a node is cordoned and nobody knows by whom. What is on the
//! node is removed when it is taken back, or at commit. "Uncordon" is the cordon state that was found.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};

use crate::kind::Kind;
use crate::naming;
use crate::object::{Object, ObjectName, patch};
use crate::server::ApiServer;

/// What the annotation of a step on a node begins with; the mark of the step follows.
const ANNOTATION: &str = "upgrade-rs.github.io/node-";
/// The taints that the cluster's own controllers set and remove.
const OF_CONTROLLERS: [&str; 2] = ["node.kubernetes.io/", "node.cloudprovider.kubernetes.io/"];

/// Holds what was found of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundNode {
    /// Its name.
    pub name: String,
    /// What tells it from another of that name.
    pub uid: String,
    /// Where it is reached: its internal address, or its name.
    pub address: String,
    /// The version of its kubelet.
    pub version: String,
    /// Whether it was cordoned.
    pub unschedulable: bool,
    /// Its taints, but for those that the cluster sets itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub taints: Vec<Value>,
}

/// Says how far the step is with a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    Cordoned,
    Upgrading,
    Upgraded,
    Done,
    Returning,
}

impl Standing {
    const ALL: [(Self, &str); 5] = [
        (Self::Cordoned, "cordoned"),
        (Self::Upgrading, "upgrading"),
        (Self::Upgraded, "upgraded"),
        (Self::Done, "done"),
        (Self::Returning, "returning"),
    ];

    fn word(self) -> &'static str {
        Self::ALL.iter().find(|(standing, _)| *standing == self).map_or("", |(_, word)| word)
    }

    /// Tells whether the node is cordoned by the step.
    fn holds(self) -> bool {
        self != Self::Done
    }
}

/// Says what is found where a node should be.
#[derive(Debug)]
pub(super) enum Look {
    /// It is as far as this; none where the step has not begun with it.
    Here(Object, Option<Standing>),
    /// The node is gone.
    Gone,
    /// Another node has its name.
    Another,
}

impl FoundNode {
    /// Records a node.
    pub(super) fn of(node: &Object) -> Self {
        let address = |kind: &str| {
            let found = node.list("/status/addresses").find(|each| each["type"] == kind)?;
            found["address"].as_str().map(str::to_owned)
        };
        Self {
            name: node.name().to_owned(),
            uid: node.uid().to_owned(),
            address: address("InternalIP").or_else(|| address("Hostname")).unwrap_or_else(|| node.name().to_owned()),
            version: version(node).to_owned(),
            unschedulable: is_cordoned(node),
            taints: own_taints(node).cloned().collect(),
        }
    }

    /// Returns the node's address in the cluster.
    pub(super) fn object(&self) -> ObjectName {
        object(&self.name)
    }

    /// Looks how far the step is with it.
    ///
    /// # Errors
    /// The cluster cannot be asked.
    pub(super) async fn look(&self, server: &ApiServer, cx: &Context) -> Result<Look, StepError> {
        Ok(match server.get(&self.object()).await? {
            Some(node) if node.uid() == self.uid => {
                let standing = standing(&node, cx);
                Look::Here(node, standing)
            }
            Some(_) => Look::Another,
            None => Look::Gone,
        })
    }

    /// Says that the node is gone.
    pub(super) fn gone(&self) -> StepError {
        self.conflict("gone, or another one of that name").with_hint(
            "find out who deletes nodes while they are upgraded: an autoscaler leaves alone what is annotated with \
             `cluster-autoscaler.kubernetes.io/scale-down-disabled=true`",
        )
    }

    /// Brings the node from the state in which it is found to the next; none is as it was found, without a
    /// trace of the step. With `taints`, those that were found and are gone are put back, too.
    ///
    /// # Errors
    /// Somebody else has cordoned or uncordoned it, or it is gone: a conflict.
    pub(super) async fn shift(
        &self,
        server: &ApiServer,
        cx: &Context,
        to: Option<Standing>,
        taints: bool,
    ) -> Result<(), StepError> {
        let decide = |node: &Object| {
            if node.uid() != self.uid {
                return Err(self.gone());
            }
            self.expect(node, cx)?;
            if standing(node, cx) == to {
                return Ok(None);
            }
            Ok(Some(patch(node, self.parts(node, cx, to, taints))))
        };
        match server.change(&self.object(), decide).await {
            Ok(_) => Ok(()),
            Err(error) => match self.look(server, cx).await {
                Ok(Look::Gone | Look::Another) => Err(self.gone()),
                _ => Err(error),
            },
        }
    }

    /// Removes what the step has written on the node, and nothing else.
    ///
    /// # Errors
    /// As [`ApiServer`] says.
    pub(super) async fn forget(&self, server: &ApiServer, cx: &Context) -> Result<(), StepError> {
        let Look::Here(_, Some(_)) = self.look(server, cx).await? else { return Ok(()) };
        let path = format!("/metadata/annotations/{}", annotation(cx).replace('/', "~1"));
        let decide = |node: &Object| Ok(standing(node, cx).map(|_| patch(node, [(path.clone(), None)])));
        match server.change(&self.object(), decide).await {
            Err(error) => match self.look(server, cx).await? {
                Look::Here(_, Some(_)) => Err(error),
                _ => Ok(()),
            },
            Ok(_) => Ok(()),
        }
    }

    /// Asks that the node is cordoned as it was left.
    ///
    /// # Errors
    /// It is not, which is a conflict, unless the step is to win.
    pub(super) fn expect(&self, node: &Object, cx: &Context) -> Result<(), StepError> {
        let left = match standing(node, cx) {
            Some(standing) if standing.holds() => true,
            _ => self.unschedulable,
        };
        if is_cordoned(node) == left || cx.on_conflict() == OnConflict::Overwrite {
            return Ok(());
        }
        Err(self.conflict(in_words(is_cordoned(node))))
    }

    fn conflict(&self, present: &str) -> StepError {
        StepError::conflict(Conflict {
            subject: self.object().to_string(),
            found: in_words(self.unschedulable).into(),
            intended: "cordoned while it is upgraded, then as found".into(),
            present: present.into(),
        })
    }

    fn parts(&self, node: &Object, cx: &Context, to: Option<Standing>, taints: bool) -> Vec<(String, Option<Value>)> {
        let cordon = to.is_some_and(Standing::holds) || self.unschedulable;
        let mut parts = vec![("/spec/unschedulable".to_owned(), cordon.then_some(json!(true)))];
        let name = annotation(cx);
        parts.push(match to {
            Some(to) if node.at("/metadata/annotations").is_object() => {
                (format!("/metadata/annotations/{}", name.replace('/', "~1")), Some(json!(value(cx, to))))
            }
            Some(to) => ("/metadata/annotations".to_owned(), Some(json!({ (name): value(cx, to) }))),
            None => (format!("/metadata/annotations/{}", name.replace('/', "~1")), None),
        });
        let missing: Vec<_> =
            self.taints.iter().filter(|taint| !own_taints(node).any(|own| same(own, taint))).collect();
        if taints && !missing.is_empty() {
            let all: Vec<_> = node.list("/spec/taints").chain(missing).cloned().collect();
            parts.push(("/spec/taints".to_owned(), Some(Value::Array(all))));
        }
        parts
    }
}

/// Tells how far the step that is called is with a node; none where it has not begun.
pub(super) fn standing(node: &Object, cx: &Context) -> Option<Standing> {
    let said = node.annotation(&annotation(cx))?;
    Standing::ALL.iter().find(|(standing, _)| value(cx, *standing) == said).map(|(standing, _)| *standing)
}

/// Names another step that has begun with a node: of another run that is not over, or of this one while it
/// holds the node.
pub(super) fn other(node: &Object, cx: &Context) -> Option<String> {
    let own = annotation(cx);
    let annotations = node.at("/metadata/annotations").as_object()?;
    let others = annotations.iter().filter(|(name, _)| name.starts_with(ANNOTATION) && **name != own);
    let values = others.filter_map(|(_, value)| value.as_str()?.rsplit_once(' '));
    let of_this_run = format!("{}/", cx.run());
    values
        .filter(|(who, word)| !(who.starts_with(&of_this_run) && *word == Standing::Done.word()))
        .map(|(who, _)| who.to_owned())
        .next()
}

/// Names a node.
pub(super) fn object(name: &str) -> ObjectName {
    ObjectName::new(Kind::node(), "", name)
}

/// Returns the version of a node's kubelet.
pub(super) fn version(node: &Object) -> &str {
    node.text("/status/nodeInfo/kubeletVersion")
}

/// Says why a node is not ready; nothing where it is.
pub(super) fn not_ready(node: &Object) -> Option<String> {
    match node.list("/status/conditions").find(|condition| condition["type"] == "Ready") {
        Some(condition) if condition["status"] == "True" => None,
        Some(condition) => {
            let text = |field: &str| condition[field].as_str().unwrap_or_default().to_owned();
            Some(format!("not ready ({}: {})", text("reason"), text("message")))
        }
        None => Some("not ready (its kubelet has said nothing)".into()),
    }
}

fn is_cordoned(node: &Object) -> bool {
    node.at("/spec/unschedulable") == true
}

fn in_words(cordoned: bool) -> &'static str {
    if cordoned { "cordoned" } else { "not cordoned" }
}

fn own_taints(node: &Object) -> impl Iterator<Item = &Value> {
    let of_controllers =
        |taint: &&Value| taint["key"].as_str().is_some_and(|key| OF_CONTROLLERS.iter().any(|own| key.starts_with(own)));
    node.list("/spec/taints").filter(move |taint| !of_controllers(taint))
}

fn same(one: &Value, other: &Value) -> bool {
    ["key", "value", "effect"].iter().all(|field| one[field] == other[field])
}

/// One for each step, so that two of a run may bring a node from version to version.
fn annotation(cx: &Context) -> String {
    format!("{ANNOTATION}{}", naming::mark(cx))
}

fn value(cx: &Context, standing: Standing) -> String {
    format!("{} {}", cx.marker(), standing.word())
}

#[cfg(test)]
mod tests {
    use super::*;
    use upgrade_core::testkit::TestContext;

    fn node(cordoned: bool, said: Option<(&Context, Standing)>) -> Object {
        let mut node = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "n1", "uid": "u",
            "resourceVersion": "7", "annotations": { "a": "b" } }, "spec": { "taints": [
            { "key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule" },
            { "key": "gpu", "value": "yes", "effect": "NoSchedule" }] },
            "status": { "addresses": [{ "type": "Hostname", "address": "n1.example" },
                { "type": "InternalIP", "address": "10.0.0.1" }], "nodeInfo": { "kubeletVersion": "v1.30.1" } } });
        if cordoned {
            node["spec"]["unschedulable"] = json!(true);
        }
        if let Some((cx, standing)) = said {
            node["metadata"]["annotations"][annotation(cx)] = json!(value(cx, standing));
        }
        Object(node)
    }

    #[test]
    fn the_cordon_is_expected_as_it_was_left() {
        let test = TestContext::new("nodes");
        let cx = &test.back();
        for found in [false, true] {
            let record = FoundNode::of(&node(found, None));
            for (said, cordoned) in [
                (None, found),
                (Some(Standing::Cordoned), true),
                (Some(Standing::Upgrading), true),
                (Some(Standing::Upgraded), true),
                (Some(Standing::Done), found),
                (Some(Standing::Returning), true),
            ] {
                let said = said.map(|standing| (cx, standing));
                assert!(record.expect(&node(cordoned, said), cx).is_ok(), "{found} {said:?}");
                let error = record.expect(&node(!cordoned, said), cx).unwrap_err();
                assert!(error.as_conflict().is_some(), "{found} {said:?}");
            }
        }
    }

    #[test]
    fn what_is_found_is_what_is_put_back() {
        let test = TestContext::new("nodes");
        let cx = &test.forward();
        let found = FoundNode::of(&node(true, None));
        assert_eq!((found.address.as_str(), found.version.as_str()), ("10.0.0.1", "v1.30.1"));
        assert_eq!(found.taints, [json!({ "key": "gpu", "value": "yes", "effect": "NoSchedule" })]);
        let mut there = node(true, Some((cx, Standing::Upgraded)));
        assert_eq!(standing(&there, cx), Some(Standing::Upgraded));
        there.0["spec"]["taints"].as_array_mut().unwrap().pop();
        let parts = found.parts(&there, cx, None, true);
        assert_eq!(parts[0], ("/spec/unschedulable".into(), Some(json!(true))), "it was cordoned before");
        assert_eq!(parts[1].1, None);
        assert_eq!(parts[2].1.as_ref().unwrap()[1]["key"], "gpu");
        let found = FoundNode { unschedulable: false, ..found };
        assert_eq!(found.parts(&there, cx, Some(Standing::Done), false)[0].1, None);
    }

    #[test]
    fn a_node_is_of_one_step_at_a_time() {
        let test = TestContext::new("nodes");
        let (cx, beside, other_run) = (test.forward(), test.beside("more").forward(), TestContext::new("x").forward());
        let held_by = |cx: &Context, standing| node(true, Some((cx, standing)));
        assert_eq!(other(&held_by(&cx, Standing::Upgrading), &cx), None);
        assert_eq!(other(&held_by(&beside, Standing::Done), &cx), None);
        assert_eq!(other(&held_by(&beside, Standing::Upgrading), &cx), Some(beside.marker()));
        assert_eq!(other(&held_by(&other_run, Standing::Done), &cx), Some(other_run.marker()));
    }
}
