//! Nodes of a test's own, which only tell what they are told, and a step that upgrades them.

#![cfg(test)]

use serde_json::{Value, json};
use upgrade_core::error::StepError;
use upgrade_core::step::{Prepared, Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_core::undoable::OptionalRollback as _;
use upgrade_k8s::Object;
use upgrade_k8s::steps::{NodeConfig, NodeStep, NodeUndo, UndoableNode};
use upgrade_testbed::kubernetes;

use crate::world::Corner;

pub(super) const OLD: &str = "v1.20.2";

/// Takes a namespace and nodes `NAMESPACE-a`, `-b`, … on which only its pods may run.
pub(super) fn with_nodes(what: &str, nodes: &[&str]) -> Option<Corner> {
    let cluster = kubernetes::shared_nodes()?;
    let corner = Corner { namespace: cluster.namespace(what) };
    make_nodes(&corner, nodes);
    Some(corner)
}

/// Makes nodes; they go with the namespace.
pub(crate) fn make_nodes(corner: &Corner, nodes: &[&str]) {
    let space = &corner.namespace.name;
    let uid = corner.get(&format!("namespace/{space}")).uid().to_owned();
    let node = |name: &&str| {
        format!(
            "apiVersion: v1\nkind: Node\nmetadata:\n  name: {space}-{name}\n  labels: {{ told: {space}, kubernetes.io/hostname: {space}-{name} }}\n  \
             annotations: {{ told/version: {OLD} }}\n  \
             ownerReferences: [{{ apiVersion: v1, kind: Namespace, name: {space}, uid: {uid} }}]\n\
             spec: {{ taints: [{{ key: told, value: {space}, effect: NoSchedule }}] }}\n"
        )
    };
    corner.namespace.apply(&nodes.iter().map(node).collect::<Vec<_>>().join("---\n"));
    for name in nodes {
        corner.namespace.kubectl(&["wait", "--for=condition=Ready", "--timeout=30s", &format!("node/{space}-{name}")]);
    }
}

/// What a pod needs to be on one of the nodes.
pub(super) fn placed(corner: &Corner, node: Option<&str>) -> String {
    let space = &corner.namespace.name;
    let node = node.map(|node| format!(", kubernetes.io/hostname: {space}-{node}")).unwrap_or_default();
    format!(
        "nodeSelector: {{ told: {space}{node} }}\n      tolerations: [{{ key: told, operator: Exists }}]\n      \
         terminationGracePeriodSeconds: 0"
    )
}

/// Makes a workload on the nodes, and waits for its pods.
pub(super) fn workload(corner: &Corner, kind: &str, name: &str, replicas: usize, node: Option<&str>) {
    let count = if kind == "DaemonSet" { String::new() } else { format!("replicas: {replicas}") };
    corner.namespace.apply(&format!(
        "apiVersion: apps/v1\nkind: {kind}\nmetadata: {{ name: {name} }}\nspec:\n  {count}\n  \
         selector: {{ matchLabels: {{ app: {name} }} }}\n  template:\n    metadata: {{ labels: {{ app: {name} }} }}\n    \
         spec:\n      {}\n      containers: [{{ name: web, image: \"shop/web:1\" }}]\n",
        placed(corner, node)
    ));
    corner.await_pods(name, "shop/web:1", replicas);
}

pub(super) fn node(corner: &Corner, name: &str) -> Object {
    corner.get(&format!("node/{}-{name}", corner.namespace.name))
}

/// Cordon, own taints, version and what the step wrote, of every node.
pub(crate) fn nodes(corner: &Corner) -> String {
    let selector = format!("told={}", corner.namespace.name);
    let list = corner.namespace.kubectl(&["get", "nodes", "--selector", &selector, "--output", "json"]);
    let list: Value = serde_json::from_str(&list).unwrap();
    let each = list["items"].as_array().unwrap().iter().cloned().map(Object).map(|node| {
        let taints = node.list("/spec/taints").filter_map(|taint| taint["key"].as_str());
        let taints: Vec<_> = taints.filter(|key| !key.starts_with("node.kubernetes.io/")).collect();
        let annotations = node.at("/metadata/annotations").as_object().unwrap();
        let annotations: Vec<_> = annotations.keys().filter(|key| key.starts_with("upgrade-rs")).collect();
        let name = node.name().rsplit('-').next().unwrap();
        let cordon = if node.at("/spec/unschedulable") == true { "cordoned" } else { "open" };
        format!("{name} {cordon} {} {taints:?} {annotations:?}\n", node.annotation("told/version").unwrap_or("-"))
    });
    each.collect()
}

pub(super) fn pods_on(corner: &Corner, name: &str) -> String {
    let fields = format!("spec.nodeName={}-{name}", corner.namespace.name);
    let format = "jsonpath={range .items[*]}{.metadata.labels.app} {end}";
    corner.namespace.kubectl(&["get", "pods", "--field-selector", &fields, "--output", format])
}

/// The words of a `kubectl` command that makes a node's kubelet be of another version.
pub(super) fn kubelet(corner: &Corner, version: &str) -> Vec<String> {
    let cluster = corner.namespace.cluster();
    let kubectl = cluster.programs().join("kubectl").display().to_string();
    let kubeconfig = cluster.kubeconfig().display().to_string();
    let version = format!("told/version={version}");
    [&*kubectl, "--kubeconfig", &kubeconfig, "annotate", "--overwrite", "node", "{node}", &version]
        .map(str::to_owned)
        .into()
}

/// A step on all the nodes, whose command changes the kubelet's version; `more` is laid over.
pub(super) fn config(corner: &Corner, more: &Value) -> NodeConfig {
    let mut config = json!({ "target": "cluster", "selector": format!("told={}", corner.namespace.name),
        "version": "1.20.3", "ready_within": "20s", "drain": { "deadline": "20s" },
        "command": { "run": kubelet(corner, "v1.20.3"), "undo": kubelet(corner, "v{version}") } });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config.as_object_mut().unwrap().retain(|_, value| !value.is_null());
    serde_json::from_value(config).unwrap()
}

pub(super) fn make(corner: &Corner, more: &Value) -> UndoableNode {
    NodeStep::from_config(config(corner, more), &corner.build_context()).unwrap().undoable().unwrap()
}

pub(super) async fn prepared(step: &UndoableNode, test: &TestContext) -> NodeUndo {
    match step.prepare(&test.forward()).await.unwrap() {
        Prepared::Change { undo, .. } => undo,
        other => panic!("{other:?}"),
    }
}

/// Applies and expects a failure; then takes back, and expects the world as it was before.
pub(super) async fn fails(corner: &Corner, step: &UndoableNode) -> StepError {
    let (test, before) = (TestContext::new("nodes"), nodes(corner));
    let undo = prepared(step, &test).await;
    let error = step.apply(&test.forward(), &undo).await.expect_err("it cannot be done");
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(nodes(corner), before);
    error
}
