//! `docker.image` with `build` and `load`, `docker.image_save` and `docker.image_push`.

#![cfg(test)]

use upgrade_core::file::{LoadOptions, parse};
use upgrade_core::names::StepId;
use upgrade_core::pipeline::Pipeline;
use upgrade_core::testkit::{Mutation, Scenario, Sweep};
use upgrade_testbed::docker::{self, Engine, Image, Registry};

use super::noticed;
use crate::image_build::{built, directory};
use crate::image_push::leads_to;
use crate::world::{Corner, registry};

/// One step each, in the order in which a release goes through them.
const BUILD: &str = "{ id: build, uses: docker.image, with: { target: engine, image: \"PREFIX-app:current\", \
                     build: { context: /tmp/PREFIX/context } } }";
const LOAD: &str = "{ id: load, uses: docker.image, with: { target: engine, image: \"PREFIX-app:current\", \
                    load: { archive: /tmp/BASE/new.tar } } }";
const SAVE: &str = "{ id: save, uses: docker.image_save, with: { target: engine, image: \"BASE-old:1\", \
                    to: /tmp/PREFIX/app.tar.zst } }";
const PUSH: &str =
    "{ id: push, uses: docker.image_push, with: { target: engine, image: \"REGISTRY/PREFIX:current\" } }";

/// What comes after the step where a defect is seeded, and changes the same thing once more: undone the
/// wrong way round, it is in the other one's way.
fn once_more(step: &str) -> &'static str {
    match step {
        SAVE => {
            "\n  - { id: again, uses: docker.image_save, with: { target: engine, image: \"BASE-other:1\", \
             to: /tmp/PREFIX/app.tar.zst } }"
        }
        PUSH => {
            "\n  - { id: name, uses: docker.image, with: { target: engine, image: \"REGISTRY/PREFIX:current\", \
             from: \"BASE-old:1\" } }\
             \n  - { id: again, uses: docker.image_push, with: { target: engine, image: \"REGISTRY/PREFIX:current\" } }"
        }
        _ => {
            "\n  - { id: again, uses: docker.image, with: { target: engine, image: \"PREFIX-app:current\", \
             from: \"BASE-other:1\" } }"
        }
    }
}

/// Images that all worlds share, made once, and a registry.
struct Sources {
    engine: Engine,
    registry: Registry,
    base: Corner,
    step: &'static str,
    /// The id of the image that is only in an archive.
    loaded: String,
    /// Whether the nameless images of a build are counted: those that nobody saw being made, as
    /// after a death inside a call, are the engine's cache.
    counted: bool,
    /// What comes after the step.
    after: &'static str,
}

impl Sources {
    fn new(step: &'static str, counted: bool) -> Option<Self> {
        let (engine, registry) = (docker::shared()?, docker::registry(false)?);
        let base = Corner::of(&engine, "base");
        Image::web("1").build(&engine, &base.name("old:1"));
        Image::web("3").build(&engine, &base.name("other:1"));
        let new = base.name("new:1");
        let loaded = Image::web("2").build(&engine, &new);
        std::fs::create_dir_all(base.directory()).unwrap();
        let archive = base.directory().join("new.tar");
        engine.docker(["save", "--output", archive.to_str().unwrap(), &new]);
        engine.docker(["image", "rm", "--force", &new]);
        Some(Self { engine, registry, base, step, loaded, counted, after: "" })
    }

    fn current(&self, world: &Corner) -> String {
        if self.step == PUSH { self.pushed(world) } else { world.name("app:current") }
    }

    fn pushed(&self, world: &Corner) -> String {
        format!("{}/{}:current", self.registry.address(), world.prefix)
    }

    fn version(&self, name: &str) -> String {
        let format = "{{range .Config.Env}}{{println .}}{{end}}";
        let found = self.engine.command(["image", "inspect", "--format", format, name]).output().unwrap();
        let found = String::from_utf8_lossy(&found.stdout).into_owned();
        found.lines().find(|line| line.starts_with("VERSION=")).unwrap_or("none").to_owned()
    }

    /// The SHA-256 of the file that is saved, or what it says if it is no archive.
    fn saved(&self, world: &Corner) -> String {
        let path = world.directory().join("app.tar.zst");
        let text = std::fs::read(&path).unwrap_or_default();
        let kept = std::fs::read_dir(world.directory()).map_or(0, Iterator::count);
        let is = if text.starts_with(&[0x28, 0xb5]) {
            "an archive".into()
        } else {
            String::from_utf8_lossy(&text).into_owned()
        };
        format!("{is}, {kept} files")
    }

    fn push_other(&self, world: &Corner, version: &str) {
        let name = self.pushed(world);
        self.engine.docker(["tag", &self.base.name(version), &name]);
        self.engine.docker(["push", "--quiet", &name]);
    }
}

impl Drop for Sources {
    fn drop(&mut self) {
        let _ = self.engine.command(["image", "rm", "--force", &self.loaded]).output();
        for name in self.engine.docker(["image", "ls", "--format", "{{.Repository}}:{{.Tag}}"]).lines() {
            if name.starts_with(&self.registry.address()) {
                let _ = self.engine.command(["image", "rm", "--force", "--no-prune", name]).output();
            }
        }
    }
}

impl Scenario for Sources {
    type World = Corner;

    fn fresh(&self) -> Corner {
        let corner = Corner::of(&self.engine, "sweep");
        self.engine.docker(["tag", &self.base.name("old:1"), &corner.name("app:current")]);
        std::fs::create_dir_all(corner.directory()).unwrap();
        match self.step {
            BUILD => {
                let base = self.base.name("old:1");
                directory(&corner, &format!("FROM {base}\nLABEL corner=PREFIX\nCOPY . /www/\nENV VERSION=2\n"));
            }
            SAVE => std::fs::write(corner.directory().join("app.tar.zst"), "the last release").unwrap(),
            LOAD => {
                let _ = self.engine.command(["image", "rm", "--force", &self.loaded]).output();
            }
            _ => {
                self.push_other(&corner, "old:1");
                // What is pushed is another image than the one that is there.
                self.engine.docker(["tag", &self.base.name("other:1"), &self.pushed(&corner)]);
            }
        }
        corner
    }

    fn pipeline(&self, world: &Corner) -> Pipeline {
        let step = format!("{}{}", self.step, self.after).replace("REGISTRY", &self.registry.address());
        let step = step.replace("PREFIX", &world.prefix).replace("BASE", &self.base.prefix);
        let host = self.engine.host();
        let document = format!(
            "targets: {{ engine: {{ uses: docker, with: {{ host: \"{host}\" }} }} }}\nupgrade: images\nsteps:\n  - {step}\n"
        );
        parse(&document, "pipeline.yaml".as_ref(), "/".as_ref(), &LoadOptions::default(), &registry())
            .unwrap_or_else(|error| panic!("{error}"))
    }

    fn observe(&self, world: &Corner) -> String {
        match self.step {
            SAVE => self.saved(world),
            PUSH => leads_to(&self.registry, &world.prefix, "current").unwrap_or_default(),
            _ => {
                let here = self.engine.command(["image", "inspect", &self.loaded]).output().unwrap().status.success();
                let made = if self.counted { built(world) } else { 0 };
                format!("{}, {made} built, archived one here: {here}", self.version(&self.current(world)))
            }
        }
    }

    fn interfere(&self, world: &Corner, _: &StepId) -> bool {
        match self.step {
            SAVE => std::fs::write(world.directory().join("app.tar.zst"), "of somebody else").unwrap(),
            PUSH => {
                self.engine.docker(["tag", &self.loaded_or_third(), &self.pushed(world)]);
                self.engine.docker(["push", "--quiet", &self.pushed(world)]);
                self.engine.docker(["tag", &self.base.name("other:1"), &self.pushed(world)]);
            }
            _ => drop(self.engine.docker(["tag", &self.base.name("other:1"), &world.name("app:current")])),
        }
        true
    }

    fn survived(&self, world: &Corner, _: &StepId) -> bool {
        match self.step {
            SAVE => self.saved(world).starts_with("of somebody else"),
            PUSH => {
                let name = self.pushed(world);
                self.engine.docker(["pull", "--quiet", &name]);
                self.version(&name) == "VERSION=4"
            }
            _ => self.version(&world.name("app:current")) == "VERSION=3",
        }
    }
}

impl Sources {
    /// An image that is neither the one found nor the one pushed.
    fn loaded_or_third(&self) -> String {
        let third = self.base.name("third:1");
        if !self.engine.command(["image", "inspect", &third]).output().unwrap().status.success() {
            Image::web("4").build(&self.engine, &third);
        }
        third
    }
}

fn sweep(step: &'static str, stride: u64, inside: bool, at_least: usize) {
    let Some(sources) = Sources::new(step, !inside) else { return };
    let sweep = Sweep::new(&sources).every(stride);
    let sweep = if inside { sweep } else { sweep.only_between_calls() };
    let report = sweep.run().unwrap_or_else(|failure| panic!("{failure}"));
    println!("{report:?}");
    assert!(report.cases >= at_least, "{report:?}");
}

#[test]
fn an_image_is_built_whole_or_nothing_of_it_is_left() {
    sweep(BUILD, 100, false, 15);
}

#[test]
fn an_image_is_loaded_or_is_not_there() {
    sweep(LOAD, 100, false, 15);
}

#[test]
fn a_file_is_saved_or_is_as_it_was() {
    sweep(SAVE, 100, true, 20);
}

#[test]
fn a_tag_is_pushed_or_leads_to_what_it_did() {
    sweep(PUSH, 100, false, 15);
}

/// `cargo nextest run -p upgrade-docker --run-ignored only campaign_image_sources`
#[test]
#[ignore = "long: every append, and deaths inside calls"]
fn campaign_image_sources() {
    for step in [BUILD, LOAD, SAVE, PUSH] {
        sweep(step, 1, true, 50);
    }
}

fn notices(step: &'static str) {
    let Some(mut sources) = Sources::new(step, true) else { return };
    sources.after = once_more(step);
    for mutation in Mutation::ALL {
        noticed(mutation, Sweep::new(&sources).with_mutation(mutation).run());
    }
}

#[test]
fn every_seeded_defect_of_a_build_is_noticed() {
    notices(BUILD);
}

#[test]
fn every_seeded_defect_of_a_load_is_noticed() {
    notices(LOAD);
}

#[test]
fn every_seeded_defect_of_a_saved_file_is_noticed() {
    notices(SAVE);
}

#[test]
fn every_seeded_defect_of_a_push_is_noticed() {
    notices(PUSH);
}
