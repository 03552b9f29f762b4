//! `k8s.scale`: a service stopped, its database made larger, and the service started again.

#![cfg(test)]

use super::{Case, notices_every_seeded_defect, sweep};
use crate::world::{Corner, set};

pub(crate) const CASE: Case = Case {
    setup: |corner| {
        corner.deployment("web", "shop/web:1", 2);
        corner.deployment("api", "shop/api:1", 1);
        corner.namespace.apply(&set("StatefulSet", "db", "shop/db:1", "replicas: 1\n  serviceName: db"));
        corner.await_pods("web", "shop/web:1", 2);
        corner.await_pods("api", "shop/api:1", 1);
        corner.await_pods("db", "shop/db:1", 1);
    },
    pipeline: "upgrade: shop\nsteps:\n  \
               - id: stop\n    uses: k8s.scale\n    with:\n      target: cluster\n      workloads:\n        \
                 - { workload: deployment/web, replicas: 0 }\n        \
                 - { workload: deployment/api, replicas: 0 }\n      order: sequence\n  \
               - id: db\n    uses: k8s.scale\n    with:\n      target: cluster\n      \
                 workloads: [{ workload: statefulset/db, replicas: 2 }]\n",
    observe,
    interfere: |corner, step| {
        let workload = if step == "db" { "statefulset/db" } else { "deployment/web" };
        corner.namespace.kubectl(&["scale", workload, "--replicas", "5"]);
        true
    },
    survived: |corner, step| {
        let workload = if step == "db" { "statefulset/db" } else { "deployment/web" };
        corner.get(workload).number("/spec/replicas") == 5
    },
};

fn observe(corner: &Corner) -> String {
    corner.written("deployments,statefulsets,configmaps,secrets,leases")
}

#[test]
fn a_number_of_pods_survives_every_crash() {
    sweep(&CASE, 27, 5);
}

#[test]
#[ignore = "all appends of all directions, minutes: cargo test -p upgrade-k8s -- --ignored campaign_a_number"]
fn campaign_a_number_of_pods_survives_every_crash() {
    sweep(&CASE, 1, 40);
}

#[test]
fn every_seeded_defect_of_a_number_is_noticed() {
    notices_every_seeded_defect(&CASE);
}
