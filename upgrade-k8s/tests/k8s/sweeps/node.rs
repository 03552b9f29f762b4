//! `k8s.node`: two of them, one node each, the second of which was cordoned before.

#![cfg(test)]

use upgrade_testbed::kubernetes::shared_nodes;

use super::{Case, notices_every_seeded_defect_on, sweep_on};
use crate::node::{make_nodes, nodes};
use crate::world::Corner;

/// The last words of the step on one node.
macro_rules! kubelet {
    ($version:literal) => {
        concat!(
            "[KUBECTL, --kubeconfig, KUBECONFIG, annotate, --overwrite, node, \"{node}\", \"told/version=",
            $version,
            "\"]"
        )
    };
}

/// The first step, of both cases.
macro_rules! first {
    () => {
        concat!(
            "upgrade: nodes\nsteps:\n  - id: first\n    uses: k8s.node\n    with:\n      target: cluster\n      \
             nodes: [NAMESPACE-a]\n      version: 1.20.3\n      command:\n        run: ",
            kubelet!("v1.20.3"),
            "\n        undo: ",
            kubelet!("v{version}"),
            "\n"
        )
    };
}

const ONE: Case = Case {
    setup: |corner| make_nodes(corner, &["a"]),
    pipeline: first!(),
    observe: nodes,
    interfere: |corner, step| {
        corner.namespace.kubectl(&[if step == "first" { "cordon" } else { "uncordon" }, &node(corner, step)]);
        true
    },
    survived: |corner, step| {
        let node = corner.get(&format!("node/{}", node(corner, step)));
        (node.at("/spec/unschedulable") == true) == (step == "first")
    },
};

const TWO: Case = Case {
    setup: |corner| {
        make_nodes(corner, &["a", "b"]);
        corner.namespace.kubectl(&["cordon", &node(corner, "second")]);
    },
    pipeline: concat!(
        first!(),
        "  - id: second\n    uses: k8s.node\n    with:\n      target: cluster\n      \
         nodes: [NAMESPACE-b]\n      version: 1.20.3\n      command:\n        run: ",
        kubelet!("v1.20.3"),
        "\n        undo: ",
        kubelet!("v{version}"),
        "\n"
    ),
    ..ONE
};

fn node(corner: &Corner, step: &str) -> String {
    format!("{}-{}", corner.namespace.name, if step == "first" { "a" } else { "b" })
}

#[test]
fn a_node_is_upgraded_or_as_it_was() {
    sweep_on(shared_nodes(), &ONE, 3, 25);
}

#[test]
#[ignore = "two steps, all appends of all directions, minutes: cargo test -p upgrade-k8s -- --ignored campaign_nodes"]
fn campaign_nodes_are_upgraded_or_as_they_were() {
    sweep_on(shared_nodes(), &TWO, 1, 70);
}

#[test]
fn every_seeded_defect_of_nodes_is_noticed() {
    notices_every_seeded_defect_on(shared_nodes(), &TWO);
}
