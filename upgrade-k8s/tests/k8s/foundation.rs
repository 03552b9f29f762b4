//! What all kinds stand on: the way to a cluster, requests, discovery, objects that are followed.

#![cfg(test)]

use std::time::{Duration, Instant};

use serde_json::json;
use upgrade_core::error::Class;
use upgrade_core::target::Target as _;
use upgrade_core::testkit::TestContext;
use upgrade_k8s::object::patch;
use upgrade_k8s::server::Deletion;
use upgrade_k8s::{Kind, ObjectName};
use upgrade_testbed::kubernetes;

use crate::world::{Corner, target};

#[tokio::test]
async fn a_cluster_is_known_by_its_uid_and_a_stranger_is_told_what_is_missing() {
    let Some(corner) = Corner::shared("identity") else { return };
    let cx = TestContext::new("x").forward();
    let identity = corner.target().identity(&cx).await.unwrap();
    assert!(identity.starts_with("cluster "), "{identity}");
    assert_eq!(identity, corner.target().identity(&cx).await.unwrap());

    let Some(stranger) = corner.namespace.cluster().kubeconfig_of("stranger") else { return };
    let error = target(&stranger, &corner.namespace.name).identity(&cx).await.unwrap_err();
    assert_eq!(error.class(), Class::Permanent);
    assert!(error.hint().unwrap().contains("Role"), "{error:?}");

    let expired = corner.namespace.cluster().kubeconfig_of("expired").unwrap();
    let error = target(&expired, &corner.namespace.name).identity(&cx).await.unwrap_err();
    assert_eq!(error.class(), Class::Permanent, "{error:?}");
    assert!(error.hint().unwrap().contains("expired"), "{error:?}");
}

#[tokio::test]
async fn a_server_that_is_not_there_is_waited_for_and_then_named() {
    let directory = tempfile::tempdir().unwrap();
    let kubeconfig = directory.path().join("config");
    let text = "clusters: [{ name: c, cluster: { server: \"https://127.0.0.1:9\" } }]\n\
                contexts: [{ name: x, context: { cluster: c } }]\ncurrent-context: x\n";
    std::fs::write(&kubeconfig, text).unwrap();
    let test = TestContext::new("x");
    let cx = test.forward();
    let stop = cx.cancelled().clone();
    let asked = tokio::spawn(async move { target(&kubeconfig, "shop").identity(&cx).await });
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!asked.is_finished(), "it is tried again");
    stop.cancel();
    let error = tokio::time::timeout(Duration::from_secs(2), asked).await.unwrap().unwrap().unwrap_err();
    assert_eq!(error.class(), Class::Transient);
}

#[tokio::test]
async fn kinds_are_found_as_kubectl_finds_them() {
    let Some(corner) = Corner::shared("kinds") else { return };
    let cx = TestContext::new("x").forward();
    let server = corner.target().connect(&cx).await.unwrap();
    for asked in ["Deployment", "deployments", "deployments.apps"] {
        assert_eq!(server.find_kind(None, asked).await.unwrap(), Some(Kind::deployment()), "{asked}");
    }
    assert_eq!(server.find_kind(Some("batch/v1"), "Job").await.unwrap(), Some(Kind::job()));
    assert_eq!(server.find_kind(Some("extensions/v1beta9"), "Job").await.unwrap(), None);
    assert_eq!(server.find_kind(None, "Rollercoaster").await.unwrap(), None);
}

#[tokio::test]
async fn a_change_is_made_on_what_is_there_however_many_others_write() {
    let Some(corner) = Corner::shared("writers") else { return };
    let cx = TestContext::new("x").forward();
    let server = corner.target().connect(&cx).await.unwrap();
    let name = ObjectName::new(Kind::config_map(), &corner.namespace.name, "counter");
    let body =
        json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "counter" }, "data": { "n": "0" } });
    server.create(&name, &body).await.unwrap();
    assert!(server.create(&name, &body).await.unwrap_err().is_in_conflict());

    let one = async || {
        let add = |present: &upgrade_k8s::Object| {
            let number: u32 = present.text("/data/n").parse().unwrap();
            Ok(Some(patch(present, [("/data/n".to_owned(), Some(json!((number + 1).to_string())))])))
        };
        for _ in 0..5 {
            server.change(&name, add).await.unwrap();
        }
    };
    tokio::join!(one(), one(), one());
    assert_eq!(server.require(&name).await.unwrap().text("/data/n"), "15");

    // What was read is of another object by now.
    let stale = server.require(&name).await.unwrap();
    let other = Deletion { uid: Some("00000000-0000-0000-0000-000000000000".into()), ..Deletion::default() };
    server.delete(&name, &other).await.unwrap();
    assert!(server.get(&name).await.unwrap().is_some(), "another one's uid deletes nothing");
    let own = Deletion { uid: Some(stale.uid().to_owned()), ..Deletion::default() };
    server.delete(&name, &own).await.unwrap();
    server.await_gone(&name, stale.uid()).await.unwrap();
    server.delete(&name, &own).await.unwrap();
    let error = server.require(&name).await.unwrap_err();
    assert!(
        error.message().contains("configmap ") && error.hint().unwrap().contains("kubectl get configmaps"),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_followed_is_seen_and_an_api_server_that_is_started_anew_loses_nothing() {
    let Some(own) = kubernetes::own() else { return };
    let namespace = own.cluster().namespace("follow");
    let test = TestContext::new("x");
    let server = target(own.cluster().kubeconfig(), &namespace.name).connect(&test.forward()).await.unwrap();
    let mut follow = server.follow(Kind::config_map(), Some(&namespace.name), "kept=yes", |object| {
        Some((object.name().to_owned(), object.text("/data/n").to_owned()))
    });
    follow.changed().await.unwrap();
    assert!(follow.objects().is_empty());
    let make = |name: &str, n: u32| {
        let body = json!({ "apiVersion": "v1", "kind": "ConfigMap", "data": { "n": n.to_string() },
            "metadata": { "name": name, "labels": { "kept": "yes" } } });
        (ObjectName::new(Kind::config_map(), &namespace.name, name), body)
    };
    let (a, body) = make("a", 1);
    server.create(&a, &body).await.unwrap();
    until(&mut follow, |all| all == [("a".to_owned(), "1".to_owned())]).await;

    own.kill();
    let (b, body) = make("b", 2);
    // It is asked for while nobody answers, and done when somebody does.
    let (created, ()) = tokio::join!(server.create(&b, &body), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        tokio::task::block_in_place(|| own.start());
    });
    created.unwrap();
    until(&mut follow, |all| all.len() == 2).await;
    server.delete(&a, &Deletion::default()).await.unwrap();
    until(&mut follow, |all| all == [("b".to_owned(), "2".to_owned())]).await;
}

async fn until(
    follow: &mut upgrade_k8s::follow::Follow<(String, String)>,
    is_so: impl Fn(&[(String, String)]) -> bool,
) {
    let began = Instant::now();
    loop {
        let mut all: Vec<_> = follow.objects().values().cloned().collect();
        all.sort();
        if is_so(&all) {
            return;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{all:?}");
        tokio::time::timeout(Duration::from_secs(30), follow.changed()).await.unwrap().unwrap();
    }
}
