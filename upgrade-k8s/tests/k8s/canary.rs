//! `k8s.canary` on a real control plane; no gateway stands behind the routes, whose weights alone are looked at.

#![cfg(test)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde_json::{Value, json};
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::{CheckError, Class};
use upgrade_core::step::{Prepared, Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_core::verdict::Verdict;
use upgrade_k8s::steps::{AnalysisConfig, Canary, CanaryConfig, CanaryUndo};

use crate::blue_green::{Watch, endpoints, populate};
use crate::world::{Corner, golden, registry};

const KINDS: &str = "deployments,services";
const ROUTED: &str = "deployments,services,httproutes";
const HASH: &str = "/spec/selector/pod-template-hash";

fn make(corner: &Corner, with: &Value) -> Canary {
    let mut config = json!({ "target": "cluster", "deployment": "web", "service": "web", "pause": "0s",
        "images": { "web": "shop/web:2" } });
    config.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
    let config: CanaryConfig = serde_json::from_value(config).unwrap();
    Canary::from_config(config, &corner.build_context().with_checks(&registry())).unwrap()
}

async fn prepared(step: &Canary, test: &TestContext) -> CanaryUndo {
    match step.prepare(&test.forward()).await.unwrap() {
        Prepared::Change { undo, .. } => undo,
        other => panic!("{other:?}"),
    }
}

/// Makes a route that leads to the Service `web`, with another backend beside it in its second rule.
pub(crate) fn route(corner: &Corner) {
    corner.namespace.cluster().kubectl(["apply", "--filename", "tests/k8s/httproute.yaml"]);
    corner.namespace.cluster().kubectl([
        "wait",
        "--for",
        "condition=Established",
        "crd/httproutes.gateway.networking.k8s.io",
    ]);
    let manifest = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: { name: web }\nspec:\n  \
        parentRefs: [{ name: front }]\n  rules:\n    - backendRefs: [{ name: web, port: 80 }]\n    \
        - matches: [{ path: { value: /api } }]\n      backendRefs: [{ name: web, port: 80, weight: 3 }, { name: api, port: 80 }]\n";
    corner.namespace.apply(manifest);
}

fn weights(corner: &Corner) -> Vec<u64> {
    let route = corner.get("httproute/web");
    let rules = route.list("/spec/rules").flat_map(|rule| rule["backendRefs"].as_array().into_iter().flatten());
    rules.map(|backend| backend["weight"].as_u64().unwrap()).collect()
}

fn how(more: &Value) -> AnalysisConfig {
    let mut config = json!({ "uses": "made", "every": "50ms" });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    serde_json::from_value(config).unwrap()
}

/// Answers what a function says, by the number of the question.
struct Asked<F>(AtomicUsize, F);

impl<F: Fn(usize) -> Verdict + Send + Sync + 'static> Asked<F> {
    fn new(answer: F) -> Arc<Self> {
        Arc::new(Self(AtomicUsize::new(0), answer))
    }
}

#[async_trait]
impl<F: Fn(usize) -> Verdict + Send + Sync + 'static> Check for Asked<F> {
    async fn check(&self, _: &Context) -> Result<Verdict, CheckError> {
        let number = self.0.fetch_add(1, Ordering::SeqCst);
        Ok(tokio::task::block_in_place(|| self.1(number)))
    }
}

/// Counts the endpoints of the Service `web`, by side.
fn shares(corner: &Corner) -> (usize, usize) {
    let all = endpoints(corner.namespace.cluster(), &corner.namespace.name, "web");
    let new = all.iter().filter(|pod| pod.contains("-canary-")).count();
    (new, all.len() - new)
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_share_the_traffic_more_and_more_and_all_of_it_goes_back() {
    let Some(corner) = Corner::shared("canary") else { return };
    let corner = Arc::new(corner);
    populate(&corner, 3);
    let before = corner.written(KINDS);
    let watch = Watch::over(&corner);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (sink, looked) = (seen.clone(), corner.clone());
    let look = Asked::new(move |_| {
        // What is ready reaches the endpoints a moment later.
        std::thread::sleep(Duration::from_millis(500));
        sink.lock().unwrap().push(shares(&looked));
        Verdict::pass("looked")
    });
    let step = make(&corner, &json!({ "weights": [5, 50, 100] })).with_check("look", look, how(&json!({})));
    let test = TestContext::new("web");
    let undo = prepared(&step, &test).await;
    let output = step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!(*seen.lock().unwrap(), [(1, 3), (3, 3), (3, 0)]);
    assert_eq!(output.images["web"], "shop/web:2");
    assert_eq!(corner.get("deployment/web").text("/spec/template/spec/containers/0/image"), "shop/web:1");
    step.rollback(&test.back(), &undo, Some(&output)).await.unwrap();
    assert!(watch.least() >= 3);
    assert_eq!(corner.written(KINDS), before);
    step.rollback(&test.back(), &undo, None).await.unwrap();
    corner.await_pods("web", "shop/web:1", 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promotion_leaves_the_deployment_that_was_there() {
    let Some(corner) = Corner::shared("promote") else { return };
    populate(&corner, 2);
    route(&corner);
    let before = corner.written("httproutes");
    for with in [json!({}), json!({ "route": "web", "images": { "web": "shop/web:3" } })] {
        let watch = Watch::over(&corner);
        let step = make(&corner, &with);
        let test = TestContext::new("web");
        let undo = prepared(&step, &test).await;
        step.apply(&test.forward(), &undo).await.unwrap();
        step.commit(&test.commit(), &undo).await.unwrap();
        if undo.route.is_none() {
            assert!(watch.least() >= 2);
        } else {
            // The route led past this Service while its pods were renewed.
            watch.least();
        }
        let image = if undo.route.is_none() { "shop/web:2" } else { "shop/web:3" };
        corner.await_pods("web", image, 2);
        let services = corner.written("services");
        assert!(!services.contains("pod-template-hash") && !services.contains("canary"), "{services}");
        assert_eq!(corner.namespace.kubectl(&["get", "deployments", "--output", "name"]).trim(), "deployment.apps/web");
        assert_eq!(corner.written("httproutes"), before);
        step.commit(&test.commit(), &undo).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_shares_the_traffic_and_gives_it_back_within_a_second() {
    let Some(corner) = Corner::shared("route") else { return };
    let corner = Arc::new(corner);
    populate(&corner, 4);
    route(&corner);
    let before = corner.written(ROUTED);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (sink, looked) = (seen.clone(), corner.clone());
    let look = Asked::new(move |_| {
        let replicas: BTreeMap<_, _> = looked
            .namespace
            .kubectl(&[
                "get",
                "deployments",
                "--output",
                "jsonpath={range .items[*]}{.metadata.name} {.status.readyReplicas}{'\\n'}{end}",
            ])
            .lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(name, ready)| (name.contains("canary"), ready.to_owned()))
            .collect();
        sink.lock().unwrap().push((weights(&looked), replicas[&true].clone(), shares(&looked)));
        Verdict::pass("looked")
    });
    let step = make(&corner, &json!({ "route": "web" })).with_check("look", look, how(&json!({})));
    let test = TestContext::new("web");
    let undo = prepared(&step, &test).await;
    is_recorded(&undo, &corner.namespace.name);
    step.apply(&test.forward(), &undo).await.unwrap();
    let expected = [(5, "1"), (25, "1"), (50, "2"), (100, "4")].map(|(weight, ready): (u64, &str)| {
        // The Service that was there leads to the pods that were there, whatever the route says.
        (vec![100 - weight, weight, 3 * (100 - weight), 3 * weight, 100], ready.to_owned(), (0, 4))
    });
    assert_eq!(*seen.lock().unwrap(), expected);
    assert_eq!(corner.get("service/web").text(HASH), undo.pair.blue);

    let polled = corner.clone();
    let returned = tokio::task::spawn_blocking(move || {
        let began = Instant::now();
        while weights(&polled)[0] != 1 {
            std::thread::sleep(Duration::from_millis(20));
        }
        began.elapsed()
    });
    step.rollback(&test.back(), &undo, None).await.unwrap();
    let returned = returned.await.unwrap();
    println!("all traffic on the stable side {returned:?} after the decision");
    assert_eq!(corner.written(ROUTED), before);
}

/// Compares what a run keeps with the golden file, but for what is other in each cluster.
fn is_recorded(undo: &CanaryUndo, namespace: &str) {
    let (pair, route) = (&undo.pair, undo.route.as_ref().unwrap());
    let mark = pair.green.rsplit('-').next().unwrap();
    let length = format!("\"length\": {}", serde_json::to_value(&pair.template).unwrap()["length"]);
    let sealed = serde_json::to_value(&pair.template).unwrap()["sha256"].as_str().unwrap().to_owned();
    let replaced = [
        (namespace, "shop"),
        (&*pair.uid, "UID-1"),
        (&*pair.services[0].uid, "UID-2"),
        (&*route.uid, "UID-3"),
        (&*pair.found, "sha256:FOUND"),
        (&*pair.intended, "sha256:INTENDED"),
        (&*sealed, "0000000000000000000000000000000000000000000000000000000000000000"),
        (&*length, "\"length\": 10"),
        (&*pair.blue, "5d4f8c7b9"),
        (mark, "0123456789ab"),
    ];
    golden("k8s.canary.undo.v1.json", undo, &replaced);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_measured_decides_and_nobody_knows_is_no_pass() {
    let Some(corner) = Corner::shared("measured") else { return };
    populate(&corner, 2);
    let before = corner.written(KINDS);
    let fails_later = || {
        Asked::new(|number| {
            if number < 2 {
                Verdict::pass("0.1% errors")
            } else {
                Verdict::fail("7% errors").with_measurement("rate", 0.07)
            }
        })
    };
    let nobody_knows = || Asked::new(|_| Verdict::unknown("no such series"));
    let verdicts = [
        (
            fails_later() as Arc<dyn Check>,
            how(&json!({ "passes": 2 })),
            "at 50%: `errors` failed: 7% errors",
            Class::Permanent,
        ),
        (nobody_knows(), how(&json!({})), "at 5%: `errors` cannot be measured: no such series", Class::Unknown),
    ];
    for (check, how, says, class) in verdicts {
        let step = make(&corner, &json!({ "weights": [5, 50, 100] })).with_check("errors", check, how);
        let test = TestContext::new("web");
        let undo = prepared(&step, &test).await;
        let error = step.apply(&test.forward(), &undo).await.unwrap_err();
        assert!(error.message().contains(says) && error.class() == class, "{error:?}");
        step.rollback(&test.back(), &undo, None).await.unwrap();
        assert_eq!(corner.written(KINDS), before);
    }
    // Any kind of check may be asked: this one asks the cluster itself, of both sides.
    let analysis = json!([{ "uses": "k8s.pods", "every": "50ms",
        "with": { "target": "cluster", "selector": "app=web,pod-template-hash={canary}" },
        "stable": { "selector": "app=web,pod-template-hash={stable}" },
        "limits": { "restarts": { "max_rise": 0 } } }]);
    let step = make(&corner, &json!({ "weights": [50, 100], "analysis": analysis }));
    let test = TestContext::new("web");
    let undo = prepared(&step, &test).await;
    step.apply(&test.forward(), &undo).await.unwrap();
    step.rollback(&test.back(), &undo, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_canary_that_dies_while_it_is_watched_ends_it() {
    let Some(corner) = Corner::shared("dies") else { return };
    populate(&corner, 2);
    let before = corner.written(KINDS);
    let step = make(&corner, &json!({ "images": { "web": "shop/web:2-late" }, "pause": "30s", "deadline": "20s" }));
    let test = TestContext::new("web");
    let undo = prepared(&step, &test).await;
    let began = Instant::now();
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert!(error.message().contains("canary") && began.elapsed() < Duration::from_secs(60), "{error:?}");
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(corner.written(KINDS), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_that_somebody_else_wrote_stop_it() {
    let Some(corner) = Corner::shared("foreign") else { return };
    populate(&corner, 1);
    route(&corner);
    let step = make(&corner, &json!({ "route": "web" }));
    let test = TestContext::new("web");
    let undo = prepared(&step, &test).await;
    step.apply(&test.forward(), &undo).await.unwrap();
    let foreign = r#"[{ "op": "replace", "path": "/spec/rules/0/backendRefs/0/name", "value": "else" }]"#;
    corner.namespace.kubectl(&["patch", "httproute", "web", "--type", "json", "--patch", foreign]);
    let error = step.rollback(&test.back(), &undo, None).await.unwrap_err();
    assert!(error.as_conflict().is_some() && error.message().contains("web"), "{error:?}");
    assert_eq!(corner.get("httproute/web").text("/spec/rules/0/backendRefs/0/name"), "else");
}

#[tokio::test]
async fn what_cannot_be_shared_is_refused_before_anything_changes() {
    let Some(corner) = Corner::shared("unshared") else { return };
    populate(&corner, 1);
    route(&corner);
    corner.namespace.apply("apiVersion: v1\nkind: Service\nmetadata: { name: other }\nspec: { selector: { app: web }, ports: [{ port: 80 }] }\n");
    let before = corner.written(ROUTED);
    for (with, says, hint) in [
        (json!({ "route": "none" }), "does not exist", "kubectl get httproutes"),
        (json!({ "route": "web", "service": "other" }), "does not lead to service other, but to: web", "backendRefs"),
        (json!({ "images": { "wbe": "x" } }), "wbe", "container"),
    ] {
        let error = make(&corner, &with).prepare(&TestContext::new("web").forward()).await.unwrap_err();
        assert!(error.message().contains(says) && error.hint().unwrap().contains(hint), "{error:?}");
    }
    corner.namespace.kubectl(&["scale", "deployment", "web", "--replicas", "0"]);
    let error = make(&corner, &json!({})).prepare(&TestContext::new("web").forward()).await.unwrap_err();
    assert!(error.message().contains("no pods") || error.message().contains("rollout"), "{error:?}");
    corner.namespace.kubectl(&["scale", "deployment", "web", "--replicas", "1"]);
    assert_eq!(corner.written(ROUTED), before);
    for (with, key) in [
        (json!({ "images": {} }), "images"),
        (json!({ "weights": [50] }), "weights"),
        (json!({ "analysis": [{ "uses": "k8s.podz" }] }), "analysis.0.uses"),
        (
            json!({ "analysis": [{ "uses": "k8s.pods", "with": { "target": "cluster", "selctor": "a=b" } }] }),
            "analysis.0.with.selctor",
        ),
        (
            json!({ "analysis": [{ "uses": "k8s.pods", "with": { "target": "cluster", "selector": "a=b" }, "limits": { "pods": { "max_increase": "1%" } } }] }),
            "analysis.0.stable",
        ),
    ] {
        let mut config =
            json!({ "target": "cluster", "deployment": "web", "service": "web", "images": { "web": "x" } });
        config.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
        let config: CanaryConfig = serde_json::from_value(config).unwrap();
        let error = Canary::from_config(config, &corner.build_context().with_checks(&registry())).unwrap_err();
        assert_eq!(error.key.as_deref(), Some(key), "{error}");
    }
}
