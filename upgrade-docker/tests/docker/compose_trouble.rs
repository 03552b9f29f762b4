//! `docker.compose` where something is wrong: with the project, the images, the driver, the configuration.

#![cfg(test)]

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use upgrade_core::error::Class;
use upgrade_core::registry::BuildContext;
use upgrade_core::step::{Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_docker::steps::{Compose, ComposeConfig};
use upgrade_testbed::docker::Image;

use crate::stack::{SHOP, Stack, quick, refused, shop, undo};

#[tokio::test]
async fn what_compose_could_not_make_again_is_refused() {
    let Some(stack) = shop("drift") else { return };
    stack.write("docker-compose.yml", &SHOP.replace("secret-of-db", "another"));
    let error = refused(&stack.step(&json!({ "images": { "db": "PREFIX-web:2" } }))).await;
    assert!(error.message().contains("db_1 is not as the files of the project say"), "{error:?}");
    assert!(error.hint().unwrap().contains("docker-compose up --detach db"), "{error:?}");
    assert!(!format!("{error:?}").contains("another"), "{error:?}");
    let error = refused(&stack.step(&json!({ "images": { "cache": "x:1" } }))).await;
    assert!(error.message().contains("no service `cache`"), "{error:?}");
    stack.write("docker-compose.override.yml", "services: { web: { image: \"PREFIX-web:1\" } }\n");
    let error = refused(&stack.step(&json!({ "images": { "web": "PREFIX-web:2" } }))).await;
    assert!(error.message().contains("override.yml is not changed"), "{error:?}");
    stack.write("docker-compose.yml", "services: [web]\n");
    let error = refused(&stack.step(&json!({}))).await;
    assert_eq!(error.class(), Class::Permanent, "{error:?}");
}

#[tokio::test]
async fn a_change_of_somebody_else_is_a_conflict() {
    let Some(stack) = shop("foreign") else { return };
    let step = stack.step(&json!({ "images": { "web": "PREFIX-web:2" }, "health": { "web": quick() } }));
    let test = TestContext::new("stack");
    let found = undo(&step, &test).await;
    let theirs = "services: { web: { restart: always } }\n";
    stack.write("docker-compose.override.yml", theirs);
    let error = step.apply(&test.forward(), &found).await.unwrap_err();
    assert!(error.as_conflict().unwrap().subject.contains("docker-compose.override.yml"), "{error:?}");
    let error = step.rollback(&test.back(), &found, None).await.unwrap_err();
    assert!(error.as_conflict().is_some(), "{error:?}");
    assert_eq!(fs::read_to_string(stack.path("docker-compose.override.yml")).unwrap(), theirs);
    fs::remove_file(stack.path("docker-compose.override.yml")).unwrap();
    step.apply(&test.forward(), &found).await.unwrap();
    // Somebody makes the container anew, of other files than those that stand there.
    stack.write("theirs.yml", "services: { web: { restart: always } }\n");
    stack.compose(&["--file", "docker-compose.yml", "--file", "theirs.yml", "up", "--detach"]);
    let ids = stack.ids();
    let error = step.rollback(&test.back(), &found, None).await.unwrap_err();
    assert!(error.as_conflict().unwrap().subject.contains("service web"), "{error:?}");
    assert_eq!(stack.ids(), ids);
}

#[tokio::test]
async fn what_cannot_be_had_or_started_changes_nothing() {
    let Some(stack) = Stack::shared("fails", "services: {}") else { return };
    let engine = &stack.corner.engine;
    for tag in ["1", "2"] {
        stack.image(&Image::web(tag), &format!("web:{tag}"));
    }
    stack.image(&Image::shell("echo no route; exec sleep 1000").healthcheck("echo sick; exit 1"), "web:sick");
    // Somebody else has the port that the new version publishes.
    let other = engine.docker([
        "run",
        "--detach",
        "--publish",
        "127.0.0.1::8080",
        "--name",
        &stack.corner.name("other"),
        &stack.corner.name("web:1"),
    ]);
    let port = engine.docker(["port", &other, "8080/tcp"]).rsplit(':').next().unwrap().to_owned();
    stack.write("docker-compose.yml", "services:\n  web:\n    image: PREFIX-web:1\n    ports: [\"127.0.0.1:${PORT}:8080\"]\n  api:\n    image: PREFIX-web:1\n    depends_on: [web]\n");
    stack.write(".env", "PORT=0\n");
    stack.compose(&["up", "--detach"]);
    let before = stack.picture();
    for (with, message, hint, then) in [
        (json!({ "images": { "web": "PREFIX-web:3" } }), "is not on the engine", "load or build it", true),
        (json!({ "env": { "PORT": port } }), "port is already allocated", "free the port", false),
        (
            json!({ "images": { "web": "PREFIX-web:2", "api": "PREFIX-web:sick" } }),
            "service api: container",
            "lines of its log",
            false,
        ),
    ] {
        let mut all = json!({ "health": { "web": quick(), "api": quick() } });
        all.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
        let (step, test, ids) = (stack.step(&all), TestContext::new("stack"), stack.ids());
        let found = undo(&step, &test).await;
        let error = step.apply(&test.forward(), &found).await.unwrap_err();
        assert_eq!(error.class(), Class::Permanent, "{error:?}");
        assert!(format!("{} {:?}", error.message(), error.detail()).contains(message), "{error:?}");
        assert!(error.hint().unwrap().contains(hint), "{error:?}");
        step.settle(&test.back(), &found).await.unwrap();
        step.rollback(&test.back(), &found, None).await.unwrap();
        assert_eq!(stack.picture(), before, "{with}");
        if then {
            assert_eq!(stack.ids(), ids);
        }
    }
}

/// Tells whether a Compose of this directory runs `up`.
fn is_up_running(directory: &Path) -> bool {
    fs::read_dir("/proc").unwrap().filter_map(Result::ok).any(|process| {
        let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
        fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd == directory)
            && String::from_utf8_lossy(&line).contains("\0up\0")
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_driver_left_under_way_is_ended_and_put_right() {
    // It takes two seconds to end, so that its stop is under way for long.
    let file = "services:\n  web:\n    image: PREFIX-slow:${TAG}\n    network_mode: none\n    stop_grace_period: 2s\n";
    let Some(stack) = Stack::shared("killed", file) else { return };
    for tag in ["1", "2"] {
        let slow = Image::shell("trap : TERM; while :; do sleep 0.1; done").with("STOPSIGNAL SIGTERM");
        stack.image(&slow.with(&format!("ENV V={tag}")), &format!("slow:{tag}"));
    }
    stack.write(".env", "TAG=1\n");
    stack.compose(&["up", "--detach"]);
    let (before, directory) = (stack.picture(), stack.directory.canonicalize().unwrap());
    for (moment, cancelled) in [("begun", false), ("stopping", false), ("stopping", true), ("renamed", false)] {
        let id = stack.ids()["web_1"].clone();
        let since = stack.corner.engine.docker(["info", "--format", "{{.SystemTime}}"]);
        let step = Arc::new(stack.step(&json!({ "env": { "TAG": "2" }, "health": { "web": quick() } })));
        let mut test = TestContext::new("stack");
        let found = Arc::new(undo(&step, &test).await);
        let applying = tokio::spawn({
            let (step, found, cx) = (step.clone(), found.clone(), test.forward());
            async move { step.apply(&cx, &found).await }
        });
        let has = |event: &str| {
            let (until, filter) =
                (stack.corner.engine.docker(["info", "--format", "{{.SystemTime}}"]), format!("event={event}"));
            let container = format!("container={id}");
            let all = ["events", "--since", &since, "--until", &until, "--filter", &filter, "--filter", &container];
            !stack.corner.engine.docker(all).is_empty()
        };
        let began = Instant::now();
        while !match moment {
            "begun" => is_up_running(&directory),
            "stopping" => has("kill"),
            _ => has("rename"),
        } {
            assert!(began.elapsed() < Duration::from_secs(60), "{moment} was not seen");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if cancelled {
            test.cancellation().cancel();
            assert!(applying.await.unwrap().is_err());
            test.renew();
        } else {
            applying.abort();
        }
        step.settle(&test.back(), &found).await.unwrap();
        let settled = stack.containers();
        if moment == "stopping" {
            assert!(
                settled.values().all(|container| container["running"] == false),
                "its stop is awaited: {settled:?}"
            );
        }
        step.rollback(&test.back(), &found, None).await.unwrap();
        assert_eq!(stack.picture(), before, "{moment}: {settled:?}");
        // Nothing that was under way comes later.
        tokio::time::sleep(Duration::from_millis(2500)).await;
        assert_eq!(stack.picture(), before, "{moment}: {settled:?}");
    }
}

#[test]
fn mistakes_in_the_configuration_name_their_key() {
    for (with, key) in [
        (json!({ "images": { "web": "Shop:1" } }), "images.web"),
        (json!({ "images": { "web": "shop:1" }, "services": ["api"] }), "images.web"),
        (json!({ "env": { "COMPOSE_FILE": "x" } }), "env.COMPOSE_FILE"),
        (json!({ "env": { "A-B": "x" } }), "env.A-B"),
        (json!({ "env": { "TAG": "$(id)" } }), "env.TAG"),
        (json!({ "health": { "web": { "exec": [] } } }), "health.web.exec"),
        (json!({ "compose": [] }), "compose"),
        (json!({ "target": "nowhere" }), "target"),
    ] {
        let mut all = json!({ "directory": "/srv/shop" });
        all.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
        let config: ComposeConfig = serde_json::from_value(all).unwrap();
        let error = Compose::from_config(config, &BuildContext::new("/")).unwrap_err();
        assert_eq!(error.key.as_deref(), Some(key), "{with}: {error}");
    }
}

#[test]
fn undo_records_of_every_format_are_read() {
    for name in ["docker.compose.undo.v1.json", "docker.compose.undo.v1.after.json"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        let golden: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let undo = Compose::read_undo(1, golden.clone()).unwrap();
        assert_eq!(serde_json::to_value(undo).unwrap(), golden, "{name}");
        assert!(Compose::read_undo(2, golden).is_err());
    }
}
