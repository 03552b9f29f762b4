//! `k8s.canary`: by the number of pods, then by a route; their commits included.

#![cfg(test)]

use super::{Case, notices_every_seeded_defect, sweep};

macro_rules! routed {
    () => {
        "upgrade: shop\nsteps:\n  \
         - id: web\n    uses: k8s.canary\n    with:\n      { target: cluster, deployment: web, service: web, route: web, images: { web: \"shop/web:2\" }, weights: [20, 100], pause: 0s }\n"
    };
}

/// By a route alone; what is done by the number of pods, `k8s.blue_green` does as well.
pub(crate) const ROUTED: Case = Case {
    setup: |corner| {
        crate::blue_green::populate(corner, 1);
        crate::canary::route(corner);
    },
    pipeline: routed!(),
    observe: |corner| corner.written("deployments,services,httproutes"),
    interfere: |corner, step| {
        let selector = "{\"spec\":{\"selector\":{\"app\":\"foreign\"}}}";
        corner.namespace.kubectl(&["patch", "service", step, "--patch", selector]);
        true
    },
    survived: |corner, step| corner.get(&format!("service/{step}")).text("/spec/selector/app") == "foreign",
};

const BOTH: Case = Case {
    setup: |corner| {
        (ROUTED.setup)(corner);
        corner.deployment("api", "shop/api:1", 2);
        corner.namespace.kubectl(&["expose", "deployment", "api", "--port", "80"]);
        corner.await_pods("api", "shop/api:1", 2);
    },
    pipeline: concat!(
        routed!(),
        "  - id: api\n    uses: k8s.canary\n    with: { target: cluster, deployment: api, service: api, env: { web: { MODE: new } }, weights: [50, 100], pause: 0s }\n"
    ),
    ..ROUTED
};

#[test]
fn a_canary_survives_every_crash() {
    sweep(&ROUTED, 17, 5);
}

#[test]
#[ignore = "all appends of all directions, minutes: cargo test -p upgrade-k8s -- --ignored campaign_a_canary"]
fn campaign_a_canary_survives_every_crash() {
    sweep(&BOTH, 1, 20);
}

#[test]
fn every_seeded_defect_is_noticed() {
    notices_every_seeded_defect(&BOTH);
}
