//! Backup, release and restore in one run, with one thing going wrong at a time.

#![cfg(test)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::world::{Tar, gz, picture};
use serde_json::json;
use upgrade_core::names::StepId;
use upgrade_core::pipeline::Pipeline;
use upgrade_core::registry::BuildContext;
use upgrade_core::step::{Prepared, Step};
use upgrade_core::testkit::{Scenario, Sweep, TestContext};
use upgrade_host::steps::Backup;
use upgrade_host::steps::Release;
use upgrade_host::steps::Restore;

/// A site with data; a backup made elsewhere is restored into it as well.
struct Upgrade {
    earlier: tempfile::TempDir,
}

impl Upgrade {
    fn new() -> Self {
        let earlier = tempfile::tempdir().unwrap();
        fs::create_dir(earlier.path().join("kept")).unwrap();
        fs::write(earlier.path().join("kept/file"), "kept").unwrap();
        let config = json!({ "paths": ["kept"], "to": "earlier.tar.zst" });
        let step =
            Backup::from_config(serde_json::from_value(config).unwrap(), &BuildContext::new(earlier.path())).unwrap();
        tokio::runtime::Runtime::new().unwrap().block_on(async {
            let test = TestContext::new("earlier");
            let Prepared::Change { undo, .. } = step.prepare(&test.forward()).await.unwrap() else { panic!() };
            step.apply(&test.forward(), &undo).await.unwrap();
        });
        Self { earlier }
    }

    fn restored(&self, world: &Path) -> PathBuf {
        world.join("restored").join(self.earlier.path().strip_prefix("/").unwrap()).join("kept")
    }

    /// What somebody else changes in the way of a step.
    fn foreign(&self, world: &Path, step: &StepId) -> PathBuf {
        match step.as_str() {
            "backup" => world.join("backup.tar.zst"),
            _ => self.restored(world).join("foreign"),
        }
    }
}

impl Scenario for Upgrade {
    type World = tempfile::TempDir;

    fn fresh(&self) -> tempfile::TempDir {
        let world = tempfile::tempdir().unwrap();
        let at = |path: &str| world.path().join(path);
        fs::create_dir_all(at("site/releases/1.0.0")).unwrap();
        fs::write(at("site/releases/1.0.0/app"), "old").unwrap();
        symlink("releases/1.0.0", at("site/current")).unwrap();
        fs::create_dir(at("data")).unwrap();
        fs::write(at("data/rows"), "rows").unwrap();
        fs::write(at("app.tar.gz"), gz(&Tar::default().file("bin/app", b"new").end())).unwrap();
        world
    }

    fn pipeline(&self, world: &tempfile::TempDir) -> Pipeline {
        let cx = BuildContext::new(world.path());
        let backup = json!({ "paths": ["data"], "to": "backup.tar.zst" });
        let release = json!({ "root": "site", "version": "1.1.0", "archive": "app.tar.gz" });
        let restore = json!({ "backup": self.earlier.path().join("earlier.tar.zst"), "to": "restored" });
        Pipeline::builder("site")
            .step("backup", Backup::from_config(serde_json::from_value(backup).unwrap(), &cx).unwrap())
            .step("release", Release::from_config(serde_json::from_value(release).unwrap(), &cx).unwrap())
            .step("restore", Restore::from_config(serde_json::from_value(restore).unwrap(), &cx).unwrap())
            .build()
            .unwrap()
    }

    fn observe(&self, world: &tempfile::TempDir) -> String {
        let mut picture = picture(world.path());
        // Each run's backup names the run and the time.
        if let Some(backup) = picture.get_mut(Path::new("backup.tar.zst")) {
            *backup = "a backup".to_owned();
        }
        format!("{picture:#?}")
    }

    fn interfere(&self, world: &tempfile::TempDir, step: &StepId) -> bool {
        if step.as_str() == "release" {
            let link = world.path().join("site/current");
            fs::remove_file(&link).unwrap();
            symlink("releases/foreign", link).unwrap();
            return true;
        }
        let path = self.foreign(world.path(), step);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "somebody else's").unwrap();
        true
    }

    fn survived(&self, world: &tempfile::TempDir, step: &StepId) -> bool {
        if step.as_str() == "release" {
            return fs::read_link(world.path().join("site/current")).is_ok_and(|l| l == Path::new("releases/foreign"));
        }
        fs::read(self.foreign(world.path(), step)).is_ok_and(|text| text == b"somebody else's")
    }
}

#[test]
fn every_seeded_defect_is_noticed() {
    super::notices_every_seeded_defect(&Upgrade::new());
}

#[test]
fn every_crash_failure_and_repetition_ends_before_or_after() {
    let report = Sweep::new(&Upgrade::new()).run().unwrap_or_else(|failure| panic!("{failure}"));
    assert!(report.cases > 60, "{report:?}");
}
