//! `docker.container` on real engines: every setting carried over, and put back whatever went wrong.

#![cfg(test)]

mod disk;
mod engine;
mod failures;
mod settings;

use serde_json::{Value, json};
use upgrade_core::context::OnConflict;
use upgrade_core::error::{Class, StepError};
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::testkit::TestContext;
use upgrade_docker::steps::{Container, ContainerUndo};
use upgrade_testbed::docker::Image;

use crate::world::{Corner, build_context};

/// A gate that loses no time.
fn quick() -> Value {
    json!({ "within": "10s", "stable": "0s", "every": "50ms" })
}

fn container(corner: &Corner, mut with: Value) -> Container {
    with["target"] = json!("engine");
    for (key, value) in [("pull", json!("never")), ("health", quick())] {
        if with.get(key).is_none() {
            with[key] = value;
        }
    }
    let config = serde_json::from_value(with).unwrap();
    Container::from_config(config, &build_context(corner.engine.host())).unwrap()
}

async fn undo(step: &Container, test: &TestContext) -> ContainerUndo {
    match step.prepare(&test.forward()).await.unwrap() {
        Prepared::Change { undo, .. } => undo,
        other => panic!("{other:?}"),
    }
}

/// Puts back as a run does.
async fn back(step: &Container, test: &TestContext, undo: &ContainerUndo) -> Result<(), StepError> {
    step.settle(&test.back(), undo).await?;
    step.rollback(&test.back(), undo, None).await
}

fn inspect(corner: &Corner, name: &str) -> Value {
    let all: Value = serde_json::from_str(&corner.engine.docker(["inspect", "--type", "container", name])).unwrap();
    all[0].clone()
}

/// What answers at the container's own address.
fn version(corner: &Corner, name: &str) -> String {
    corner.engine.docker(["exec", name, "wget", "-qO-", "http://127.0.0.1:8080/version"])
}

/// Starts `web:1` as a container, with `web:2` beside it; returns their names: container, old, new.
fn web(corner: &Corner, arguments: &[&str]) -> (String, String, String) {
    let (name, old, new) = (corner.name("web"), corner.name("image:1"), corner.name("image:2"));
    Image::web("1").build(&corner.engine, &old);
    Image::web("2").build(&corner.engine, &new);
    let mut all = vec!["run", "--detach", "--name", &name];
    all.extend(arguments);
    all.push(&old);
    corner.engine.docker(&all);
    (name, old, new)
}

fn containers(corner: &Corner) -> Vec<String> {
    corner.list(&["ps", "--all"], "{{.Names}}")
}

#[tokio::test]
async fn a_container_is_replaced_and_committed() {
    let Some(corner) = Corner::shared("replace") else { return };
    let (name, _, new) = web(&corner, &["--restart", "always", "--env", "TOKEN=hidden"]);
    let before = inspect(&corner, &name);
    let step = container(&corner, json!({ "name": name, "image": new, "env": { "MODE": "fast" } }));
    let test = TestContext::new("web");
    let prepared = step.prepare(&test.forward()).await.unwrap();
    let Prepared::Change { undo, changes } = prepared else { panic!("{prepared:?}") };
    let summary = changes[0].summary.clone().unwrap();
    assert!(summary.contains("image:1 → ") && summary.contains("env: +MODE"), "{summary}");
    let record = serde_json::to_string(&undo).unwrap() + &format!("{undo:?}{changes:?}");
    assert!(!record.contains("hidden") && !record.contains("fast"), "{record}");

    let output = step.apply(&test.forward(), &undo).await.unwrap();
    let after = inspect(&corner, &name);
    assert_eq!((after["Id"].as_str(), after["State"]["Running"].as_bool()), (Some(&*output.id), Some(true)));
    assert_eq!(version(&corner, &name), "2");
    let env: Vec<&str> = after["Config"]["Env"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert!(env.contains(&"TOKEN=hidden") && env.contains(&"MODE=fast") && env.contains(&"VERSION=2"), "{env:?}");
    let kept = inspect(&corner, before["Id"].as_str().unwrap());
    assert_eq!(kept["HostConfig"]["RestartPolicy"]["Name"], "no");
    assert_eq!(containers(&corner).len(), 2);

    assert_eq!(step.apply(&test.forward(), &undo).await.unwrap(), output);
    for _ in 0..2 {
        step.commit(&test.commit(), &undo).await.unwrap();
    }
    assert_eq!(containers(&corner).join(" "), name);
    assert_eq!(inspect(&corner, &name)["HostConfig"]["RestartPolicy"]["Name"], "always");
    let again = step.prepare(&TestContext::new("again").forward()).await.unwrap();
    assert!(matches!(again, Prepared::Unchanged { .. }), "{again:?}");
}

#[tokio::test]
async fn a_stopped_container_stays_stopped() {
    let Some(corner) = Corner::shared("stopped") else { return };
    let (name, _, new) = web(&corner, &[]);
    corner.engine.docker(["stop", &name]);
    let before = inspect(&corner, &name);
    let (step, test) = (container(&corner, json!({ "name": name, "image": new })), TestContext::new("web"));
    let found = undo(&step, &test).await;
    step.apply(&test.forward(), &found).await.unwrap();
    let after = inspect(&corner, &name);
    assert_eq!((after["State"]["Running"].as_bool(), after["Id"] == before["Id"]), (Some(false), false));
    for _ in 0..2 {
        back(&step, &test, &found).await.unwrap();
        assert_eq!(inspect(&corner, &name)["Id"], before["Id"]);
        assert_eq!(inspect(&corner, &name)["State"], before["State"]);
    }
    assert_eq!(containers(&corner), [name]);
}

#[tokio::test]
async fn a_kept_container_that_was_pruned_is_made_again() {
    let Some(corner) = Corner::shared("pruned") else { return };
    let (name, _, new) = web(&corner, &["--volume", "/data", "--env", "TOKEN=hidden", "--restart", "unless-stopped"]);
    corner.engine.docker(["exec", &name, "sh", "-c", "echo precious >/data/file"]);
    let before = inspect(&corner, &name);
    let (step, test) = (container(&corner, json!({ "name": name, "image": new })), TestContext::new("web"));
    let found = undo(&step, &test).await;
    let output = step.apply(&test.forward(), &found).await.unwrap();
    corner.engine.docker(["rm", before["Id"].as_str().unwrap()]);
    for _ in 0..2 {
        step.settle(&test.back(), &found).await.unwrap();
        step.rollback(&test.back(), &found, Some(&output)).await.unwrap();
        let after = inspect(&corner, &name);
        assert_eq!(settings::normal(&after), settings::normal(&before));
        assert_eq!(version(&corner, &name), "1");
        assert_eq!(corner.engine.docker(["exec", &name, "cat", "/data/file"]), "precious");
    }
    assert_eq!(containers(&corner), [name]);
}

#[tokio::test]
async fn a_container_of_somebody_else_is_left_alone_or_written_over() {
    let Some(corner) = Corner::shared("foreign") else { return };
    let (name, old, new) = web(&corner, &[]);
    let step = container(&corner, json!({ "name": name, "image": new }));
    let test = TestContext::new("web");
    let found = undo(&step, &test).await;
    step.apply(&test.forward(), &found).await.unwrap();
    corner.engine.docker(["rm", "--force", &name]);
    let theirs = corner.engine.docker(["run", "--detach", "--name", &name, &old]);
    let error = back(&step, &test, &found).await.unwrap_err();
    assert!(error.as_conflict().is_some(), "{error:?}");
    assert_eq!(inspect(&corner, &name)["Id"], theirs.as_str());
    let error = step.apply(&test.forward(), &found).await.unwrap_err();
    assert!(error.as_conflict().is_some(), "{error:?}");
    let overwriting = test.clone().on_conflict(OnConflict::Overwrite);
    back(&step, &overwriting, &found).await.unwrap();
    assert_eq!(version(&corner, &name), "1");
    assert_eq!(containers(&corner), [name]);
}

#[tokio::test]
async fn what_cannot_be_replaced_is_refused() {
    let Some(corner) = Corner::shared("refused") else { return };
    let (name, _, new) = web(&corner, &["--rm"]);
    let refused = async |with: Value| -> StepError {
        let test = TestContext::new("web");
        container(&corner, with).prepare(&test.forward()).await.unwrap_err()
    };
    let error = refused(json!({ "name": name, "image": new })).await;
    assert!(error.message().contains("`--rm`"), "{error:?}");
    let error = refused(json!({ "name": corner.name("gone"), "image": new })).await;
    assert_eq!(error.class(), Class::Permanent);
    assert!(error.message().contains("there is no container") && error.hint().is_some(), "{error:?}");
    // An id is not a name.
    let id = inspect(&corner, &name)["Id"].as_str().unwrap()[..12].to_owned();
    let error = refused(json!({ "name": id, "image": new })).await;
    assert!(error.message().contains("there is no container"), "{error:?}");
}

#[test]
fn a_configuration_that_is_wrong_names_its_key() {
    let cx = build_context("unix:///run/engine.sock");
    for (with, key) in [
        (json!({ "name": "-" }), "name"),
        (json!({ "name": "web", "env": { "A=B": "c" } }), "env"),
        (json!({ "name": "web", "ports": ["80", "x"] }), "ports.1"),
        (json!({ "name": "web", "mounts": ["/data"] }), "mounts.0"),
        (json!({ "name": "web", "health": { "exec": [] } }), "health.exec"),
        (json!({ "name": "web", "target": "nowhere" }), "target"),
    ] {
        let mut with = with;
        if with.get("target").is_none() {
            with["target"] = json!("engine");
        }
        let error = Container::from_config(serde_json::from_value(with).unwrap(), &cx).unwrap_err();
        assert_eq!(error.key.as_deref(), Some(key), "{error}");
    }
}

#[tokio::test]
async fn the_undo_record_is_as_it_was_written_before() {
    let Some(corner) = Corner::shared("golden") else { return };
    let (name, old, new) = web(&corner, &["--restart", "on-failure:3"]);
    let step = container(&corner, json!({ "name": name, "image": new }));
    let found = serde_json::to_value(undo(&step, &TestContext::new("web")).await).unwrap();
    let mut written = found.clone();
    written["found"]["inspect"] = json!({ "sha256": "DIGEST", "length": 1 });
    let mut text = serde_json::to_string_pretty(&written).unwrap() + "\n";
    for (id, stands) in [("id", "CONTAINER"), ("image_id", "OLD")] {
        text = text.replace(found["found"][id].as_str().unwrap(), stands);
    }
    text = text.replace(found["intended"]["image_id"].as_str().unwrap(), "NEW");
    for (own, stands) in [(&name, "web"), (&old, "image:1"), (&new, "image:2")] {
        text = text.replace(own.as_str(), stands);
    }
    let golden = |name: &str| std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let path = golden("docker.container.undo.v1.json");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    assert_eq!(text, std::fs::read_to_string(&path).unwrap());
    for name in ["docker.container.undo.v1.json", "docker.container.undo.v1.tag.json"] {
        let golden: Value = serde_json::from_slice(&std::fs::read(golden(name)).unwrap()).unwrap();
        let read = Container::read_undo(1, golden.clone()).unwrap();
        assert_eq!(serde_json::to_value(read).unwrap(), golden, "{name}");
    }
}
