//! The step of `custom_step`, crashed, failed, repeated and met by somebody else's changes.
#![cfg(test)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use tempfile::TempDir;
use upgrade_core::names::StepId;
use upgrade_core::pipeline::Pipeline;
use upgrade_core::testkit::{Scenario, Sweep, tree};
use upgrade_examples::PointLink;

struct Dataset;

impl Scenario for Dataset {
    type World = TempDir;

    fn fresh(&self) -> TempDir {
        let world = tempfile::tempdir().unwrap();
        symlink("dataset-1", world.path().join("dataset")).unwrap();
        world
    }

    fn pipeline(&self, world: &TempDir) -> Pipeline {
        let step = PointLink { link: world.path().join("dataset"), target: "dataset-2".into() };
        Pipeline::builder("dataset").to("2.0.0").step("link", step).build().unwrap()
    }

    fn observe(&self, world: &TempDir) -> String {
        tree(world.path())
    }

    fn interfere(&self, world: &TempDir, _step: &StepId) -> bool {
        fs::remove_file(world.path().join("dataset")).unwrap();
        symlink("elsewhere", world.path().join("dataset")).is_ok()
    }

    fn survived(&self, world: &TempDir, _step: &StepId) -> bool {
        fs::read_link(world.path().join("dataset")).is_ok_and(|target| target == Path::new("elsewhere"))
    }
}

#[test]
fn the_link_leads_to_the_old_or_to_the_new_data() {
    let report = Sweep::new(&Dataset).run().unwrap_or_else(|failure| panic!("{failure}"));
    assert!(report.cases > 30, "{report:?}");
}
