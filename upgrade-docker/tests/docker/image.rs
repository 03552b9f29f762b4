//! `docker.image` on a real engine, with a real registry.

#![cfg(test)]

use serde_json::{Value, json};
use upgrade_core::context::OnConflict;
use upgrade_core::registry::BuildError;
use upgrade_core::step::{Prepared, Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_docker::steps::{Image, ImageConfig, ImageUndo};
use upgrade_testbed::docker::{self, Registry};

use crate::world::{Corner, build_context, golden};

/// A repository in a registry, with the versions 1 and 2; the engine has neither.
struct World {
    corner: Corner,
    registry: Registry,
    test: TestContext,
    ids: [String; 2],
}

impl World {
    fn new(what: &str) -> Option<Self> {
        let (corner, registry) = (Corner::shared(what)?, docker::registry(false)?);
        let mut world = Self { ids: Default::default(), test: TestContext::new(what), corner, registry };
        world.ids = [world.push("1"), world.push("2")];
        Some(world)
    }

    /// Builds a version, pushes it, and removes it from the engine; returns its id.
    fn push(&self, version: &str) -> String {
        let (engine, name) = (&self.corner.engine, self.name(version));
        let id = docker::Image::web(version).build(engine, &name);
        engine.docker(["push", "--quiet", &name]);
        self.forget(&name);
        id
    }

    fn name(&self, tag: &str) -> String {
        format!("{}/{}:{tag}", self.registry.address(), self.corner.prefix)
    }

    fn forget(&self, name: &str) {
        self.corner.engine.docker(["image", "rm", "--force", name]);
    }

    fn make(&self, more: &Value) -> Result<Image, BuildError> {
        let mut config = json!({ "target": "engine" });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let config: ImageConfig = serde_json::from_value(config).unwrap();
        Image::from_config(config, &build_context(self.corner.engine.host()))
    }

    /// The names that the engine has for images of the repository, and what of ours is left.
    fn names(&self) -> Vec<String> {
        let all = self.corner.engine.docker(["image", "ls", "--all", "--format", "{{.Repository}}:{{.Tag}}"]);
        let mark = upgrade_docker::naming::mark(&self.test.forward());
        let ours = |name: &&str| name.contains(&self.corner.prefix) || name.contains(&mark);
        let mut all: Vec<_> = all.lines().filter(ours).map(|name| name.replace(&self.name(""), "")).collect();
        all.sort_unstable();
        all
    }

    fn id(&self, name: &str) -> String {
        self.corner.engine.docker(["image", "inspect", "--format", "{{.Id}}", name])
    }

    fn is_here(&self, id: &str) -> bool {
        self.corner.engine.command(["image", "inspect", id]).output().unwrap().status.success()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for id in &self.ids {
            let _ = self.corner.engine.command(["image", "rm", "--force", id]).output();
        }
    }
}

async fn prepare(step: &Image, test: &TestContext) -> ImageUndo {
    match step.prepare(&test.forward()).await {
        Ok(Prepared::Change { undo, .. }) => undo,
        Ok(_) => panic!("it is not done yet"),
        Err(error) => panic!("{error:?}"),
    }
}

#[tokio::test]
async fn an_image_is_pulled_as_it_was_when_the_step_was_prepared_and_goes_again() {
    let Some(world) = World::new("pulls") else { return };
    let step = world.make(&json!({ "image": world.name("1") })).unwrap();
    let undo = prepare(&step, &world.test).await;
    let digest = undo.pulled.as_ref().unwrap().digest().unwrap().to_owned();
    let pinned = undo.pulled.as_ref().unwrap().to_string();
    let shown = format!("registry.example.com/shop/web@sha256:{}", "0".repeat(64));
    let read = golden("docker.image.undo.v1.json", &undo, &[(&pinned, &shown)]);
    Image::read_undo(1, read).unwrap();
    // The tag moves on; what was planned is what comes.
    let engine = &world.corner.engine;
    let second = world.name("2");
    engine.docker(["pull", "--quiet", &second]);
    engine.docker(["tag", &second, &world.name("1")]);
    engine.docker(["push", "--quiet", &world.name("1")]);
    world.forget(&world.name("1"));
    world.forget(&second);
    for _ in 0..2 {
        let output = step.apply(&world.test.forward(), &undo).await.unwrap();
        assert_eq!((output.image_id.as_str(), output.digest.as_deref()), (&*world.ids[0], Some(&*digest)));
    }
    assert_eq!(world.id(&world.name("1")), world.ids[0]);
    for _ in 0..2 {
        step.rollback(&world.test.back(), &undo, None).await.unwrap();
        assert!(world.names().is_empty() && !world.is_here(&world.ids[0]), "{:?}", world.names());
    }
}

#[tokio::test]
async fn a_name_goes_back_to_the_image_that_had_it() {
    let Some(world) = World::new("goes") else { return };
    let engine = &world.corner.engine;
    engine.docker(["pull", "--quiet", &world.name("1")]);
    engine.docker(["tag", &world.name("1"), &world.name("current")]);
    engine.docker(["pull", "--quiet", &world.name("2")]);
    let step = world.make(&json!({ "image": world.name("current"), "from": world.name("2") })).unwrap();
    let before = world.names();
    let undo = prepare(&step, &world.test).await;
    let output = step.apply(&world.test.forward(), &undo).await.unwrap();
    assert_eq!(world.id(&world.name("current")), world.ids[1]);
    // What the name led to is not pruned while it may be needed.
    world.forget(&world.name("1"));
    for _ in 0..2 {
        step.rollback(&world.test.back(), &undo, Some(&output)).await.unwrap();
        assert_eq!(world.id(&world.name("current")), world.ids[0]);
    }
    engine.docker(["tag", &world.name("current"), &world.name("1")]);
    assert_eq!(world.names(), before);

    step.apply(&world.test.forward(), &undo).await.unwrap();
    for _ in 0..2 {
        step.commit(&world.test.commit(), &undo).await.unwrap();
    }
    assert_eq!((world.names(), world.id(&world.name("current"))), (before, world.ids[1].clone()));
    let answer = step.prepare(&world.test.forward()).await.unwrap();
    assert!(matches!(&answer, Prepared::Unchanged { output, .. } if output.image_id == world.ids[1]), "{answer:?}");
}

#[tokio::test]
async fn somebody_elses_tag_is_a_conflict() {
    let Some(world) = World::new("somebody") else { return };
    let engine = &world.corner.engine;
    for version in ["1", "2"] {
        engine.docker(["pull", "--quiet", &world.name(version)]);
    }
    let current = world.name("current");
    engine.docker(["tag", &world.name("1"), &current]);
    let step = world.make(&json!({ "image": current, "from": world.name("2") })).unwrap();
    let undo = prepare(&step, &world.test).await;
    let other = world.corner.name("other:1");
    docker::Image::web("3").build(engine, &other);
    engine.docker(["tag", &other, &current]);
    let error = step.apply(&world.test.forward(), &undo).await.unwrap_err();
    assert!(error.as_conflict().is_some(), "{error:?}");
    let error = step.rollback(&world.test.back(), &undo, None).await.unwrap_err();
    assert!(error.as_conflict().is_some() && world.id(&current) == world.id(&other), "{error:?}");
    let overwriting = TestContext::new("somebody").on_conflict(OnConflict::Overwrite);
    step.rollback(&overwriting.back(), &undo, None).await.unwrap();
    assert_eq!(world.id(&current), world.ids[0]);
    let cx = world.test.back();
    step.rollback(&cx, &undo, None).await.unwrap();
}

#[tokio::test]
async fn old_images_are_pruned_at_commit_but_not_those_in_use() {
    let Some(world) = World::new("prune") else { return };
    let engine = &world.corner.engine;
    let mut names = Vec::new();
    for version in ["3", "4", "5"] {
        names.push(world.name(version));
        docker::Image::web(version).build(engine, &names[names.len() - 1]);
        // The time of a build is known to the second.
        tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    }
    engine.docker(["create", "--network", "none", "--name", &world.corner.name("old"), &names[0]]);
    let step = world.make(&json!({ "image": world.name("1"), "keep": 2 })).unwrap();
    let undo = prepare(&step, &world.test).await;
    step.apply(&world.test.forward(), &undo).await.unwrap();
    for _ in 0..2 {
        step.commit(&world.test.commit(), &undo).await.unwrap();
        // The one that was brought, the newest, and the one in use.
        assert_eq!(world.names(), ["1", "3", "5"]);
    }
}

#[tokio::test]
async fn what_cannot_be_brought_says_so_before_anything_changes() {
    let Some(world) = World::new("cannot") else { return };
    for (with, message, hint) in [
        (json!({ "image": world.name("9") }), "asking the registry for image", "name and tag"),
        (json!({ "image": world.name("x"), "from": world.name("9") }), "is not on the engine", "correct `from`"),
    ] {
        let step = world.make(&with).unwrap();
        let error = step.prepare(&world.test.forward()).await.unwrap_err();
        assert!(error.message().contains(message) && error.hint().unwrap().contains(hint), "{error:?}");
        assert!(step.prepare(&TestContext::new("plan").dry_run().forward()).await.is_ok());
    }
    let digest = format!("{}@sha256:{}", world.name("1"), "0".repeat(64));
    for (with, key) in [
        (json!({ "image": digest, "from": world.name("1") }), "image"),
        (json!({ "image": world.name("x"), "from": world.name("1"), "platform": "linux/arm64" }), "platform"),
        (json!({ "image": world.name("1"), "keep": 0 }), "keep"),
    ] {
        let error = world.make(&with).unwrap_err();
        assert_eq!(error.key.as_deref(), Some(key), "{error}");
    }
}
