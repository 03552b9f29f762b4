//! A real project of Compose in a corner of an engine, and what is to be seen of it.

#![cfg(test)]

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;
use upgrade_core::error::StepError;
use upgrade_core::step::{Prepared, Step as _};
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

pub(crate) async fn undo(step: &Compose, test: &TestContext) -> ComposeUndo {
    match step.prepare(&test.forward()).await.unwrap() {
        Prepared::Change { undo, .. } => undo,
        other => panic!("{other:?}"),
    }
}

pub(crate) async fn refused(step: &Compose) -> StepError {
    step.prepare(&TestContext::new("stack").forward()).await.unwrap_err()
}

pub(crate) const SHOP: &str = r#"
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

pub(crate) fn shop(what: &str) -> Option<Stack> {
    let stack = Stack::shared(what, SHOP)?;
    stack.image(&Image::shell("echo row >>/data/rows; exec sleep 1000"), "db:1");
    stack.image(&Image::web("1").healthcheck("wget -qO- http://127.0.0.1:8080/health"), "web:1");
    stack.image(&Image::web("2").healthcheck("wget -qO- http://127.0.0.1:8080/health"), "web:2");
    stack.compose(&["up", "--detach"]);
    Some(stack)
}
