//! `host.release`: applied, undone and confirmed, whole and from every partial state.

#![cfg(test)]

use std::fs;
use std::io::Cursor;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::world::{Tar, golden, gz, picture};
use serde_json::{Value, json};
use upgrade_core::context::OnConflict;
use upgrade_core::error::{Class, StepError};
use upgrade_core::registry::{BuildContext, Registry};
use upgrade_core::sealed::sha256_hex;
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::testkit::TestContext;
use upgrade_host::steps::{Release, ReleaseOutput, ReleaseUndo};

fn archive() -> Vec<u8> {
    gz(&Tar::default().file("bin/app", b"new").file("etc/app.conf", b"conf").link("run", "bin/app").end())
}

struct Site {
    directory: tempfile::TempDir,
    test: TestContext,
}

impl Site {
    /// A site where 1.0.0 is current and 1.1.0 is about to be released.
    fn new() -> Self {
        let site = Self::empty();
        fs::create_dir_all(site.at("site/releases/1.0.0")).unwrap();
        fs::write(site.at("site/releases/1.0.0/app"), "old").unwrap();
        symlink("releases/1.0.0", site.at("site/current")).unwrap();
        site
    }

    fn empty() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("app.tar.gz"), archive()).unwrap();
        Self { directory, test: TestContext::new("release") }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.directory.path().join(path)
    }

    fn step(&self) -> Release {
        self.step_with(json!({}))
    }

    fn step_with(&self, with: Value) -> Release {
        self.try_step(with).unwrap()
    }

    fn try_step(&self, with: Value) -> Result<Release, upgrade_core::registry::BuildError> {
        let mut config = json!({ "root": "site", "version": "1.1.0", "archive": "app.tar.gz" });
        let Value::Object(with) = with else { panic!("{with}") };
        config.as_object_mut().unwrap().extend(with);
        config.as_object_mut().unwrap().retain(|_, value| !value.is_null());
        Release::from_config(serde_json::from_value(config).unwrap(), &BuildContext::new(self.directory.path()))
    }

    async fn prepare(&self, step: &Release) -> Result<ReleaseUndo, StepError> {
        match step.prepare(&self.test.forward()).await? {
            Prepared::Change { undo, .. } => Ok(undo),
            other => panic!("{other:?}"),
        }
    }

    async fn apply(&self, step: &Release, undo: &ReleaseUndo) -> Result<ReleaseOutput, StepError> {
        step.apply(&self.test.forward(), undo).await
    }

    async fn rollback(&self, step: &Release, undo: &ReleaseUndo) -> Result<(), StepError> {
        step.rollback(&self.test.back(), undo, None).await
    }

    fn current(&self) -> PathBuf {
        fs::read_link(self.at("site/current")).unwrap()
    }

    /// The hidden name that this run lays the release down under.
    fn temporary(&self) -> PathBuf {
        let marker = self.test.forward().marker();
        self.at(&format!("site/releases/.1.1.0.upgrade-{}", &sha256_hex(marker.as_bytes())[..12]))
    }
}

#[tokio::test]
async fn is_laid_down_switched_and_undone() {
    let site = Site::new();
    let step = site.step();
    let before = picture(site.directory.path());
    let Prepared::Change { undo, changes } = step.prepare(&site.test.forward()).await.unwrap() else { panic!() };
    assert_eq!(picture(site.directory.path()), before, "prepare changes nothing");
    assert!(changes[0].summary.as_ref().unwrap().contains("NOT verified"));
    assert_eq!(changes[1].summary.as_deref(), Some("releases/1.0.0 → releases/1.1.0"));

    for _ in 0..2 {
        let output = site.apply(&step, &undo).await.unwrap();
        assert_eq!(output.path, site.at("site/releases/1.1.0"));
        assert_eq!(output.previous.as_deref(), Some(Path::new("releases/1.0.0")));
        assert_eq!(site.current(), Path::new("releases/1.1.0"));
        assert_eq!(fs::read(site.at("site/current/run")).unwrap(), b"new");
    }
    let after = picture(site.directory.path());
    step.settle(&site.test.back(), &undo).await.unwrap();
    assert_eq!(picture(site.directory.path()), after, "settle removes nothing that counts");
    assert!(matches!(step.prepare(&site.test.forward()).await.unwrap(), Prepared::Unchanged { .. }));
    for _ in 0..2 {
        site.rollback(&step, &undo).await.unwrap();
        assert_eq!(picture(site.directory.path()), before);
    }
}

#[tokio::test]
async fn the_first_release_leaves_nothing_when_undone() {
    let site = Site::empty();
    let before = picture(site.directory.path());
    let step = site.step();
    let undo = site.prepare(&step).await.unwrap();
    let output = site.apply(&step, &undo).await.unwrap();
    assert_eq!(output.previous, None);
    assert_eq!(site.current(), Path::new("releases/1.1.0"));
    site.rollback(&step, &undo).await.unwrap();
    assert_eq!(picture(site.directory.path()), before);
}

/// Leaves a site as a call that was cut off would.
type Spoil = fn(&Site);

#[tokio::test]
async fn every_partial_state_leads_on_and_back() {
    let partial: [(&str, Spoil); 6] = [
        ("nothing was done", |_| {}),
        ("the release was half unpacked", |site| {
            fs::create_dir_all(site.temporary().join("bin")).unwrap();
            fs::write(site.temporary().join("bin/app"), "ne").unwrap();
        }),
        ("it had no name yet", |site| {
            fs::rename(site.at("site/releases/1.1.0"), site.temporary()).unwrap();
        }),
        ("the link was not switched", |site| relink(site, "releases/1.0.0")),
        ("the next link had no name yet", |site| {
            relink(site, "releases/1.0.0");
            let marker = site.test.forward().marker();
            let name = format!("site/.current.upgrade-{}", &sha256_hex(marker.as_bytes())[..12]);
            symlink("releases/1.1.0", site.at(&name)).unwrap();
        }),
        ("all was done", |_| {}),
    ];
    for (at, (what, leave)) in partial.iter().enumerate() {
        for back in [false, true] {
            let site = Site::new();
            let before = picture(site.directory.path());
            let step = site.step();
            let undo = site.prepare(&step).await.unwrap();
            if at >= 2 {
                site.apply(&step, &undo).await.unwrap();
            }
            if at == 2 {
                relink(&site, "releases/1.0.0");
            }
            leave(&site);
            step.settle(&site.test.forward(), &undo).await.unwrap();
            if back {
                site.rollback(&step, &undo).await.unwrap();
                assert_eq!(picture(site.directory.path()), before, "{what}");
            } else {
                site.apply(&step, &undo).await.unwrap();
                let whole = Site::new();
                let undo = whole.prepare(&step_of(&whole)).await.unwrap();
                whole.apply(&step_of(&whole), &undo).await.unwrap();
                assert_eq!(picture(site.directory.path()), picture(whole.directory.path()), "{what}");
            }
        }
    }
}

fn step_of(site: &Site) -> Release {
    site.step()
}

fn relink(site: &Site, target: &str) {
    fs::remove_file(site.at("site/current")).unwrap();
    symlink(target, site.at("site/current")).unwrap();
}

#[tokio::test]
async fn somebody_elses_change_is_a_conflict() {
    let site = Site::new();
    let step = site.step();
    let undo = site.prepare(&step).await.unwrap();
    relink(&site, "releases/0.9.0");
    let before = picture(site.directory.path());
    let error = site.apply(&step, &undo).await.unwrap_err();
    assert_eq!(error.as_conflict().unwrap().present, "releases/0.9.0");
    assert_eq!(picture(site.directory.path()), before);

    relink(&site, "releases/1.0.0");
    site.apply(&step, &undo).await.unwrap();
    relink(&site, "releases/0.9.0");
    let before = picture(site.directory.path());
    assert!(site.rollback(&step, &undo).await.unwrap_err().as_conflict().is_some());
    assert_eq!(picture(site.directory.path()), before);
    let overwrite = site.test.clone().on_conflict(OnConflict::Overwrite);
    step.rollback(&overwrite.back(), &undo, None).await.unwrap();
    assert_eq!(site.current(), Path::new("releases/1.0.0"));
}

#[tokio::test]
async fn an_altered_release_is_kept_and_an_added_file_set_aside() {
    let site = Site::new();
    let step = site.step();
    let undo = site.prepare(&step).await.unwrap();
    site.apply(&step, &undo).await.unwrap();
    fs::write(site.at("site/releases/1.1.0/bin/app"), "patched").unwrap();
    let error = site.rollback(&step, &undo).await.unwrap_err();
    assert!(error.as_conflict().unwrap().present.contains("bin/app"));
    assert_eq!(site.current(), Path::new("releases/1.0.0"), "the old release serves all the same");

    fs::write(site.at("site/releases/1.1.0/bin/app"), "new").unwrap();
    fs::write(site.at("site/releases/1.1.0/app.log"), "why it failed").unwrap();
    site.rollback(&step, &undo).await.unwrap();
    assert!(!site.at("site/releases/1.1.0").exists());
    let aside = fs::read_dir(site.at("site/releases"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.to_string_lossy().contains(".1.1.0.rolled-back-"))
        .unwrap();
    assert_eq!(fs::read(aside.join("app.log")).unwrap(), b"why it failed");
}

#[tokio::test]
async fn a_release_that_was_there_is_reused_and_stays() {
    let site = Site::new();
    let step = site.step();
    let undo = site.prepare(&step).await.unwrap();
    site.apply(&step, &undo).await.unwrap();
    relink(&site, "releases/1.0.0");
    let before = picture(site.directory.path());
    let undo = site.prepare(&step).await.unwrap();
    assert!(undo.found_release);
    site.apply(&step, &undo).await.unwrap();
    site.rollback(&step, &undo).await.unwrap();
    assert_eq!(picture(site.directory.path()), before);

    fs::write(site.at("site/releases/1.1.0/bin/app"), "another build").unwrap();
    let error = site.prepare(&step).await.unwrap_err();
    assert!(error.message().contains("with other content"), "{error}");
}

#[tokio::test]
async fn current_must_be_a_link() {
    let site = Site::new();
    fs::remove_file(site.at("site/current")).unwrap();
    fs::create_dir(site.at("site/current")).unwrap();
    let error = site.prepare(&site.step()).await.unwrap_err();
    assert!(error.message().contains("is a directory"), "{error}");
    assert!(error.hint().unwrap().contains("ln -s"));
}

#[tokio::test]
async fn a_missing_old_release_is_not_linked_back() {
    let site = Site::new();
    let step = site.step();
    let undo = site.prepare(&step).await.unwrap();
    site.apply(&step, &undo).await.unwrap();
    fs::rename(site.at("site/releases/1.0.0"), site.at("gone")).unwrap();
    let error = site.rollback(&step, &undo).await.unwrap_err();
    assert!(error.message().contains("is gone"), "{error}");
    assert_eq!(site.current(), Path::new("releases/1.1.0"));
}

#[tokio::test]
async fn digests_are_held_to() {
    let site = Site::new();
    let right = sha256_hex(&archive());
    site.prepare(&site.step_with(json!({ "sha256": right.to_uppercase() }))).await.unwrap();
    let wrong = site.prepare(&site.step_with(json!({ "sha256": "0".repeat(64) }))).await.unwrap_err();
    assert_eq!(wrong.class(), Class::Permanent);
    assert!(wrong.message().contains(&right) && wrong.message().contains("app.tar.gz"), "{wrong}");
    fs::write(site.at("SHA256SUMS"), format!("{right}  app.tar.gz\n{}  other\n", "0".repeat(64))).unwrap();
    site.prepare(&site.step_with(json!({ "sha256_file": "SHA256SUMS" }))).await.unwrap();
    fs::write(site.at("SHA256SUMS"), format!("{right}  other.tar.gz\n")).unwrap();
    let step = site.step_with(json!({ "sha256_file": "SHA256SUMS" }));
    assert!(site.prepare(&step).await.unwrap_err().message().contains("holds no SHA-256 digest"));
}

#[tokio::test]
async fn an_archive_changed_after_it_was_verified_is_not_laid_down() {
    let site = Site::new();
    let step = site.step();
    let before = picture(&site.at("site"));
    let undo = site.prepare(&step).await.unwrap();
    fs::write(site.at("app.tar.gz"), gz(&Tar::default().file("bin/app", b"evil").end())).unwrap();
    let error = site.apply(&step, &undo).await.unwrap_err();
    assert!(error.message().contains("not what was verified"), "{error}");
    assert_eq!(picture(&site.at("site")), before);
}

#[tokio::test]
async fn signatures_are_held_to() {
    let site = Site::new();
    let pair = minisign::KeyPair::generate_unencrypted_keypair().unwrap();
    let other = minisign::KeyPair::generate_unencrypted_keypair().unwrap();
    let sign = |bytes: Vec<u8>| {
        let signature = minisign::sign(Some(&pair.pk), &pair.sk, Cursor::new(bytes), None, None).unwrap();
        fs::write(site.at("app.minisig"), signature.into_string()).unwrap();
    };
    sign(archive());
    let signed = |key: &minisign::PublicKey| {
        site.step_with(json!({ "signature": "app.minisig", "public_key": key.to_base64(), "require_signature": true }))
    };
    site.prepare(&signed(&pair.pk)).await.unwrap();
    for step in [signed(&other.pk), {
        sign(b"another archive".to_vec());
        signed(&pair.pk)
    }] {
        let error = site.prepare(&step).await.unwrap_err();
        assert_eq!(error.class(), Class::Permanent);
        assert!(error.message().contains("does not vouch for"), "{error}");
    }
    fs::write(site.at("app.minisig"), "no signature").unwrap();
    assert!(site.prepare(&signed(&pair.pk)).await.is_err());
    assert!(!site.at("site/releases/1.1.0").exists());
}

#[tokio::test]
async fn commit_prunes_and_spares() {
    let site = Site::new();
    for version in ["0.1.0", "0.2.0", "0.10.0", "1.2.0"] {
        fs::create_dir(site.at("site/releases").join(version)).unwrap();
    }
    let step = site.step();
    let undo = site.prepare(&step).await.unwrap();
    site.apply(&step, &undo).await.unwrap();
    for _ in 0..2 {
        step.commit(&site.test.commit(), &undo).await.unwrap();
        let mut left: Vec<_> =
            fs::read_dir(site.at("site/releases")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["1.0.0", "1.1.0", "1.2.0"]);
    }
}

#[tokio::test]
async fn a_directory_is_copied() {
    let site = Site::new();
    fs::create_dir_all(site.at("build/bin")).unwrap();
    fs::write(site.at("build/bin/app"), "new").unwrap();
    symlink("bin/app", site.at("build/run")).unwrap();
    let step = site.step_with(json!({ "archive": null, "directory": "build" }));
    let undo = site.prepare(&step).await.unwrap();
    let output = site.apply(&step, &undo).await.unwrap();
    assert_eq!(fs::read(output.path.join("run")).unwrap(), b"new");
    site.rollback(&step, &undo).await.unwrap();
    assert!(!output.path.exists());
    symlink("../../outside", site.at("build/out")).unwrap();
    assert!(site.prepare(&step).await.unwrap_err().message().contains("leads outside"));
}

#[tokio::test]
async fn a_cancelled_call_ends_and_leaves_nothing() {
    let site = Site::new();
    let step = site.step();
    let undo = site.prepare(&step).await.unwrap();
    let before = picture(site.directory.path());
    site.test.cancellation().cancel();
    assert!(site.apply(&step, &undo).await.is_err());
    assert_eq!(picture(site.directory.path()), before);
}

#[test]
fn wrong_configurations_are_named() {
    let site = Site::new();
    for (with, key) in [
        (json!({ "version": "../x" }), "version"),
        (json!({ "version": null }), "version"),
        (json!({ "current": "releases" }), "current"),
        (json!({ "archive": null }), "archive"),
        (json!({ "directory": "x" }), "archive"),
        (json!({ "sha256": "abc" }), "sha256"),
        (json!({ "signature": "x" }), "signature"),
        (json!({ "signature": "x", "public_key": "x" }), "public_key"),
        (json!({ "require_signature": true }), "require_signature"),
    ] {
        assert_eq!(site.try_step(with).unwrap_err().key.as_deref(), Some(key));
    }
    let mut registry = Registry::new();
    upgrade_host::register(&mut registry);
    let config = json!({ "root": "/srv/app", "version": "1.0.0", "archive": "a.tar" });
    registry.make_step("host.release", config, &BuildContext::new("/")).unwrap();
}

#[tokio::test]
async fn undo_format_1_is_read() {
    let site = Site::new();
    let undo = site.prepare(&site.step()).await.unwrap();
    let written = golden("host.release.undo.v1.json", &undo, &[(&sha256_hex(&archive()), "ARCHIVE")]);
    Release::read_undo(1, written).unwrap();
    assert!(Release::read_undo(2, Value::Null).is_err());
}
