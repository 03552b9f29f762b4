//! `k8s.apply`: two steps; objects that are made, and some that are changed, a workload among them.

#![cfg(test)]

use super::{Case, notices_every_seeded_defect, sweep};
use crate::world::Corner;

pub(crate) const CASE: Case = Case {
    setup: |corner| {
        corner.namespace.kubectl(&["create", "configmap", "shop", "--from-literal", "MODE=old"]);
        corner.deployment("web", "shop/web:1", 1);
        corner.await_pods("web", "shop/web:1", 1);
    },
    pipeline: "upgrade: shop\nsteps:\n  \
               - id: config\n    uses: k8s.apply\n    with:\n      target: cluster\n      force: true\n      objects:\n        \
                 - { apiVersion: v1, kind: ConfigMap, metadata: { name: shop }, data: { MODE: new } }\n        \
                 - { apiVersion: v1, kind: Secret, metadata: { name: keys }, stringData: { TOKEN: t } }\n  \
               - id: web\n    uses: k8s.apply\n    with:\n      target: cluster\n      force: true\n      objects:\n        \
                 - { apiVersion: v1, kind: Service, metadata: { name: web }, spec: { selector: { app: web }, ports: [{ port: 80, protocol: TCP }] } }\n        \
                 - apiVersion: apps/v1\n          kind: Deployment\n          metadata: { name: web, annotations: { release: two } }\n          \
                   spec:\n            selector: { matchLabels: { app: web } }\n            \
                   template: { metadata: { labels: { app: web } }, spec: { containers: [{ name: web, image: \"shop/web:2\" }] } }\n",
    observe: |corner| corner.written("deployments,services,configmaps,secrets"),
    interfere: |corner, step| {
        match step {
            "config" => corner.namespace.kubectl(&[
                "patch",
                "configmap",
                "shop",
                "--patch",
                "{\"data\":{\"MODE\":\"foreign\"}}",
            ]),
            _ => corner.namespace.kubectl(&["set", "image", "deployment/web", "web=shop/foreign:9"]),
        };
        true
    },
    survived: |corner: &Corner, step| match step {
        "config" => corner.get("configmap/shop").text("/data/MODE") == "foreign",
        _ => corner.get("deployment/web").text("/spec/template/spec/containers/0/image") == "shop/foreign:9",
    },
};

#[test]
fn objects_survive_every_crash() {
    sweep(&CASE, 9, 5);
}

#[test]
#[ignore = "all appends of all directions, minutes: cargo test -p upgrade-k8s -- --ignored campaign_objects"]
fn campaign_objects_survive_every_crash() {
    sweep(&CASE, 1, 40);
}

#[test]
fn every_seeded_defect_is_noticed() {
    notices_every_seeded_defect(&CASE);
}
