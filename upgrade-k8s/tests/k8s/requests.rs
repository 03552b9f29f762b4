//! How often the API server is asked.

#![cfg(test)]

use serde_json::json;
use upgrade_core::step::{Prepared, Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_k8s::steps::{RolloutConfig, RolloutStep};

use crate::faults::proxy::Proxy;
use crate::world::{Corner, build_context};

const WORKLOADS: usize = 20;

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_costs_six_requests_at_most_and_a_kind_one_watch() {
    let Some(corner) = Corner::shared("requests") else { return };
    for number in 0..WORKLOADS {
        corner.deployment(&format!("web-{number}"), "shop/web:1", 1);
    }
    for number in 0..WORKLOADS {
        corner.await_pods(&format!("web-{number}"), "shop/web:1", 1);
    }
    let kubeconfig = corner.kubeconfig().to_owned();
    let proxy = tokio::task::spawn_blocking(move || Proxy::before(&kubeconfig)).await.unwrap();
    let workloads: Vec<_> = (0..WORKLOADS)
        .map(|number| json!({ "workload": format!("deployment/web-{number}"), "images": { "web": "shop/web:2" } }))
        .collect();
    let config: RolloutConfig = serde_json::from_value(json!({ "target": "cluster", "workloads": workloads })).unwrap();
    let step = RolloutStep::from_config(config, &build_context(&proxy.kubeconfig(), &corner.namespace.name)).unwrap();
    let test = TestContext::new("web");
    proxy.fail(None);
    let Prepared::Change { undo, .. } = step.prepare(&test.forward()).await.unwrap() else { panic!("it is to change") };
    step.apply(&test.forward(), &undo).await.unwrap();
    let there = proxy.asked();
    let watches = |asked: &[String], kind: &str| {
        asked.iter().filter(|line| line.contains("watch=true") && line.contains(&format!("/{kind}?"))).count()
    };
    println!("{} requests for {WORKLOADS} workloads, there", there.len());
    assert!(there.len() <= 6 * WORKLOADS, "{}: {there:#?}", there.len());
    for kind in ["deployments", "replicasets", "pods"] {
        assert_eq!(watches(&there, kind), 1, "{kind}");
    }
    proxy.fail(None);
    step.rollback(&test.back(), &undo, None).await.unwrap();
    let back = proxy.asked();
    println!("{} requests, back", back.len());
    assert!(back.len() <= 6 * WORKLOADS, "{}: {back:#?}", back.len());
    tokio::task::spawn_blocking(move || drop(proxy)).await.unwrap();
}
