//! `host.file` on real files: there and back, interrupted, repeated, met by foreign changes.

#![cfg(test)]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use serde_json::json;
use upgrade_core::context::OnConflict;
use upgrade_core::registry::{BuildContext, Registry};
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::testkit::TestContext;
use upgrade_host::steps::{File, FileConfig};
use upgrade_host::steps::{FileUndo, Kept};

/// Everything that a rollback must put back, of every path below a directory.
fn world(directory: &Path) -> Vec<(PathBuf, u32, u32, i64, i64, Vec<u8>)> {
    let mut entries = Vec::new();
    let mut pending = vec![directory.to_path_buf()];
    while let Some(at) = pending.pop() {
        for entry in fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            let m = fs::symlink_metadata(&path).unwrap();
            let content = if m.is_symlink() {
                fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()
            } else if m.is_dir() {
                pending.push(path.clone());
                Vec::new()
            } else {
                fs::read(&path).unwrap()
            };
            // A directory's time changes with every temporary file in it.
            let (seconds, nanoseconds) = if m.is_dir() { (0, 0) } else { (m.mtime(), m.mtime_nsec()) };
            entries.push((path, m.mode(), m.uid(), seconds, nanoseconds, content));
        }
    }
    entries.sort();
    entries
}

fn step(config: serde_json::Value) -> File {
    File::from_config(serde_json::from_value::<FileConfig>(config).unwrap(), &BuildContext::default()).unwrap()
}

async fn prepared(step: &File, test: &TestContext) -> FileUndo {
    match step.prepare(&test.forward()).await.unwrap() {
        Prepared::Change { undo, .. } => undo,
        other => panic!("{other:?}"),
    }
}

/// Applies and rolls back, whole, twice and interrupted; the world must be as before each time.
async fn there_and_back(directory: &Path, config: serde_json::Value, check: impl Fn()) {
    let before = world(directory);
    let step = step(config);
    for interrupted in [false, true] {
        let test = TestContext::new("file");
        let undo = prepared(&step, &test).await;
        assert_eq!(world(directory), before, "prepare changes nothing");
        let temporary = undo.path.with_file_name(leftover(&undo, &test));
        if interrupted && temporary.parent().unwrap().is_dir() {
            fs::write(&temporary, b"half of it").unwrap();
            step.settle(&test.forward(), &undo).await.unwrap();
            assert_eq!(world(directory), before, "settle removes what was left");
            fs::write(&temporary, b"half of it").unwrap();
        }
        step.rollback(&test.back(), &undo, None).await.unwrap();
        assert_eq!(world(directory), before, "a rollback of nothing changes nothing");
        for _ in 0..2 {
            step.apply(&test.forward(), &undo).await.unwrap();
            check();
        }
        for _ in 0..2 {
            step.rollback(&test.back(), &undo, None).await.unwrap();
            assert_eq!(world(directory), before);
        }
    }
    let test = TestContext::new("file");
    let undo = prepared(&step, &test).await;
    step.apply(&test.forward(), &undo).await.unwrap();
    for _ in 0..2 {
        step.commit(&test.commit(), &undo).await.unwrap();
    }
    check();
    let again = step.prepare(&TestContext::new("file").forward()).await.unwrap();
    assert!(matches!(again, Prepared::Unchanged { .. }), "{again:?}");
    let hidden = world(directory).into_iter().filter(|(path, ..)| path.to_string_lossy().contains(".upgrade-"));
    assert_eq!(hidden.count(), 0, "commit leaves nothing behind");
}

fn leftover(undo: &FileUndo, test: &TestContext) -> String {
    let digest = upgrade_core::sealed::sha256_hex(test.forward().marker().as_bytes());
    format!(".{}.upgrade-{}", undo.path.file_name().unwrap().to_string_lossy(), &digest[..12])
}

fn file(directory: &Path, content: &[u8]) -> PathBuf {
    let path = directory.join("notes.conf");
    fs::write(&path, content).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let old = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000, 123_456_789);
    fs::File::options().write(true).open(&path).unwrap().set_modified(old).unwrap();
    path
}

#[tokio::test]
async fn an_old_file_is_replaced_and_comes_back_with_mode_and_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = file(directory.path(), b"old\n");
    there_and_back(directory.path(), json!({ "path": path, "content": "new\n" }), || {
        assert_eq!(fs::read(&path).unwrap(), b"new\n");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o640);
    })
    .await;
}

#[tokio::test]
async fn directories_are_made_and_removed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a/b/c.conf");
    let config = json!({ "path": path, "content": "new", "mode": "0600", "create_directories": true });
    there_and_back(directory.path(), config, || assert_eq!(fs::read(&path).unwrap(), b"new")).await;
}

#[tokio::test]
async fn directories_that_others_use_by_now_stay() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a/b/c.conf");
    let step = step(json!({ "path": path, "content": "new", "create_directories": true }));
    let test = TestContext::new("file");
    let undo = prepared(&step, &test).await;
    step.apply(&test.forward(), &undo).await.unwrap();
    fs::write(directory.path().join("a/theirs"), b"x").unwrap();
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert!(!directory.path().join("a/b").exists());
    assert!(directory.path().join("a/theirs").exists());
}

#[tokio::test]
async fn a_file_is_removed_and_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = file(directory.path(), b"old\n");
    there_and_back(directory.path(), json!({ "path": path, "state": "absent" }), || assert!(!path.exists())).await;
}

#[tokio::test]
async fn a_link_gives_way_to_a_file_and_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    let target = file(directory.path(), b"target\n");
    let link = directory.path().join("link");
    symlink("notes.conf", &link).unwrap();
    there_and_back(directory.path(), json!({ "path": link, "content": "new" }), || {
        assert!(!link.is_symlink());
        assert_eq!(fs::read(&target).unwrap(), b"target\n");
    })
    .await;
}

#[tokio::test]
async fn a_link_is_followed_when_asked() {
    let directory = tempfile::tempdir().unwrap();
    let target = file(directory.path(), b"target\n");
    let link = directory.path().join("link");
    symlink("notes.conf", &link).unwrap();
    there_and_back(directory.path(), json!({ "path": link, "content": "new", "follow": true }), || {
        assert!(link.is_symlink());
        assert_eq!(fs::read(&target).unwrap(), b"new");
    })
    .await;
}

#[tokio::test]
async fn only_the_mode_changes() {
    let directory = tempfile::tempdir().unwrap();
    let path = file(directory.path(), b"old\n");
    there_and_back(directory.path(), json!({ "path": path, "mode": "0600", "owner": "0:0" }), || {
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(fs::read(&path).unwrap(), b"old\n");
    })
    .await;
}

#[tokio::test]
async fn a_source_is_copied() {
    let elsewhere = tempfile::tempdir().unwrap();
    let source = elsewhere.path().join("source");
    fs::write(&source, b"from the source").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("copy");
    there_and_back(directory.path(), json!({ "path": path, "source": source }), || {
        assert_eq!(fs::read(&path).unwrap(), b"from the source");
    })
    .await;
    fs::remove_file(&path).unwrap();
    let step = step(json!({ "path": path, "source": source }));
    let test = TestContext::new("file");
    let undo = prepared(&step, &test).await;
    fs::write(&source, b"another one").unwrap();
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert!(error.message().contains("has changed since"), "{error}");
    assert!(!path.exists());
}

#[tokio::test]
async fn a_large_file_is_kept_aside() {
    let directory = tempfile::tempdir().unwrap();
    let path = file(directory.path(), &vec![b'x'; 17 * 1024 * 1024]);
    for config in [json!({ "path": path, "content": "new" }), json!({ "path": path, "state": "absent" })] {
        let undo = prepared(&step(config.clone()), &TestContext::new("file")).await;
        assert!(matches!(undo.kept, Some(Kept::Aside(_))));
        let before = fs::metadata(&path).unwrap();
        let test = TestContext::new("file");
        let step = step(config);
        let undo = prepared(&step, &test).await;
        for _ in 0..2 {
            step.apply(&test.forward(), &undo).await.unwrap();
        }
        for _ in 0..2 {
            step.rollback(&test.back(), &undo, None).await.unwrap();
        }
        let after = fs::metadata(&path).unwrap();
        assert_eq!((before.ino(), before.mtime_nsec(), before.len()), (after.ino(), after.mtime_nsec(), after.len()));
        // A crash between the link and the replacement: both names are the same file.
        let Some(Kept::Aside(aside)) = &undo.kept else { unreachable!() };
        fs::hard_link(&path, aside).unwrap();
        step.rollback(&test.back(), &undo, None).await.unwrap();
        assert!(!aside.exists());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
    let test = TestContext::new("file");
    let step = step(json!({ "path": path, "content": "new" }));
    let undo = prepared(&step, &test).await;
    step.apply(&test.forward(), &undo).await.unwrap();
    for _ in 0..2 {
        step.commit(&test.commit(), &undo).await.unwrap();
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "commit leaves nothing behind");
}

#[tokio::test]
async fn a_foreign_change_is_a_conflict_in_both_directions() {
    let directory = tempfile::tempdir().unwrap();
    let path = file(directory.path(), b"old\n");
    let step = step(json!({ "path": path, "content": "new" }));
    let test = TestContext::new("file");
    let undo = prepared(&step, &test).await;
    fs::write(&path, b"theirs").unwrap();
    for error in [
        step.apply(&test.forward(), &undo).await.unwrap_err(),
        step.rollback(&test.back(), &undo, None).await.unwrap_err(),
    ] {
        let conflict = error.as_conflict().unwrap();
        assert!(conflict.found.starts_with("file sha256:"), "{conflict:?}");
        assert_ne!(conflict.present, conflict.found);
        assert!(error.hint().is_some());
        assert_eq!(fs::read(&path).unwrap(), b"theirs");
    }
    // Only a mode is another state, too.
    fs::write(&path, b"old\n").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
    assert!(step.apply(&test.forward(), &undo).await.unwrap_err().as_conflict().is_some());
    let overwrite = test.on_conflict(OnConflict::Overwrite);
    step.apply(&overwrite.forward(), &undo).await.unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
    fs::write(&path, b"theirs again").unwrap();
    step.rollback(&overwrite.back(), &undo, None).await.unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"old\n");
}

#[tokio::test]
async fn what_cannot_be_put_back_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let test = TestContext::new("file");
    let refused = [
        json!({ "path": directory.path(), "content": "x" }),
        json!({ "path": "/dev/null", "content": "x" }),
        json!({ "path": directory.path().join("no/such/file"), "content": "x" }),
        json!({ "path": directory.path().join("no-content"), "mode": "0600" }),
        json!({ "path": directory.path().join("x"), "content": "x", "owner": "nobody-of-this-name" }),
    ];
    for config in refused {
        let error = step(config.clone()).prepare(&test.forward()).await.unwrap_err();
        assert!(error.hint().is_some(), "{config}: {error}");
    }
}

#[tokio::test]
async fn a_cancelled_apply_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = file(directory.path(), b"old\n");
    let step = step(json!({ "path": path, "content": "new" }));
    let test = TestContext::new("file");
    let undo = prepared(&step, &test).await;
    test.cancellation().cancel();
    step.apply(&test.forward(), &undo).await.unwrap_err();
    assert_eq!(fs::read(&path).unwrap(), b"old\n");
}

const CANARY: &str = "canary-5ecret-v4lue";

#[tokio::test]
async fn secrets_found_and_put_in_are_shown_nowhere() {
    let directory = tempfile::tempdir().unwrap();
    let secret = directory.path().join("secret");
    fs::write(&secret, format!("{CANARY}-new\n")).unwrap();
    let path = file(directory.path(), format!("PORT=1\nPASSWORD={CANARY}\n{CANARY}\n").as_bytes());
    let template = json!({
        "text": "PORT={{ port }}\nPASSWORD={{ secrets.password | upper }}\n", "vars": { "port": 1 },
        "secrets": { "password": { "file": secret } }
    });
    for config in [json!({ "path": path, "template": template }), json!({ "path": path, "state": "absent" })] {
        let step = step(config);
        let test = TestContext::new("file");
        let prepared = step.prepare(&test.forward()).await.unwrap();
        let Prepared::Change { undo, changes } = prepared else { panic!() };
        let output = step.apply(&test.forward(), &undo).await.unwrap();
        if path.exists() {
            assert_eq!(fs::read_to_string(&path).unwrap(), format!("PORT=1\nPASSWORD={}-NEW\n", CANARY.to_uppercase()));
        }
        let diff = changes[0].diff.clone().unwrap();
        assert!(diff.contains("- PASSWORD=•••"), "{diff}");
        step.rollback(&test.back(), &undo, Some(&output)).await.unwrap();
        fs::write(&path, format!("PASSWORD={CANARY}-theirs")).unwrap();
        let conflict = step.apply(&test.forward(), &undo).await.unwrap_err();
        file(directory.path(), format!("PORT=1\nPASSWORD={CANARY}\n{CANARY}\n").as_bytes());
        let seen = format!(
            "{undo:?} {changes:?} {output:?} {conflict:?} {step:?} {} {} {} {}",
            serde_json::to_string(&undo).unwrap(),
            serde_json::to_string(&changes).unwrap(),
            serde_json::to_string(&conflict).unwrap(),
            step.definition()
        );
        assert!(!seen.to_lowercase().contains(CANARY), "{seen}");
    }
}

#[tokio::test]
async fn a_template_names_only_what_is_defined() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x");
    let step = step(json!({ "path": path, "template": { "text": "a\n{{ unknown }}\n", "vars": {} } }));
    let error = step.prepare(&TestContext::new("file").forward()).await.unwrap_err();
    assert!(error.message().contains("line 2"), "{error}");
}

#[test]
fn a_wrong_configuration_is_refused_when_it_is_read() {
    let mut registry = Registry::new();
    upgrade_host::register(&mut registry);
    let cx = BuildContext::new("/srv");
    for with in [
        json!({ "path": "x" }),
        json!({ "path": "x", "content": "a", "source": "b" }),
        json!({ "path": "x", "state": "absent", "content": "a" }),
        json!({ "path": "x", "content": "a", "mode": 640 }),
        json!({ "path": "x", "content": "a", "mode": "0999" }),
        json!({ "path": "x", "contents": "a" }),
        json!({ "path": "x", "template": {} }),
        json!({ "path": "x", "template": { "text": "", "vars": { "secrets": 1 } } }),
    ] {
        assert!(registry.make_step("host.file", with.clone(), &cx).is_err(), "{with}");
    }
    assert!(registry.make_step("host.file", json!({ "path": "x", "content": "a" }), &cx).is_ok());
}

/// Records of format 1 in the journals of users: they must be read for ever.
#[test]
fn undo_records_of_format_1_are_read() {
    for name in ["host.file.undo.v1.json", "host.file.undo.v1.symlink.json", "host.file.undo.v1.large.json"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        let golden: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let undo = File::read_undo(1, golden.clone()).unwrap();
        assert_eq!(serde_json::to_value(undo).unwrap(), golden, "{name}");
    }
    assert!(File::read_undo(2, json!({})).is_err());
}
