//! The Roles that the pages name: each carries its step up and back, and with one verb less it does not.

#![cfg(test)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde_json::{Value, json};
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::CheckError;
use upgrade_core::executor::{Executor, Interrupt, Outcome, RunOptions};
use upgrade_core::journal::MemoryJournal;
use upgrade_core::pipeline::Pipeline;
use upgrade_core::registry::{AnyTarget, BuildContext};
use upgrade_core::verdict::Verdict;
use upgrade_k8s::steps::RolloutStep;
use upgrade_k8s::{Cluster, ClusterConfig};

use crate::world::Corner;

/// Fails, so that all is put back, and remembers that it came to be asked.
struct Refuses(Arc<AtomicBool>);

#[async_trait]
impl Check for Refuses {
    async fn check(&self, _: &Context) -> Result<Verdict, CheckError> {
        self.0.store(true, Ordering::SeqCst);
        Ok(Verdict::fail("not wanted"))
    }
}

/// Reads the rules of the Role that a page names.
fn rules_of(page: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/steps").join(page);
    let text = std::fs::read_to_string(path).unwrap();
    let section = text.split("\n## Rights\n").nth(1).expect("the page names rights");
    let block = section.split("```").nth(1).expect("they are a block").trim_start_matches("yml");
    let manifest = &upgrade_k8s::manifest::Manifest::parse(block, page).unwrap()[0];
    manifest.object.list("/rules").cloned().collect()
}

fn without(rules: &[Value], rule: usize, verb: usize) -> Vec<Value> {
    let mut less = rules.to_vec();
    less[rule]["verbs"].as_array_mut().unwrap().remove(verb);
    if less[rule]["verbs"].as_array().unwrap().is_empty() {
        less.remove(rule);
    }
    less
}

fn texts(value: &Value) -> Vec<&str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// Gives the stranger these rights and no others, and waits until the API server heeds them.
fn grant(corner: &Corner, all: &[Value], granted: &[Value]) {
    let role = json!({ "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role",
        "metadata": { "name": "named" }, "rules": granted });
    corner.namespace.apply(&role.to_string());
    let began = Instant::now();
    for rule in all {
        let (group, resource) = (texts(&rule["apiGroups"])[0], texts(&rule["resources"])[0]);
        let what = if group.is_empty() { resource.to_owned() } else { format!("{resource}.{group}") };
        for verb in texts(&rule["verbs"]) {
            let is_granted = granted
                .iter()
                .any(|each| each["resources"] == rule["resources"] && texts(&each["verbs"]).contains(&verb));
            let asked =
                ["auth", "can-i", verb, what.as_str(), "--as", "stranger", "--namespace", &corner.namespace.name];
            while corner.namespace.cluster().command(asked).output().unwrap().status.success() != is_granted {
                assert!(began.elapsed() < Duration::from_secs(30), "{verb} {what}: {is_granted} is not heeded");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}

#[tokio::test]
async fn a_rollout_needs_what_its_page_says_and_no_less() {
    let Some(corner) = Corner::shared("rights") else { return };
    let Some(stranger) = corner.namespace.cluster().kubeconfig_of("stranger") else { return };
    corner.deployment("web", "shop/web:1", 2);
    corner.await_pods("web", "shop/web:1", 2);
    corner.namespace.kubectl(&["create", "role", "named", "--verb=get", "--resource=secrets"]);
    corner.namespace.kubectl(&["create", "rolebinding", "named", "--role", "named", "--user", "stranger"]);
    let rules = rules_of("k8s.rollout.md");
    let up_and_back = async || {
        // A pipeline of its own each time: what a cluster was asked for once is remembered.
        let config = ClusterConfig {
            kubeconfig: Some(stranger.clone()),
            namespace: Some(corner.namespace.name.clone()),
            lease: Some(false),
            ..ClusterConfig::default()
        };
        let cluster = Cluster::from_config(config, &BuildContext::new("/")).unwrap();
        let cx = BuildContext::new("/").with_target("cluster", AnyTarget::new("k8s", cluster));
        let config = json!({ "target": "cluster",
            "workloads": [{ "workload": "deployment/web", "images": { "web": "shop/web:2" } }] });
        let step = RolloutStep::from_config(serde_json::from_value(config).unwrap(), &cx).unwrap();
        let reached = Arc::new(AtomicBool::new(false));
        let pipeline =
            Pipeline::builder("rights").step("web", step).verify("wanted", Refuses(reached.clone())).build().unwrap();
        let executor = Executor::new(Arc::new(MemoryJournal::new()));
        let (options, interrupt) = (RunOptions::default(), Interrupt::new());
        let run = executor.run(&pipeline, &options, &interrupt);
        let ended = tokio::time::timeout(Duration::from_secs(60), run).await;
        let is_back = matches!(&ended, Ok(Ok(report)) if matches!(report.outcome, Outcome::RolledBack { .. }));
        (reached.load(Ordering::SeqCst) && is_back, format!("{ended:?}"))
    };
    grant(&corner, &rules, &rules);
    let (is_enough, ended) = up_and_back().await;
    assert!(is_enough, "{ended}");
    corner.await_pods("web", "shop/web:1", 2);
    for (at, rule) in rules.iter().enumerate() {
        for (number, verb) in texts(&rule["verbs"]).into_iter().enumerate() {
            grant(&corner, &rules, &without(&rules, at, number));
            let (is_enough, ended) = up_and_back().await;
            assert!(!is_enough, "it does without {verb} of {}: {ended}", rule["resources"]);
        }
    }
}
