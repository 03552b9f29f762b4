//! `k8s.config`: a ConfigMap with its reader, and a Secret that is made.

#![cfg(test)]

use super::{Case, notices_every_seeded_defect, sweep};
use crate::world::deployment;

pub(crate) const CASE: Case = Case {
    setup: |corner| {
        corner.namespace.kubectl(&["create", "configmap", "shop", "--from-literal", "MODE=old"]);
        let web = deployment("web", "shop/web:1", 1);
        let web = web.replace("env: [{ name: MODE, value: old }]", "envFrom: [{ configMapRef: { name: shop } }]");
        corner.namespace.apply(&web);
        corner.await_pods("web", "shop/web:1", 1);
    },
    pipeline: "upgrade: shop\nsteps:\n  \
               - id: more\n    uses: k8s.config\n    with: { target: cluster, config_maps: { made: { A: \"1\" } } }\n  \
               - id: mode\n    uses: k8s.config\n    with: { target: cluster, config_maps: { shop: { MODE: new, MORE: \"1\" } } }\n",
    observe: |corner| corner.written("deployments,configmaps,secrets"),
    interfere: |corner, step| {
        if step == "mode" {
            corner.namespace.kubectl(&["patch", "configmap", "shop", "--patch", "{\"data\":{\"MODE\":\"foreign\"}}"]);
        }
        step == "mode"
    },
    survived: |corner, _| corner.get("configmap/shop").text("/data/MODE") == "foreign",
};

#[test]
fn a_configuration_survives_every_crash() {
    sweep(&CASE, 9, 5);
}

#[test]
#[ignore = "all appends of all directions, minutes: cargo test -p upgrade-k8s -- --ignored campaign_a_configuration"]
fn campaign_a_configuration_survives_every_crash() {
    sweep(&CASE, 1, 40);
}

#[test]
fn every_seeded_defect_is_noticed() {
    notices_every_seeded_defect(&CASE);
}
