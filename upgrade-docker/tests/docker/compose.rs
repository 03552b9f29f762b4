//! `docker.compose` on real projects: what is replaced, what is left alone, what is put back.

#![cfg(test)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use upgrade_core::error::{Class, StepError};
use upgrade_core::registry::BuildContext;
use upgrade_core::step::{Prepared, Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_docker::steps::{Compose, ComposeConfig, ComposeUndo};
use upgrade_testbed::docker::{self, Image};

use crate::world::{Corner, build_context};

/// Holds a project of Compose in a corner of an engine.
pub(crate) struct Stack {
    /// Dropped first: its containers, before their files.
    pub(crate) corner: Corner,
    _home: TempDir,
    pub(crate) directory: PathBuf,
}

impl Stack {
    /// Lays out a project on the shared engine; `PREFIX` in its files stands for the corner's prefix.
    pub(crate) fn shared(what: &str, file: &str) -> Option<Self> {
        docker::compose()?;
        Corner::shared(what).map(|corner| Self::on(corner, file))
    }

    /// Lays it out in a corner that there is.
    pub(crate) fn on(corner: Corner, file: &str) -> Self {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join(&corner.prefix);
        fs::create_dir(&directory).unwrap();
        let stack = Self { corner, _home: home, directory };
        stack.write("docker-compose.yml", file);
        stack
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text.replace("PREFIX", &self.corner.prefix)).unwrap();
    }

    pub(crate) fn image(&self, image: &Image, name: &str) -> String {
        image.build(&self.corner.engine, &self.corner.name(name))
    }

    /// Runs Compose as a person would; returns all that it said.
    pub(crate) fn compose(&self, arguments: &[&str]) -> String {
        self.compose_with(&[], arguments)
    }

    /// The same, with variables of the shell.
    pub(crate) fn compose_with(&self, variables: &[(&str, &str)], arguments: &[&str]) -> String {
        let mut command = Command::new(docker::compose().unwrap());
        command.args(arguments).current_dir(&self.directory).stdin(Stdio::null());
        command.envs(variables.iter().copied()).env("DOCKER_HOST", self.corner.engine.host());
        let done = command.output().unwrap();
        let said = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        assert!(done.status.success(), "{command:?}: {said}");
        said
    }

    /// The ids of all containers of the project, by name.
    pub(crate) fn ids(&self) -> BTreeMap<String, String> {
        let all = self.corner.engine.docker([
            "ps",
            "--all",
            "--no-trunc",
            "--filter",
            &format!("label=com.docker.compose.project={}", self.corner.prefix),
            "--format",
            "{{.Names}} {{.ID}}",
        ]);
        let pair = |line: &str| {
            let (name, id) = line.split_once(' ').unwrap();
            (name.trim_start_matches(&self.corner.prefix).trim_start_matches('_').to_owned(), id.to_owned())
        };
        all.lines().map(pair).collect()
    }

    /// The containers by name, with what matters of each.
    pub(crate) fn containers(&self) -> BTreeMap<String, Value> {
        let format = "{{json .}}";
        let of = |(name, id): (String, String)| {
            let whole: Value =
                serde_json::from_str(&self.corner.engine.docker(["inspect", "--format", format, &id])).unwrap();
            let mut environment: Vec<String> =
                serde_json::from_value(whole["Config"]["Env"].clone()).unwrap_or_default();
            environment.retain(|variable| !variable.starts_with("affinity:container="));
            environment.sort_unstable();
            let mounts: Vec<String> = whole["Mounts"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|mount| format!("{} {}", mount["Name"], mount["Destination"]))
                .collect();
            let networks: Vec<&String> =
                whole["NetworkSettings"]["Networks"].as_object().unwrap().iter().map(|(name, _)| name).collect();
            let labels = &whole["Config"]["Labels"];
            let seen = json!({
                "image": whole["Image"], "reference": whole["Config"]["Image"], "running": whole["State"]["Running"],
                "env": environment, "mounts": mounts, "networks": networks,
                "hash": labels["com.docker.compose.config-hash"],
                "number": labels["com.docker.compose.container-number"],
            });
            (name, seen)
        };
        self.ids().into_iter().map(of).collect()
    }

    pub(crate) fn tag(&self, name: &str) -> String {
        self.corner.engine.docker(["image", "inspect", "--format", "{{.Id}}", &self.corner.name(name)])
    }

    /// All that a step may change: containers, tags, files, networks, volumes.
    pub(crate) fn picture(&self) -> String {
        let mut files: Vec<(String, String)> = fs::read_dir(&self.directory)
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| (entry.file_name().into_string().unwrap(), fs::read_to_string(entry.path()).unwrap()))
            .collect();
        files.sort_unstable();
        let seen = json!({
            "containers": self.containers(),
            "files": files,
            "networks": self.corner.list(&["network", "ls"], "{{.Name}}"),
            "volumes": self.corner.list(&["volume", "ls"], "{{.Name}}"),
            "images": self.corner.list(&["image", "ls", "--no-trunc"], "{{.Repository}}:{{.Tag}} {{.ID}}"),
        });
        serde_json::to_string_pretty(&seen).unwrap().replace(&self.corner.prefix, "PREFIX")
    }

    pub(crate) fn step(&self, with: &Value) -> Compose {
        let mut all = json!({
            "target": "engine", "directory": self.directory, "pull": "never", "compose": ["docker-compose"],
        });
        all.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
        let text = all.to_string().replace("PREFIX", &self.corner.prefix);
        let config: ComposeConfig = serde_json::from_str(&text).unwrap();
        Compose::from_config(config, &build_context(self.corner.engine.host())).unwrap()
    }
}

/// A gate that does not make the tests wait.
pub(crate) fn quick() -> Value {
    json!({ "stable": "0s", "every": "50ms", "within": "10s" })
}

async fn undo(step: &Compose, test: &TestContext) -> ComposeUndo {
    match step.prepare(&test.forward()).await.unwrap() {
        Prepared::Change { undo, .. } => undo,
        other => panic!("{other:?}"),
    }
}

async fn refused(step: &Compose) -> StepError {
    step.prepare(&TestContext::new("stack").forward()).await.unwrap_err()
}

const SHOP: &str = r#"
services:
  db:
    image: "PREFIX-db:1"
    volumes: ["data:/data"]
    environment: { PASSWORD: secret-of-db }
  web:
    image: "PREFIX-web:1"
    depends_on: [db]
volumes:
  data: {}
"#;

fn shop(what: &str) -> Option<Stack> {
    let stack = Stack::shared(what, SHOP)?;
    stack.image(&Image::shell("echo row >>/data/rows; exec sleep 1000"), "db:1");
    stack.image(&Image::web("1").healthcheck("wget -qO- http://127.0.0.1:8080/health"), "web:1");
    stack.image(&Image::web("2").healthcheck("wget -qO- http://127.0.0.1:8080/health"), "web:2");
    stack.compose(&["up", "--detach"]);
    Some(stack)
}

#[tokio::test]
async fn one_service_gets_another_image_and_back() {
    let Some(stack) = shop("one") else { return };
    let (before, ids) = (stack.picture(), stack.ids());
    let step = stack.step(&json!({ "images": { "web": "PREFIX-web:2" }, "health": { "web": quick() } }));
    let test = TestContext::new("stack");
    let found = undo(&step, &test).await;
    assert_eq!(stack.picture(), before, "prepare changes nothing");
    let record = serde_json::to_string(&found).unwrap();
    assert!(!record.contains("secret-of-db"), "{record}");
    let output = step.apply(&test.forward(), &found).await.unwrap();
    assert_eq!(output.services["web"].image_id, stack.tag("web:2"));
    let after = stack.ids();
    assert_eq!(after["db_1"], ids["db_1"], "the other service is left alone");
    assert_ne!(after["web_1"], ids["web_1"]);
    stack.compose(&["up", "--detach"]);
    assert_eq!(stack.ids(), after, "Compose finds nothing to do");

    step.rollback(&test.back(), &found, Some(&output)).await.unwrap();
    assert_eq!(stack.picture(), before);
    let back = stack.ids();
    stack.compose(&["up", "--detach"]);
    assert_eq!(stack.ids(), back, "Compose finds nothing to do");
    step.rollback(&test.back(), &found, Some(&output)).await.unwrap();
    assert_eq!(stack.ids(), back, "a second undo changes nothing");
}

#[tokio::test]
async fn what_is_up_to_date_is_left_alone() {
    let Some(stack) = shop("done") else { return };
    for with in [json!({}), json!({ "services": ["web"] })] {
        let prepared = stack.step(&with).prepare(&TestContext::new("stack").forward()).await.unwrap();
        assert!(matches!(prepared, Prepared::Unchanged { .. }), "{with}: {prepared:?}");
    }
    let step = stack.step(&json!({ "images": { "web": "PREFIX-web:2" }, "health": { "web": quick() } }));
    let test = TestContext::new("stack");
    let found = undo(&step, &test).await;
    step.apply(&test.forward(), &found).await.unwrap();
    step.commit(&test.commit(), &found).await.unwrap();
    step.commit(&test.commit(), &found).await.unwrap();
    let prepared = step.prepare(&TestContext::new("again").forward()).await.unwrap();
    assert!(matches!(prepared, Prepared::Unchanged { .. }), "{prepared:?}");
    let mine = stack.corner.engine.docker(["image", "ls", "--no-trunc", "--format", "{{.Repository}} {{.ID}}"]);
    assert!(!mine.contains(&format!("upgrade-kept {}", stack.tag("web:1"))), "{mine}");
}

const MANY: &str = r#"
services:
  web:
    image: "PREFIX-web:1"
    scale: 3
  job:
    image: "PREFIX-job:${TAG}"
    volumes: ["/data"]
"#;

fn many(what: &str) -> Option<Stack> {
    let stack = Stack::shared(what, MANY)?;
    for tag in ["1", "2"] {
        stack.image(&Image::web(tag), &format!("web:{tag}"));
        stack.image(&Image::shell("exec sleep 1000").with(&format!("ENV V={tag}")), &format!("job:{tag}"));
    }
    stack.image(&Image::shell("echo cannot open the ledger; exit 3"), "web:bad");
    stack.write(".env", "# ours\nTAG=1\n");
    stack.compose(&["up", "--detach"]);
    Some(stack)
}

#[tokio::test]
async fn replicas_are_replaced_one_by_one_and_their_numbers_come_back() {
    let Some(stack) = many("many") else { return };
    let before = stack.picture();
    let step = stack.step(&json!({ "images": { "web": "PREFIX-web:2" }, "health": { "web": quick() } }));
    let test = TestContext::new("stack");
    let found = undo(&step, &test).await;
    let output = step.apply(&test.forward(), &found).await.unwrap();
    let names = |stack: &Stack| stack.ids().into_keys().filter(|name| name.starts_with("web")).collect::<Vec<_>>();
    assert_eq!(names(&stack), ["web_3", "web_4", "web_5"], "Compose counts on");
    assert_eq!(output.services["web"].containers.len(), 3);
    let after = stack.ids();
    stack.compose(&["up", "--detach"]);
    assert_eq!(stack.ids(), after, "Compose finds nothing to do");
    step.rollback(&test.back(), &found, Some(&output)).await.unwrap();
    assert_eq!(stack.picture(), before);
}

#[tokio::test]
async fn a_roll_that_fails_in_the_middle_leaves_the_other_replicas_alone() {
    let Some(stack) = many("middle") else { return };
    let (before, ids) = (stack.picture(), stack.ids());
    let step = stack.step(&json!({ "images": { "web": "PREFIX-web:bad" }, "health": { "web": quick() } }));
    let test = TestContext::new("stack");
    let found = undo(&step, &test).await;
    let error = step.apply(&test.forward(), &found).await.unwrap_err();
    assert_eq!(error.class(), Class::Permanent, "{error:?}");
    assert!(
        error.message().starts_with("service web: container ") && error.message().contains("exited with 3"),
        "{error:?}"
    );
    assert!(error.detail().unwrap().contains("cannot open the ledger"), "{error:?}");
    let now = stack.ids();
    assert_eq!((&now["web_1"], &now["web_2"]), (&ids["web_1"], &ids["web_2"]));
    step.rollback(&test.back(), &found, None).await.unwrap();
    assert_eq!(stack.picture(), before);
    let back = stack.ids();
    assert_eq!((&back["web_1"], &back["web_2"]), (&ids["web_1"], &ids["web_2"]));
}

#[tokio::test]
async fn a_variable_changes_what_it_changes_and_volumes_are_carried_over() {
    let Some(stack) = many("variable") else { return };
    let (before, ids) = (stack.picture(), stack.ids());
    let volumes = |stack: &Stack| stack.containers()["job_1"]["mounts"].clone();
    let data = volumes(&stack);
    let step = stack.step(&json!({ "env": { "TAG": "2" }, "health": { "job": quick() } }));
    let test = TestContext::new("stack");
    let found = undo(&step, &test).await;
    assert_eq!(stack.picture(), before);
    let output = step.apply(&test.forward(), &found).await.unwrap();
    assert_eq!(output.services.keys().collect::<Vec<_>>(), ["job"]);
    assert_eq!(fs::read_to_string(stack.path(".env")).unwrap(), "# ours\nTAG=2\n");
    assert_eq!(stack.containers()["job_1"]["image"], stack.tag("job:2").as_str());
    assert_eq!(volumes(&stack), data);
    assert_eq!(stack.ids()["web_1"], ids["web_1"]);
    step.rollback(&test.back(), &found, Some(&output)).await.unwrap();
    assert_eq!(stack.picture(), before);
}

#[tokio::test]
async fn what_was_stopped_stays_stopped_both_ways() {
    let Some(stack) = shop("stopped") else { return };
    stack.compose(&["stop", "--timeout", "1", "web"]);
    let before = stack.picture();
    let step = stack.step(&json!({ "images": { "web": "PREFIX-web:2" } }));
    let test = TestContext::new("stack");
    let found = undo(&step, &test).await;
    let output = step.apply(&test.forward(), &found).await.unwrap();
    let web = &stack.containers()["web_1"];
    assert_eq!((&web["running"], &web["image"]), (&json!(false), &json!(stack.tag("web:2"))));
    step.rollback(&test.back(), &found, Some(&output)).await.unwrap();
    assert_eq!(stack.picture(), before);
}

#[tokio::test]
async fn a_tag_that_moved_names_the_old_image_again() {
    let (Some(stack), Some(registry)) = (Stack::shared("moved", "services: {}"), docker::registry(false)) else {
        return;
    };
    let engine = &stack.corner.engine;
    let name = format!("{}/{}:latest", registry.address(), stack.corner.prefix);
    let new = Image::web("2").build(engine, &name);
    engine.docker(["push", "--quiet", &name]);
    engine.docker(["image", "rm", &name]);
    let old = Image::web("1").build(engine, &name);
    stack.write("docker-compose.yml", &format!("services:\n  web:\n    image: {name}\n"));
    stack.compose(&["up", "--detach"]);
    let (before, picture) = (stack.containers(), stack.picture());
    let step = stack.step(&json!({ "pull": "always", "health": { "web": quick() } }));
    let test = TestContext::new("stack");
    let found = undo(&step, &test).await;
    let output = step.apply(&test.forward(), &found).await.unwrap();
    assert_eq!(stack.containers()["web_1"]["image"], new.as_str());
    let prepared = step.prepare(&TestContext::new("again").forward()).await.unwrap();
    assert!(matches!(prepared, Prepared::Unchanged { .. }), "{prepared:?}");
    step.rollback(&test.back(), &found, Some(&output)).await.unwrap();
    assert_eq!(stack.containers(), before);
    assert_eq!(engine.docker(["image", "inspect", "--format", "{{.Id}}", &name]), old);
    assert_eq!(stack.picture(), picture);
    let ids = stack.ids();
    stack.compose(&["up", "--detach"]);
    assert_eq!(stack.ids(), ids, "Compose finds nothing to do");
    engine.docker(["rm", "--force", &ids["web_1"]]);
    engine.docker(["image", "rm", "--force", &name, &new]);
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
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/docker.compose.undo.v1.json");
    let golden: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let undo = Compose::read_undo(1, golden.clone()).unwrap();
    assert_eq!(serde_json::to_value(undo).unwrap(), golden);
    assert!(Compose::read_undo(2, golden).is_err());
}

#[tokio::test]
async fn jobs_end_first_and_what_lives_in_another_container_moves_with_it() {
    let file = "services:\n  seed:\n    image: PREFIX-seed:1\n  web:\n    image: PREFIX-web:1\n    depends_on:\n      \
                seed: { condition: service_completed_successfully }\n  side:\n    image: PREFIX-web:1\n    \
                command: [sleep, \"1000\"]\n    network_mode: \"service:web\"\n";
    let Some(stack) = Stack::shared("order", file) else { return };
    for (name, script) in
        [("seed:1", "true"), ("seed:2", "sleep 0.5; echo seeded"), ("seed:bad", "echo no table; exit 4")]
    {
        stack.image(&Image::shell(script), name);
    }
    stack.image(&Image::web("1"), "web:1");
    stack.image(&Image::web("2"), "web:2");
    stack.compose(&["up", "--detach"]);
    // What lives in another container carries its id in its hash.
    let seen = |stack: &Stack| {
        let mut all = stack.containers();
        all.values_mut().for_each(|container| container["hash"] = Value::Null);
        all
    };
    let (before, ids) = (seen(&stack), stack.ids());
    let with = |seed: &str| json!({ "images": { "seed": seed, "web": "PREFIX-web:2" }, "health": { "web": quick(), "side": quick() } });
    let (step, test) = (stack.step(&with("PREFIX-seed:bad")), TestContext::new("stack"));
    let found = undo(&step, &test).await;
    let error = step.apply(&test.forward(), &found).await.unwrap_err();
    assert!(error.message().contains("service seed: job ") && error.message().contains("exited with 4"), "{error:?}");
    assert!(error.detail().unwrap().contains("no table"), "{error:?}");
    assert_eq!(stack.ids()["web_1"], ids["web_1"], "what waits for the job is not touched");
    step.rollback(&test.back(), &found, None).await.unwrap();
    assert_eq!(seen(&stack), before);

    let (step, test) = (stack.step(&with("PREFIX-seed:2")), TestContext::new("stack"));
    let found = undo(&step, &test).await;
    let output = step.apply(&test.forward(), &found).await.unwrap();
    assert_eq!(output.services.keys().collect::<Vec<_>>(), ["seed", "side", "web"]);
    let engine = &stack.corner.engine;
    let network = |stack: &Stack| {
        let now = stack.ids();
        let mode = engine.docker(["inspect", "--format", "{{.HostConfig.NetworkMode}}", &now["side_1"]]);
        assert_eq!(mode, format!("container:{}", now["web_1"]));
    };
    network(&stack);
    step.rollback(&test.back(), &found, Some(&output)).await.unwrap();
    assert_eq!(seen(&stack), before);
    network(&stack);
}
