//! `docker.volume_backup`: what is kept, how it is proven, and who waits meanwhile.

#![cfg(test)]

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use upgrade_core::error::StepError;
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::testkit::TestContext;
use upgrade_docker::steps::{VolumeBackup, VolumeBackupUndo};
use upgrade_testbed::docker::Image;

use crate::volumes::{standing, with_app};
use crate::world::{Corner, build_context, golden};

fn step(corner: &Corner, to: &Path, with: &Value) -> VolumeBackup {
    let mut all = json!({ "target": "engine", "volume": corner.name("data"), "to": to });
    all.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
    let config = serde_json::from_value(all).unwrap();
    VolumeBackup::from_config(config, &build_context(corner.engine.host())).unwrap()
}

async fn undo(step: &VolumeBackup, test: &TestContext) -> VolumeBackupUndo {
    match step.prepare(&test.forward()).await.unwrap() {
        Prepared::Change { undo, .. } => undo,
        other => panic!("{other:?}"),
    }
}

async fn refused(step: &VolumeBackup) -> StepError {
    step.prepare(&TestContext::new("backup").forward()).await.unwrap_err()
}

fn state(corner: &Corner, name: &str, what: &str) -> String {
    corner.engine.docker(["inspect", "--format", what, &corner.name(name)])
}

#[tokio::test]
async fn a_volume_is_kept_with_all_that_it_holds_and_proven_by_restoring_it() {
    let Some(corner) = Corner::shared("backup") else { return };
    with_app(&corner);
    let before = standing(&corner);
    let directory = tempfile::tempdir().unwrap();
    let to = directory.path().join("new/backups");
    let (step, test) = (step(&corner, &to, &json!({ "prove": "restore", "keep": 2 })), TestContext::new("backup"));
    let undo = undo(&step, &test).await;
    let output = step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!(standing(&corner), before);
    assert_eq!((output.files, output.bytes), (3, 3 + 4 + (3 << 18)));
    let packed = std::fs::read(&output.path).unwrap();
    assert_eq!(output.sha256, upgrade_core::sealed::sha256_hex(&packed));
    assert_eq!(output.path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(output.path.parent().unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o700);
    assert!(test.reported().iter().any(|progress| progress.message == "backing up the volume" && progress.done > 0));

    // Without this program: an ordinary tar.
    let listed = std::process::Command::new("tar").args(["--zstd", "-tf"]).arg(&output.path).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    for name in ["files/\n", "files/deep/text\n", "files/link\n", "files/pipe\n", "manifest.json\n"] {
        assert!(listed.contains(name), "{listed}");
    }
    // Called again it proves what is there; a changed one is somebody else's.
    assert_eq!(step.apply(&test.forward(), &undo).await.unwrap(), output);
    step.commit(&test.commit(), &undo).await.unwrap();
    let mut changed = packed.clone();
    changed[packed.len() / 2] ^= 1;
    std::fs::write(&output.path, changed).unwrap();
    assert!(step.apply(&test.forward(), &undo).await.unwrap_err().as_conflict().is_some());
    let error = step.rollback(&test.back(), &undo, None).await.unwrap_err();
    assert!(error.as_conflict().unwrap().present.contains("as a backup of a volume"), "{error:?}");
    std::fs::write(&output.path, packed).unwrap();
    for _ in 0..2 {
        step.rollback(&test.back(), &undo, Some(&output)).await.unwrap();
        assert!(!directory.path().join("new").exists());
    }
}

#[tokio::test]
async fn consumers_wait_meanwhile_and_go_on_whatever_came_of_it() {
    let Some(corner) = Corner::shared("wait") else { return };
    let volume = with_app(&corner);
    let (paused, stopped) = (corner.name("paused"), corner.name("stopped"));
    let (image, mount) = (corner.name("image:1"), format!("{volume}:/data:ro"));
    corner.engine.docker(["run", "-d", "--network", "none", "--name", &paused, "--volume", &mount, &image]);
    corner.engine.docker(["pause", &paused]);
    corner.engine.docker(["create", "--network", "none", "--name", &stopped, "--volume", &mount, &image]);
    let before = standing(&corner);
    let directory = tempfile::tempdir().unwrap();
    let started = || state(&corner, "app", "{{.State.StartedAt}}");
    let at_first = started();

    let pausing = step(&corner, directory.path(), &json!({ "consumers": "pause" }));
    let test = TestContext::new("pausing");
    let found = undo(&pausing, &test).await;
    assert_eq!(found.consumers.iter().map(|c| c.name.clone()).collect::<Vec<_>>(), [corner.name("app")]);
    pausing.apply(&test.forward(), &found).await.unwrap();
    assert_eq!((standing(&corner), started()), (before.clone(), at_first.clone()));

    let stopping = step(&corner, directory.path(), &json!({ "consumers": "stop" }));
    let test = TestContext::new("stopping");
    let found = undo(&stopping, &test).await;
    stopping.apply(&test.forward(), &found).await.unwrap();
    assert_eq!(standing(&corner), before);
    assert_ne!(started(), at_first);

    // The directory is gone and cannot be made: the backup fails when they wait already.
    let blocked = directory.path().join("file");
    std::fs::write(&blocked, "").unwrap();
    let (again, test) = (step(&corner, directory.path(), &json!({ "consumers": "stop" })), TestContext::new("failing"));
    let mut found = undo(&again, &test).await;
    found.path = directory.path().join("n".repeat(250)).with_extension("tar.zst");
    again.apply(&test.forward(), &found).await.unwrap_err();
    assert_eq!(standing(&corner), before);
    let test = TestContext::new("cancelled");
    let found = undo(&again, &test).await;
    let cx = test.forward();
    test.cancellation().cancel();
    again.apply(&cx, &found).await.unwrap_err();
    assert_eq!(standing(&corner), before);
}

#[tokio::test]
async fn a_stop_that_a_crash_left_under_way_does_not_end_what_was_started_again() {
    let Some(corner) = Corner::shared("flight") else { return };
    let (volume, app, image) = (corner.name("data"), corner.name("app"), corner.name("image:1"));
    Image::shell("trap '' TERM; while true; do sleep 0.1; done")
        .with("STOPSIGNAL SIGTERM")
        .build(&corner.engine, &image);
    let mount = format!("{volume}:/data");
    let options = ["run", "-d", "--network", "none", "--stop-timeout", "2", "--name", &app, "--volume", &mount, &image];
    corner.engine.docker(options);
    let directory = tempfile::tempdir().unwrap();
    let step = step(&corner, directory.path(), &json!({ "consumers": "stop" }));
    let test = TestContext::new("backup");
    let found = undo(&step, &test).await;
    let mut under_way = corner.engine.command(["stop", &app]).spawn().unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let test = test.interrupted();
    step.settle(&test.back(), &found).await.unwrap();
    step.rollback(&test.back(), &found, None).await.unwrap();
    under_way.wait().unwrap();
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(state(&corner, "app", "{{.State.Status}}"), "running");
}

#[tokio::test]
async fn what_cannot_be_kept_is_refused_before_anything_is_stopped() {
    let Some(corner) = Corner::shared("refused") else { return };
    let directory = tempfile::tempdir().unwrap();
    let to = directory.path();
    let error = refused(&step(&corner, to, &json!({}))).await;
    assert!(error.message().contains("there is no volume"), "{error:?}");
    let (volume, image) = (corner.name("data"), corner.name("image:1"));
    corner.engine.docker(["volume", "create", &volume]);
    let error = refused(&step(&corner, to, &json!({}))).await;
    assert!(error.hint().unwrap().contains("name as `image`"), "{error:?}");
    let error = refused(&step(&corner, to, &json!({ "image": image }))).await;
    assert!(error.message().contains("is not on the engine"), "{error:?}");
    Image::shell("sleep 1000").build(&corner.engine, &image);
    let error = refused(&step(&corner, to, &json!({ "image": image, "free": "1000000GiB" }))).await;
    assert!(error.message().contains("must stay so"), "{error:?}");
    let there = to.join("there.tar.zst");
    std::fs::write(&there, "").unwrap();
    let error = refused(&step(&corner, &there, &json!({ "image": image }))).await;
    assert!(error.message().contains("is there already"), "{error:?}");
    let (app, mount) = (corner.name("app"), format!("{volume}:/data"));
    corner.engine.docker(["run", "-d", "--rm", "--network", "none", "--name", &app, "--volume", &mount, &image]);
    let error = refused(&step(&corner, to, &json!({ "consumers": "stop" }))).await;
    assert!(error.hint().unwrap().contains("consumers: pause"), "{error:?}");
    let build = |with: &Value| {
        let mut all = json!({ "volume": "data", "to": "backups" });
        all.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
        VolumeBackup::from_config(serde_json::from_value(all).unwrap(), &build_context(corner.engine.host()))
            .unwrap_err()
    };
    assert_eq!(build(&json!({ "volume": "./data" })).key.as_deref(), Some("volume"));
    assert_eq!(build(&json!({ "level": 20 })).key.as_deref(), Some("level"));
    assert_eq!(build(&json!({ "to": "a.tar.zst", "keep": 1 })).key.as_deref(), Some("keep"));
}

#[tokio::test]
async fn its_undo_record_is_read_by_every_later_version() {
    let Some(corner) = Corner::shared("golden") else { return };
    with_app(&corner);
    let directory = tempfile::tempdir().unwrap();
    let step = step(&corner, &directory.path().join("a/b.tar.zst"), &json!({ "consumers": "stop" }));
    let undo = undo(&step, &TestContext::new("backup")).await;
    let app = state(&corner, "app", "{{.Id}}");
    let image = state(&corner, "app", "{{.Image}}");
    let place = directory.path().to_str().unwrap();
    let replace = [(&*app, "APP"), (&*image, "IMAGE"), (place, "/srv"), (&*corner.prefix, "shop")];
    let written = golden("docker.volume_backup.undo.v1.json", &undo, &replace);
    VolumeBackup::read_undo(1, written).unwrap();
}
