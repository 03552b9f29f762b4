//! `k8s.node` on a real control plane, with nodes of a test's own that only tell what they are told.

#![cfg(test)]

mod drains;
mod told;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::json;
use upgrade_core::context::Context;
use upgrade_core::error::{Class, StepError};
use upgrade_core::step::{Prepared, Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_core::undoable::OptionalRollback as _;
use upgrade_k8s::ApiServer;
use upgrade_k8s::steps::{FoundNode, NodeStep, NodeUpgrade};

use self::told::{OLD, config, fails, kubelet, make, node, pods_on, prepared, with_nodes, workload};
pub(crate) use self::told::{make_nodes, nodes};
use crate::world::golden;

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
