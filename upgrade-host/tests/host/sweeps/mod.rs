//! Every step of this crate lived through crashes, failures, repetitions and foreign changes, on
//! real files and real processes; and the seeded defects that the sweeps must notice.

#![cfg(test)]

mod configuration;
mod files;
mod processes;
mod release;
mod trees;

use std::fs;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;
use upgrade_core::file::{LoadOptions, parse};
use upgrade_core::names::StepId;
use upgrade_core::pipeline::Pipeline;
use upgrade_core::registry::Registry;
use upgrade_core::testkit::{Mutation, Scenario, Sweep, tree};

/// Describes one sweep: a directory as it is before, the pipeline file that changes it, and what
/// somebody else may do to it meanwhile.
struct Case {
    /// Makes the world before.
    setup: fn(&Path),
    pipeline: &'static str,
    /// Changes what a step works on, as somebody else; a step that is not named is left alone.
    interfere: fn(&Path, &str) -> bool,
    /// Tells whether that change is still there.
    survived: fn(&Path, &str) -> bool,
    /// Writes down more than the tree of the directory.
    observe: fn(&Path) -> String,
}

impl Case {
    const fn new(setup: fn(&Path), pipeline: &'static str) -> Self {
        Self { setup, pipeline, interfere: |_, _| false, survived: |_, _| true, observe: |_| String::new() }
    }
}

/// Ends what a case has started when its world goes.
struct World(TempDir);

impl Drop for World {
    fn drop(&mut self) {
        if let Ok(pid) = fs::read_to_string(self.0.path().join("run/pid")) {
            let _ = Command::new("kill").arg(pid.trim()).status();
        }
    }
}

impl Scenario for Case {
    type World = World;

    fn fresh(&self) -> World {
        let world = World(tempfile::tempdir().unwrap());
        fs::create_dir(world.0.path().join("site")).unwrap();
        (self.setup)(world.0.path());
        world
    }

    fn pipeline(&self, world: &World) -> Pipeline {
        let mut registry = Registry::new();
        upgrade_host::register(&mut registry);
        let name = world.0.path().join("pipeline.yaml");
        parse(self.pipeline, &name, world.0.path(), &LoadOptions::default(), &registry)
            .unwrap_or_else(|e| panic!("{e}"))
    }

    fn observe(&self, world: &World) -> String {
        let text = format!("{}{}", tree(&world.0.path().join("site")), (self.observe)(world.0.path()));
        // Each world has a directory of its own; its name is all that two of them may differ in.
        text.replace(world.0.path().file_name().unwrap().to_str().unwrap(), "WORLD")
    }

    fn interfere(&self, world: &World, step: &StepId) -> bool {
        (self.interfere)(world.0.path(), step.as_str())
    }

    fn survived(&self, world: &World, step: &StepId) -> bool {
        (self.survived)(world.0.path(), step.as_str())
    }
}

fn sweep(case: &Case, at_least: usize) {
    let report = Sweep::new(case).run().unwrap_or_else(|failure| panic!("{failure}"));
    println!("{report:?}");
    assert!(report.cases >= at_least, "{report:?}");
}

fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn reads(path: &Path, text: &str) -> bool {
    fs::read_to_string(path).is_ok_and(|found| found == text)
}

/// Packs a release into `DIR/NAME.tar.gz`.
fn pack(directory: &Path, name: &str, files: &[(&str, &str)]) {
    let source = directory.join(name);
    for (path, text) in files {
        write(&source.join(path), text);
    }
    let archive = directory.join(format!("{name}.tar.gz"));
    let done = Command::new("tar").arg("-czf").arg(archive).arg("-C").arg(&source).arg(".").status().unwrap();
    assert!(done.success());
    fs::remove_dir_all(source).unwrap();
}

/// Asks that each seeded defect is noticed: what a sweep passes proves something only then.
fn notices_every_seeded_defect(case: &impl Scenario) {
    for mutation in Mutation::ALL {
        let failure = Sweep::new(case).with_mutation(mutation).run();
        let failure = failure.expect_err(&format!("{mutation:?} was not noticed"));
        println!("{mutation:?}: {failure}");
    }
}
