//! What containers that run say, in progress and in failures; and the number of their pods.

#![cfg(test)]

use serde_json::{Value, json};
use upgrade_core::step::{Prepared, Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_core::undoable::OptionalRollback as _;
use upgrade_k8s::steps::{JobStep, RolloutStep, Scale};

use super::{corner, inside};
use crate::world::Corner;

fn config<T: serde::de::DeserializeOwned>(more: &Value) -> T {
    let mut config = json!({ "target": "cluster" });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    serde_json::from_value(config).unwrap()
}

fn job(corner: &Corner, script: &str) -> upgrade_k8s::steps::UndoableJob {
    let with = json!({ "name": "migrate", "image": "upgrade.test/busybox:1", "command": ["sh", "-c", script], "undo": { "command": ["true"] } });
    JobStep::from_config(config(&with), &corner.build_context()).unwrap().undoable().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a real kubelet: see kubelet/mod.rs"]
async fn campaign_on_a_real_kubelet_a_job_is_followed_with_its_log() {
    let corner = corner("log");
    let test = TestContext::new("log");
    let step = job(&corner, "echo table 1 of 2; sleep 6; echo table 2 of 2");
    let Prepared::Change { undo, .. } = step.prepare(&test.forward()).await.unwrap() else { panic!("it is not done") };
    step.apply(&test.forward(), &undo).await.unwrap();
    let shown = test.reported();
    assert!(shown.iter().any(|progress| progress.message.contains("table 1 of 2")), "{shown:?}");
    step.rollback(&test.back(), &undo, None).await.unwrap();

    let test = TestContext::new("fails");
    let step = job(&corner, "echo begun; echo no such table >&2; exit 3");
    let Prepared::Change { undo, .. } = step.prepare(&test.forward()).await.unwrap() else { panic!("it is not done") };
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert!(error.message().contains('3') && error.detail().unwrap().contains("no such table"), "{error:?}");
    step.rollback(&test.back(), &undo, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a real kubelet: see kubelet/mod.rs"]
async fn campaign_on_a_real_kubelet_a_crash_is_told_in_the_containers_own_words() {
    let corner = corner("words");
    // Without a probe, a container counts as ready as soon as it has started, and its rollout as complete.
    let script = "[ \\\"$MODE\\\" != new ] || { echo cannot read the new format; exit 1; }; exec sleep 1000";
    let patch = format!(
        "{{\"spec\":{{\"template\":{{\"spec\":{{\"containers\":[{{\"name\":\"web\",\"command\":[\"sh\",\"-c\",\"{script}\"],\"readinessProbe\":{{\"exec\":{{\"command\":[\"true\"]}},\"initialDelaySeconds\":2}}}}]}}}}}}}}"
    );
    corner.namespace.kubectl(&["patch", "deployment", "web", "--patch", &patch]);
    corner.namespace.kubectl(&["rollout", "status", "deployment/web"]);
    let test = TestContext::new("words");
    let with = json!({ "workloads": [{ "workload": "deployment/web", "env": { "web": { "MODE": "new" } } }] });
    let step = RolloutStep::from_config(config(&with), &corner.build_context()).unwrap();
    let Prepared::Change { undo, .. } = step.prepare(&test.forward()).await.unwrap() else { panic!("it is not done") };
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert!(error.detail().unwrap_or_default().contains("cannot read the new format"), "{error:?}");
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(inside(&corner, "echo $MODE"), "");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a real kubelet: see kubelet/mod.rs"]
async fn campaign_on_a_real_kubelet_a_pod_that_works_off_what_it_has_is_waited_for() {
    let corner = corner("grace");
    let patch = r#"{"spec":{"template":{"spec":{"terminationGracePeriodSeconds":30,"containers":[{"name":"web",
        "command":["sh","-c","trap 'sleep 4; exit 0' TERM; while true; do sleep 0.1; done"]}]}}}}"#;
    corner.namespace.kubectl(&["patch", "deployment", "web", "--patch", patch]);
    corner.namespace.kubectl(&["rollout", "status", "deployment/web"]);
    let test = TestContext::new("grace");
    let with = json!({ "workloads": [{ "workload": "deployment/web", "replicas": 0 }] });
    let step = Scale::from_config(config(&with), &corner.build_context()).unwrap();
    let Prepared::Change { undo, .. } = step.prepare(&test.forward()).await.unwrap() else { panic!("it is not done") };
    let began = std::time::Instant::now();
    step.apply(&test.forward(), &undo).await.unwrap();
    assert!(began.elapsed().as_secs() >= 3, "{:?}", began.elapsed());
    assert_eq!(corner.namespace.kubectl(&["get", "pods", "--output", "name"]), "");
    step.rollback(&test.back(), &undo, None).await.unwrap();
    corner.await_pods("web", "upgrade.test/busybox:1", 1);
}
