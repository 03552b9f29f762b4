//! `k8s.node` on a real control plane, with nodes of a test's own that only tell what they are told.

#![cfg(test)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde_json::{Value, json};
use upgrade_core::context::Context;
use upgrade_core::error::{Class, StepError};
use upgrade_core::step::{Prepared, Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_core::undoable::OptionalRollback as _;
use upgrade_k8s::steps::{FoundNode, NodeConfig, NodeStep, NodeUndo, NodeUpgrade, UndoableNode};
use upgrade_k8s::{ApiServer, Object};
use upgrade_testbed::kubernetes;

use crate::world::{Corner, golden};

const OLD: &str = "v1.20.2";

/// Takes a namespace and nodes `NAMESPACE-a`, `-b`, … on which only its pods may run.
pub(crate) fn with_nodes(what: &str, nodes: &[&str]) -> Option<Corner> {
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
fn placed(corner: &Corner, node: Option<&str>) -> String {
    let space = &corner.namespace.name;
    let node = node.map(|node| format!(", kubernetes.io/hostname: {space}-{node}")).unwrap_or_default();
    format!(
        "nodeSelector: {{ told: {space}{node} }}\n      tolerations: [{{ key: told, operator: Exists }}]\n      \
         terminationGracePeriodSeconds: 0"
    )
}

/// Makes a workload on the nodes, and waits for its pods.
pub(crate) fn workload(corner: &Corner, kind: &str, name: &str, replicas: usize, node: Option<&str>) {
    let count = if kind == "DaemonSet" { String::new() } else { format!("replicas: {replicas}") };
    corner.namespace.apply(&format!(
        "apiVersion: apps/v1\nkind: {kind}\nmetadata: {{ name: {name} }}\nspec:\n  {count}\n  \
         selector: {{ matchLabels: {{ app: {name} }} }}\n  template:\n    metadata: {{ labels: {{ app: {name} }} }}\n    \
         spec:\n      {}\n      containers: [{{ name: web, image: \"shop/web:1\" }}]\n",
        placed(corner, node)
    ));
    corner.await_pods(name, "shop/web:1", replicas);
}

/// A pod that nobody would make anew.
fn bare_pod(corner: &Corner, name: &str, node: &str) {
    corner.namespace.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{ name: {name} }}\nspec:\n      {}\n      \
         containers: [{{ name: web, image: \"shop/web:1\" }}]\n",
        placed(corner, Some(node))
    ));
    corner.namespace.kubectl(&["wait", "--for=condition=Ready", "--timeout=30s", &format!("pod/{name}")]);
}

fn node(corner: &Corner, name: &str) -> Object {
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

fn pods_on(corner: &Corner, name: &str) -> String {
    let fields = format!("spec.nodeName={}-{name}", corner.namespace.name);
    let format = "jsonpath={range .items[*]}{.metadata.labels.app} {end}";
    corner.namespace.kubectl(&["get", "pods", "--field-selector", &fields, "--output", format])
}

/// The words of a `kubectl` command that makes a node's kubelet be of another version.
pub(crate) fn kubelet(corner: &Corner, version: &str) -> Vec<String> {
    let cluster = corner.namespace.cluster();
    let kubectl = cluster.programs().join("kubectl").display().to_string();
    let kubeconfig = cluster.kubeconfig().display().to_string();
    let version = format!("told/version={version}");
    [&*kubectl, "--kubeconfig", &kubeconfig, "annotate", "--overwrite", "node", "{node}", &version]
        .map(str::to_owned)
        .into()
}

/// A step on all the nodes, whose command changes the kubelet's version; `more` is laid over.
fn config(corner: &Corner, more: &Value) -> NodeConfig {
    let mut config = json!({ "target": "cluster", "selector": format!("told={}", corner.namespace.name),
        "version": "1.20.3", "ready_within": "20s", "drain": { "deadline": "20s" },
        "command": { "run": kubelet(corner, "v1.20.3"), "undo": kubelet(corner, "v{version}") } });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config.as_object_mut().unwrap().retain(|_, value| !value.is_null());
    serde_json::from_value(config).unwrap()
}

fn make(corner: &Corner, more: &Value) -> UndoableNode {
    NodeStep::from_config(config(corner, more), &corner.build_context()).unwrap().undoable().unwrap()
}

async fn prepared(step: &UndoableNode, test: &TestContext) -> NodeUndo {
    match step.prepare(&test.forward()).await.unwrap() {
        Prepared::Change { undo, .. } => undo,
        other => panic!("{other:?}"),
    }
}

/// Applies and expects a failure; then takes back, and expects the world as it was before.
async fn fails(corner: &Corner, step: &UndoableNode) -> StepError {
    let (test, before) = (TestContext::new("nodes"), nodes(corner));
    let undo = prepared(step, &test).await;
    let error = step.apply(&test.forward(), &undo).await.expect_err("it cannot be done");
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(nodes(corner), before);
    error
}

#[tokio::test]
async fn nodes_are_upgraded_one_after_the_other_and_taken_back() {
    let Some(corner) = with_nodes("nodes", &["a", "b"]) else { return };
    // One was cordoned before, and stays so.
    corner.namespace.kubectl(&["cordon", &format!("{}-b", corner.namespace.name)]);
    workload(&corner, "Deployment", "web", 2, Some("a"));
    workload(&corner, "DaemonSet", "agent", 2, None);
    corner.namespace.kubectl(&["patch", "deployment", "web", "--patch", "{\"spec\":{\"replicas\":0}}"]);
    corner.await_pods("web", "shop/web:1", 0);
    let before = nodes(&corner);
    assert_eq!(before, format!("a open {OLD} [\"told\"] []\nb cordoned {OLD} [\"told\"] []\n"));

    let test = TestContext::new("nodes");
    let step = make(&corner, &json!({}));
    let Prepared::Change { undo, changes } = step.prepare(&test.forward()).await.unwrap() else { panic!() };
    let told: Vec<_> = changes.iter().map(|change| change.summary.clone().unwrap()).collect();
    assert!(told[0].contains("v1.20.2 -> 1.20.3") && told[0].contains("1 of DaemonSets stay"), "{told:?}");
    assert!(told[1].contains("stays cordoned"), "{told:?}");
    let output = step.apply(&test.forward(), &undo).await.unwrap();
    let versions: Vec<_> = output.nodes.iter().map(|node| node.version.as_str()).collect();
    assert_eq!(versions, ["v1.20.3", "v1.20.3"]);
    let mark = upgrade_k8s::naming::mark(&test.forward());
    let mine = format!("[\"told\"] [\"upgrade-rs.github.io/node-{mark}\"]");
    assert_eq!(nodes(&corner), format!("a open v1.20.3 {mine}\nb cordoned v1.20.3 {mine}\n"));
    assert_eq!(pods_on(&corner, "a").trim(), "agent", "a DaemonSet's pod stays");
    // A second call finds it done.
    assert_eq!(step.apply(&test.forward(), &undo).await.unwrap(), output);

    step.rollback(&test.back(), &undo, Some(&output)).await.unwrap();
    assert_eq!(nodes(&corner), before);
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(nodes(&corner), before);

    let uids: Vec<_> = undo.nodes.iter().map(|node| node.uid.as_str()).collect();
    let replace = [(uids[0], "UID-A"), (uids[1], "UID-B"), (corner.namespace.name.as_str(), "NODE")];
    golden("k8s.node.undo.v1.json", &undo, &replace);
}

#[tokio::test]
async fn at_commit_nothing_of_the_step_is_left_and_what_is_done_is_not_done_again() {
    let Some(corner) = with_nodes("commit", &["a"]) else { return };
    let test = TestContext::new("nodes");
    let step =
        make(&corner, &json!({ "verify": ["sh", "-c", "test \"$UPGRADE_NODE\" = {node} && test {version} = 1.20.2"] }));
    let undo = prepared(&step, &test).await;
    step.apply(&test.forward(), &undo).await.unwrap();
    // Another run does not take a node of one that is not over.
    let other = make(&corner, &json!({ "version": "1.20.4" })).prepare(&TestContext::new("x").forward()).await;
    assert!(other.unwrap_err().message().contains("in the hands of"));
    step.commit(&test.commit(), &undo).await.unwrap();
    step.commit(&test.commit(), &undo).await.unwrap();
    assert_eq!(nodes(&corner), "a open v1.20.3 [\"told\"] []\n");
    match step.prepare(&TestContext::new("again").forward()).await.unwrap() {
        Prepared::Unchanged { reason, output } => assert!(reason.contains("1 nodes") && output.nodes.len() == 1),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_budget_that_blocks_is_named_and_nothing_is_lost() {
    let Some(corner) = with_nodes("budget", &["a", "b"]) else { return };
    workload(&corner, "Deployment", "web", 2, Some("a"));
    corner.namespace.kubectl(&["create", "poddisruptionbudget", "stays", "--selector=app=web", "--min-available=2"]);
    let step = make(&corner, &json!({ "drain": { "deadline": "3s" } }));
    let began = Instant::now();
    let error = fails(&corner, &step).await;
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    for part in ["not drained within 3s", "/web-", "budget stays needs 2"] {
        assert!(error.message().contains(part), "{part}: {error:?}");
    }
    assert!(error.hint().unwrap().contains("k8s.budget"), "{error:?}");
    assert_eq!(pods_on(&corner, "a").trim(), "web web");
    // Where it lets one go at a time, they go one after the other.
    corner.namespace.kubectl(&["delete", "poddisruptionbudget", "stays"]);
    corner.namespace.kubectl(&[
        "patch",
        "deployment",
        "web",
        "--type=json",
        "--patch",
        "[{op: remove, path: /spec/template/spec/nodeSelector/kubernetes.io~1hostname}]",
    ]);
    corner.namespace.kubectl(&["rollout", "status", "deployment/web", "--timeout=30s"]);
    corner.namespace.kubectl(&["create", "poddisruptionbudget", "one", "--selector=app=web", "--max-unavailable=1"]);
    let (test, step) = (TestContext::new("nodes"), make(&corner, &json!({})));
    let undo = prepared(&step, &test).await;
    step.apply(&test.forward(), &undo).await.unwrap();
    corner.await_pods("web", "shop/web:1", 2);
}

#[tokio::test]
async fn pods_that_must_not_be_evicted_are_refused_before_anything_changes() {
    let Some(corner) = with_nodes("refused", &["a", "b"]) else { return };
    bare_pod(&corner, "alone", "b");
    let (step, before) = (make(&corner, &json!({})), nodes(&corner));
    let error = step.prepare(&TestContext::new("nodes").forward()).await.unwrap_err();
    assert!(error.message().contains("/alone has no controller"), "{error:?}");
    assert!(error.hint().unwrap().contains("force: true"), "{error:?}");
    let Prepared::Change { changes, .. } = step.prepare(&TestContext::new("plan").dry_run().forward()).await.unwrap()
    else {
        panic!()
    };
    assert!(changes[1].summary.as_deref().unwrap().contains("not as it is now"), "{changes:?}");
    assert_eq!(nodes(&corner), before);
    let step = make(&corner, &json!({ "drain": { "force": true, "grace_period": "0s", "deadline": "20s" } }));
    let test = TestContext::new("nodes");
    let Prepared::Change { undo, changes } = step.prepare(&test.forward()).await.unwrap() else { panic!() };
    assert!(changes[0].undo_loses.as_deref().unwrap().contains("without a controller"), "{changes:?}");
    step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!(pods_on(&corner, "b"), "");
}

#[tokio::test]
async fn a_failure_at_the_second_node_leaves_the_third_alone_and_undo_restores_all() {
    let Some(corner) = with_nodes("second", &["a", "b", "c"]) else { return };
    let effects = tempfile::tempdir().unwrap();
    let log = effects.path().join("log");
    let command = |version: &str, then: &str| {
        let kubectl = kubelet(&corner, version).join(" ");
        json!([
            "sh",
            "-c",
            format!(
                "echo {{node}} {then} >> {}; {kubectl} && test {{node}} != {}-b || test {then} = undo",
                log.display(),
                corner.namespace.name
            )
        ])
    };
    let step = make(
        &corner,
        &json!({ "command": { "run": command("v1.20.3", "up"), "undo": command("v{version}", "undo") } }),
    );
    let (test, before) = (TestContext::new("nodes"), nodes(&corner));
    let undo = prepared(&step, &test).await;
    let third = node(&corner, "c").resource_version().to_owned();
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert!(error.message().contains("-b: `sh -c") && error.class() == Class::Permanent, "{error:?}");
    let there = nodes(&corner);
    assert!(there.contains("a open v1.20.3") && there.contains("b cordoned v1.20.3"), "{there}");
    assert!(there.contains(&format!("c open {OLD} [\"told\"] []")), "{there}");
    // Tried again: what is done is not done again.
    step.apply(&test.forward(), &undo).await.unwrap_err();
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(nodes(&corner), before);
    let done = std::fs::read_to_string(&log).unwrap().replace(&format!("{}-", corner.namespace.name), "");
    assert_eq!(done, "a up\nb up\nb up\nb undo\na undo\n");
    // Only what its own machine says of it, if anything, has changed.
    let again = node(&corner, "c");
    assert_eq!(
        again.text("/metadata/managedFields/0/manager"),
        node(&corner, "c").text("/metadata/managedFields/0/manager")
    );
    assert!(!again.list("/metadata/managedFields").any(|each| each["manager"] == "upgrade"), "{third}: {again:?}");
}

#[tokio::test]
async fn a_node_that_does_not_come_back_fails_in_time() {
    let Some(corner) = with_nodes("late", &["a"]) else { return };
    let step = make(&corner, &json!({ "version": "1.20.9", "ready_within": "2s" }));
    let error = fails(&corner, &step).await;
    assert!(error.message().contains("of version v1.20.3, not 1.20.9, after 2s"), "{error:?}");
    let unready = kubelet(&corner, "v1.20.3").into_iter().chain(["told/ready=False".to_owned()]).collect::<Vec<_>>();
    let ready = kubelet(&corner, OLD).into_iter().chain(["told/ready=True".to_owned()]).collect::<Vec<_>>();
    let step = make(&corner, &json!({ "ready_within": "2s", "command": { "run": unready, "undo": ready } }));
    let error = fails(&corner, &step).await;
    assert!(error.message().contains("not ready (Told: told)") && error.hint().is_some(), "{error:?}");
    let step = make(&corner, &json!({ "verify": ["sh", "-c", "echo no answer >&2; exit 1"] }));
    let error = fails(&corner, &step).await;
    assert!(error.message().ends_with("ended with exit code 1") && error.detail() == Some("no answer"), "{error:?}");
    let words = kubelet(&corner, OLD).into_iter().chain(["told/ready=False".to_owned()]);
    let words: Vec<_> =
        words.skip(1).map(|word| word.replace("{node}", &format!("{}-a", corner.namespace.name))).collect();
    assert!(corner.namespace.cluster().command(&words).status().unwrap().success());
    corner.namespace.kubectl(&[
        "wait",
        "--for=condition=Ready=False",
        "--timeout=10s",
        &format!("node/{}-a", corner.namespace.name),
    ]);
    let error = step.prepare(&TestContext::new("x").forward()).await.unwrap_err();
    assert!(error.message().contains("before it is upgraded"), "{error:?}");
}

#[tokio::test]
async fn somebody_elses_cordon_is_a_conflict_and_left_alone() {
    let Some(corner) = with_nodes("foreign", &["a", "b"]) else { return };
    let name = |node: &str| format!("{}-{node}", corner.namespace.name);
    let step = make(&corner, &json!({}));
    let test = TestContext::new("nodes");
    let undo = prepared(&step, &test).await;
    // Before it was begun.
    corner.namespace.kubectl(&["cordon", &name("a")]);
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert!(error.as_conflict().is_some_and(|conflict| conflict.present == "cordoned"), "{error:?}");
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert!(nodes(&corner).contains("a cordoned"), "what was not begun is not touched");
    corner.namespace.kubectl(&["uncordon", &name("a")]);
    // When it was done; the other one is taken back all the same.
    step.apply(&test.forward(), &undo).await.unwrap();
    corner.namespace.kubectl(&["cordon", &name("b")]);
    let error = step.rollback(&test.back(), &undo, None).await.unwrap_err();
    assert!(error.as_conflict().is_some_and(|conflict| conflict.subject.ends_with("-b")), "{error:?}");
    let there = nodes(&corner);
    assert!(there.contains(&format!("a open {OLD}")) && there.contains("b cordoned v1.20.3"), "{there}");
    corner.namespace.kubectl(&["uncordon", &name("b")]);
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert!(nodes(&corner).contains(&format!("b open {OLD}")));
}

#[tokio::test]
async fn nodes_that_an_autoscaler_deletes_are_named() {
    let Some(corner) = with_nodes("gone", &["a", "b"]) else { return };
    let name = |node: &str| format!("{}-{node}", corner.namespace.name);
    let (step, test) = (make(&corner, &json!({})), TestContext::new("nodes"));
    let undo = prepared(&step, &test).await;
    corner.namespace.kubectl(&["delete", "node", &name("a")]);
    let output = step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!((output.gone, output.nodes.len()), (vec![name("a")], 1));
    // Another one of that name is not the one that was found.
    make_nodes(&corner, &["a"]);
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert!(error.as_conflict().is_some() && error.hint().unwrap().contains("autoscaler"), "{error:?}");
    corner.namespace.kubectl(&["delete", "node", &name("a"), &name("b")]);
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert!(test.reported().iter().any(|told| told.message.contains("-b is gone")));
    let missing = make(&corner, &json!({ "selector": null, "nodes": ["no-such-node"] }));
    let error = missing.prepare(&test.forward()).await.unwrap_err();
    assert!(error.message().contains("no-such-node does not exist"), "{error:?}");
    let error = make(&corner, &json!({})).prepare(&test.forward()).await.unwrap_err();
    assert!(error.hint().unwrap().contains("--show-labels"), "{error:?}");
}

/// Dies in the middle, as a driver does: whatever is under way is dropped.
#[tokio::test]
async fn what_was_done_before_a_crash_is_not_done_again() {
    let Some(corner) = with_nodes("crash", &["a", "b"]) else { return };
    let effects = tempfile::tempdir().unwrap();
    let log = effects.path().join("log");
    let kubectl = kubelet(&corner, "v1.20.3").join(" ");
    let slow = format!(
        "echo {{node}} >> {}; test {{node}} = {}-a || sleep 3; {kubectl}",
        log.display(),
        corner.namespace.name
    );
    let undo = kubelet(&corner, "v{version}");
    let step = make(&corner, &json!({ "command": { "run": ["sh", "-c", slow], "undo": undo } }));
    let (test, before) = (TestContext::new("nodes"), nodes(&corner));
    let undo = prepared(&step, &test).await;
    let cx = test.forward();
    let early = tokio::time::timeout(Duration::from_secs(20), async {
        tokio::select! {
            done = step.apply(&cx, &undo) => panic!("{done:?}"),
            () = async { while !nodes(&corner).contains("a open v1.20.3") || std::fs::read_to_string(&log).unwrap_or_default().lines().count() < 2 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            } } => {}
        }
    });
    early.await.unwrap();
    step.settle(&test.forward(), &undo).await.unwrap();
    assert!(nodes(&corner).contains(&format!("b cordoned {OLD}")), "{}", nodes(&corner));
    step.apply(&test.forward(), &undo).await.unwrap();
    let done = std::fs::read_to_string(&log).unwrap().replace(&format!("{}-", corner.namespace.name), "");
    assert_eq!(done, "a\nb\nb\n");
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(nodes(&corner), before);
}

#[tokio::test]
async fn a_job_upgrades_the_node_it_is_on() {
    let Some(corner) = with_nodes("job", &["a"]) else { return };
    let job = json!({ "image": "tools:done", "command": ["chroot", "/host", "upgrade"], "env": { "ADDS": "up" },
        "undo": { "command": ["chroot", "/host", "downgrade"], "env": { "REMOVES": "up" } } });
    let step = make(&corner, &json!({ "command": null, "version": null, "job": job }));
    let (test, before) = (TestContext::new("nodes"), nodes(&corner));
    let undo = prepared(&step, &test).await;
    step.apply(&test.forward(), &undo).await.unwrap();
    let effects = || corner.get("configmap/effects").text("/data/lines").to_owned();
    assert_eq!(effects(), "up\n");
    let jobs =
        corner.namespace.kubectl(&["get", "jobs", "--output", "jsonpath={.items[*].spec.template.spec.nodeName}"]);
    assert_eq!(jobs, format!("{}-a", corner.namespace.name));
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!((effects().as_str(), nodes(&corner)), ("", before));
    assert_eq!(corner.namespace.kubectl(&["get", "jobs", "--output", "name"]), "");
    let undo = prepared(&step, &test).await;
    step.apply(&test.forward(), &undo).await.unwrap();
    step.commit(&test.commit(), &undo).await.unwrap();
    assert_eq!(corner.namespace.kubectl(&["get", "jobs", "--output", "name"]), "");
}

/// Counts how many nodes are worked on at once.
struct Counting {
    now: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
}

#[async_trait]
impl NodeUpgrade for Counting {
    fn describe(&self) -> String {
        "count".into()
    }

    fn can_be_undone(&self) -> bool {
        true
    }

    async fn upgrade(&self, _: &Context, _: &ApiServer, _: &FoundNode) -> Result<(), StepError> {
        self.most.fetch_max(self.now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(700)).await;
        self.now.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }

    async fn undo(&self, _: &Context, _: &ApiServer, _: &FoundNode) -> Result<(), StepError> {
        Ok(())
    }
}

#[tokio::test]
async fn a_program_brings_its_own_upgrade_and_says_how_many_nodes_at_once() {
    let Some(corner) = with_nodes("own", &["a", "b", "c"]) else { return };
    let most = Arc::new(AtomicUsize::new(0));
    let counting = Counting { now: Arc::default(), most: most.clone() };
    let config = config(&corner, &json!({ "command": null, "version": null, "at_once": 2 }));
    let step = NodeStep::upgraded_by(config, counting, &corner.build_context()).unwrap().undoable().unwrap();
    let (test, before) = (TestContext::new("nodes"), nodes(&corner));
    let undo = prepared(&step, &test).await;
    // What the upgrade of a machine may lose is put back: its taints.
    let taint = async {
        while !nodes(&corner).contains("a cordoned") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        corner.namespace.kubectl(&["taint", "node", &format!("{}-a", corner.namespace.name), "told-"]);
    };
    let cx = test.forward();
    let (done, ()) = tokio::join!(step.apply(&cx, &undo), taint);
    done.unwrap();
    assert_eq!(most.load(Ordering::SeqCst), 2);
    assert!(!nodes(&corner).contains("[] [\"upg"), "{}", nodes(&corner));
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(nodes(&corner), before);
}

#[tokio::test]
async fn a_pod_that_does_not_end_is_named_and_its_eviction_is_not_asked_for_again() {
    let Some(corner) = with_nodes("stays", &["a", "b"]) else { return };
    workload(&corner, "Deployment", "web", 2, Some("a"));
    corner.namespace.kubectl(&["create", "poddisruptionbudget", "stays", "--selector=app=web", "--min-available=2"]);
    let pods = corner.namespace.kubectl(&["get", "pods", "--output", "name"]);
    let held = "--patch={\"metadata\":{\"finalizers\":[\"example.com/stays\"]}}";
    for pod in pods.lines() {
        corner.namespace.kubectl(&["patch", pod, held]);
    }
    let step = make(&corner, &json!({ "drain": { "deadline": "10s" } }));
    let test = TestContext::new("nodes");
    let undo = prepared(&step, &test).await;
    let cx = test.forward();
    let (done, ()) = tokio::join!(step.apply(&cx, &undo), async {
        // Refused by the budget first, and then deleted by somebody else.
        tokio::time::sleep(Duration::from_secs(1)).await;
        corner.namespace.kubectl(&["delete", "deployment", "web"]);
        corner.namespace.kubectl(&["delete", "pods", "--all", "--wait=false"]);
    });
    let error = done.unwrap_err();
    assert!(error.message().contains("was evicted and has not ended"), "{error:?}");
    assert!(error.hint().unwrap().contains("finalizers"), "{error:?}");
    let told = test.reported().len();
    assert!(told < 100, "{told} times round: it does not wait");
    for pod in pods.lines() {
        corner.namespace.kubectl(&["patch", pod, "--type=json", "--patch=[{op: remove, path: /metadata/finalizers}]"]);
    }
    step.rollback(&test.back(), &undo, None).await.unwrap();
}

#[tokio::test]
async fn the_rights_that_the_page_names_are_enough() {
    let Some(corner) = with_nodes("rights", &["a", "b"]) else { return };
    let Some(stranger) = corner.namespace.cluster().kubeconfig_of("stranger") else { return };
    let space = &corner.namespace.name;
    let owner = corner.get(&format!("namespace/{space}")).uid().to_owned();
    corner.namespace.apply(&format!(
        "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\nmetadata:\n  name: {space}\n  \
         ownerReferences: [{{ apiVersion: v1, kind: Namespace, name: {space}, uid: {owner} }}]\nrules:\n\
         - {{ apiGroups: [''], resources: [nodes], verbs: [get, list, watch, patch] }}\n\
         - {{ apiGroups: [''], resources: [pods], verbs: [list, watch] }}\n\
         - {{ apiGroups: [''], resources: [pods/eviction], verbs: [create] }}\n\
         ---\napiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRoleBinding\nmetadata:\n  name: {space}\n  \
         ownerReferences: [{{ apiVersion: v1, kind: Namespace, name: {space}, uid: {owner} }}]\n\
         roleRef: {{ apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: {space} }}\n\
         subjects: [{{ apiGroup: rbac.authorization.k8s.io, kind: User, name: stranger }}]\n"
    ));
    workload(&corner, "Deployment", "web", 2, Some("a"));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (test, before) = (TestContext::new("nodes"), nodes(&corner));
    let cx = crate::world::build_context(&stranger, space);
    let step = NodeStep::from_config(config(&corner, &json!({})), &cx).unwrap().undoable().unwrap();
    let undo = prepared(&step, &test).await;
    corner.namespace.kubectl(&[
        "patch",
        "deployment",
        "web",
        "--type=json",
        "--patch",
        "[{op: remove, path: /spec/template/spec/nodeSelector/kubernetes.io~1hostname}]",
    ]);
    step.apply(&test.forward(), &undo).await.unwrap();
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(nodes(&corner), before);
    step.commit(&test.commit(), &undo).await.unwrap();
}

#[tokio::test]
async fn what_only_drains_can_be_undone_and_what_has_no_undo_cannot() {
    let Some(corner) = with_nodes("drain", &["a"]) else { return };
    let without = config(&corner, &json!({ "command": { "run": ["true"] } }));
    let step = NodeStep::from_config(without, &corner.build_context()).unwrap();
    assert!(step.irreversible_because().is_some_and(|why| why.contains("`undo`")));
    let step = make(&corner, &json!({ "command": null, "version": null }));
    let (test, before) = (TestContext::new("nodes"), nodes(&corner));
    let undo = prepared(&step, &test).await;
    step.apply(&test.forward(), &undo).await.unwrap();
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(nodes(&corner), before);
}

#[tokio::test]
async fn fifty_pods_are_drained_together() {
    let Some(corner) = with_nodes("fifty", &["a", "b"]) else { return };
    corner.namespace.kubectl(&["cordon", &format!("{}-b", corner.namespace.name)]);
    workload(&corner, "Deployment", "web", 50, None);
    corner.namespace.kubectl(&["uncordon", &format!("{}-b", corner.namespace.name)]);
    assert_eq!(pods_on(&corner, "a").split_whitespace().count(), 50);
    let nodes = json!([format!("{}-a", corner.namespace.name)]);
    let step = make(&corner, &json!({ "selector": null, "nodes": nodes, "command": null, "version": null }));
    let test = TestContext::new("nodes");
    let undo = prepared(&step, &test).await;
    let began = Instant::now();
    step.apply(&test.forward(), &undo).await.unwrap();
    println!("drained in {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    assert_eq!(pods_on(&corner, "a"), "");
    corner.await_pods("web", "shop/web:1", 50);
}
