//! `k8s.blue_green` on a real control plane; the endpoints are those that its controllers make.

#![cfg(test)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use upgrade_core::step::{Prepared, Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_k8s::Object;
use upgrade_k8s::steps::{BlueGreen, BlueGreenConfig, BlueGreenUndo};
use upgrade_testbed::kubernetes::Cluster;

use crate::world::Corner;

const KINDS: &str = "deployments,services";
const HASH: &str = "/spec/selector/pod-template-hash";

fn make(corner: &Corner, with: &Value) -> BlueGreen {
    let mut config = json!({ "target": "cluster", "deployment": "web", "service": "web" });
    config.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
    let config: BlueGreenConfig = serde_json::from_value(config).unwrap();
    BlueGreen::from_config(config, &corner.build_context()).unwrap()
}

async fn prepared(step: &BlueGreen, test: &TestContext) -> BlueGreenUndo {
    match step.prepare(&test.forward()).await.unwrap() {
        Prepared::Change { undo, .. } => undo,
        other => panic!("{other:?}"),
    }
}

pub(crate) fn populate(corner: &Corner, replicas: u32) {
    corner.deployment("web", "shop/web:1", replicas);
    let service = |name: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name} }}\nspec: {{ selector: {{ app: web }}, ports: [{{ port: 80 }}] }}\n"
        )
    };
    corner.namespace.apply(&format!("{}---\n{}", service("web"), service("preview")));
    corner.await_pods("web", "shop/web:1", replicas as usize);
    await_endpoints(corner, replicas as usize);
}

pub(crate) fn endpoints(cluster: &Cluster, namespace: &str, name: &str) -> Vec<String> {
    let text = cluster.kubectl(["--namespace", namespace, "get", "endpoints", name, "--output", "json"]);
    let object = Object(serde_json::from_str(&text).unwrap());
    let addresses = object.list("/subsets").flat_map(|subset| subset["addresses"].as_array().into_iter().flatten());
    addresses.map(|each| each["targetRef"]["name"].as_str().unwrap_or_default().to_owned()).collect()
}

fn await_endpoints(corner: &Corner, count: usize) {
    let began = Instant::now();
    while endpoints(corner.namespace.cluster(), &corner.namespace.name, "web").len() != count {
        assert!(began.elapsed() < Duration::from_secs(30), "the Service has no endpoints");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Samples every 100 ms how many ready pods the Service leads to.
pub(crate) struct Watch {
    over: Arc<AtomicBool>,
    samples: std::thread::JoinHandle<Vec<usize>>,
}

impl Watch {
    pub(crate) fn over(corner: &Corner) -> Self {
        let (cluster, namespace) = (corner.namespace.cluster().clone(), corner.namespace.name.clone());
        let over = Arc::new(AtomicBool::new(false));
        let ended = over.clone();
        let samples = std::thread::spawn(move || {
            let mut all = Vec::new();
            while !ended.load(Ordering::Relaxed) {
                all.push(endpoints(&cluster, &namespace, "web").len());
                std::thread::sleep(Duration::from_millis(100));
            }
            all
        });
        Self { over, samples }
    }

    pub(crate) fn least(self) -> usize {
        self.over.store(true, Ordering::Relaxed);
        let samples = self.samples.join().unwrap();
        println!("{samples:?}");
        samples.into_iter().min().unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn traffic_is_switched_and_given_back_and_never_has_fewer_pods() {
    let Some(corner) = Corner::shared("bluegreen") else { return };
    populate(&corner, 3);
    let before = corner.written(KINDS);
    let watch = Watch::over(&corner);
    let step = make(&corner, &json!({ "images": { "web": "shop/web:2-slow" }, "preview": "preview", "stable": "1s" }));
    let test = TestContext::new("web");
    let undo = prepared(&step, &test).await;
    let output = step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!(output.images["web"], "shop/web:2-slow");
    let all = endpoints(corner.namespace.cluster(), &corner.namespace.name, "web");
    assert!(all.iter().all(|pod| pod.starts_with(&format!("{}-", undo.green))) && all.len() == 3, "{all:?}");
    let hash = corner.get("service/web").text(HASH).to_owned();
    assert_eq!(corner.get("service/preview").text(HASH), hash);
    assert_eq!(
        corner.get("deployment/web").text("/spec/template/spec/containers/0/image"),
        "shop/web:1",
        "blue is kept"
    );
    step.apply(&test.forward(), &undo).await.unwrap();

    let began = Instant::now();
    step.rollback(&test.back(), &undo, Some(&output)).await.unwrap();
    println!("given back and tidied within {:?}", began.elapsed());
    assert!(watch.least() >= 3);
    assert_eq!(corner.written(KINDS), before);
    corner.await_pods("web", "shop/web:1", 3);
    step.rollback(&test.back(), &undo, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_leaves_the_deployment_that_was_there_with_what_is_new() {
    let Some(corner) = Corner::shared("commit") else { return };
    populate(&corner, 2);
    let watch = Watch::over(&corner);
    let step = make(&corner, &json!({ "images": { "web": "shop/web:2" }, "env": { "web": { "MODE": "new" } } }));
    let test = TestContext::new("web");
    let undo = prepared(&step, &test).await;
    step.apply(&test.forward(), &undo).await.unwrap();
    step.commit(&test.commit(), &undo).await.unwrap();
    assert!(watch.least() >= 2);
    corner.await_pods("web", "shop/web:2", 2);
    let services = corner.written("services");
    assert!(!services.contains("pod-template-hash"), "{services}");
    assert_eq!(corner.namespace.kubectl(&["get", "deployments", "--output", "name"]), "deployment.apps/web");
    step.commit(&test.commit(), &undo).await.unwrap();
    let again = step.prepare(&TestContext::new("again").forward()).await.unwrap();
    assert!(matches!(again, Prepared::Unchanged { .. }), "{again:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_green_side_that_is_hopeless_or_does_not_stay_ready_never_sees_traffic() {
    let Some(corner) = Corner::shared("badgreen") else { return };
    populate(&corner, 2);
    let before = corner.written(KINDS);
    for (tag, stable, says) in [("2-missing", "0s", "2-missing"), ("2-late", "20s", "")] {
        let step = make(
            &corner,
            &json!({ "images": { "web": format!("shop/web:{tag}") }, "stable": stable, "deadline": "30s" }),
        );
        let test = TestContext::new("web");
        let undo = prepared(&step, &test).await;
        let watch = Watch::over(&corner);
        let error = step.apply(&test.forward(), &undo).await.unwrap_err();
        assert!(error.message().contains("green") && error.message().contains(says), "{error:?}");
        let all = endpoints(corner.namespace.cluster(), &corner.namespace.name, "web");
        assert!(all.iter().all(|pod| !pod.contains("green")), "{all:?}");
        step.rollback(&test.back(), &undo, None).await.unwrap();
        assert!(watch.least() >= 2);
        assert_eq!(corner.written(KINDS), before);
    }
}

#[tokio::test]
async fn what_cannot_be_switched_is_refused_before_anything_changes() {
    let Some(corner) = Corner::shared("noswitch") else { return };
    populate(&corner, 1);
    corner.namespace.apply("apiVersion: v1\nkind: Service\nmetadata: { name: else }\nspec: { selector: { app: api }, ports: [{ port: 80 }] }\n");
    let before = corner.written(KINDS);
    for (with, says, hint) in [
        (json!({ "service": "else", "images": { "web": "x" } }), "does not lead to the pods", "selector"),
        (json!({ "service": "none", "images": { "web": "x" } }), "does not exist", "kubectl get services"),
        (json!({ "images": { "wbe": "x" } }), "wbe", "container"),
    ] {
        let error = make(&corner, &with).prepare(&TestContext::new("web").forward()).await.unwrap_err();
        assert!(error.message().contains(says) && error.hint().unwrap().contains(hint), "{error:?}");
    }
    assert_eq!(corner.written(KINDS), before);
    for (with, key) in [(json!({}), "images"), (json!({ "preview": "web", "images": { "web": "x" } }), "preview")] {
        let mut config = json!({ "target": "cluster", "deployment": "web", "service": "web" });
        config.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
        let config: BlueGreenConfig = serde_json::from_value(config).unwrap();
        let error = BlueGreen::from_config(config, &corner.build_context()).unwrap_err();
        assert_eq!(error.key.as_deref(), Some(key), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_somebody_else_leads_elsewhere_stops_it() {
    let Some(corner) = Corner::shared("elsewhere") else { return };
    populate(&corner, 1);
    let step = make(&corner, &json!({ "images": { "web": "shop/web:2" } }));
    let test = TestContext::new("web");
    let undo = prepared(&step, &test).await;
    step.apply(&test.forward(), &undo).await.unwrap();
    corner.namespace.kubectl(&["patch", "service", "web", "--patch", "{\"spec\":{\"selector\":{\"app\":\"api\"}}}"]);
    let error = step.rollback(&test.back(), &undo, None).await.unwrap_err();
    assert!(error.as_conflict().is_some() && error.message().contains("service"), "{error:?}");
    assert_eq!(corner.get("service/web").text("/spec/selector/app"), "api");
}
