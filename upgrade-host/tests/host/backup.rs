//! `host.backup` and `host.restore`: what is kept comes back as it was, and only if it is whole.

#![cfg(test)]

use std::ffi::OsStr;
use std::fs;
use std::io::{Seek, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use crate::world::{golden, picture, picture_with_times};
use serde_json::{Value, json};
use upgrade_core::check::Check;
use upgrade_core::registry::{BuildContext, Registry};
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::testkit::TestContext;
use upgrade_core::verdict::Status;
use upgrade_host::checks::BackupCheck;
use upgrade_host::steps::{Backup, BackupOutput, BackupUndo};
use upgrade_host::steps::{Restore, RestoreUndo};

struct World {
    directory: tempfile::TempDir,
    test: TestContext,
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let world = Self { directory, test: TestContext::new("backup") };
        let data = world.at("data");
        fs::create_dir_all(data.join("empty")).unwrap();
        fs::create_dir(data.join("deep")).unwrap();
        fs::write(data.join("deep/secret"), "s3cret").unwrap();
        fs::set_permissions(data.join("deep/secret"), fs::Permissions::from_mode(0o4640)).unwrap();
        fs::write(data.join(OsStr::from_bytes(b"not\xffutf-8\n")), "odd").unwrap();
        fs::write(data.join("n".repeat(200)), "long").unwrap();
        symlink("/nowhere//at/../all", data.join("dangling")).unwrap();
        fs::hard_link(data.join("deep/secret"), data.join("hard")).unwrap();
        let mut sparse = fs::File::create(data.join("large")).unwrap();
        sparse.seek(std::io::SeekFrom::Start(5 << 20)).unwrap();
        sparse.write_all(b"end").unwrap();
        sparse.set_modified(SystemTime::UNIX_EPOCH + Duration::new(1_000_000_007, 123_456_789)).unwrap();
        fs::set_permissions(data.join("deep"), fs::Permissions::from_mode(0o2750)).unwrap();
        fs::write(world.at("app.conf"), "conf").unwrap();
        world
    }

    fn at(&self, path: &str) -> PathBuf {
        self.directory.path().join(path)
    }

    fn backup(&self, with: Value) -> Backup {
        let mut config = json!({ "paths": ["data", "app.conf"], "to": "backups" });
        let Value::Object(with) = with else { panic!("{with}") };
        config.as_object_mut().unwrap().extend(with);
        Backup::from_config(serde_json::from_value(config).unwrap(), &BuildContext::new(self.directory.path())).unwrap()
    }

    async fn make(&self, step: &Backup) -> (BackupUndo, BackupOutput) {
        let Prepared::Change { undo, .. } = step.prepare(&self.test.forward()).await.unwrap() else { panic!() };
        let output = step.apply(&self.test.forward(), &undo).await.unwrap();
        (undo, output)
    }

    fn restore(&self, with: Value) -> Restore {
        Restore::from_config(serde_json::from_value(with).unwrap(), &BuildContext::new(self.directory.path())).unwrap()
    }

    fn check(&self, with: Value) -> BackupCheck {
        BackupCheck::from_config(serde_json::from_value(with).unwrap(), &BuildContext::new(self.directory.path()))
            .unwrap()
    }
}

async fn prepare(step: &Restore, test: &TestContext) -> RestoreUndo {
    match step.prepare(&test.forward()).await.unwrap() {
        Prepared::Change { undo, .. } => undo,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn what_was_kept_comes_back_as_it_was() {
    let world = World::new();
    let _socket = std::os::unix::net::UnixListener::bind(world.at("data/socket")).unwrap();
    let (_, output) = world.make(&world.backup(json!({}))).await;
    assert_eq!((output.files, output.skipped), (6, 1));
    assert_eq!(fs::metadata(&output.path).unwrap().permissions().mode() & 0o777, 0o600);
    drop(_socket);
    fs::remove_file(world.at("data/socket")).unwrap();
    let kept = picture_with_times(&world.at("data"));

    fs::remove_dir_all(world.at("data/deep")).unwrap();
    fs::write(world.at("data/new"), "written since").unwrap();
    fs::remove_file(world.at("app.conf")).unwrap();
    let destroyed = picture(world.directory.path());
    let step = world.restore(json!({ "backup": output.path, "sha256": output.sha256 }));
    let test = TestContext::new("restore");
    let undo = prepare(&step, &test).await;
    assert_eq!(picture(world.directory.path()), destroyed, "prepare changes nothing");
    for _ in 0..2 {
        step.apply(&test.forward(), &undo).await.unwrap();
        // The directory that holds the socket was changed by removing it.
        let mut restored = picture_with_times(&world.at("data"));
        restored.insert(PathBuf::new(), kept[Path::new("")].clone());
        assert_eq!(restored, kept);
        assert_eq!(fs::read(world.at("app.conf")).unwrap(), b"conf");
    }
    for _ in 0..2 {
        step.rollback(&test.back(), &undo, None).await.unwrap();
        assert_eq!(picture(world.directory.path()), destroyed);
    }
    step.apply(&test.forward(), &undo).await.unwrap();
    for _ in 0..2 {
        step.commit(&test.commit(), &undo).await.unwrap();
        assert_eq!(fs::read_dir(world.directory.path()).unwrap().count(), 3, "nothing is left aside");
    }
    assert!(matches!(step.prepare(&test.forward()).await.unwrap(), Prepared::Unchanged { .. }));
}

#[tokio::test]
async fn a_restore_elsewhere_leaves_the_original() {
    let world = World::new();
    let (_, output) = world.make(&world.backup(json!({}))).await;
    let before = picture(world.directory.path());
    let step = world.restore(json!({ "backup": output.path, "to": "elsewhere" }));
    let test = TestContext::new("restore");
    let undo = prepare(&step, &test).await;
    step.apply(&test.forward(), &undo).await.unwrap();
    let there = world.at("elsewhere").join(world.at("data").strip_prefix("/").unwrap());
    assert_eq!(picture_with_times(&there), picture_with_times(&world.at("data")));
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(picture(world.directory.path()), before);
}

#[tokio::test]
async fn a_change_after_the_restore_is_a_conflict() {
    let world = World::new();
    let (_, output) = world.make(&world.backup(json!({}))).await;
    fs::write(world.at("app.conf"), "broken").unwrap();
    let step = world.restore(json!({ "backup": output.path }));
    let test = TestContext::new("restore");
    let undo = prepare(&step, &test).await;
    fs::write(world.at("app.conf"), "mended meanwhile").unwrap();
    assert!(step.apply(&test.forward(), &undo).await.unwrap_err().as_conflict().is_some());
    assert_eq!(fs::read(world.at("app.conf")).unwrap(), b"mended meanwhile");
}

#[tokio::test]
async fn a_restore_cut_off_half_way_leads_on_and_back() {
    for back in [false, true] {
        let world = World::new();
        let (_, output) = world.make(&world.backup(json!({}))).await;
        fs::write(world.at("data/new"), "since").unwrap();
        let before = picture(world.directory.path());
        let step = world.restore(json!({ "backup": output.path }));
        let test = TestContext::new("restore");
        let undo = prepare(&step, &test).await;
        // As a file system that cannot exchange would be found between its two renames.
        let digest = upgrade_core::sealed::sha256_hex(test.forward().marker().as_bytes());
        let aside = world.at(&format!(".data.upgrade-{}", &digest[..12]));
        let found = world.at(&format!(".data.upgrade-{}.found", &digest[..12]));
        step.apply(&test.forward(), &undo).await.unwrap();
        fs::create_dir(&found).unwrap();
        fs::rename(aside.join("data"), found.join("data")).unwrap();
        fs::rename(world.at("data"), aside.join("data")).unwrap();
        if back {
            step.rollback(&test.back(), &undo, None).await.unwrap();
            assert_eq!(picture(world.directory.path()), before);
        } else {
            step.apply(&test.forward(), &undo).await.unwrap();
            assert!(!world.at("data/new").exists());
            step.rollback(&test.back(), &undo, None).await.unwrap();
            assert_eq!(picture(world.directory.path()), before);
        }
    }
}

#[tokio::test]
async fn a_backup_is_undone_from_every_state() {
    let world = World::new();
    let before = picture(world.directory.path());
    let step = world.backup(json!({}));
    let (undo, output) = world.make(&step).await;
    assert_eq!(step.apply(&world.test.forward(), &undo).await.unwrap(), output, "a second call makes no other");
    for output in [Some(&output), None] {
        step.rollback(&world.test.back(), &undo, output).await.unwrap();
        assert_eq!(picture(world.directory.path()), before);
    }
    step.apply(&world.test.forward(), &undo).await.unwrap();
    step.rollback(&world.test.back(), &undo, None).await.unwrap();
    assert_eq!(picture(world.directory.path()), before);

    fs::create_dir(world.at("backups")).unwrap();
    fs::write(&undo.path, "somebody else's").unwrap();
    assert!(step.apply(&world.test.forward(), &undo).await.unwrap_err().as_conflict().is_some());
    assert!(step.rollback(&world.test.back(), &undo, None).await.unwrap_err().as_conflict().is_some());
    assert_eq!(fs::read(&undo.path).unwrap(), b"somebody else's");

    let world = World::new();
    let step = world.backup(json!({ "on_rollback": "keep" }));
    let (undo, output) = world.make(&step).await;
    step.rollback(&world.test.back(), &undo, Some(&output)).await.unwrap();
    assert!(output.path.exists());
}

#[tokio::test]
async fn what_is_excluded_is_left_out_and_old_ones_are_pruned() {
    let world = World::new();
    let step = world.backup(json!({ "exclude": ["deep", "large"], "keep": 1 }));
    fs::create_dir(world.at("backups")).unwrap();
    fs::write(world.at("backups/backup-0.9.0-00000000-0000-7000-8000-000000000000.tar.zst"), "old").unwrap();
    fs::write(world.at("backups/by-hand.tar.zst"), "mine").unwrap();
    let (undo, output) = world.make(&step).await;
    assert_eq!(output.files, 4);
    step.commit(&world.test.commit(), &undo).await.unwrap();
    assert_eq!(fs::read_dir(world.at("backups")).unwrap().count(), 2);
    assert!(output.path.exists());
}

#[tokio::test]
async fn a_backup_does_not_hold_itself_nor_fill_the_disk() {
    let world = World::new();
    let inside = world.backup(json!({ "to": "data/backups" }));
    assert!(inside.prepare(&world.test.forward()).await.unwrap_err().message().contains("would hold itself"));
    let excluded = world.backup(json!({ "to": "data/backups", "exclude": ["backups"] }));
    excluded.prepare(&world.test.forward()).await.unwrap();
    let greedy = world.backup(json!({ "free": "900TiB" }));
    assert!(greedy.prepare(&world.test.forward()).await.unwrap_err().message().contains("free"));
    let missing = world.backup(json!({ "paths": ["data", "none"] }));
    assert!(missing.prepare(&world.test.forward()).await.unwrap_err().message().contains("none"));
}

#[tokio::test]
async fn a_damaged_backup_is_noticed_everywhere() {
    let world = World::new();
    fs::remove_file(world.at("data/large")).unwrap();
    let (_, output) = world.make(&world.backup(json!({}))).await;
    let test = TestContext::new("check");
    let config = json!({ "path": "backups", "max_age": "1h", "holds": ["data/deep"] });
    let verdict = world.check(config.clone()).check(&test.forward()).await.unwrap();
    assert_eq!(verdict.status, Status::Pass, "{verdict:?}");
    assert_eq!(verdict.facts["sha256"], output.sha256);
    let asks = |with: Value| {
        let check = world.check(with);
        let cx = test.forward();
        async move { check.check(&cx).await.unwrap() }
    };
    assert_eq!(asks(json!({ "path": "none" })).await.status, Status::Fail);
    assert_eq!(asks(json!({ "path": "data" })).await.status, Status::Fail);
    assert_eq!(asks(json!({ "path": "backups", "holds": ["other"] })).await.status, Status::Fail);
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert_eq!(asks(json!({ "path": "backups", "max_age": "1ms" })).await.status, Status::Fail);

    let good = fs::read(&output.path).unwrap();
    let before = picture(&world.at("data"));
    for at in (0..good.len()).step_by(good.len() / 40 + 1) {
        let mut bytes = good.clone();
        bytes[at] ^= 0x40;
        fs::write(&output.path, &bytes).unwrap();
        // Some bits of a zstd frame say nothing: what unpacks to the same is the same backup.
        let same = zstd::decode_all(&bytes[..]).ok() == zstd::decode_all(&good[..]).ok();
        let expected = if same { Status::Pass } else { Status::Fail };
        assert_eq!(asks(config.clone()).await.status, expected, "byte {at}");
        let restore = world.restore(json!({ "backup": output.path, "sha256": output.sha256 }));
        restore.prepare(&test.forward()).await.unwrap_err();
    }
    fs::write(&output.path, &good[..good.len() / 2]).unwrap();
    assert_eq!(asks(config).await.status, Status::Fail);
    assert_eq!(picture(&world.at("data")), before);
    let mut registry = Registry::new();
    upgrade_host::register(&mut registry);
    registry.make_check("host.backup", json!({ "path": "x" }), &BuildContext::new("/")).unwrap();
}

#[tokio::test]
async fn a_file_that_keeps_changing_is_named() {
    let world = World::new();
    let path = world.at("data/large");
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let writer = std::thread::spawn(move || {
        let mut file = fs::OpenOptions::new().write(true).open(path).unwrap();
        while stopped.try_recv().is_err() {
            file.rewind().unwrap();
            file.write_all(b"x").unwrap();
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    let step = world.backup(json!({}));
    let Prepared::Change { undo, .. } = step.prepare(&world.test.forward()).await.unwrap() else { panic!() };
    let error = step.apply(&world.test.forward(), &undo).await.unwrap_err();
    stop.send(()).unwrap();
    writer.join().unwrap();
    assert!(error.message().contains("data/large kept changing"), "{error}");
    assert_eq!(fs::read_dir(world.at("backups")).unwrap().count(), 0);
    let output = step.apply(&world.test.forward(), &undo).await.unwrap();
    assert_eq!(output.files, 6);
}

#[tokio::test]
async fn a_full_disk_leaves_nothing_behind() {
    let world = World::new();
    let small = world.at("small");
    fs::create_dir(&small).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=256k", "tmpfs"]).arg(&small).status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: a tmpfs can only be mounted by root");
        return;
    }
    // Zeros are estimated at their full size, so the check beforehand would answer; noise written
    // after it makes the write itself fail.
    fs::remove_file(world.at("data/large")).unwrap();
    let step = world.backup(json!({ "to": "small" }));
    let Prepared::Change { undo, .. } = step.prepare(&world.test.forward()).await.unwrap() else { panic!() };
    let mut state = 1u64;
    let noise: Vec<u8> = (0..2 << 20)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as u8
        })
        .collect();
    fs::write(world.at("data/noise"), noise).unwrap();
    let result = step.apply(&world.test.forward(), &undo).await;
    let left = fs::read_dir(&small).unwrap().count();
    let unmounted = Command::new("umount").arg(&small).status().unwrap();
    assert!(unmounted.success());
    let error = result.unwrap_err();
    assert!(error.hint().unwrap().contains("free some space"), "{error} {:?}", error.causes());
    assert_eq!(left, 0);
}

#[tokio::test]
async fn undo_format_1_is_read() {
    let world = World::new();
    let root = world.directory.path().to_string_lossy().into_owned();
    let run = world.test.forward().run().to_string();
    let (undo, output) = world.make(&world.backup(json!({}))).await;
    let written = golden("host.backup.undo.v1.json", &undo, &[(&root, "/srv"), (&run, "RUN")]);
    Backup::read_undo(1, written).unwrap();

    fs::write(world.at("app.conf"), "other").unwrap();
    let step = world.restore(json!({ "backup": output.path }));
    let undo = prepare(&step, &TestContext::new("restore")).await;
    let mut replace = vec![(root, "/srv".to_owned()), (undo.backup_sha256.clone(), "BACKUP".to_owned())];
    for (at, place) in undo.places.iter().enumerate() {
        let found = place.found.clone().unwrap();
        if found != place.intended {
            replace.push((found, format!("FOUND{at}")));
        }
        replace.push((place.intended.clone(), format!("INTENDED{at}")));
    }
    let replace: Vec<_> = replace.iter().map(|(from, to)| (from.as_str(), to.as_str())).collect();
    Restore::read_undo(1, golden("host.restore.undo.v1.json", &undo, &replace)).unwrap();
}
