//! `docker.exec` on a real engine.

#![cfg(test)]

use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::{TcpListener, UnixStream};
use upgrade_core::context::OnConflict;
use upgrade_core::error::Class;
use upgrade_core::registry::BuildError;
use upgrade_core::step::{Prepared, Rollback as _, Step};
use upgrade_core::testkit::TestContext;
use upgrade_core::undoable::OptionalRollback;
use upgrade_docker::steps::{Exec, ExecConfig, ExecUndo, UndoableExec};
use upgrade_testbed::docker::Image;

use crate::world::{Corner, build_context, golden};

/// A container that runs, and what a step finds in it.
struct World {
    corner: Corner,
    test: TestContext,
    host: String,
}

impl World {
    fn new(what: &str) -> Option<Self> {
        let corner = Corner::shared(what)?;
        Image::shell("sleep 1000").build(&corner.engine, &corner.name("image:1"));
        let host = corner.engine.host().to_owned();
        let world = Self { corner, test: TestContext::new(what), host };
        world.start();
        Some(world)
    }

    fn start(&self) {
        let (name, image) = (self.corner.name("web"), self.corner.name("image:1"));
        self.corner.engine.docker(["run", "--detach", "--network", "none", "--name", &name, &image]);
    }

    fn make(&self, more: &Value) -> Result<Exec, BuildError> {
        let mut config = json!({ "target": "engine", "container": self.corner.name("web"), "command": ["true"] });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let config: ExecConfig = serde_json::from_value(config).unwrap();
        Exec::from_config(config, &build_context(&self.host))
    }

    fn undoable(&self, more: &Value) -> UndoableExec {
        self.make(more).unwrap().undoable().unwrap()
    }

    fn inside(&self, script: &str) -> String {
        self.corner.engine.docker(["exec", &self.corner.name("web"), "sh", "-c", script])
    }

    /// How many processes of the container sleep for so long.
    fn sleepers(&self, seconds: &str) -> usize {
        let top = self.corner.engine.docker(["top", &self.corner.name("web"), "-eo", "pid,args"]);
        top.lines().filter(|line| line.trim_end().ends_with(&format!("sleep {seconds}"))).count()
    }
}

async fn prepare(step: &impl Step<Undo = ExecUndo>, test: &TestContext) -> ExecUndo {
    match step.prepare(&test.forward()).await {
        Ok(Prepared::Change { undo, .. }) => undo,
        Ok(_) => panic!("it is not done yet"),
        Err(error) => panic!("{error:?}"),
    }
}

#[tokio::test]
async fn a_command_runs_inside_and_is_undone() {
    let Some(world) = World::new("inside") else { return };
    let secret = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(secret.path(), "very-secret").unwrap();
    let step = world.undoable(&json!({
        "command": ["sh", "-c", "echo $WORD >/data/log; pwd; echo token $TOKEN >&2; id -u"],
        "env": { "WORD": "new", "TOKEN": { "file": secret.path() } },
        "user": "0",
        "directory": "/tmp",
        "undo": ["rm", "-f", "/data/log"],
        "unless": ["grep", "new", "/data/log"],
    }));
    let undo = prepare(&step, &world.test).await;
    let output = step.apply(&world.test.forward(), &undo).await.unwrap();
    assert_eq!((output.exit_code, output.stdout.as_str()), (Some(0), "/tmp\n0"), "{output:?}");
    assert!(output.stderr.starts_with("token ") && !output.stderr.contains("very-secret"), "{output:?}");
    assert!(world.test.reported().iter().any(|progress| progress.message == "/tmp"), "{:?}", world.test.reported());
    let answer = step.prepare(&world.test.forward()).await.unwrap();
    assert!(matches!(&answer, Prepared::Unchanged { reason, .. } if reason == "`unless` says so"), "{answer:?}");
    let read = golden("docker.exec.undo.v1.json", &undo, &[(&undo.container_id, "CONTAINER")]);
    UndoableExec::read_undo(1, read).unwrap();
    for _ in 0..2 {
        step.settle(&world.test.back(), &undo).await.unwrap();
        step.rollback(&world.test.back(), &undo, Some(&output)).await.unwrap();
        assert_eq!(world.inside("ls /data"), "");
    }
}

/// What a crash leaves in the container, and what ends it.
async fn a_leftover_is_ended(world: &World) {
    let step = world.undoable(&json!({
        "command": ["sh", "-c", "echo begun >/data/log; sleep 777; echo done >>/data/log"],
        "undo": ["rm", "-f", "/data/log"],
    }));
    let undo = prepare(&step, &world.test).await;
    // Dropped in the middle, as a process that is killed drops it.
    let cut_off = tokio::time::timeout(Duration::from_millis(900), step.apply(&world.test.forward(), &undo)).await;
    assert!(cut_off.is_err());
    // Somebody else's, which looks the same to the engine's list.
    world.corner.engine.docker(["exec", "--detach", &world.corner.name("web"), "sh", "-c", "sleep 778"]);
    assert_eq!((world.sleepers("777"), world.inside("cat /data/log").as_str()), (1, "begun"));
    for _ in 0..2 {
        step.settle(&world.test.back(), &undo).await.unwrap();
        assert_eq!((world.sleepers("777"), world.sleepers("778")), (0, 1));
    }
    step.rollback(&world.test.back(), &undo, None).await.unwrap();
    assert_eq!(world.inside("ls /data"), "");
}

#[tokio::test]
async fn what_a_crash_left_running_is_ended_by_its_marker() {
    let Some(world) = World::new("local") else { return };
    a_leftover_is_ended(&world).await;
}

#[tokio::test]
async fn what_a_crash_left_running_on_an_engine_elsewhere_is_ended_too() {
    let Some(mut world) = World::new("remote") else { return };
    let Some(socket) = world.host.strip_prefix("unix://").map(str::to_owned) else { return };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    world.host = format!("tcp://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let socket = socket.clone();
            tokio::spawn(async move {
                let mut engine = UnixStream::connect(socket).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut client, &mut engine).await;
            });
        }
    });
    a_leftover_is_ended(&world).await;
}

#[tokio::test]
async fn a_failure_quotes_the_command() {
    let Some(world) = World::new("quotes") else { return };
    let forward = world.test.forward();
    for (command, class, message, hint) in [
        (vec!["sh", "-c", "echo no such table >&2; exit 3"], Class::Permanent, "ended with exit code 3", "read what"),
        (vec!["sh", "-c", "exit 75"], Class::Transient, "ended with exit code 75", "read what"),
        (vec!["sh", "-c", "kill -9 $$"], Class::Unknown, "ended with exit code 137", "from outside"),
        (vec!["no-such-program"], Class::Permanent, "ended with exit code 12", "check `command`"),
    ] {
        let step = world.make(&json!({ "command": command })).unwrap();
        let undo = prepare(&step, &world.test).await;
        let error = step.apply(&forward, &undo).await.unwrap_err();
        assert!(error.class() == class && error.message().contains(message), "{error:?}");
        assert!(error.hint().unwrap().contains(hint), "{error:?}");
    }
    let step = world.make(&json!({ "command": ["sh", "-c", "exit 3"], "success": [3] })).unwrap();
    let undo = prepare(&step, &world.test).await;
    assert_eq!(step.apply(&forward, &undo).await.unwrap().exit_code, Some(3));
}

#[tokio::test]
async fn a_cancelled_command_is_ended() {
    let Some(world) = World::new("cancelled") else { return };
    let step = world.make(&json!({ "command": ["sh", "-c", "echo waiting; sleep 779"] })).unwrap();
    let undo = prepare(&step, &world.test).await;
    let forward = world.test.forward();
    let (applied, ()) = tokio::join!(step.apply(&forward, &undo), async {
        tokio::time::sleep(Duration::from_millis(800)).await;
        world.test.cancellation().cancel();
    });
    let error = applied.unwrap_err();
    assert_eq!((error.detail(), world.sleepers("779")), (Some("waiting"), 0), "{error:?}");
}

#[tokio::test]
async fn another_container_of_that_name_is_a_conflict() {
    let Some(world) = World::new("other") else { return };
    let step = world.undoable(&json!({ "command": ["touch", "/data/log"], "undo": ["rm", "-f", "/data/log"] }));
    let undo = prepare(&step, &world.test).await;
    world.corner.engine.docker(["rm", "--force", &world.corner.name("web")]);
    let error = step.apply(&world.test.forward(), &undo).await.unwrap_err();
    assert!(error.message().contains("there is no container") && error.hint().is_some(), "{error:?}");
    world.start();
    let error = step.apply(&world.test.forward(), &undo).await.unwrap_err();
    assert!(error.as_conflict().is_some(), "{error:?}");
    let error = step.rollback(&world.test.back(), &undo, None).await.unwrap_err();
    assert!(error.as_conflict().is_some(), "{error:?}");
    step.settle(&world.test.back(), &undo).await.unwrap();
    let overwriting = TestContext::new("other").on_conflict(OnConflict::Overwrite);
    step.apply(&overwriting.forward(), &undo).await.unwrap();
    assert_eq!(world.inside("ls /data"), "log");
    world.corner.engine.docker(["stop", &world.corner.name("web")]);
    let error = step.prepare(&world.test.forward()).await.unwrap_err();
    assert!(error.message().contains("does not run"), "{error:?}");
    assert!(step.prepare(&TestContext::new("plan").dry_run().forward()).await.is_ok());
}

#[test]
fn a_wrong_configuration_names_its_key() {
    let Some(world) = World::new("wrongexec") else { return };
    for (more, key) in [
        (json!({ "container": "" }), "container"),
        (json!({ "command": [] }), "command"),
        (json!({ "undo": [""] }), "undo"),
        (json!({ "no_effect": true, "undo": ["true"] }), "no_effect"),
        (json!({ "success": [] }), "success"),
        (json!({ "env": { "": "x" } }), "env"),
    ] {
        let error = world.make(&more).unwrap_err();
        assert_eq!(error.key.as_deref(), Some(key), "{error}");
    }
}
