//! `k8s.node` against `kubectl drain`: a node with fifty pods.
//!
//! `cargo run --release -p upgrade-benches --bin k8s_drain [ROUNDS [PODS]]`
//!
//! On the tests' control plane, whose nodes only tell what a kubelet would tell: a pod ends as soon as its
//! deletion is seen. Theirs and ours take turns, from one node to the other and back. Both nodes are
//! cordoned beforehand, so that nothing comes back while it is drained; ours is a whole run, from its first
//! entry to its commit, and ends with the node's cordon as it was found. A first round warms up.

use std::time::{Duration, Instant};

use serde_json::json;
use upgrade_benches::runs::Runs;
use upgrade_benches::{Outcome, spread};
use upgrade_core::registry::{AnyTarget, BuildContext};
use upgrade_core::undoable::OptionalRollback as _;
use upgrade_k8s::steps::{NodeStep, UndoableNode};
use upgrade_k8s::{Cluster, ClusterConfig};
use upgrade_testbed::kubernetes::{self, Namespace};

fn main() -> Outcome<()> {
    let mut arguments = std::env::args().skip(1);
    let rounds: usize = arguments.next().map_or(Ok(5), |text| text.parse())?;
    let pods: usize = arguments.next().map_or(Ok(50), |text| text.parse())?;
    let own = kubernetes::own().ok_or("there is no control plane: scripts/kubernetes builds it")?;
    let namespace = own.cluster().namespace("bench");
    let home = tempfile::tempdir()?;
    let runs = Runs::below(home.path())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;

    namespace.kubectl(&["cordon", "node2", "node3"]);
    namespace.apply(&format!(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{ name: web }}\nspec:\n  replicas: {pods}\n  \
         selector: {{ matchLabels: {{ app: web }} }}\n  template:\n    metadata: {{ labels: {{ app: web }} }}\n    \
         spec: {{ terminationGracePeriodSeconds: 0, containers: [{{ name: web, image: \"shop/web:1\" }}] }}\n"
    ));
    let mut rows = Vec::new();
    for round in 0..=rounds {
        let theirs = turn(&namespace, pods, "node1", "node2", || {
            namespace.kubectl(&["drain", "node1"]);
            Ok(())
        })?;
        let ours = turn(&namespace, pods, "node2", "node1", || {
            runtime.block_on(runs.commit(step(&namespace, "node2")?)).map(drop)
        })?;
        if round > 0 {
            rows.push([theirs, ours].map(|time| time.as_secs_f64()));
        }
    }
    let of = |value: fn(&[f64; 2]) -> f64| spread(rows.iter().map(value).collect());
    println!("a node with {pods} pods ({rounds} rounds):");
    println!("  kubectl drain      {} s", of(|row| row[0]));
    println!("  k8s.node in a run  {} s", of(|row| row[1]));
    println!("  ours / theirs      {} ×   (target ≤ 1.0)", of(|row| row[1] / row[0]));
    Ok(())
}

/// Waits until all pods are on a node, cordons it, opens the other one, and measures its drain.
fn turn(
    namespace: &Namespace,
    pods: usize,
    from: &str,
    to: &str,
    drain: impl FnOnce() -> Outcome<()>,
) -> Outcome<Duration> {
    namespace.kubectl(&["rollout", "status", "deployment/web"]);
    let on = |node: &str| {
        let fields = format!("spec.nodeName={node}");
        namespace.kubectl(&["get", "pods", "--field-selector", &fields, "--output", "name"]).lines().count()
    };
    if on(from) != pods {
        return Err(format!("{} of {pods} pods are on {from}", on(from)).into());
    }
    namespace.kubectl(&["cordon", from]);
    namespace.kubectl(&["uncordon", to]);
    let began = Instant::now();
    drain()?;
    let took = began.elapsed();
    if on(from) != 0 {
        return Err(format!("{} pods are left on {from}", on(from)).into());
    }
    Ok(took)
}

fn step(namespace: &Namespace, node: &str) -> Outcome<UndoableNode> {
    let config = ClusterConfig {
        kubeconfig: Some(namespace.cluster().kubeconfig().to_owned()),
        namespace: Some(namespace.name.clone()),
        ..ClusterConfig::default()
    };
    let cluster = Cluster::from_config(config, &BuildContext::new("/"))?;
    let context = BuildContext::new("/").with_target("cluster", AnyTarget::new("k8s", cluster));
    let config = json!({ "target": "cluster", "nodes": [node] });
    let step = NodeStep::from_config(serde_json::from_value(config)?, &context)?;
    step.undoable().map_err(|_| "a step that only drains can be undone".into())
}
