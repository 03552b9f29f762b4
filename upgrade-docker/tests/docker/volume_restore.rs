//! `docker.volume_restore`: what it puts in, what it keeps, and what it refuses.

#![cfg(test)]

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use upgrade_core::context::OnConflict;
use upgrade_core::error::StepError;
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::testkit::TestContext;
use upgrade_docker::steps::{VolumeRestore, VolumeRestoreUndo};
use upgrade_testbed::docker::Image;

use crate::volumes::{backup_of, picture, standing, with_app, write};
use crate::world::{Corner, build_context, golden};

fn step(corner: &Corner, backup: &Path, with: &Value) -> VolumeRestore {
    let mut all = json!({ "target": "engine", "volume": corner.name("data"), "backup": backup });
    all.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
    let config = serde_json::from_value(all).unwrap();
    VolumeRestore::from_config(config, &build_context(corner.engine.host())).unwrap()
}

async fn undo(step: &VolumeRestore, test: &TestContext) -> VolumeRestoreUndo {
    match step.prepare(&test.forward()).await.unwrap() {
        Prepared::Change { undo, .. } => undo,
        other => panic!("{other:?}"),
    }
}

async fn refused(step: &VolumeRestore) -> StepError {
    step.prepare(&TestContext::new("restore").forward()).await.unwrap_err()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

#[test]
fn a_volume_is_replaced_as_a_whole_and_put_back_exactly() {
    let Some(corner) = Corner::shared("restore") else { return };
    let directory = tempfile::tempdir().unwrap();
    let backup = directory.path().join("backup.tar.zst");
    let sha256 = backup_of(&corner, "two", &backup);
    with_app(&corner);
    let app = corner.name("app");
    write(&corner, &app, "only-before", "text");
    let seen = || (standing(&corner), picture(&corner, &app));
    let before = seen();
    let step = step(&corner, &backup, &json!({ "sha256": sha256 }));
    let test = TestContext::new("restore");
    runtime().block_on(async {
        let found = undo(&step, &test).await;
        let output = step.apply(&test.forward(), &found).await.unwrap();
        assert_eq!((output.files, output.bytes), (3, 3 + 4 + (3 << 18)));
        let after = seen();
        assert!(!after.1.contains("only-before") && after.1 != before.1, "{}", after.1);
        assert!(after.0.contains("data.kept-"), "{}", after.0);
        // What was put in is the backup's, down to owners, times, links and long names.
        let again = step.prepare(&TestContext::new("again").forward()).await.unwrap();
        assert!(matches!(again, Prepared::Unchanged { .. }), "{again:?}");
        step.apply(&test.forward(), &found).await.unwrap();
        for _ in 0..2 {
            step.rollback(&test.back(), &found, Some(&output)).await.unwrap();
            assert_eq!(seen(), before);
        }
        // In another run it stays.
        let test = TestContext::new("restore");
        let found = undo(&step, &test).await;
        step.apply(&test.forward(), &found).await.unwrap();
        step.commit(&test.commit(), &found).await.unwrap();
        assert_eq!(seen(), (before.0.clone(), after.1));
    });
}

#[test]
fn what_was_written_since_is_lost_only_if_the_pipeline_says_so() {
    let Some(corner) = Corner::shared("since") else { return };
    let directory = tempfile::tempdir().unwrap();
    let backup = directory.path().join("backup.tar.zst");
    backup_of(&corner, "two", &backup);
    with_app(&corner);
    let app = corner.name("app");
    let before = picture(&corner, &app);
    let step = step(&corner, &backup, &json!({}));
    let test = TestContext::new("restore");
    runtime().block_on(async {
        let found = undo(&step, &test).await;
        step.apply(&test.forward(), &found).await.unwrap();
        write(&corner, &app, "since", "text");
        // A repeated call finds it done, whatever was written.
        step.apply(&test.forward(), &found).await.unwrap();
        let error = step.rollback(&test.back(), &found, None).await.unwrap_err();
        assert!(error.as_conflict().is_some(), "{error:?}");
        assert!(picture(&corner, &app).contains("data/since"));
        assert!(standing(&corner).contains(&format!("{app} running")), "{}", standing(&corner));
        let test = test.on_conflict(OnConflict::Overwrite);
        // Without what was kept there is no undo, and nothing is emptied for it.
        let kept =
            corner.list(&["volume", "ls"], "{{.Name}}").into_iter().find(|name| name.contains(".kept-")).unwrap();
        let holder = corner.engine.docker(["inspect", "--format", "{{.Image}} {{json .Config.Labels}}", &kept]);
        assert!(holder.contains("io.github.upgrade-rs.content"), "{holder}");
        let aside = format!("{kept}-aside");
        corner.engine.docker(["rename", &kept, &aside]);
        let error = step.rollback(&test.back(), &found, None).await.unwrap_err();
        assert!(error.message().contains("and is gone") && error.hint().unwrap().contains("--skip"), "{error:?}");
        assert!(picture(&corner, &app).contains("data/since"));
        corner.engine.docker(["rename", &aside, &kept]);
        step.rollback(&test.back(), &found, None).await.unwrap();
        assert_eq!(picture(&corner, &app), before);
    });
}

/// The sweep dies within the first instants of a call; here each call dies later than the last one.
#[test]
fn a_death_in_the_middle_of_it_leaves_the_volume_as_it_was_or_as_the_backup_has_it() {
    let Some(corner) = Corner::shared("death") else { return };
    let directory = tempfile::tempdir().unwrap();
    let backup = directory.path().join("backup.tar.zst");
    backup_of(&corner, "two", &backup);
    with_app(&corner);
    let app = corner.name("app");
    let seen = || (standing(&corner), picture(&corner, &app));
    let before = seen();
    let step = step(&corner, &backup, &json!({}));
    runtime().block_on(async {
        let (mut after, mut delay, mut met) = (None, Duration::from_millis(150), BTreeSet::new());
        for round in 0.. {
            let test = TestContext::new("restore");
            let found = undo(&step, &test).await;
            let died = tokio::time::timeout(delay, step.apply(&test.forward(), &found)).await.is_err();
            met.extend(standing(&corner).lines().filter_map(|line| {
                let what = line.strip_prefix(&*corner.prefix)?.split_once("data.")?.1.split('-').next()?;
                Some(what.to_owned())
            }));
            let test = test.interrupted();
            if round % 2 == 0 {
                step.settle(&test.forward(), &found).await.unwrap();
                step.apply(&test.forward(), &found).await.unwrap();
                let reached = seen().1;
                assert_ne!(reached, before.1);
                assert_eq!(*after.get_or_insert_with(|| reached.clone()), reached, "applied after {delay:?}");
            }
            step.settle(&test.back(), &found).await.unwrap();
            let _ = tokio::time::timeout(delay, step.rollback(&test.back(), &found, None)).await;
            step.settle(&test.back(), &found).await.unwrap();
            step.rollback(&test.back(), &found, None).await.unwrap();
            assert_eq!(seen(), before, "after {delay:?}");
            if !died {
                break;
            }
            delay += Duration::from_millis(250);
        }
        assert!(met.len() > 2, "it died in too few places: {met:?}");
    });
}

#[test]
fn a_volume_that_is_not_there_is_made_as_it_was_and_removed_again() {
    let Some(corner) = Corner::shared("new") else { return };
    let directory = tempfile::tempdir().unwrap();
    let backup = directory.path().join("backup.tar.zst");
    backup_of(&corner, "two", &backup);
    let before = standing(&corner);
    let test = TestContext::new("restore");
    runtime().block_on(async {
        let error = refused(&step(&corner, &backup, &json!({}))).await;
        assert!(error.hint().unwrap().contains("name as `image`"), "{error:?}");
        let step = step(&corner, &backup, &json!({ "image": corner.name("image:1") }));
        let found = undo(&step, &test).await;
        assert_eq!(found.found, None);
        step.apply(&test.forward(), &found).await.unwrap();
        assert!(standing(&corner).contains("data local of=backup"), "{}", standing(&corner));
        let again = step.prepare(&TestContext::new("again").forward()).await.unwrap();
        assert!(matches!(again, Prepared::Unchanged { .. }), "{again:?}");
        step.rollback(&test.back(), &found, None).await.unwrap();
        assert_eq!(standing(&corner), before);
    });
}

#[test]
fn what_cannot_be_restored_is_refused_before_anything_changes() {
    let Some(corner) = Corner::shared("refused") else { return };
    let directory = tempfile::tempdir().unwrap();
    let backup = directory.path().join("backup.tar.zst");
    backup_of(&corner, "two", &backup);
    let volume = with_app(&corner);
    let before = (standing(&corner), picture(&corner, &corner.name("app")));
    let whole = std::fs::read(&backup).unwrap();
    let damaged = directory.path().join("damaged.tar.zst");
    runtime().block_on(async {
        let error = refused(&step(&corner, &directory.path().join("none"), &json!({}))).await;
        assert!(error.message().contains("cannot read"), "{error:?}");
        let error = refused(&step(&corner, &backup, &json!({ "sha256": "0".repeat(64) }))).await;
        assert!(error.message().contains("has the SHA-256 digest"), "{error:?}");
        for damage in [&whole[..whole.len() - 9], &whole[..whole.len() / 2], b"text"] {
            std::fs::write(&damaged, damage).unwrap();
            let error = refused(&step(&corner, &damaged, &json!({}))).await;
            assert!(error.message().contains("as a backup of a volume"), "{error:?}");
        }
        // An image without the program that empties the volume.
        let bare = corner.name("bare:1");
        Image::shell("true").build(&corner.engine, &corner.name("full:1"));
        let archive = directory.path().join("bare.tar");
        tar::Builder::new(std::fs::File::create(&archive).unwrap()).finish().unwrap();
        corner.engine.docker(["import", archive.to_str().unwrap(), &bare]);
        let error = refused(&step(&corner, &backup, &json!({ "image": bare }))).await;
        assert!(error.message().contains("no program `rm`"), "{error:?}");

        // Changed between prepare and apply: who was stopped goes on, and nothing else happened.
        let (restore, test) = (step(&corner, &backup, &json!({})), TestContext::new("restore"));
        let found = undo(&restore, &test).await;
        write(&corner, &corner.name("app"), "meanwhile", "text");
        let error = restore.apply(&test.forward(), &found).await.unwrap_err();
        assert!(error.as_conflict().unwrap().subject.contains(&volume), "{error:?}");
        corner.engine.docker(["exec", &corner.name("app"), "rm", "/data/meanwhile"]);
        corner.engine.docker(["exec", &corner.name("app"), "touch", "-d", "@1600000070", "/data"]);
        assert_eq!((standing(&corner), picture(&corner, &corner.name("app"))), before);
        restore.rollback(&test.back(), &found, None).await.unwrap();
        assert_eq!((standing(&corner), picture(&corner, &corner.name("app"))), before);

        // What the engine would not put back as it is: the owner of its second name takes the bit away.
        corner.engine.docker(["exec", &corner.name("app"), "chmod", "4755", "/data/hard"]);
        let before = (standing(&corner), picture(&corner, &corner.name("app")));
        let test = TestContext::new("exact");
        let found = undo(&restore, &test).await;
        let error = restore.apply(&test.forward(), &found).await.unwrap_err();
        assert!(error.message().contains("deep/text` differs; nothing was changed"), "{error:?}");
        restore.rollback(&test.back(), &found, None).await.unwrap();
        assert_eq!((standing(&corner), picture(&corner, &corner.name("app"))), before);
    });
    let build = |with: Value| {
        let config = serde_json::from_value(with).unwrap();
        VolumeRestore::from_config(config, &build_context(corner.engine.host())).unwrap_err()
    };
    let error = build(json!({ "volume": "/data", "backup": "b" }));
    assert_eq!(error.key.as_deref(), Some("volume"));
    let error = build(json!({ "volume": "data", "backup": "b", "sha256": "12" }));
    assert_eq!(error.key.as_deref(), Some("sha256"));
}

#[test]
fn its_undo_record_is_read_by_every_later_version() {
    let Some(corner) = Corner::shared("golden") else { return };
    let directory = tempfile::tempdir().unwrap();
    let backup = directory.path().join("backup.tar.zst");
    let sha256 = backup_of(&corner, "two", &backup);
    with_app(&corner);
    let step = step(&corner, &backup, &json!({}));
    let undo = runtime().block_on(undo(&step, &TestContext::new("restore")));
    let known = |what: &str| corner.engine.docker(["inspect", "--format", what, &corner.name("app")]);
    let (app, image) = (known("{{.Id}}"), known("{{.Image}}"));
    let replace = [(&*app, "APP"), (&*image, "IMAGE"), (&*sha256, "BACKUP"), (&*corner.prefix, "shop")];
    let written = golden("docker.volume_restore.undo.v1.json", &undo, &replace);
    VolumeRestore::read_undo(1, written).unwrap();
}
