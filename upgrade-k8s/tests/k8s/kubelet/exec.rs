//! `k8s.exec` in containers that run.

#![cfg(test)]

use std::time::Duration;

use serde_json::{Value, json};
use upgrade_core::context::OnConflict;
use upgrade_core::error::Class;
use upgrade_core::step::{Prepared, Rollback as _, Step};
use upgrade_core::testkit::TestContext;
use upgrade_core::undoable::OptionalRollback;
use upgrade_k8s::steps::{ExecUndo, UndoableExec};

use super::{corner, deployment, inside};
use crate::exec::make;
use crate::sweeps::{Case, notices_every_seeded_defect_on, sweep_on};
use crate::world::{Corner, golden};

fn undoable(corner: &Corner, more: &Value) -> UndoableExec {
    make(corner, more).unwrap().undoable().unwrap()
}

async fn prepare(step: &impl Step<Undo = ExecUndo>, test: &TestContext) -> ExecUndo {
    match step.prepare(&test.forward()).await {
        Ok(Prepared::Change { undo, .. }) => undo,
        Ok(_) => panic!("it is not done yet"),
        Err(error) => panic!("{error:?}"),
    }
}

/// How many processes of the container sleep for so long.
fn sleepers(corner: &Corner, seconds: &str) -> usize {
    let list = inside(corner, "for each in /proc/[0-9]*; do tr '\\000' ' ' <$each/cmdline 2>/dev/null; echo; done");
    list.lines().filter(|line| line.trim() == format!("sleep {seconds}")).count()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a real kubelet: see kubelet/mod.rs"]
async fn campaign_on_a_real_kubelet_a_command_runs_inside_and_is_undone() {
    let corner = corner("inside");
    let test = TestContext::new("inside");
    let secret = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(secret.path(), "very-secret").unwrap();
    let step = undoable(
        &corner,
        &json!({
            "command": ["sh", "-c", "echo $WORD >/data/log; pwd; echo token $TOKEN >&2; echo \"$1\"", "sh", "a 'b'\n$c"],
            "env": { "WORD": "new", "TOKEN": { "file": secret.path() } },
            "directory": "/tmp",
            "undo": ["rm", "-f", "/data/log"],
            "unless": ["grep", "new", "/data/log"],
        }),
    );
    let undo = prepare(&step, &test).await;
    let output = step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!((output.exit_code, output.stdout.as_str()), (Some(0), "/tmp\na 'b'\n$c"), "{output:?}");
    assert!(output.stderr.starts_with("token ") && !output.stderr.contains("very-secret"), "{output:?}");
    assert!(test.reported().iter().any(|progress| progress.message == "/tmp"), "{:?}", test.reported());
    let answer = step.prepare(&test.forward()).await.unwrap();
    assert!(matches!(&answer, Prepared::Unchanged { reason, .. } if reason == "`unless` says so"), "{answer:?}");
    let owner = undo.owner.clone().unwrap();
    let replace =
        [(&*undo.pod, "POD"), (&undo.pod_uid, "UID"), (&owner, "OWNER"), (&corner.namespace.name, "NAMESPACE")];
    let read = golden("k8s.exec.undo.v1.json", &undo, &replace);
    UndoableExec::read_undo(1, read).unwrap();
    for _ in 0..2 {
        step.settle(&test.back(), &undo).await.unwrap();
        step.rollback(&test.back(), &undo, Some(&output)).await.unwrap();
        assert_eq!(inside(&corner, "ls /data"), "");
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a real kubelet: see kubelet/mod.rs"]
async fn campaign_on_a_real_kubelet_what_a_crash_left_running_is_ended() {
    let corner = corner("left");
    let test = TestContext::new("left");
    let step = undoable(
        &corner,
        &json!({
            // A child in a session of its own, which ignores what is asked of it first.
            "command": ["sh", "-c", "echo begun >/data/log; setsid sh -c 'trap \"\" TERM; sleep 779' & sleep 777; echo done >>/data/log"],
            "undo": ["rm", "-f", "/data/log"],
        }),
    );
    let undo = prepare(&step, &test).await;
    // Dropped in the middle, as a process that is killed drops it.
    let cut_off = tokio::time::timeout(Duration::from_secs(2), step.apply(&test.forward(), &undo)).await;
    assert!(cut_off.is_err());
    // Somebody else's, which looks the same.
    inside(&corner, "setsid sleep 778 >/dev/null 2>&1 &");
    assert_eq!((sleepers(&corner, "777"), inside(&corner, "cat /data/log").as_str()), (1, "begun"));
    for _ in 0..2 {
        step.settle(&test.back(), &undo).await.unwrap();
        let left = ["777", "779", "778"].map(|seconds| sleepers(&corner, seconds));
        assert_eq!(left, [0, 0, 1]);
    }
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(inside(&corner, "ls /data"), "");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a real kubelet: see kubelet/mod.rs"]
async fn campaign_on_a_real_kubelet_a_cancelled_command_is_ended() {
    let corner = corner("cancelled");
    let test = TestContext::new("cancelled");
    let step = undoable(&corner, &json!({ "command": ["sleep", "777"], "no_effect": true }));
    let undo = prepare(&step, &test).await;
    let cancellation = test.cancellation().clone();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(1)).await;
        cancellation.cancel();
    });
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert_eq!((error.message(), sleepers(&corner, "777")), ("cancelled", 0), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a real kubelet: see kubelet/mod.rs"]
async fn campaign_on_a_real_kubelet_a_failure_quotes_the_command() {
    let corner = corner("quotes");
    let test = TestContext::new("quotes");
    for (command, class, message, hint) in [
        (json!(["sh", "-c", "echo no such table >&2; exit 3"]), Class::Permanent, "exit code 3", "by hand"),
        (json!(["sh", "-c", "exit 75"]), Class::Transient, "exit code 75", ""),
        (json!(["sh", "-c", "kill -9 $$"]), Class::Unknown, "exit code 137", "memory"),
        (json!(["no-such-program"]), Class::Permanent, "exit code 127", "command"),
    ] {
        let step = undoable(&corner, &json!({ "command": command, "no_effect": true }));
        let undo = prepare(&step, &test).await;
        let error = step.apply(&test.forward(), &undo).await.unwrap_err();
        assert_eq!(error.class(), class, "{error:?}");
        assert!(error.message().contains(message) && error.hint().unwrap().contains(hint), "{error:?}");
    }
    let many =
        undoable(&corner, &json!({ "command": ["sh", "-c", "seq 1 100000; seq 1 1000 >&2"], "no_effect": true }));
    let undo = prepare(&many, &test).await;
    let output = many.apply(&test.forward(), &undo).await.unwrap();
    assert!(output.stdout.ends_with("\n100000") && output.stdout.len() <= 64 << 10, "{}", output.stdout.len());
    assert!(output.stderr.ends_with("\n1000"));
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a real kubelet: see kubelet/mod.rs"]
async fn campaign_on_a_real_kubelet_an_image_without_a_shell_is_refused_before_anything_runs() {
    let corner = corner("bare");
    corner.namespace.apply(&deployment("bare", "bare:1", 1));
    corner.await_pods("bare", "upgrade.test/bare:1", 1);
    let step = undoable(&corner, &json!({ "workload": "deployment/bare", "command": ["true"], "no_effect": true }));
    let error = step.prepare(&TestContext::new("bare").forward()).await.unwrap_err();
    assert!(error.message().contains("no shell"), "{error:?}");
    assert!(error.hint().unwrap().contains("k8s.job"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a real kubelet: see kubelet/mod.rs"]
async fn campaign_on_a_real_kubelet_a_replaced_pod_is_undone_in_the_next_one() {
    let corner = corner("replaced");
    let test = TestContext::new("replaced");
    let command = json!({ "command": ["touch", "/data/new"], "undo": ["sh", "-c", "echo undone >/data/log"] });
    let step = undoable(&corner, &command);
    let undo = prepare(&step, &test).await;
    let output = step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!(output.pod.as_deref(), Some(&*undo.pod));
    corner.namespace.kubectl(&["delete", "pod", &undo.pod, "--wait"]);
    corner.await_pods("web", "upgrade.test/busybox:1", 1);
    step.settle(&test.back(), &undo).await.unwrap();
    step.rollback(&test.back(), &undo, Some(&output)).await.unwrap();
    assert_eq!(inside(&corner, "cat /data/log"), "undone");
    // Another Deployment of that name is somebody else's.
    corner.namespace.kubectl(&["delete", "deployment", "web", "--wait"]);
    corner.namespace.apply(&deployment("web", "busybox:1", 1));
    corner.await_pods("web", "upgrade.test/busybox:1", 1);
    let error = step.rollback(&test.back(), &undo, Some(&output)).await.unwrap_err();
    assert!(error.as_conflict().is_some(), "{error:?}");
    let winning = TestContext::new("replaced").on_conflict(OnConflict::Overwrite);
    step.rollback(&winning.back(), &undo, Some(&output)).await.unwrap();
}

/// The first step, of both cases.
macro_rules! second {
    () => {
        r#"
upgrade: commands
steps:
  - id: second
    uses: k8s.exec
    with:
      target: cluster
      workload: deployment/web
      command: [sh, -c, "grep -q two /data/log || echo two >>/data/log"]
      undo: [sh, -c, "grep -v two /data/log >/data/new; mv /data/new /data/log"]
"#
    };
}

const ONE: Case = Case {
    setup: |corner| {
        corner.namespace.apply(&deployment("web", "busybox:1", 1));
        corner.await_pods("web", "upgrade.test/busybox:1", 1);
        inside(corner, "echo one >/data/log");
    },
    pipeline: second!(),
    observe: |corner| inside(corner, "rm -f /data/new; cat /data/log; ls /data"),
    interfere: |corner, _| {
        corner.namespace.kubectl(&["delete", "deployment", "web", "--cascade=foreground", "--wait"]);
        corner.namespace.apply(&deployment("web", "busybox:1", 1));
        corner.await_pods("web", "upgrade.test/busybox:1", 1);
        inside(corner, "echo another >/data/log");
        true
    },
    survived: |corner, _| inside(corner, "cat /data/log") == "another",
};

const TWO: Case = Case {
    pipeline: concat!(
        second!(),
        r#"  - id: third
    uses: k8s.exec
    with:
      target: cluster
      selector: app=web
      command: [sh, -c, "grep -q two /data/log && { grep -q three /data/log || echo three >>/data/log; }"]
      undo:
        - sh
        - -c
        - |
          grep -v three /data/log >/data/new; mv /data/new /data/log
          grep -q two /data/log || echo out of order >>/data/log
"#
    ),
    interfere: |_, _| false,
    ..ONE
};

#[test]
#[ignore = "a real kubelet: see kubelet/mod.rs"]
fn campaign_on_a_real_kubelet_a_command_is_done_or_undone() {
    sweep_on(Some(upgrade_testbed::kubernetes::kubelet()), &ONE, 3, 25);
}

#[test]
#[ignore = "a real kubelet: see kubelet/mod.rs"]
fn campaign_on_a_real_kubelet_commands_are_all_done_or_none() {
    sweep_on(Some(upgrade_testbed::kubernetes::kubelet()), &TWO, 3, 25);
}

#[test]
#[ignore = "a real kubelet: see kubelet/mod.rs"]
fn campaign_on_a_real_kubelet_every_seeded_defect_of_commands_is_noticed() {
    notices_every_seeded_defect_on(Some(upgrade_testbed::kubernetes::kubelet()), &TWO);
}
