//! `host.service` with real processes and a stand-in for systemctl.

#![cfg(test)]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use upgrade_core::context::Context;
use upgrade_core::registry::BuildContext;
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::testkit::TestContext;
use upgrade_host::steps::{Service, ServiceUndo};

fn script(path: &Path, text: &str) {
    std::fs::write(path, format!("#!/bin/sh\n{text}")).expect("a script is written");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("a script is executable");
}

/// Writes the commands of a service that goes on in the background and talks on its stdout.
fn service_in(dir: &Path) {
    script(
        &dir.join("start"),
        "echo starting\n(while :; do echo alive; echo tick >> ticks; sleep 0.1; done) &\necho $! > pid\n\
         echo start >> calls\n",
    );
    script(&dir.join("stop"), "kill $(cat pid); rm -f pid; echo stop >> calls\n");
    script(&dir.join("status"), "test -e pid && kill -0 $(cat pid) 2>/dev/null\n");
}

fn service(action: &str, dir: &Path) -> Service {
    with(
        json!({ "action": action, "start": ["./start"], "stop": ["./stop"], "status": ["./status"], "wait": "5s" }),
        dir,
    )
}

fn with(config: Value, dir: &Path) -> Service {
    let config = serde_json::from_value(config).expect("a configuration");
    Service::from_config(config, &BuildContext::new(dir)).expect("a service")
}

fn pid(dir: &Path) -> Option<u32> {
    std::fs::read_to_string(dir.join("pid")).ok()?.trim().parse().ok()
}

fn calls(dir: &Path) -> String {
    std::fs::read_to_string(dir.join("calls")).unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

struct Ended<'a>(&'a Path);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        if let Some(pid) = pid(self.0) {
            let _ = std::process::Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
    }
}

async fn prepared(step: &Service, test: &TestContext) -> Option<ServiceUndo> {
    match step.prepare(&test.forward()).await.expect("a service that can be asked") {
        Prepared::Change { undo, .. } => Some(undo),
        Prepared::Unchanged { .. } => None,
        Prepared::KnownAfter { .. } => panic!("it does not depend on a step"),
    }
}

#[tokio::test]
async fn a_service_is_started_once_and_stopped_by_the_undo() {
    let dir = TempDir::new().unwrap();
    service_in(dir.path());
    let _ended = Ended(dir.path());
    let (step, test) = (service("start", dir.path()), TestContext::new("start"));
    let undo = prepared(&step, &test).await.unwrap();
    assert!(!undo.was_active);
    for _ in 0..2 {
        assert!(step.apply(&test.forward(), &undo).await.unwrap().active);
    }
    assert_eq!(calls(dir.path()), "start");
    assert!(prepared(&step, &test).await.is_none(), "an active service need not be started");
    for _ in 0..2 {
        step.rollback(&test.back(), &undo, None).await.unwrap();
        assert_eq!(pid(dir.path()), None);
    }
    assert_eq!(calls(dir.path()), "start stop");
}

#[tokio::test]
async fn stopping_is_undone_by_starting_and_restarting_by_restarting() {
    let dir = TempDir::new().unwrap();
    service_in(dir.path());
    let _ended = Ended(dir.path());
    let test = TestContext::new("stop");
    assert!(prepared(&service("stop", dir.path()), &test).await.is_none());
    let start = service("start", dir.path());
    start.apply(&test.forward(), &ServiceUndo { was_active: false }).await.unwrap();

    let stop = service("stop", dir.path());
    let undo = prepared(&stop, &test).await.unwrap();
    stop.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!(pid(dir.path()), None);
    stop.rollback(&test.back(), &undo, None).await.unwrap();
    let first = pid(dir.path()).unwrap();

    let restart = service("restart", dir.path());
    let undo = prepared(&restart, &test).await.unwrap();
    restart.apply(&test.forward(), &undo).await.unwrap();
    let second = pid(dir.path()).unwrap();
    restart.rollback(&test.back(), &undo, None).await.unwrap();
    let third = pid(dir.path()).unwrap();
    assert!(first != second && second != third);

    let later = service("restart_on_undo", dir.path());
    let undo = prepared(&later, &test).await.unwrap();
    later.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!(pid(dir.path()), Some(third));
    later.rollback(&test.back(), &undo, None).await.unwrap();
    assert_ne!(pid(dir.path()), Some(third));
    stop.rollback(&test.back(), &ServiceUndo { was_active: false }, None).await.unwrap();
}

#[tokio::test]
async fn a_started_service_is_not_ours_to_end() {
    let dir = TempDir::new().unwrap();
    service_in(dir.path());
    let _ended = Ended(dir.path());
    let (step, test) = (service("start", dir.path()), TestContext::new("start"));
    let begun = Instant::now();
    step.apply(&test.forward(), &ServiceUndo { was_active: false }).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(4), "the service's output was waited for");
    let environment = std::fs::read(format!("/proc/{}/environ", pid(dir.path()).unwrap())).unwrap();
    assert!(!String::from_utf8_lossy(&environment).contains(Context::MARKER));
    step.settle(&test.back(), &ServiceUndo { was_active: false }).await.unwrap();
    // It talks on the output that it was given: into a closed pipe, that would be its end.
    let ticks = || std::fs::metadata(dir.path().join("ticks")).map_or(0, |ticks| ticks.len());
    let before = ticks();
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert!(ticks() > before, "the service did not outlive the step");
}

#[tokio::test]
async fn a_start_command_that_a_crash_left_behind_is_ended() {
    let dir = TempDir::new().unwrap();
    service_in(dir.path());
    script(&dir.path().join("start"), "echo $$ > own.tmp; mv own.tmp own; sleep 2; touch late\n");
    let (step, test) = (service("start", dir.path()), TestContext::new("start"));
    let undo = ServiceUndo { was_active: false };
    let cx = test.forward();
    tokio::select! {
        _ = step.apply(&cx, &undo) => panic!("it sleeps"),
        () = async { while !dir.path().join("own").exists() { tokio::time::sleep(Duration::from_millis(10)).await } } => {}
    }
    step.settle(&cx, &undo).await.unwrap();
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert!(!dir.path().join("late").exists(), "the start command went on behind our back");
}

#[tokio::test]
async fn a_service_that_does_not_come_up_says_what_it_said() {
    let dir = TempDir::new().unwrap();
    service_in(dir.path());
    script(&dir.path().join("start"), "echo the port is taken >&2\n");
    let config = json!({ "action": "start", "start": ["./start"], "stop": ["./stop"], "status": ["./status"],
        "wait": "300ms", "log": "service.log" });
    let step = with(config, dir.path());
    let error = step.apply(&TestContext::new("s").forward(), &ServiceUndo { was_active: false }).await.unwrap_err();
    assert!(error.message().contains("not active after 300ms"), "{error}");
    assert_eq!(error.detail().unwrap().trim(), "the port is taken");
    assert!(error.hint().unwrap().contains("service.log"));
}

#[tokio::test]
async fn a_unit_is_driven_through_systemctl() {
    let dir = TempDir::new().unwrap();
    script(
        &dir.path().join("systemctl"),
        r#"verb=$1; for unit; do :; done
        test "$unit" = notes.service || { test "$verb" = show && printf 'LoadState=not-found\nActiveState=inactive\n'; exit 0; }
        case $verb in
        show) printf 'LoadState=loaded\nActiveState=%s\n' "$(cat state 2>/dev/null || echo inactive)";;
        start|restart) echo "$verb" >> calls; echo activating > state; (sleep 0.3; echo active > state) >/dev/null 2>&1 & ;;
        stop) echo stop >> calls; echo inactive > state;;
        esac
        "#,
    );
    let unit = |action: &str, unit: &str| {
        with(json!({ "action": action, "unit": unit, "systemctl": ["./systemctl"], "wait": "5s" }), dir.path())
    };
    let test = TestContext::new("unit");
    let start = unit("start", "notes.service");
    let undo = prepared(&start, &test).await.unwrap();
    start.apply(&test.forward(), &undo).await.unwrap();
    start.apply(&test.forward(), &undo).await.unwrap();
    let restart = unit("restart", "notes.service");
    let was = prepared(&restart, &test).await.unwrap();
    restart.apply(&test.forward(), &was).await.unwrap();
    start.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(calls(dir.path()), "start restart stop");
    let error = unit("stop", "mistyped.service").prepare(&test.forward()).await.unwrap_err();
    assert!(error.message().contains("no unit mistyped.service"), "{error}");
}

#[test]
fn a_unit_or_commands_and_not_both() {
    for wrong in [
        json!({ "action": "start" }),
        json!({ "action": "start", "unit": "a", "start": ["b"] }),
        json!({ "action": "start", "start": ["b"], "stop": ["c"] }),
        json!({ "action": "start", "unit": "--now" }),
    ] {
        let config = serde_json::from_value(wrong.clone()).unwrap();
        assert!(Service::from_config(config, &BuildContext::new("/")).is_err(), "{wrong}");
    }
}

#[test]
fn records_of_format_1_stay_readable() {
    assert_eq!(Service::read_undo(1, json!({ "was_active": true })).unwrap(), ServiceUndo { was_active: true });
    assert!(Service::read_output(1, json!({ "active": true })).unwrap().active);
    assert!(Service::read_undo(2, json!({ "was_active": true })).is_err());
}
