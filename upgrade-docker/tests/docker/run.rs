//! `docker.run` on a real engine.

#![cfg(test)]

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use upgrade_core::error::Class;
use upgrade_core::registry::BuildError;
use upgrade_core::step::{Prepared, Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_core::undoable::OptionalRollback;
use upgrade_docker::steps::{Run, RunConfig, RunUndo, UndoableRun};
use upgrade_testbed::docker::Image;

use crate::world::{Corner, build_context, golden};

/// A volume with a log in it, and an image whose commands write there.
struct World {
    corner: Corner,
    test: TestContext,
}

impl World {
    fn new(what: &str) -> Option<Self> {
        let corner = Corner::shared(what)?;
        Image::shell("true").build(&corner.engine, &corner.name("image:1"));
        corner.engine.docker(["volume", "create", &corner.name("data")]);
        Some(Self { corner, test: TestContext::new(what) })
    }

    fn config(&self, more: &Value) -> RunConfig {
        let mut config = json!({
            "target": "engine",
            "image": self.corner.name("image:1"),
            "pull": "never",
            "networks": ["none"],
            "volumes": [format!("{}:/data", self.corner.name("data"))],
        });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(config).unwrap()
    }

    fn make(&self, more: &Value) -> Result<Run, BuildError> {
        Run::from_config(self.config(more), &build_context(self.corner.engine.host()))
    }

    fn undoable(&self, more: &Value) -> UndoableRun {
        self.make(more).unwrap().undoable().unwrap()
    }

    fn log(&self) -> String {
        let mount = format!("{}:/data", self.corner.name("data"));
        let image = self.corner.name("image:1");
        self.corner.engine.docker([
            "run",
            "--rm",
            "--network",
            "none",
            "--volume",
            &mount,
            &image,
            "sh",
            "-c",
            "cat /data/log || true",
        ])
    }

    /// The containers that carry the step's marker.
    fn left(&self) -> Vec<String> {
        let label = format!("label={}={}", upgrade_docker::naming::MARKER, self.test.forward().marker());
        let all = self.corner.engine.docker(["ps", "--all", "--filter", &label, "--format", "{{.ID}} {{.Status}}"]);
        all.lines().map(str::to_owned).collect()
    }
}

async fn prepare(step: &impl upgrade_core::step::Step<Undo = RunUndo>, test: &TestContext) -> RunUndo {
    match step.prepare(&test.forward()).await {
        Ok(Prepared::Change { undo, .. }) => undo,
        Ok(_) => panic!("it is not done yet"),
        Err(error) => panic!("{error:?}"),
    }
}

#[tokio::test]
async fn a_command_runs_once_however_often_it_is_called_and_is_undone() {
    let Some(world) = World::new("once") else { return };
    let secret = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(secret.path(), "very-secret").unwrap();
    let step = world.undoable(&json!({
        "command": ["sh", "-c", "echo $WORD >>/data/log; echo said $WORD; echo token $TOKEN >&2; id"],
        "env": { "WORD": "new", "TOKEN": { "file": secret.path() } },
        "user": "0",
        "directory": "/tmp",
        "undo": { "command": ["rm", "-f", "/data/log"] },
    }));
    let (forward, test) = (world.test.forward(), &world.test);
    let undo = prepare(&step, test).await;
    let output = step.apply(&forward, &undo).await.unwrap();
    assert_eq!(output.exit_code, Some(0));
    assert!(output.stdout.starts_with("said new") && output.stdout.contains("uid=0"), "{output:?}");
    assert!(output.stderr.starts_with("token ") && !output.stderr.contains("very-secret"), "{output:?}");
    assert!(test.reported().iter().any(|progress| progress.message == "said new"), "{:?}", test.reported());
    assert_eq!(step.apply(&forward, &undo).await.unwrap(), output);
    assert_eq!(world.log(), "new");
    assert_eq!(world.left().len(), 1);
    let written = serde_json::to_string(&undo).unwrap();
    assert!(!written.contains("very-secret"), "{written}");
    let read = golden("docker.run.undo.v1.json", &undo, &[(&undo.image_id, "sha256:IMAGE")]);
    Run::read_undo(1, read).unwrap();

    let back = test.back();
    for _ in 0..2 {
        step.settle(&back, &undo).await.unwrap();
        step.rollback(&back, &undo, Some(&output)).await.unwrap();
        assert_eq!((world.log().as_str(), world.left().len()), ("", 0));
    }

    step.apply(&forward, &undo).await.unwrap();
    for _ in 0..2 {
        step.commit(&test.commit(), &undo).await.unwrap();
    }
    assert_eq!((world.log().as_str(), world.left().len()), ("new", 0));
}

#[tokio::test]
async fn what_a_crash_left_running_is_awaited_forward_and_ended_back() {
    let Some(world) = World::new("crash") else { return };
    let step = world.undoable(&json!({
        "command": ["sh", "-c", "echo begun >>/data/log; sleep 1.5; echo done >>/data/log"],
        "undo": { "command": ["rm", "-f", "/data/log"] },
    }));
    let (forward, back) = (world.test.forward(), world.test.back());
    let undo = prepare(&step, &world.test).await;
    // Dropped in the middle, as a process that is killed drops it.
    let cut_off = tokio::time::timeout(Duration::from_millis(900), step.apply(&forward, &undo)).await;
    assert!(cut_off.is_err());
    step.settle(&forward, &undo).await.unwrap();
    step.apply(&forward, &undo).await.unwrap();
    assert_eq!(world.log(), "begun\ndone");
    step.rollback(&back, &undo, None).await.unwrap();

    let cut_off = tokio::time::timeout(Duration::from_millis(900), step.apply(&forward, &undo)).await;
    assert!(cut_off.is_err());
    step.settle(&back, &undo).await.unwrap();
    assert!(world.left().iter().all(|status| status.contains("Exited")), "{:?}", world.left());
    step.rollback(&back, &undo, None).await.unwrap();
    assert_eq!((world.log().as_str(), world.left().len()), ("", 0));
}

#[tokio::test]
async fn a_failure_quotes_the_command_and_leaves_nothing() {
    let Some(world) = World::new("fails") else { return };
    let forward = world.test.forward();
    for (script, class, message) in [
        ("echo no such table: notes >&2; exit 3", Class::Permanent, "ended with exit code 3"),
        ("echo the database is starting >&2; exit 75", Class::Transient, "ended with exit code 75"),
        ("exit 137", Class::Unknown, "ended with exit code 137"),
    ] {
        let script = format!("{script}; true");
        let step = world.make(&json!({ "command": ["sh", "-c", script] })).unwrap();
        let undo = prepare(&step, &world.test).await;
        let error = step.apply(&forward, &undo).await.unwrap_err();
        assert_eq!(error.class(), class, "{error:?}");
        assert!(error.message().contains(message) && error.hint().is_some(), "{error:?}");
        assert_eq!(error.detail().is_some(), class != Class::Unknown, "{error:?}");
        assert_eq!(world.left().len(), 0);
    }
    let allowed = world.make(&json!({ "command": ["sh", "-c", "exit 3"], "success": [0, 3] })).unwrap();
    let undo = prepare(&allowed, &world.test).await;
    assert_eq!(allowed.apply(&forward, &undo).await.unwrap().exit_code, Some(3));
    allowed.commit(&world.test.commit(), &undo).await.unwrap();
}

#[tokio::test]
async fn what_could_never_run_is_not_undone() {
    let Some(world) = World::new("never") else { return };
    let (forward, back) = (world.test.forward(), world.test.back());
    let undo_by = json!({ "command": ["sh", "-c", "echo undone >>/data/log"] });
    for (more, hint) in [
        (json!({ "command": ["no-such-program"] }), "check `command`"),
        (json!({ "volumes": ["/no/such/directory:/x"] }), "check `command`"),
    ] {
        let mut config = more.clone();
        config["undo"] = undo_by.clone();
        let step = world.undoable(&config);
        let undo = prepare(&step, &world.test).await;
        for _ in 0..2 {
            let error = step.apply(&forward, &undo).await.unwrap_err();
            assert!(error.class() == Class::Permanent && error.hint().unwrap().contains(hint), "{error:?}");
        }
        step.settle(&back, &undo).await.unwrap();
        step.rollback(&back, &undo, None).await.unwrap();
        assert_eq!((world.log().as_str(), world.left().len()), ("", 0), "{more}");
    }
    for (more, message) in [
        (json!({ "networks": [world.corner.name("net")] }), "there is no network"),
        (json!({ "volumes": [format!("{}:/x", world.corner.name("gone"))] }), "there is no volume"),
        (json!({ "image": world.corner.name("image:2") }), "is not on the engine"),
    ] {
        let step = world.make(&more).unwrap();
        let error = step.prepare(&forward).await.unwrap_err();
        assert!(error.message().contains(message) && error.hint().is_some(), "{error:?}");
        // A plan is none the wiser: an earlier step may make it.
        assert!(step.prepare(&TestContext::new("plan").dry_run().forward()).await.is_ok());
    }
}

#[tokio::test]
async fn a_cancelled_command_is_ended() {
    let Some(world) = World::new("cancel") else { return };
    let step = world.make(&json!({ "command": ["sh", "-c", "echo waiting; sleep 1000"] })).unwrap();
    let forward = world.test.forward();
    let undo = prepare(&step, &world.test).await;
    let began = Instant::now();
    let (applied, ()) = tokio::join!(step.apply(&forward, &undo), async {
        tokio::time::sleep(Duration::from_millis(800)).await;
        world.test.cancellation().cancel();
    });
    let error = applied.unwrap_err();
    assert_eq!(error.detail(), Some("waiting"), "{error:?}");
    assert!(began.elapsed() < Duration::from_secs(8) && world.left().is_empty(), "{:?}", world.left());
}

#[tokio::test]
async fn unless_says_that_it_is_done() {
    let Some(world) = World::new("unless") else { return };
    let step = world
        .make(&json!({ "command": ["sh", "-c", "echo done >>/data/log"], "unless": ["grep", "done", "/data/log"] }))
        .unwrap();
    let forward = world.test.forward();
    let undo = prepare(&step, &world.test).await;
    step.apply(&forward, &undo).await.unwrap();
    step.commit(&world.test.commit(), &undo).await.unwrap();
    let answer = step.prepare(&forward).await.unwrap();
    assert!(matches!(&answer, Prepared::Unchanged { reason, .. } if reason == "`unless` says so"), "{answer:?}");
    assert!(world.left().is_empty());
}

#[tokio::test]
async fn a_command_reaches_all_its_networks() {
    let Some(world) = World::new("nets") else { return };
    let (first, second) = (world.corner.name("first"), world.corner.name("second"));
    for network in [&first, &second] {
        world.corner.engine.docker(["network", "create", network]);
    }
    let script = "ls /sys/class/net | grep -c eth || true";
    let step = world.make(&json!({ "command": ["sh", "-c", script], "networks": [first, second] })).unwrap();
    let undo = prepare(&step, &world.test).await;
    assert_eq!(step.apply(&world.test.forward(), &undo).await.unwrap().stdout, "2");
    step.commit(&world.test.commit(), &undo).await.unwrap();
}

#[test]
fn a_wrong_configuration_names_its_key() {
    let Some(world) = World::new("wrong") else { return };
    for (more, key) in [
        (json!({ "no_effect": true, "undo": { "command": ["true"] } }), "no_effect"),
        (json!({ "undo": { "command": [] } }), "undo.command"),
        (json!({ "success": [] }), "success"),
        (json!({ "networks": ["host", "other"] }), "networks"),
        (json!({ "env": { "A=B": "x" } }), "env"),
    ] {
        let error = world.make(&more).unwrap_err();
        assert_eq!(error.key.as_deref(), Some(key), "{error}");
    }
}
