//! `k8s.rollout`: two steps, the second one of two workloads.

#![cfg(test)]

use super::{Case, notices_every_seeded_defect, sweep};
use crate::world::{Corner, set};

pub(crate) const CASE: Case = Case {
    setup: |corner| {
        corner.deployment("web", "shop/web:1", 1);
        corner.deployment("api", "shop/api:1", 1);
        corner.namespace.apply(&set("StatefulSet", "db", "shop/db:1", "replicas: 1\n  serviceName: db"));
        corner.await_pods("web", "shop/web:1", 1);
        corner.await_pods("api", "shop/api:1", 1);
        corner.await_pods("db", "shop/db:1", 1);
    },
    pipeline: "upgrade: shop\nsteps:\n  \
               - id: db\n    uses: k8s.rollout\n    with:\n      target: cluster\n      \
                 workloads: [{ workload: statefulset/db, images: { web: \"shop/db:2\" } }]\n  \
               - id: web\n    uses: k8s.rollout\n    with:\n      target: cluster\n      workloads:\n        \
                 - { workload: deployment/web, images: { web: \"shop/web:2\" }, replicas: 2 }\n        \
                 - { workload: deployment/api, env: { web: { MODE: new } } }\n",
    observe,
    interfere: |corner, step| {
        let workload = if step == "db" { "statefulset/db" } else { "deployment/web" };
        corner.namespace.kubectl(&["set", "image", workload, "web=shop/foreign:9"]);
        true
    },
    survived: |corner, step| {
        let workload = if step == "db" { "statefulset/db" } else { "deployment/web" };
        corner.get(workload).text("/spec/template/spec/containers/0/image") == "shop/foreign:9"
    },
};

/// The workloads as written; pods follow from them, and are looked at where the step says that they do.
fn observe(corner: &Corner) -> String {
    corner.written("deployments,statefulsets,configmaps,secrets,leases")
}

#[test]
fn a_rollout_survives_every_crash() {
    sweep(&CASE, 9, 5);
}

#[test]
#[ignore = "all appends of all directions, minutes: cargo test -p upgrade-k8s -- --ignored campaign_a_rollout"]
fn campaign_a_rollout_survives_every_crash() {
    sweep(&CASE, 1, 40);
}

#[test]
fn every_seeded_defect_is_noticed() {
    notices_every_seeded_defect(&CASE);
}
