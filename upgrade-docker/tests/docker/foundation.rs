//! What all kinds are built on, tried on a real engine: images, containers, health.

#![cfg(test)]

use std::time::Duration;

use upgrade_core::context::Context;
use upgrade_core::error::Class;
use upgrade_core::target::Target as _;
use upgrade_core::testkit::TestContext;
use upgrade_docker::health::Gate;
use upgrade_docker::images::{self, Pull};
use upgrade_docker::{ImageReference, containers};
use upgrade_testbed::docker::{self, Image};

use crate::world::{Corner, target};

fn context() -> Context {
    TestContext::new("web").forward()
}

fn gate(json: &serde_json::Value) -> Gate {
    let mut value = serde_json::json!({ "within": "5s", "stable": "500ms", "every": "50ms" });
    value.as_object_mut().unwrap().extend(json.as_object().unwrap().clone());
    let gate: Gate = serde_json::from_value(value).unwrap();
    gate.validate().unwrap();
    gate
}

#[tokio::test]
async fn an_engine_says_who_it_is() {
    let Some(engine) = docker::shared() else { return };
    let identity = target(engine.host()).identity(&context()).await.unwrap();
    assert_eq!(identity, format!("engine {}", engine.docker(["info", "--format", "{{.ID}}"])));
}

#[tokio::test]
async fn an_image_is_pulled_with_the_right_credentials_and_verified() {
    let (Some(corner), Some(registry)) = (Corner::shared("pull"), docker::registry(true)) else { return };
    let engine = &corner.engine;
    let name = format!("{}/{}:1.0", registry.address(), corner.prefix);
    let id = Image::web("1.0").build(engine, &name);
    engine.docker(["login", "--username", docker::USER, "--password", docker::PASSWORD, &registry.address()]);
    engine.docker(["push", "--quiet", &name]);
    engine.docker(["logout", &registry.address()]);
    engine.docker(["image", "rm", &name]);
    let (cx, reference) = (context(), name.parse::<ImageReference>().unwrap());

    let anonymous = target(engine.host());
    let client = anonymous.connect(&cx).await.unwrap();
    let error = images::obtain(&anonymous, &client, &cx, &reference, None, Pull::Always).await.unwrap_err();
    assert_eq!(error.class(), Class::Permanent, "{error:?}");
    assert!(error.hint().unwrap().contains("check user and password"), "{error:?}");

    let secret = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(secret.path(), docker::PASSWORD).unwrap();
    let login = |path: &std::path::Path| -> upgrade_docker::EngineConfig {
        serde_json::from_value(serde_json::json!({
            "host": engine.host(),
            "registries": { registry.address(): { "username": docker::USER, "password": { "file": path } } },
        }))
        .unwrap()
    };
    let build =
        |config| upgrade_docker::Engine::from_config(config, &upgrade_core::registry::BuildContext::new("/")).unwrap();
    let known = build(login(secret.path()));
    let image = images::obtain(&known, &client, &cx, &reference, None, Pull::Missing).await.unwrap();
    assert_eq!(images::id_of(&image).unwrap(), id);

    let error = images::obtain(&known, &client, &cx, &reference, Some("linux/s390x"), Pull::Never).await.unwrap_err();
    assert!(error.message().contains("linux/s390x is needed"), "{error:?}");
    let gone = reference.with_tag("2.0");
    let error = images::obtain(&known, &client, &cx, &gone, None, Pull::Always).await.unwrap_err();
    assert!(error.hint().unwrap().contains("name and tag"), "{error:?}");
    std::fs::write(secret.path(), "wrong").unwrap();
    let error =
        images::obtain(&build(login(secret.path())), &client, &context(), &gone, None, Pull::Always).await.unwrap_err();
    assert!(error.hint().unwrap().contains("check user and password"), "{error:?}");
}

#[tokio::test]
async fn a_kept_image_survives_its_name() {
    let Some(corner) = Corner::shared("keep") else { return };
    let engine = &corner.engine;
    let name = corner.name("image:1");
    let id = Image::shell("sleep 1000").build(engine, &name);
    let cx = context();
    let client = target(engine.host()).connect(&cx).await.unwrap();
    images::keep(&client, &cx, &id).await.unwrap();
    images::keep(&client, &cx, &id).await.unwrap();
    engine.docker(["image", "rm", &name]);
    assert!(images::local(&client, &id).await.unwrap().is_some());
    assert_eq!(images::kept(&client, &cx).await.unwrap(), [id.as_str()]);
    images::let_go(&client, &cx, &id).await.unwrap();
    images::let_go(&client, &cx, &id).await.unwrap();
    assert!(images::local(&client, &id).await.unwrap().is_none());
}

#[tokio::test]
async fn a_kept_image_is_let_go_though_a_container_runs_of_it() {
    let Some(corner) = Corner::shared("used") else { return };
    let engine = &corner.engine;
    let name = corner.name("image:1");
    let id = Image::shell("sleep 1000").build(engine, &name);
    let container = engine.docker(["run", "--detach", "--network", "none", "--name", &corner.name("user"), &name]);
    let cx = context();
    let client = target(engine.host()).connect(&cx).await.unwrap();
    images::keep(&client, &cx, &id).await.unwrap();
    // The name goes to another image, as a pull moves it.
    Image::shell("sleep 2000").build(engine, &name);
    let is_kept = || engine.docker(["image", "inspect", "--format", "{{.RepoTags}}", &id]).contains("upgrade-kept");
    engine.docker(["kill", &container]);
    images::let_go(&client, &cx, &id).await.unwrap();
    assert!(is_kept(), "it is the last name that the stopped container's image has");
    engine.docker(["start", &container]);
    images::let_go(&client, &cx, &id).await.unwrap();
    assert!(!is_kept());
    assert!(containers::is_running(&containers::inspect(&client, &container).await.unwrap().unwrap()));
    engine.docker(["rm", "--force", &container]);
    engine.docker(["image", "rm", &id]);
}

#[tokio::test]
async fn every_change_of_a_container_may_be_repeated() {
    let Some(corner) = Corner::shared("repeat") else { return };
    let engine = &corner.engine;
    let image = corner.name("image:1");
    Image::shell("sleep 1000").build(engine, &image);
    let (first, second) = (corner.name("first"), corner.name("second"));
    let id = engine.docker(["create", "--name", &first, &image]);
    let cx = context();
    let client = target(engine.host()).connect(&cx).await.unwrap();
    for _ in 0..2 {
        containers::start(&client, &id, &first).await.unwrap();
    }
    for _ in 0..2 {
        containers::rename(&client, &id, &second).await.unwrap();
    }
    for _ in 0..2 {
        containers::stop(&client, &id, &second, Duration::from_secs(1)).await.unwrap();
        let found = containers::inspect(&client, &second).await.unwrap().unwrap();
        assert!(!containers::is_running(&found), "{}", containers::state_line(&found));
    }
    for _ in 0..2 {
        containers::remove(&client, &id, &second, true).await.unwrap();
        assert!(containers::inspect(&client, &second).await.unwrap().is_none());
    }
    containers::stop(&client, &id, &second, Duration::from_secs(1)).await.unwrap();
}

#[tokio::test]
async fn a_gate_lets_pass_what_serves_and_names_what_does_not() {
    let Some(corner) = Corner::shared("gate") else { return };
    let engine = &corner.engine;
    let cx = context();
    let client = target(engine.host()).connect(&cx).await.unwrap();
    let run = |what: &str, image: Image, arguments: &[&str]| {
        let (name, tag) = (corner.name(what), corner.name(&format!("{what}:1")));
        image.build(engine, &tag);
        let mut all = vec!["run", "--detach", "--name", &name];
        all.extend(arguments);
        all.push(&tag);
        (engine.docker(&all), name)
    };
    let (id, name) = run("web", Image::web("1.0").healthcheck("wget -qO- http://127.0.0.1:8080/health"), &[]);
    let all = serde_json::json!({ "within": "30s", "healthcheck": true, "tcp": 8080,
        "http": { "port": 8080, "path": "/version" },
        "exec": ["wget", "-qO-", "http://127.0.0.1:8080/health"], "log": "listening" });
    gate(&all).wait(&client, &cx, &id, &name).await.unwrap();
    let slow = serde_json::json!({ "within": "600ms", "http": { "port": 8080, "path": "/nothing" } });
    let error = gate(&slow).wait(&client, &cx, &id, &name).await.unwrap_err();
    assert!(
        error.message().contains("not healthy within 600ms") && error.message().contains("answers with 404"),
        "{error:?}"
    );
    assert!(error.message().contains(&name) && error.detail().unwrap().contains("listening"), "{error:?}");
    // The end of its output is not its end.
    let silent = serde_json::json!({ "within": "1s", "exec": ["sh", "-c", "exec >&- 2>&-; sleep 0.3; exit 3"] });
    let error = gate(&silent).wait(&client, &cx, &id, &name).await.unwrap_err();
    assert!(error.message().contains("exits with 3"), "{error:?}");

    let (id, name) = run("dies", Image::shell("echo cannot open the database; exit 3"), &[]);
    let error = gate(&serde_json::json!({})).wait(&client, &cx, &id, &name).await.unwrap_err();
    assert!(error.message().contains("exited with 3"), "{error:?}");
    assert!(error.detail().unwrap().contains("cannot open the database"), "{error:?}");

    let (id, name) = run("loops", Image::shell("sleep 0.2; exit 1"), &["--restart", "always"]);
    let error = gate(&serde_json::json!({ "stable": "4s" })).wait(&client, &cx, &id, &name).await.unwrap_err();
    assert!(error.message().contains("restarted again and again"), "{error:?}");

    let (id, name) = run("sick", Image::shell("sleep 1000").healthcheck("echo no route; exit 1"), &[]);
    let error = gate(&serde_json::json!({})).wait(&client, &cx, &id, &name).await.unwrap_err();
    assert!(error.message().contains("its health check fails: no route"), "{error:?}");

    let (id, name) = run("late", Image::shell("sleep 1; exit 1"), &[]);
    let error = gate(&serde_json::json!({ "stable": "3s" })).wait(&client, &cx, &id, &name).await.unwrap_err();
    assert!(error.message().contains("within the 3s that it must stay healthy"), "{error:?}");
}

#[tokio::test]
async fn an_engine_of_ones_own_is_killed_and_comes_back() {
    let Some(own) = docker::own() else { return };
    let engine = own.engine();
    Image::shell("sleep 1000").build(engine, "still:1");
    let id = engine.docker(["run", "--detach", "--network", "none", "--name", "still", "still:1"]);
    let cx = context();
    own.kill();
    let error = target(engine.host()).connect(&cx).await.unwrap_err();
    assert_eq!(error.class(), Class::Transient, "{error:?}");
    own.start();
    let client = target(engine.host()).connect(&cx).await.unwrap();
    assert!(containers::inspect(&client, &id).await.unwrap().is_some());
}
