//! What a run leaves in its journal, and on the engine when it is over.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use upgrade_core::step::{Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_docker::steps::{BlueGreen, BlueGreenUndo};
use upgrade_testbed::docker::{self, Image};

use super::{step, undo};
use crate::world::Corner;

/// Compares an undo record with its golden file and returns what that holds; `UPDATE_GOLDEN=1` writes it.
fn golden(name: &str, undo: &BlueGreenUndo, replace: &[(&str, &str)]) -> Value {
    let mut text = serde_json::to_string_pretty(undo).unwrap() + "\n";
    for (from, to) in replace {
        text = text.replace(from, to);
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, &text).unwrap();
    }
    assert_eq!(text, fs::read_to_string(&path).unwrap(), "{}", path.display());
    serde_json::from_str(&text).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn undo_records_of_this_format_are_read_for_ever_and_hold_no_secret() {
    let Some(corner) = Corner::shared("golden") else { return };
    corner.network("front");
    let (old, next) = (corner.web("1.0"), corner.web("2.0"));
    let network = corner.name("front");
    let id = corner.engine.docker([
        "run",
        "--detach",
        "--name",
        &corner.name("web"),
        "--network",
        &network,
        "--network-alias",
        "api",
        "--env",
        "TOKEN=hunter2",
        &old,
    ]);
    let address = corner.address("web");
    let image = corner.engine.docker(["image", "inspect", "--format", "{{.Id}}", &next]);
    fs::create_dir_all(corner.directory()).unwrap();
    let file = corner.directory().join("to");
    let directory = corner.directory().display().to_string();
    fs::write(&file, "password hunter2").unwrap();
    let proxy = json!({ "proxy": { "file": file, "template": "{{ address }}", "port": 80, "reload": ["true"] } });
    for (name, switch) in [("alias", json!({ "alias": {} })), ("proxy", proxy)] {
        let step = step(&corner, &next, &switch, &json!({ "env": { "PASSWORD": "correct horse" } }));
        let test = TestContext::new("web");
        let undo = undo(&step, &test).await;
        let text = serde_json::to_string(&undo).unwrap();
        assert!(!text.contains("hunter2") && !text.contains("horse"), "{text}");
        let parsed: Value = serde_json::from_str(&text).unwrap();
        let (made, length) = (parsed["made"]["sha256"].as_str().unwrap(), parsed["made"]["length"].to_string());
        let kept = parsed["switch"]["alias"]["renamed"].as_str().unwrap_or("no such name");
        let kept = kept.rsplit('-').next().unwrap();
        let replace = [
            (id.as_str(), "OLD"),
            (&image, "IMAGE"),
            (&address, "ADDRESS"),
            (made, "MADE"),
            (&length, "1000"),
            (kept, "MARK"),
            (directory.as_str(), "/etc/nginx"),
            (&corner.prefix, "shop"),
        ];
        let written = golden(&format!("docker.blue_green.undo.v1.{name}.json"), &undo, &replace);
        let read = BlueGreen::read_undo(1, written.clone()).unwrap();
        assert_eq!(serde_json::to_value(read).unwrap(), written);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_images_name_is_moved_with_the_container_and_back() {
    let (Some(corner), Some(registry)) = (Corner::shared("moved"), docker::registry(false)) else { return };
    let engine = &corner.engine;
    corner.network("front");
    let name = format!("{}/{}:current", registry.address(), corner.prefix);
    let next = Image::web("2.0").build(engine, &name);
    engine.docker(["push", "--quiet", &name]);
    engine.docker(["image", "rm", &name]);
    let found = Image::web("1.0").build(engine, &name);
    let (container, network) = (corner.name("web"), corner.name("front"));
    engine.docker(["run", "--detach", "--name", &container, "--network", &network, &name]);
    let step = step(&corner, &name, &json!({ "alias": {} }), &json!({ "pull": "always" }));
    let named = || engine.docker(["image", "inspect", "--format", "{{.Id}}", &name]);
    let there = |id: &str| engine.command(["image", "inspect", id]).output().unwrap().status.success();

    let test = TestContext::new("web");
    let undo = super::undo(&step, &test).await;
    assert_eq!(named(), found, "until then, whoever starts it gets the old one");
    let output = step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!((output.image.as_str(), named().as_str()), (next.as_str(), next.as_str()));
    for _ in 0..2 {
        step.rollback(&test.back(), &undo, None).await.unwrap();
        assert_eq!(named(), found);
        assert!(!there(&next), "what was pulled for nothing is removed");
    }

    let test = TestContext::new("web");
    let undo = super::undo(&step, &test).await;
    step.apply(&test.forward(), &undo).await.unwrap();
    step.commit(&test.commit(), &undo).await.unwrap();
    assert_eq!(named(), next);
    let kept = engine.docker(["image", "ls", "--quiet", "--no-trunc", "upgrade-kept"]);
    assert!(!kept.contains(&found) && !kept.contains(&next), "{kept}");
    engine.docker(["rm", "--force", &corner.name("web-blue")]);
    engine.docker(["image", "rm", "--force", &next]);
    let _ = engine.command(["image", "rm", "--force", &found]).output();
}
