//! `k8s.job` on a real control plane.

#![cfg(test)]

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use upgrade_core::error::{Class, StepError};
use upgrade_core::step::{Prepared, Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_core::undoable::OptionalRollback;
use upgrade_k8s::naming;
use upgrade_k8s::steps::{JobConfig, JobStep, JobUndo, UndoableJob};
use upgrade_testbed::kubernetes;

use crate::world::{Corner, build_context, golden};

fn config(image: &str, more: &Value) -> JobConfig {
    let mut config = json!({ "target": "cluster", "name": "migrate", "image": image, "env": { "ADDS": "two" } });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    serde_json::from_value(config).unwrap()
}

/// A step that can be undone.
fn make(corner: &Corner, image: &str, more: &Value) -> UndoableJob {
    let mut all = json!({ "undo": { "image": "shop/db:done", "command": ["down"], "env": { "REMOVES": "two" } } });
    all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let step = JobStep::from_config(config(image, &all), &corner.build_context()).unwrap();
    step.undoable().unwrap()
}

async fn prepared(step: &UndoableJob, test: &TestContext) -> JobUndo {
    match step.prepare(&test.forward()).await.unwrap() {
        Prepared::Change { undo, .. } => undo,
        other => panic!("{other:?}"),
    }
}

/// Prepares, applies and expects a failure within seconds; rolls back and returns the error.
async fn fails(corner: &Corner, step: &UndoableJob, test: &TestContext) -> StepError {
    let undo = prepared(step, test).await;
    let began = Instant::now();
    let error = step.apply(&test.forward(), &undo).await.expect_err("it cannot be done");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}: {error:?}", began.elapsed());
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(jobs(corner), "");
    error
}

fn jobs(corner: &Corner) -> String {
    corner.namespace.kubectl(&["get", "jobs", "--output", "name"])
}

/// What the Jobs did to the world.
fn effects(corner: &Corner) -> String {
    corner.namespace.kubectl(&[
        "get",
        "configmap",
        "effects",
        "--ignore-not-found",
        "--output",
        "jsonpath={.data.lines}",
    ])
}

#[tokio::test]
async fn a_job_is_done_once_and_undone_by_another_one() {
    let Some(corner) = Corner::shared("job") else { return };
    let test = TestContext::new("migrate");
    let step = make(&corner, "shop/db:done", &json!({}));
    let undo = prepared(&step, &test).await;
    let output = step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!((output.job.as_str(), output.exit_code), (undo.job.as_str(), 0));
    assert!(output.pod.as_deref().unwrap().starts_with("migrate-job-"), "{output:?}");
    assert_eq!(effects(&corner), "two");
    // A second call finds it done.
    let again = step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!((again, effects(&corner).as_str()), (output.clone(), "two"));

    step.rollback(&test.back(), &undo, Some(&output)).await.unwrap();
    assert_eq!((effects(&corner).as_str(), jobs(&corner).as_str()), ("", ""));
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!((effects(&corner).as_str(), jobs(&corner).as_str()), ("", ""));

    let mark = naming::mark(&test.forward());
    let read = golden("k8s.job.undo.v1.json", &undo, &[(&mark, "MARK"), (&corner.namespace.name, "NAMESPACE")]);
    let read = JobStep::read_undo(JobStep::FORMAT, read).unwrap();
    assert_eq!(read.undo.as_deref(), Some("migrate-undo-MARK"));
}

#[tokio::test]
async fn a_job_is_removed_at_commit_and_what_it_did_stays() {
    let Some(corner) = Corner::shared("commit") else { return };
    let test = TestContext::new("migrate");
    let template = json!({ "metadata": { "labels": { "team": "db" } }, "spec": { "containers": [
        { "name": "migrate", "image": "shop/db:done", "env": [{ "name": "ADDS", "value": "two" }] }] } });
    let config = json!({ "target": "cluster", "name": "migrate", "template": template, "retries": 1 });
    let step = JobStep::from_config(serde_json::from_value(config).unwrap(), &corner.build_context()).unwrap();
    assert_eq!(step.irreversible_because(), Some("no `undo` Job is given"));
    let Prepared::Change { undo, changes } = step.prepare(&test.forward()).await.unwrap() else { panic!() };
    assert_eq!(changes[0].subject, "shop/db:done");
    assert!(changes[0].summary.as_deref().unwrap().contains("what it does stays"), "{changes:?}");
    step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!(corner.get(&format!("job/{}", undo.job)).text("/spec/template/metadata/labels/team"), "db");
    step.commit(&test.commit(), &undo).await.unwrap();
    step.commit(&test.commit(), &undo).await.unwrap();
    assert_eq!((effects(&corner).as_str(), jobs(&corner).as_str()), ("two", ""));
}

#[tokio::test]
async fn a_failure_names_pod_container_and_exit_code() {
    let Some(corner) = Corner::shared("fail") else { return };
    let error = fails(&corner, &make(&corner, "shop/db:fail", &json!({})), &TestContext::new("fail")).await;
    assert_eq!(error.class(), Class::Permanent);
    for part in ["pod migrate-job-", "(container job)", "exit code 3"] {
        assert!(error.message().contains(part), "{part}: {error:?}");
    }
    assert!(error.hint().unwrap().contains("what it said"), "{error:?}");
}

#[tokio::test]
async fn an_image_that_is_missing_is_named_within_seconds_and_nothing_is_undone() {
    let Some(corner) = Corner::shared("missing") else { return };
    // Its undo would never end either: that it never ran is known.
    let more = json!({ "undo": { "command": ["down"] } });
    let step = make(&corner, "shop/db:2-missing", &more);
    let error = fails(&corner, &step, &TestContext::new("missing")).await;
    assert!(error.message().contains("shop/db:2-missing") && error.message().contains("pod "), "{error:?}");
    assert!(error.hint().unwrap().contains("image's name"), "{error:?}");
    // Another attempt makes it anew.
    let test = TestContext::new("missing");
    let undo = prepared(&step, &test).await;
    for attempt in [1, 2] {
        let error = step.apply(&test.clone().attempt(attempt).forward(), &undo).await.unwrap_err();
        assert!(error.message().contains("shop/db:2-missing"), "{error:?}");
    }
    step.rollback(&test.back(), &undo, None).await.unwrap();
}

#[tokio::test]
async fn a_deadline_that_is_over_is_said() {
    let Some(corner) = Corner::shared("deadline") else { return };
    let step = make(&corner, "shop/db:1", &json!({ "deadline": "2s" }));
    let error = fails(&corner, &step, &TestContext::new("late")).await;
    assert!(error.message().contains("not done within 2 s"), "{error:?}");
}

#[tokio::test]
async fn a_job_that_outlives_its_caller_is_found_again_and_not_run_twice() {
    let Some(corner) = Corner::shared("outlives") else { return };
    let test = TestContext::new("migrate");
    let step = make(&corner, "shop/db:done", &json!({}));
    let undo = prepared(&step, &test).await;
    for pause in [0, 50, 300] {
        // Dropped in the middle, as by a crash.
        let cut = tokio::time::timeout(Duration::from_millis(pause), step.apply(&test.forward(), &undo)).await;
        assert!(cut.is_err(), "it takes longer than that");
    }
    step.apply(&test.clone().interrupted().forward(), &undo).await.unwrap();
    assert_eq!(effects(&corner), "two");
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!((effects(&corner).as_str(), jobs(&corner).as_str()), ("", ""));
}

#[tokio::test]
async fn a_job_that_was_made_while_it_was_undone_is_undone_as_well() {
    let Some(corner) = Corner::shared("meanwhile") else { return };
    let test = TestContext::new("migrate");
    let step = make(&corner, "shop/db:done", &json!({}));
    let undo = prepared(&step, &test).await;
    let (back, forward) = (test.back(), test.forward());
    // A driver that is given up for dead, and is not.
    let (undone, _) = tokio::join!(step.rollback(&back, &undo, None), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        tokio::time::timeout(Duration::from_secs(1), step.apply(&forward, &undo)).await
    });
    undone.unwrap();
    assert_eq!((effects(&corner).as_str(), jobs(&corner).as_str()), ("", ""));
}

#[tokio::test]
async fn nothing_is_undone_while_a_pod_still_runs() {
    let Some(corner) = Corner::shared("slow") else { return };
    let test = TestContext::new("migrate");
    // It stays until somebody says that it may go, as one does whose node is lost.
    let template = json!({ "metadata": { "finalizers": ["example.com/stays"] },
        "spec": { "containers": [{ "name": "migrate", "image": "shop/db:1" }] } });
    let undo = json!({ "image": "shop/db:done", "command": ["down"] });
    let config = json!({ "target": "cluster", "name": "migrate", "template": template, "undo": undo });
    let step = JobStep::from_config(serde_json::from_value(config).unwrap(), &corner.build_context()).unwrap();
    let step = step.undoable().unwrap();
    let undo = prepared(&step, &test).await;
    let _ = tokio::time::timeout(Duration::from_secs(1), step.apply(&test.forward(), &undo)).await;
    let pod = corner.namespace.kubectl(&["get", "pods", "--output", "name"]);
    assert!(pod.starts_with("pod/migrate-job-"), "{pod}");
    let back = test.back();
    let early = tokio::time::timeout(Duration::from_secs(2), step.rollback(&back, &undo, None)).await;
    assert!(early.is_err() && jobs(&corner).is_empty(), "the undo waits: {early:?}");
    assert!(test.reported().iter().any(|told| told.message.contains("waiting for pod")), "it says for what");
    corner.namespace.kubectl(&["patch", &pod, "--type=json", "--patch=[{op: remove, path: /metadata/finalizers}]"]);
    step.rollback(&back, &undo, None).await.unwrap();
    assert_eq!(jobs(&corner), "");
}

#[tokio::test]
async fn a_call_that_is_cancelled_leaves_nothing_running() {
    let Some(corner) = Corner::shared("cancelled") else { return };
    let mut test = TestContext::new("migrate");
    let step = make(&corner, "shop/db:1", &json!({}));
    let undo = prepared(&step, &test).await;
    let token = test.cancellation().clone();
    let cx = test.forward();
    let (ended, ()) = tokio::join!(step.apply(&cx, &undo), async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        token.cancel();
    });
    assert_eq!(ended.unwrap_err().message(), "cancelled");
    let job = corner.get(&format!("job/{}", undo.job));
    assert_eq!(job.at("/spec/parallelism"), 0);
    test.renew();
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(jobs(&corner), "");
    assert_eq!(corner.namespace.kubectl(&["get", "pods", "--output", "name"]), "");
}

#[tokio::test]
async fn what_the_cluster_refuses_is_said_before_anything_runs() {
    let Some(corner) = Corner::shared("refused") else { return };
    let refused = async |step: UndoableJob| step.prepare(&TestContext::new("x").forward()).await.unwrap_err();
    let error = refused(make(&corner, "shop/db:done", &json!({ "name": "Migrate" }))).await;
    assert!(error.message().contains("invalid") && error.hint().unwrap().contains("correct"), "{error:?}");
    let error = refused(make(&corner, "shop/db:done", &json!({ "service_account": "nobody" }))).await;
    assert!(error.message().contains("nobody"), "{error:?}");

    let step = make(&corner, "shop/db:done", &json!({}));
    let test = TestContext::new("quota");
    let undo = prepared(&step, &test).await;
    corner.namespace.kubectl(&["create", "quota", "none", "--hard", "pods=0"]);
    std::thread::sleep(Duration::from_secs(1));
    // Where it came after the step was prepared, the Job's controller says so.
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert!(error.message().contains("exceeded quota") && error.hint().unwrap().contains("quota"), "{error:?}");
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(jobs(&corner), "");
    let error = refused(make(&corner, "shop/db:done", &json!({}))).await;
    assert!(error.message().contains("exceeded quota") && error.hint().unwrap().contains("quota"), "{error:?}");
    // What a plan finds may be mended by the steps before.
    let Prepared::Change { changes, .. } = step.prepare(&TestContext::new("plan").dry_run().forward()).await.unwrap()
    else {
        panic!()
    };
    let summary = changes[0].summary.as_deref().unwrap();
    assert!(summary.contains("exceeded quota") && summary.contains("variables: ADDS"), "{summary}");
    assert!(!summary.contains("two"), "{summary}");
}

#[tokio::test]
async fn a_job_of_somebody_else_is_left_alone() {
    let Some(corner) = Corner::shared("foreign") else { return };
    let test = TestContext::new("migrate");
    let step = make(&corner, "shop/db:done", &json!({}));
    let undo = prepared(&step, &test).await;
    corner.namespace.kubectl(&["create", "job", &undo.job, "--image", "shop/other:done"]);
    for error in [
        step.prepare(&test.forward()).await.unwrap_err(),
        step.apply(&test.forward(), &undo).await.unwrap_err(),
        step.rollback(&test.back(), &undo, None).await.unwrap_err(),
    ] {
        assert!(error.as_conflict().is_some_and(|conflict| conflict.subject.contains(&undo.job)), "{error:?}");
    }
    step.commit(&test.commit(), &undo).await.unwrap();
    assert!(jobs(&corner).contains(&undo.job));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_that_is_started_anew_loses_no_job() {
    let Some(own) = kubernetes::own() else { return };
    let corner = Corner { namespace: own.cluster().namespace("anew") };
    let test = TestContext::new("migrate");
    let step = make(&corner, "shop/db:done", &json!({}));
    let undo = prepared(&step, &test).await;
    let cx = test.forward();
    let (done, ()) = tokio::join!(step.apply(&cx, &undo), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        tokio::task::block_in_place(|| {
            own.kill();
            std::thread::sleep(Duration::from_secs(1));
            own.start();
        });
    });
    assert_eq!(done.unwrap().exit_code, 0);
    assert_eq!(effects(&corner), "two");
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!((effects(&corner).as_str(), jobs(&corner).as_str()), ("", ""));
}

#[tokio::test]
async fn the_rights_that_the_page_names_are_enough() {
    let Some(corner) = Corner::shared("rights") else { return };
    let Some(stranger) = corner.namespace.cluster().kubeconfig_of("stranger") else { return };
    let verbs = "--verb=create,get,list,watch,patch,delete";
    corner.namespace.kubectl(&["create", "role", "jobs", verbs, "--resource", "jobs.batch"]);
    corner.namespace.kubectl(&["create", "role", "pods", "--verb=list,watch", "--resource", "pods"]);
    for role in ["jobs", "pods"] {
        corner.namespace.kubectl(&["create", "rolebinding", role, "--role", role, "--user", "stranger"]);
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    for (image, is_done) in [("shop/db:done", true), ("shop/db:fail", false), ("shop/db:missing", false)] {
        let test = TestContext::new("migrate");
        let undo = json!({ "image": "shop/db:done", "command": ["down"], "env": { "REMOVES": "two" } });
        let config = config(image, &json!({ "undo": undo }));
        let step = JobStep::from_config(config, &build_context(&stranger, &corner.namespace.name)).unwrap();
        let step = step.undoable().unwrap();
        let undo = prepared(&step, &test).await;
        let done = step.apply(&test.forward(), &undo).await;
        assert_eq!(done.is_ok(), is_done, "{image}: {done:?}");
        step.rollback(&test.back(), &undo, None).await.unwrap();
        assert_eq!((effects(&corner).as_str(), jobs(&corner).as_str()), ("", ""));
    }
}
