//! `docker.image`: an image that is pulled, and a name that moves to it.

#![cfg(test)]

use upgrade_core::file::{LoadOptions, parse};
use upgrade_core::names::StepId;
use upgrade_core::pipeline::Pipeline;
use upgrade_core::testkit::{Mutation, Scenario, Sweep};
use upgrade_testbed::docker::{self, Engine, Image, Registry};

use crate::world::{Corner, registry};

/// Images in a registry, and an engine that has one of another kind under the name that moves.
struct Moving {
    engine: Engine,
    registry: Registry,
    /// What all worlds share: built once.
    base: Corner,
    /// The id of the image in the registry.
    id: String,
}

impl Moving {
    fn new() -> Option<Self> {
        let (engine, registry) = (docker::shared()?, docker::registry(false)?);
        let base = Corner::of(&engine, "base");
        Image::web("1").build(&engine, &base.name("old:1"));
        Image::web("3").build(&engine, &base.name("other:1"));
        let name = format!("{}/{}:2", registry.address(), base.prefix);
        let id = Image::web("2").build(&engine, &name);
        engine.docker(["push", "--quiet", &name]);
        engine.docker(["image", "rm", "--force", &id]);
        Some(Self { engine, registry, base, id })
    }

    fn pulled(&self) -> String {
        format!("{}/{}:2", self.registry.address(), self.base.prefix)
    }

    /// The names that keep one of these images.
    fn kept(&self) -> Vec<String> {
        let ours = [self.id.clone(), self.id_of(&self.base.name("old:1"))];
        let format = "{{.Repository}}:{{.Tag}} {{.ID}}";
        let all = self.engine.docker(["image", "ls", "--no-trunc", "--format", format]);
        let all = all.lines().filter_map(|line| line.split_once(' '));
        let kept = all.filter(|(name, id)| name.starts_with("upgrade-kept:") && ours.iter().any(|ours| ours == id));
        kept.map(|(name, _)| name.to_owned()).collect()
    }

    fn id_of(&self, name: &str) -> String {
        let found = self.engine.command(["image", "inspect", "--format", "{{.Id}}", name]).output().unwrap();
        String::from_utf8_lossy(&found.stdout).trim().to_owned()
    }
}

impl Drop for Moving {
    fn drop(&mut self) {
        let _ = self.engine.command(["image", "rm", "--force", &self.id]).output();
    }
}

impl Scenario for Moving {
    type World = Corner;

    fn fresh(&self) -> Corner {
        // By its id, all names of it.
        let _ = self.engine.command(["image", "rm", "--force", &self.id]).output();
        // What an undo kept that was skipped is for whoever skipped it.
        for kept in self.kept() {
            self.engine.docker(["image", "rm", &kept]);
        }
        let corner = Corner::of(&self.engine, "sweep");
        self.engine.docker(["tag", &self.base.name("old:1"), &corner.name("app:current")]);
        corner
    }

    fn pipeline(&self, world: &Corner) -> Pipeline {
        let (host, pulled, current) = (self.engine.host(), self.pulled(), world.name("app:current"));
        let document = format!(
            "targets: {{ engine: {{ uses: docker, with: {{ host: \"{host}\" }} }} }}\nupgrade: images\nsteps:\n  \
             - {{ id: pull, uses: docker.image, with: {{ target: engine, image: \"{pulled}\" }} }}\n  \
             - {{ id: name, uses: docker.image, with: {{ target: engine, image: \"{current}\", from: \"{pulled}\" }} }}\n"
        );
        parse(&document, "pipeline.yaml".as_ref(), "/".as_ref(), &LoadOptions::default(), &registry())
            .unwrap_or_else(|error| panic!("{error}"))
    }

    fn observe(&self, world: &Corner) -> String {
        let (current, pulled) = (self.id_of(&world.name("app:current")), self.id_of(&self.pulled()));
        let old = self.id_of(&self.base.name("old:1"));
        let is = |id: &str| {
            if id == self.id {
                "new"
            } else if id == old {
                "old"
            } else {
                "other"
            }
        };
        format!("current is {}, pulled is {}, kept {}", is(&current), is(&pulled), self.kept().len())
    }

    fn interfere(&self, world: &Corner, step: &StepId) -> bool {
        let name = if step.as_str() == "pull" { self.pulled() } else { world.name("app:current") };
        self.engine.docker(["tag", &self.base.name("other:1"), &name]);
        true
    }

    fn survived(&self, world: &Corner, step: &StepId) -> bool {
        let name = if step.as_str() == "pull" { self.pulled() } else { world.name("app:current") };
        let survived = self.id_of(&name) == self.id_of(&self.base.name("other:1"));
        if step.as_str() == "pull" {
            let _ = self.engine.command(["image", "rm", &name]).output();
        }
        survived
    }
}

/// Lives through every `stride`th trouble, with the deaths inside calls or without them.
fn sweep(stride: u64, inside: bool, at_least: usize) {
    let Some(moving) = Moving::new() else { return };
    let sweep = Sweep::new(&moving).every(stride);
    let sweep = if inside { sweep } else { sweep.only_between_calls() };
    let report = sweep.run().unwrap_or_else(|failure| panic!("{failure}"));
    println!("{report:?}");
    assert!(report.cases >= at_least, "{report:?}");
}

#[test]
fn images_are_all_there_or_none() {
    sweep(4, false, 20);
}

#[test]
#[ignore = "long: every append"]
fn campaign_images_are_all_there_or_none() {
    sweep(1, true, 70);
}

#[test]
fn every_seeded_defect_of_images_is_noticed() {
    let Some(moving) = Moving::new() else { return };
    for mutation in Mutation::ALL {
        let failure = Sweep::new(&moving).with_mutation(mutation).run();
        super::noticed(mutation, failure);
    }
}
