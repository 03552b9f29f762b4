//! Next containers that do not come to serve: the old one serves on, and the message says why.

#![cfg(test)]

use serde_json::{Value, json};
use upgrade_core::error::{Class, StepError};
use upgrade_core::step::{Prepared, Step};
use upgrade_core::testkit::TestContext;
use upgrade_docker::EngineConfig;
use upgrade_docker::steps::Container;
use upgrade_testbed::docker::{self, Image};

use super::{back, container, containers, inspect, version, web};
use crate::world::{Corner, build_context};

/// Tries a replacement that fails, puts it back, and asks that the old container serves as before.
async fn fails(corner: &Corner, name: &str, step: &Container) -> StepError {
    let images = || corner.list(&["image", "ls", "--all"], "{{.Repository}}:{{.Tag}} {{.ID}}");
    let (before, tags) = (inspect(corner, name), images());
    let test = TestContext::new("web");
    let error = match step.prepare(&test.forward()).await {
        Ok(Prepared::Change { undo, .. }) => {
            let error = step.apply(&test.forward(), &undo).await.unwrap_err();
            back(step, &test, &undo).await.unwrap();
            error
        }
        Ok(other) => panic!("{other:?}"),
        Err(error) => error,
    };
    let after = inspect(corner, name);
    assert_eq!((&after["Id"], &after["HostConfig"]), (&before["Id"], &before["HostConfig"]));
    assert_eq!(version(corner, name), "1");
    assert_eq!(containers(corner), [name]);
    assert_eq!(images(), tags);
    assert_eq!(error.class(), Class::Permanent, "{error:?}");
    assert!(error.hint().is_some_and(|hint| !hint.contains('\n')), "{error:?}");
    error
}

/// Tries an image that does not come to serve under this gate.
async fn with_image(corner: &Corner, name: &str, image: &Image, health: Value) -> StepError {
    let tag = corner.name("bad:1");
    image.build(&corner.engine, &tag);
    fails(corner, name, &container(corner, json!({ "name": name, "image": tag, "health": health }))).await
}

#[tokio::test]
async fn an_image_that_does_not_come_to_serve_is_rolled_back() {
    let Some(corner) = Corner::shared("fails") else { return };
    let (name, ..) = web(&corner, &["--restart", "on-failure:2"]);
    let gate = |with: Value| {
        let mut gate = json!({ "within": "800ms", "stable": "0s", "every": "50ms" });
        with.as_object().unwrap().iter().for_each(|(key, value)| gate[key] = value.clone());
        gate
    };
    let says = |error: &StepError, message: &str, detail: &str| {
        assert!(error.message().contains(&name) && error.message().contains(message), "{error:?}");
        assert!(error.detail().unwrap().contains(detail), "{error:?}");
    };
    let dies = Image::shell("echo cannot open the database; exit 3");
    let error = with_image(&corner, &name, &dies, gate(json!({ "stable": "3s" }))).await;
    says(&error, "restarted again and again", "cannot open the database");
    let never = Image::shell("echo starting; sleep 1000").healthcheck("echo no route; exit 1");
    let error = with_image(&corner, &name, &never, gate(json!({ "within": "5s" }))).await;
    says(&error, "health check fails: no route", "starting");
    let error = with_image(&corner, &name, &Image::web("2"), gate(json!({ "http": { "port": 9 } }))).await;
    says(&error, "not healthy within 800ms", "listening");
    let later = Image::shell("echo up; sleep 0.7; echo out of memory; exit 9");
    let error = with_image(&corner, &name, &later, gate(json!({ "stable": "3s" }))).await;
    says(&error, "within the 3s that it must stay healthy", "out of memory");

    let error = with_image(&corner, &name, &Image::shell("").with("CMD [\"/bin/nothing\"]"), gate(json!({}))).await;
    assert!(error.message().contains(&name) && error.message().contains("/bin/nothing"), "{error:?}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = format!("127.0.0.1:{}:8080", taken.local_addr().unwrap().port());
    let new = corner.name("image:2");
    let error =
        fails(&corner, &name, &container(&corner, json!({ "name": name, "image": new, "ports": [port] }))).await;
    assert!(error.message().contains(&name) && error.message().contains("address already in use"), "{error:?}");
    assert!(error.hint().unwrap().contains("free the port"), "{error:?}");
    let secret = json!({ "name": name, "image": new, "env": { "TOKEN": { "file": "/nothing/token" } } });
    let error = fails(&corner, &name, &container(&corner, secret)).await;
    assert!(error.message().contains("/nothing/token"), "{error:?}");
}

#[tokio::test]
async fn an_image_that_cannot_be_had_stops_nothing() {
    let (Some(corner), Some(registry)) = (Corner::shared("pulls"), docker::registry(true)) else { return };
    let engine = &corner.engine;
    let (name, old, new) = web(&corner, &[]);
    let remote = |tag: &str| format!("{}/{}:{tag}", registry.address(), corner.prefix);
    engine.docker(["login", "--username", docker::USER, "--password", docker::PASSWORD, &registry.address()]);
    for (from, to) in [(&old, "latest"), (&new, "2")] {
        engine.docker(["tag", from, &remote(to)]);
        engine.docker(["push", "--quiet", &remote(to)]);
    }
    engine.docker(["tag", &new, &remote("latest")]);
    engine.docker(["push", "--quiet", &remote("latest")]);
    engine.docker(["logout", &registry.address()]);
    engine.docker(["image", "rm", "--force", &engine.docker(["image", "inspect", "--format", "{{.Id}}", &new])]);
    // As it is where `latest` has moved on at the registry.
    engine.docker(["tag", &old, &remote("latest")]);

    let password = tempfile::NamedTempFile::new().unwrap();
    let pulling = |password: &std::path::Path, image: String, with: Value| {
        let config: EngineConfig = serde_json::from_value(json!({
            "host": engine.host(),
            "registries": { registry.address(): { "username": docker::USER, "password": { "file": password } } },
        }))
        .unwrap();
        let known = upgrade_docker::Engine::from_config(config, &build_context(engine.host())).unwrap();
        let target = upgrade_core::registry::AnyTarget::new("docker", known);
        let cx = upgrade_core::registry::BuildContext::new("/").with_target("engine", target);
        let mut all = json!({ "target": "engine", "name": name, "image": image, "health": super::quick() });
        with.as_object().unwrap().iter().for_each(|(key, value)| all[key] = value.clone());
        Container::from_config(serde_json::from_value(all).unwrap(), &cx).unwrap()
    };
    std::fs::write(password.path(), "wrong").unwrap();
    let error = fails(&corner, &name, &pulling(password.path(), remote("2"), json!({}))).await;
    assert!(error.hint().unwrap().contains("check user and password"), "{error:?}");
    assert!(error.message().contains(&remote("2")), "{error:?}");
    std::fs::write(password.path(), docker::PASSWORD).unwrap();
    let error = fails(&corner, &name, &pulling(password.path(), remote("3"), json!({}))).await;
    assert!(error.hint().unwrap().contains("name and tag"), "{error:?}");
    let error =
        fails(&corner, &name, &pulling(password.path(), remote("2"), json!({ "platform": "linux/s390x" }))).await;
    assert!(error.message().contains("linux/s390x is needed"), "{error:?}");

    // What is pulled does not move a tag until it is swapped in, and it moves back.
    let at = |name: &str| engine.docker(["image", "inspect", "--format", "{{.Id}}", name]);
    let (step, test) = (pulling(password.path(), remote("latest"), json!({})), TestContext::new("web"));
    let found = super::undo(&step, &test).await;
    assert_eq!(at(&remote("latest")), at(&old));
    let output = step.apply(&test.forward(), &found).await.unwrap();
    assert_eq!((version(&corner, &name).as_str(), at(&remote("latest"))), ("2", output.image_id.clone()));
    back(&step, &test, &found).await.unwrap();
    assert_eq!((version(&corner, &name).as_str(), at(&remote("latest"))), ("1", at(&old)));
    let left = engine.command(["image", "inspect", &output.image_id]).output().unwrap();
    assert!(!left.status.success(), "the image that was pulled for nothing is still there");

    let (step, test) = (pulling(password.path(), remote("latest"), json!({})), TestContext::new("web"));
    let found = super::undo(&step, &test).await;
    step.apply(&test.forward(), &found).await.unwrap();
    step.commit(&test.commit(), &found).await.unwrap();
    assert_eq!((version(&corner, &name).as_str(), at(&remote("latest"))), ("2", output.image_id));
    let kept = engine.docker(["image", "ls", "--format", "{{.Repository}} {{.ID}}", "--no-trunc"]);
    let ids = [at(&old), at(&remote("latest"))];
    let kept: Vec<_> = kept.lines().filter(|line| line.starts_with("upgrade-kept")).collect();
    assert!(!kept.iter().any(|line| ids.iter().any(|id| line.ends_with(id))), "{kept:?}");
}

#[tokio::test]
async fn an_image_without_a_name_is_as_nameless_afterwards() {
    let Some(corner) = Corner::shared("nameless") else { return };
    let (name, old, new) = web(&corner, &[]);
    // Two containers of an image that lost its tag: no engine takes the last name of such a one.
    let beside = corner.name("beside");
    let id = inspect(&corner, &name)["Image"].as_str().unwrap().to_owned();
    corner.engine.docker(["run", "--detach", "--name", &beside, &old]);
    corner.engine.docker(["tag", &new, &old]);
    let tags = || corner.engine.docker(["image", "inspect", "--format", "{{.RepoTags}}", &id]);
    assert_eq!(tags(), "[]");
    let step = container(&corner, json!({ "name": name, "image": new }));
    for commits in [false, true] {
        let test = TestContext::new("web");
        let found = super::undo(&step, &test).await;
        step.apply(&test.forward(), &found).await.unwrap();
        assert!(tags().contains("upgrade-kept"), "{}", tags());
        if commits {
            step.commit(&test.commit(), &found).await.unwrap();
        } else {
            back(&step, &test, &found).await.unwrap();
        }
        assert_eq!(tags(), "[]", "{commits}");
    }
    corner.engine.docker(["rm", "--force", &beside]);
    corner.engine.docker(["image", "rm", &id]);
}
