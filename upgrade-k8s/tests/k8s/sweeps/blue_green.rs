//! `k8s.blue_green`: two of them, of which the second one also leads a preview; their commits included.

#![cfg(test)]

use super::{Case, notices_every_seeded_defect, sweep};

pub(crate) const CASE: Case = Case {
    setup: |corner| {
        crate::blue_green::populate(corner, 1);
        corner.deployment("api", "shop/api:1", 1);
        corner.namespace.kubectl(&["expose", "deployment", "api", "--port", "80"]);
        corner.await_pods("api", "shop/api:1", 1);
    },
    pipeline: "upgrade: shop\nsteps:\n  \
               - id: api\n    uses: k8s.blue_green\n    with: { target: cluster, deployment: api, service: api, env: { web: { MODE: new } } }\n  \
               - id: web\n    uses: k8s.blue_green\n    with:\n      { target: cluster, deployment: web, service: web, preview: preview, images: { web: \"shop/web:2\" } }\n",
    observe: |corner| corner.written("deployments,services"),
    interfere: |corner, step| {
        corner.namespace.kubectl(&[
            "patch",
            "service",
            step,
            "--patch",
            "{\"spec\":{\"selector\":{\"app\":\"foreign\"}}}",
        ]);
        true
    },
    survived: |corner, step| corner.get(&format!("service/{step}")).text("/spec/selector/app") == "foreign",
};

#[test]
fn a_switch_survives_every_crash() {
    sweep(&CASE, 13, 5);
}

#[test]
#[ignore = "all appends of all directions, minutes: cargo test -p upgrade-k8s -- --ignored campaign_a_switch"]
fn campaign_a_switch_survives_every_crash() {
    sweep(&CASE, 1, 20);
}

#[test]
fn every_seeded_defect_is_noticed() {
    notices_every_seeded_defect(&CASE);
}
