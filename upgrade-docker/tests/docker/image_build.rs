//! `docker.image` with `build`, on a real engine.

#![cfg(test)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use upgrade_core::step::{Prepared, Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_docker::steps::{Image, ImageConfig, ImageUndo};
use upgrade_testbed::docker;

use crate::world::{Corner, build_context, golden};

/// A directory to build from, on an engine that has what it is built on.
pub(crate) struct World {
    pub(crate) corner: Corner,
    pub(crate) test: TestContext,
}

impl World {
    pub(crate) fn new(what: &str, dockerfile: &str) -> Option<Self> {
        let corner = Corner::shared(what)?;
        docker::Image::web("1").build(&corner.engine, &corner.name("base:1"));
        directory(&corner, dockerfile);
        Some(Self { test: TestContext::new(what), corner })
    }

    pub(crate) fn make(&self, more: &Value) -> Image {
        let mut config = json!({ "target": "engine", "image": self.corner.name("app:current") });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let config: ImageConfig = serde_json::from_value(config).unwrap();
        Image::from_config(config, &build_context(self.corner.engine.host())).unwrap()
    }

    pub(crate) async fn prepare(&self, step: &Image) -> ImageUndo {
        match step.prepare(&self.test.forward()).await {
            Ok(Prepared::Change { undo, .. }) => undo,
            Ok(_) => panic!("it is not done yet"),
            Err(error) => panic!("{error:?}"),
        }
    }

    /// The names of the corner's images, and what of ours is left.
    pub(crate) fn names(&self) -> Vec<String> {
        let all = self.corner.engine.docker(["image", "ls", "--all", "--format", "{{.Repository}}:{{.Tag}}"]);
        let mark = upgrade_docker::naming::mark(&self.test.forward());
        let ours = |name: &&str| name.contains(&self.corner.prefix) || name.contains(&mark);
        let mut all: Vec<_> = all.lines().filter(ours).map(|name| name.replace(&self.corner.prefix, "P")).collect();
        all.sort_unstable();
        all
    }

    pub(crate) fn id(&self, name: &str) -> String {
        self.corner.engine.docker(["image", "inspect", "--format", "{{.Id}}", name])
    }

    fn built(&self) -> usize {
        built(&self.corner)
    }
}

/// Writes a directory to build from; `PREFIX` stands for the corner's prefix.
pub(crate) fn directory(corner: &Corner, dockerfile: &str) {
    let root = corner.directory().join("context");
    fs::create_dir_all(&root).unwrap();
    fs::write(root.join("Dockerfile"), dockerfile.replace("PREFIX", &corner.prefix)).unwrap();
    fs::write(root.join("version"), "2\n").unwrap();
    fs::write(root.join("left"), "out").unwrap();
    fs::write(root.join(".dockerignore"), "left\n").unwrap();
}

/// How many images there are that a build of the corner made: named, nameless and in between.
pub(crate) fn built(corner: &Corner) -> usize {
    let label = format!("label=corner={}", corner.prefix);
    let listed = corner.engine.docker(["image", "ls", "--all", "--quiet", "--filter", &label]);
    listed.lines().collect::<BTreeSet<_>>().len()
}

fn context(world: &World) -> String {
    world.corner.directory().join("context").display().to_string()
}

const PLAIN: &str = "FROM PREFIX-base:1\nLABEL corner=PREFIX\nCOPY . /www/\nENV VERSION=2\n";

#[tokio::test]
async fn an_image_is_built_and_all_that_the_build_made_goes_again() {
    let Some(world) = World::new("builds", PLAIN) else { return };
    let engine = &world.corner.engine;
    engine.docker(["tag", &world.corner.name("base:1"), &world.corner.name("app:current")]);
    let (before, old) = (world.names(), world.id(&world.corner.name("app:current")));
    let step = world.make(&json!({ "build": { "context": context(&world) } }));
    let undo = world.prepare(&step).await;
    let built = undo.built.clone().unwrap();
    let read = golden(
        "docker.image.undo.v1.build.json",
        &undo,
        &[
            (&built.since, "2026-01-02T03:04:05.678901234Z"),
            (&built.context, &"c".repeat(64)),
            (&world.corner.prefix, "shop"),
            (&old, &format!("sha256:{}", "0".repeat(64))),
        ],
    );
    Image::read_undo(1, read).unwrap();
    let first = step.apply(&world.test.forward(), &undo).await.unwrap();
    // Built again, from what the engine kept of the first time: the same image.
    let second = step.apply(&world.test.forward(), &undo).await.unwrap();
    assert_eq!((&first.image_id, first.digest.as_ref()), (&second.image_id, None));
    assert_eq!((world.id(&world.corner.name("app:current")), world.built()), (first.image_id.clone(), 3));
    for _ in 0..2 {
        step.rollback(&world.test.back(), &undo, Some(&first)).await.unwrap();
        assert_eq!((world.names(), world.id(&world.corner.name("app:current"))), (before.clone(), old.clone()));
        assert_eq!(world.built(), 0);
    }
    let third = step.apply(&world.test.forward(), &undo).await.unwrap();
    assert_ne!(third.image_id, first.image_id);
    for _ in 0..2 {
        step.commit(&world.test.commit(), &undo).await.unwrap();
        // The engine's cache, as after any build.
        assert_eq!((world.names(), world.built()), (before.clone(), 3));
    }
    // What the cache gives is not this run's to remove.
    let again = world.prepare(&step).await;
    let output = step.apply(&world.test.forward(), &again).await.unwrap();
    step.rollback(&world.test.back(), &again, None).await.unwrap();
    assert_eq!((world.built(), output.image_id), (3, world.id(&world.corner.name("app:current"))));
}

#[tokio::test]
async fn a_build_that_fails_says_where_and_shows_no_secret() {
    let text = "FROM PREFIX-base:1 AS first\nLABEL corner=PREFIX\nARG TOKEN\nRUN echo with $TOKEN; echo not found >&2; exit 3\n\
                FROM first\nRUN true\n";
    let Some(world) = World::new("fails", text) else { return };
    let secret = world.corner.directory().join("token");
    fs::write(&secret, "hunter2-and-more").unwrap();
    let build = json!({ "context": context(&world), "args": { "TOKEN": { "file": secret } }, "network": "none" });
    let step = world.make(&json!({ "build": build }));
    let undo = world.prepare(&step).await;
    let error = step.apply(&world.test.forward(), &undo).await.unwrap_err();
    assert!(
        error.message().contains("at `Step 4/6 : RUN echo with $TOKEN") && error.message().contains("code: 3"),
        "{error:?}"
    );
    let detail = error.detail().unwrap();
    assert!(detail.contains("with •••") && detail.contains("not found"), "{detail}");
    assert!(error.hint().unwrap().contains("correct the Dockerfile"), "{error:?}");
    let shown = format!("{error:?}{:?}", world.test.reported());
    assert!(!shown.contains("hunter2"), "{shown}");
    step.rollback(&world.test.back(), &undo, None).await.unwrap();
    assert_eq!((world.names(), world.built()), (vec!["P-base:1".to_owned()], 0));
}

#[tokio::test]
async fn what_cannot_be_built_says_so_before_anything_changes() {
    let Some(world) = World::new("cannot-build", PLAIN) else { return };
    let nowhere = world.corner.directory().join("nowhere");
    for (build, message, hint) in [
        (json!({ "context": context(&world), "dockerfile": "Other" }), "there is no Dockerfile at", "build.dockerfile"),
        (json!({ "context": nowhere }), "there is no directory", "build.context"),
    ] {
        let step = world.make(&json!({ "build": build }));
        let error = step.prepare(&world.test.forward()).await.unwrap_err();
        assert!(error.message().contains(message) && error.hint().unwrap().contains(hint), "{error:?}");
        assert!(step.prepare(&TestContext::new("plan").dry_run().forward()).await.is_ok());
    }
    fs::write(Path::new(&context(&world)).join(".dockerignore"), "[\n").unwrap();
    let step = world.make(&json!({ "build": { "context": context(&world) } }));
    let error = step.prepare(&world.test.forward()).await.unwrap_err();
    assert!(error.message().contains("`[` is not a pattern"), "{error:?}");
    // What changes after it was planned is not what was planned.
    fs::write(Path::new(&context(&world)).join(".dockerignore"), "left\n").unwrap();
    let undo = world.prepare(&step).await;
    fs::write(Path::new(&context(&world)).join("version"), "3\n").unwrap();
    let error = step.apply(&world.test.forward(), &undo).await.unwrap_err();
    assert!(error.message().contains("changed after the step was prepared"), "{error:?}");
    step.rollback(&world.test.back(), &undo, None).await.unwrap();
    assert_eq!((world.names(), world.built()), (vec!["P-base:1".to_owned()], 0));
}
