//! `host.command` with real processes.

#![cfg(test)]

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;
use upgrade_core::check::Check;
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::Class;
use upgrade_core::registry::{BuildContext, Registry};
use upgrade_core::secret::SecretRef;
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::testkit::TestContext;
use upgrade_core::verdict::Status;
use upgrade_host::checks::CommandCheck;
use upgrade_host::steps::{Command, CommandOutput, CommandUndo};

fn command(with: serde_json::Value, base: &Path) -> Command {
    let config = serde_json::from_value(with).expect("a configuration");
    Command::from_config(config, &BuildContext::new(base)).expect("a command")
}

fn lines(path: &Path) -> usize {
    std::fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

/// Tells whether a process lives; one that ended and was not waited for does not.
fn lives(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

async fn pid_in(path: PathBuf) -> u32 {
    for _ in 0..500 {
        if let Ok(pid) = std::fs::read_to_string(&path).unwrap_or_default().trim().parse() {
            return pid;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("no process wrote {}", path.display());
}

#[tokio::test]
async fn a_command_is_applied_and_undone_as_often_as_asked() {
    let dir = TempDir::new().unwrap();
    let step = command(json!({ "run": ["touch", "made"] }), dir.path()).undone_by(["rm", "-f", "made"]);
    let test = TestContext::new("make").on_conflict(OnConflict::Stop);
    let Prepared::Change { undo, changes } = step.prepare(&test.forward()).await.unwrap() else { panic!() };
    assert_eq!(changes[0].subject, "touch made");
    assert!(!dir.path().join("made").exists(), "prepare changes nothing");
    for _ in 0..2 {
        step.apply(&test.forward(), &undo).await.unwrap();
        assert!(dir.path().join("made").exists());
    }
    for _ in 0..2 {
        step.rollback(&test.back(), &undo, None).await.unwrap();
        assert!(!dir.path().join("made").exists());
    }
}

#[tokio::test]
async fn what_is_done_already_is_not_run() {
    let dir = TempDir::new().unwrap();
    let log = dir.path().join("log");
    for done in [json!({ "creates": "log" }), json!({ "unless": ["test", "-e", "log"] })] {
        let _ = std::fs::remove_file(&log);
        let mut with = json!({ "shell": true, "script": "echo ran >> log" });
        with.as_object_mut().unwrap().extend(done.as_object().unwrap().clone());
        let step = command(with, dir.path());
        let test = TestContext::new("once");
        let Prepared::Change { undo, .. } = step.prepare(&test.forward()).await.unwrap() else { panic!() };
        step.apply(&test.forward(), &undo).await.unwrap();
        // The end of the first attempt was not seen: the second finds its work.
        let output = step.apply(&test.clone().attempt(2).interrupted().forward(), &undo).await.unwrap();
        assert_eq!((lines(&log), output.exit_code), (1, None));
        assert!(matches!(step.prepare(&test.forward()).await.unwrap(), Prepared::Unchanged { .. }));
    }
}

#[tokio::test]
async fn failures_say_what_the_command_said_and_whether_to_try_again() {
    let dir = TempDir::new().unwrap();
    let cx = TestContext::new("fail").forward();
    for (script, class, success) in [
        ("echo the disk is full >&2; exit 3", Class::Permanent, json!([0])),
        ("echo the disk is full >&2; exit 75", Class::Transient, json!([0])),
        ("echo the disk is full; kill -9 $$", Class::Unknown, json!([0])),
        ("echo the disk is full >&2; exit 0", Class::Permanent, json!([3])),
    ] {
        let step = command(json!({ "shell": true, "script": script, "success": success }), dir.path());
        let error = step.apply(&cx, &CommandUndo {}).await.unwrap_err();
        assert_eq!(error.class(), class, "{script}");
        assert_eq!(error.detail().unwrap().trim(), "the disk is full");
        assert!(error.hint().is_some());
    }
    let accepted = command(json!({ "shell": true, "script": "exit 3", "success": [3] }), dir.path());
    assert_eq!(accepted.apply(&cx, &CommandUndo {}).await.unwrap().exit_code, Some(3));
    let missing = Command::new(["no-such-program-anywhere"]).apply(&cx, &CommandUndo {}).await.unwrap_err();
    assert!(missing.hint().unwrap().contains("not in PATH"), "{missing:?}");
}

#[tokio::test]
async fn a_plan_never_fails_because_an_earlier_step_has_not_run() {
    let dir = TempDir::new().unwrap();
    let with = json!({ "run": ["./tool"], "unless": ["./tool", "done"], "check": ["./tool", "check"] });
    let step = command(with, dir.path());
    let plan = step.prepare(&TestContext::new("tool").dry_run().forward()).await.unwrap();
    assert!(matches!(plan, Prepared::Change { .. }));
    assert!(step.prepare(&TestContext::new("tool").forward()).await.is_err(), "the run itself must not guess");
}

#[tokio::test]
async fn output_is_bounded_and_keeps_its_end() {
    let dir = TempDir::new().unwrap();
    let script = "head -c 3000000 /dev/zero | tr '\\0' x; echo; echo the end";
    let step = command(json!({ "shell": true, "script": script }), dir.path());
    let output = step.apply(&TestContext::new("loud").forward(), &CommandUndo {}).await.unwrap();
    assert!(output.stdout.len() <= (64 << 10) + 8 && output.stdout.ends_with("the end"));
}

#[tokio::test]
async fn cancelling_ends_the_whole_group_within_the_grace() {
    let dir = TempDir::new().unwrap();
    // The shell ignores SIGTERM, and so does its child: only SIGKILL ends them.
    let script = "trap '' TERM; sleep 300 & echo $! > child.tmp; mv child.tmp child; wait; sleep 300";
    let step = command(json!({ "shell": true, "script": script }), dir.path());
    let test = TestContext::new("slow");
    let cx = test.forward();
    let call = tokio::spawn(async move { step.apply(&cx, &CommandUndo {}).await });
    let child = pid_in(dir.path().join("child")).await;
    let begun = Instant::now();
    test.cancellation().cancel();
    let error = call.await.unwrap().unwrap_err();
    assert_eq!(error.class(), Class::Unknown);
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    assert!(!lives(child), "the child outlived the cancelled command");
}

#[tokio::test]
async fn settling_ends_what_a_crash_left_behind_and_nothing_else() {
    let test = TestContext::new("crashed");
    let cx = test.forward();
    let sleeper = |marker: &str| {
        let mut command = std::process::Command::new("sleep");
        command.arg("300").env(Context::MARKER, marker).stdout(Stdio::null()).spawn().unwrap()
    };
    let mut left = sleeper(&cx.marker());
    let mut other = sleeper("another-run/crashed");
    let mut near = sleeper(&format!("{}-too", cx.marker()));
    let step = Command::new(["true"]);
    for _ in 0..2 {
        step.settle(&cx, &CommandUndo {}).await.unwrap();
        assert!(!lives(left.id()), "the leftover runs on");
        assert!(lives(other.id()) && lives(near.id()), "a stranger was ended");
    }
    for child in [&mut left, &mut other, &mut near] {
        let _ = child.kill();
        child.wait().unwrap();
    }
}

#[tokio::test]
async fn a_call_that_is_dropped_leaves_its_process_to_be_settled() {
    let dir = TempDir::new().unwrap();
    let script = "echo $$ > own.tmp; mv own.tmp own; setsid sleep 300 & sleep 300";
    let step = command(json!({ "shell": true, "script": script }), dir.path());
    let cx = TestContext::new("dropped").forward();
    let own = tokio::select! {
        _ = step.apply(&cx, &CommandUndo {}) => panic!("it sleeps"),
        pid = pid_in(dir.path().join("own")) => pid,
    };
    assert!(lives(own), "a crash does not end children");
    step.settle(&cx, &CommandUndo {}).await.unwrap();
    assert!(!lives(own));
}

#[tokio::test]
async fn a_child_that_holds_the_pipe_open_does_not_hold_the_step() {
    let dir = TempDir::new().unwrap();
    let step = command(json!({ "shell": true, "script": "sleep 300 & echo started" }), dir.path());
    let cx = TestContext::new("leak").forward();
    let begun = Instant::now();
    let output = step.apply(&cx, &CommandUndo {}).await.unwrap();
    assert_eq!(output.stdout, "started");
    assert!(begun.elapsed() < Duration::from_secs(5));
    step.settle(&cx, &CommandUndo {}).await.unwrap();
}

#[tokio::test]
async fn a_secret_appears_nowhere() {
    let dir = TempDir::new().unwrap();
    let canary = "canary-c0mmand-5ecret";
    std::fs::write(dir.path().join("token"), canary).unwrap();
    let secret = SecretRef::file(dir.path().join("token").display().to_string());
    let cx = TestContext::new("secret").forward();
    let shown = Command::new(["/bin/sh", "-c", "echo $TOKEN; echo $TOKEN >&2"]).env("TOKEN", secret.clone());
    let output = shown.apply(&cx, &CommandUndo {}).await.unwrap();
    assert_eq!(output.stdout, "•••");
    let failing = Command::new(["/bin/sh", "-c", "echo $TOKEN >&2; exit 1"]).env("TOKEN", secret);
    let error = failing.apply(&cx, &CommandUndo {}).await.unwrap_err();
    let prepared = failing.prepare(&cx).await.unwrap();
    let all = format!(
        "{output:?} {error:?} {prepared:?} {failing:?} {} {}",
        failing.definition(),
        serde_json::to_string(&error).unwrap()
    );
    assert!(!all.contains(canary), "{all}");
    assert!(all.contains("token"), "the reference is shown");
}

#[tokio::test]
async fn as_a_check_its_exit_code_is_the_answer() {
    let dir = TempDir::new().unwrap();
    let check = |script: &str| {
        let with = json!({ "shell": true, "script": script });
        CommandCheck::from_config(serde_json::from_value(with).unwrap(), &BuildContext::new(dir.path())).unwrap()
    };
    let cx = TestContext::new("present").forward();
    let verdict = check("echo notes 1.2.3").check(&cx).await.unwrap();
    assert_eq!((verdict.status, verdict.facts["version"].as_str()), (Status::Pass, "1.2.3"));
    assert_eq!(check("exit 1").check(&cx).await.unwrap().status, Status::Fail);
    assert_eq!(check("kill -9 $$").check(&cx).await.unwrap().status, Status::Unknown);

    let slow = check("echo $$ > own.tmp; mv own.tmp own; sleep 300");
    let own = tokio::select! {
        _ = slow.check(&cx) => panic!("it sleeps"),
        pid = pid_in(dir.path().join("own")) => pid,
    };
    for _ in 0..200 {
        tokio::time::sleep(Duration::from_millis(10)).await;
        if !lives(own) {
            return;
        }
    }
    panic!("a check that was dropped runs on");
}

#[test]
fn a_configuration_says_whether_it_can_be_undone() {
    let mut registry = Registry::new();
    upgrade_host::register(&mut registry);
    let cx = BuildContext::new("/");
    let make = |with| registry.make_step("host.command", with, &cx);
    assert!(make(json!({ "run": ["true"] })).unwrap().irreversible_reason().is_some());
    assert!(make(json!({ "run": ["true"], "undo": ["false"] })).unwrap().irreversible_reason().is_none());
    assert!(make(json!({ "run": ["true"], "no_effect": true })).unwrap().irreversible_reason().is_none());
    for wrong in [
        json!({}),
        json!({ "run": [] }),
        json!({ "script": "true" }),
        json!({ "shell": true, "run": ["true"] }),
        json!({ "shell": true, "script": "true", "run": ["true"] }),
        json!({ "run": ["true"], "undo": ["true"], "no_effect": true }),
        json!({ "run": ["true"], "unknown": 1 }),
    ] {
        assert!(make(wrong.clone()).is_err(), "{wrong}");
    }
}

#[test]
fn records_of_format_1_stay_readable() {
    assert_eq!(Command::read_undo(1, json!({})).unwrap(), CommandUndo {});
    let output = CommandOutput { exit_code: Some(0), stdout: "done".into(), stderr: String::new() };
    assert_eq!(Command::read_output(1, json!({ "exit_code": 0, "stdout": "done", "stderr": "" })).unwrap(), output);
    assert!(Command::read_undo(2, json!({})).is_err());
}
