//! `docker.image_push` from a real engine to a real registry.

#![cfg(test)]

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use serde_json::json;
use upgrade_core::error::Class;
use upgrade_core::step::{Prepared, Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_docker::steps::{ImagePush, ImagePushConfig, ImagePushUndo};
use upgrade_docker::{EngineConfig, RegistryLogin};
use upgrade_testbed::docker::{self, Registry};

use crate::world::{Corner, build_context, golden};

/// Two images on an engine, and a registry that has neither.
struct World {
    corner: Corner,
    registry: Registry,
    test: TestContext,
}

impl World {
    fn new(what: &str, locked: bool) -> Option<Self> {
        let (corner, registry) = (Corner::shared(what)?, docker::registry(locked)?);
        for version in ["1", "2"] {
            docker::Image::web(version).build(&corner.engine, &corner.name(&format!("app:{version}")));
        }
        Some(Self { test: TestContext::new(what), corner, registry })
    }

    fn name(&self, tag: &str) -> String {
        format!("{}/{}:{tag}", self.registry.address(), self.corner.prefix)
    }

    /// Gives a version the name `current` on the engine.
    fn name_it(&self, version: &str) {
        self.corner.engine.docker(["tag", &self.corner.name(&format!("app:{version}")), &self.name("current")]);
    }

    fn step(&self) -> ImagePush {
        self.with(&json!({}))
    }

    fn with(&self, more: &serde_json::Value) -> ImagePush {
        let mut config = json!({ "target": "engine", "image": self.name("current") });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let config: ImagePushConfig = serde_json::from_value(config).unwrap();
        ImagePush::from_config(config, &build_context(self.corner.engine.host())).unwrap()
    }

    async fn prepare(&self, step: &ImagePush) -> ImagePushUndo {
        match step.prepare(&self.test.forward()).await {
            Ok(Prepared::Change { undo, .. }) => undo,
            Ok(_) => panic!("it is not done yet"),
            Err(error) => panic!("{error:?}"),
        }
    }

    fn leads_to(&self, tag: &str) -> Option<String> {
        leads_to(&self.registry, &self.corner.prefix, tag)
    }
}

/// The digest that a tag leads to, as whoever pulls it is told.
pub(crate) fn leads_to(registry: &Registry, repository: &str, tag: &str) -> Option<String> {
    let mut stream = TcpStream::connect(registry.address()).unwrap();
    let accept = "application/vnd.docker.distribution.manifest.v2+json";
    // Of this version, the answer comes in one piece and ends with the connection.
    write!(stream, "GET /v2/{repository}/manifests/{tag} HTTP/1.0\r\nAccept: {accept}\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let head = answer.windows(4).position(|end| end == b"\r\n\r\n").unwrap();
    let is_there = String::from_utf8_lossy(&answer[..head]).lines().next().unwrap().contains(" 200 ");
    is_there.then(|| upgrade_core::sealed::sha256_hex(&answer[head + 4..]))
}

impl Drop for World {
    fn drop(&mut self) {
        for tag in ["current", "stable"] {
            let _ = self.corner.engine.command(["image", "rm", "--force", &self.name(tag)]).output();
        }
    }
}

#[tokio::test]
async fn a_tag_leads_to_the_image_and_back_to_the_same_manifest() {
    let Some(world) = World::new("push", false) else { return };
    world.name_it("1");
    world.corner.engine.docker(["push", "--quiet", &world.name("current")]);
    let old = world.leads_to("current").unwrap();
    world.name_it("2");
    let step = world.step();
    let undo = world.prepare(&step).await;
    let found = undo.found.clone().unwrap();
    let read = golden(
        "docker.image_push.undo.v1.json",
        &undo,
        &[(&undo.image_id, &format!("sha256:{}", "0".repeat(64))), (&old, &"a".repeat(64))],
    );
    ImagePush::read_undo(1, read).unwrap();
    assert_eq!(found.digest, format!("sha256:{old}"));
    for _ in 0..2 {
        let output = step.apply(&world.test.forward(), &undo).await.unwrap();
        assert_eq!(output.digest, format!("sha256:{}", world.leads_to("current").unwrap()));
        assert_ne!(output.digest, found.digest);
    }
    let new = world.leads_to("current").unwrap();
    for _ in 0..2 {
        step.rollback(&world.test.back(), &undo, None).await.unwrap();
        assert_eq!(world.leads_to("current").as_ref(), Some(&old));
        // Nothing else led to what was pushed: it is gone by its digest as well.
        assert_eq!(world.leads_to(&format!("sha256:{new}")), None);
    }
    // What was removed can be pushed again.
    step.apply(&world.test.forward(), &undo).await.unwrap();
    step.commit(&world.test.commit(), &undo).await.unwrap();
    assert_eq!(world.leads_to("current"), Some(new));
    let answer = step.prepare(&world.test.forward()).await.unwrap();
    assert!(matches!(answer, Prepared::Unchanged { .. }), "{answer:?}");
}

#[tokio::test]
async fn a_tag_that_was_not_there_goes_and_others_stay() {
    let Some(world) = World::new("push-new", false) else { return };
    world.name_it("1");
    let step = world.step();
    let undo = world.prepare(&step).await;
    assert!(undo.found.is_none());
    step.apply(&world.test.forward(), &undo).await.unwrap();
    for _ in 0..2 {
        step.rollback(&world.test.back(), &undo, None).await.unwrap();
        assert_eq!(world.leads_to("current"), None);
    }
    // Another tag leads to the same manifest: by its digest, that one would go too.
    step.apply(&world.test.forward(), &undo).await.unwrap();
    world.corner.engine.docker(["tag", &world.name("current"), &world.name("stable")]);
    world.corner.engine.docker(["push", "--quiet", &world.name("stable")]);
    let stays = world.leads_to("stable");
    if let Err(error) = step.rollback(&world.test.back(), &undo, None).await {
        assert!(error.message().contains("removes no tags here"), "{error:?}");
        assert!(error.hint().unwrap().contains("may_stay"), "{error:?}");
        world.with(&json!({ "may_stay": true })).rollback(&world.test.back(), &undo, None).await.unwrap();
    } else {
        assert_eq!(world.leads_to("current"), None);
    }
    assert!(stays.is_some() && world.leads_to("stable") == stays);
}

#[tokio::test]
async fn somebody_elses_tag_is_a_conflict() {
    let Some(world) = World::new("push-other", false) else { return };
    let engine = &world.corner.engine;
    let other = world.corner.name("other:1");
    docker::Image::web("3").build(engine, &other);
    world.name_it("2");
    let step = world.step();
    let undo = world.prepare(&step).await;
    engine.docker(["tag", &other, &world.name("current")]);
    engine.docker(["push", "--quiet", &world.name("current")]);
    world.name_it("2");
    let theirs = world.leads_to("current");
    let error = step.apply(&world.test.forward(), &undo).await.unwrap_err();
    assert!(error.as_conflict().is_some(), "{error:?}");
    let error = step.rollback(&world.test.back(), &undo, None).await.unwrap_err();
    assert!(error.as_conflict().is_some() && world.leads_to("current") == theirs, "{error:?}");
}

#[tokio::test]
async fn who_may_not_push_is_told_before_anything_changes() {
    let Some(world) = World::new("push-locked", true) else { return };
    world.name_it("1");
    let address = world.registry.address();
    let with = |login: Option<(&str, &str)>| {
        let mut config = EngineConfig { host: Some(world.corner.engine.host().to_owned()), ..EngineConfig::default() };
        if let Some((username, password)) = login {
            let password = upgrade_core::secret::SecretRef::file(written(&world.corner, password).to_string_lossy());
            config.registries.insert(address.clone(), RegistryLogin { username: username.to_owned(), password });
        }
        let cx = upgrade_core::registry::BuildContext::new("/");
        let engine = upgrade_docker::Engine::from_config(config, &cx).unwrap();
        let cx = cx.with_target("engine", upgrade_core::registry::AnyTarget::new("docker", engine));
        let config = json!({ "target": "engine", "image": world.name("current") });
        ImagePush::from_config(serde_json::from_value(config).unwrap(), &cx).unwrap()
    };
    for login in [None, Some((docker::USER, "wrong-password"))] {
        let error = with(login).prepare(&world.test.forward()).await.unwrap_err();
        assert_eq!(error.class(), Class::Permanent, "{error:?}");
        assert!(error.message().contains("401") && error.hint().unwrap().contains("password"), "{error:?}");
        let said = format!("{error:?}").replace("holds-wrong-password", "");
        assert!(!said.contains("wrong-password"), "{said}");
    }
    let step = with(Some((docker::USER, docker::PASSWORD)));
    let undo = world.prepare(&step).await;
    step.apply(&world.test.forward(), &undo).await.unwrap();
    // The password is changed between the push and its undo.
    let error = with(Some((docker::USER, "wrong-password"))).apply(&world.test.forward(), &undo).await.unwrap_err();
    assert_eq!(error.class(), Class::Permanent, "{error:?}");
    step.rollback(&world.test.back(), &undo, None).await.unwrap();
}

/// Writes a password to a file of its own.
fn written(corner: &Corner, password: &str) -> std::path::PathBuf {
    std::fs::create_dir_all(corner.directory()).unwrap();
    let path = corner.directory().join(format!("holds-{password}"));
    std::fs::write(&path, password).unwrap();
    path
}

#[tokio::test]
async fn a_registry_that_is_down_is_tried_again_later() {
    let Some(world) = World::new("push-down", false) else { return };
    world.name_it("1");
    let gone = "127.0.0.1:1/web:1";
    world.corner.engine.docker(["tag", &world.name("current"), gone]);
    let config = json!({ "target": "engine", "image": gone });
    let config: ImagePushConfig = serde_json::from_value(config).unwrap();
    let step = ImagePush::from_config(config, &build_context(world.corner.engine.host())).unwrap();
    let error = step.prepare(&world.test.forward()).await.unwrap_err();
    world.corner.engine.docker(["image", "rm", gone]);
    assert_eq!(error.class(), Class::Transient, "{error:?}");
    assert!(error.message().contains("does not answer") && error.hint().is_some(), "{error:?}");
    let config = json!({ "target": "engine", "image": world.name("missing") });
    let config: ImagePushConfig = serde_json::from_value(config).unwrap();
    let step = ImagePush::from_config(config, &build_context(world.corner.engine.host())).unwrap();
    let error = step.prepare(&world.test.forward()).await.unwrap_err();
    assert!(error.message().contains("is not on the engine"), "{error:?}");
    assert!(step.prepare(&TestContext::new("plan").dry_run().forward()).await.is_ok());
}
