//! A corner of an engine that is upgraded again and again, and the command that does it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;
use upgrade_testbed::docker::{self, Engine, Image};

/// What is upgraded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    /// A container that serves, a command in one of its own, and a volume.
    Containers,
    /// A project of Compose.
    Project,
}

/// How it is meant to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Upgrade {
    Good,
    /// Its last step fails.
    Bad,
    /// Not committed before somebody confirms.
    Unconfirmed,
}

const CONTAINERS: &str = r#"
  - id: web
    uses: docker.container
    with: { target: engine, name: NAME-web, image: "IMAGES:2", pull: never, env: { MODE: fast }, health: GATE }
  - id: line
    uses: docker.run
    with:
      target: engine
      image: "IMAGES:1"
      pull: never
      networks: [none]
      volumes: ["NAME-log:/data"]
      command: [sh, -c, "echo two >>/data/log"]
      undo: { command: [sh, -c, "grep -v two /data/log >/data/new; mv /data/new /data/log"] }
  - id: data
    uses: docker.volume_restore
    with: { target: engine, volume: NAME-data, backup: "HOME/backup.tar.zst", image: "IMAGES:1" }
"#;

const PROJECT: &str = r#"
  - id: project
    uses: docker.compose
    with:
      target: engine
      directory: HOME/NAME
      compose: [docker-compose]
      pull: never
      images: { web: "IMAGES:2" }
      env: { LEVEL: "2" }
      health: { web: GATE }
"#;

const BAD: &str = r#"
  - id: last
    uses: docker.run
    with: { target: engine, image: "IMAGES:1", pull: never, networks: [none], command: ["false"], no_effect: true }
"#;

const COMPOSE: &str = r#"
services:
  web:
    image: "IMAGES:1"
    network_mode: none
    environment: { LEVEL: "${LEVEL}" }
"#;

/// One corner of an engine, made anew for each case, and its images, made once.
pub(crate) struct Scene {
    pub(crate) what: What,
    engine: Engine,
    home: TempDir,
    name: String,
    images: String,
}

impl Scene {
    pub(crate) fn new(what: What) -> Option<Self> {
        if what == What::Project {
            docker::compose()?;
        }
        let engine = docker::shared()?;
        let name = engine.unique("killed");
        let images = format!("{name}-image");
        for version in ["1", "2"] {
            let image = Image::shell("exec sleep 1000").with(&format!("ENV VERSION={version}"));
            image.build(&engine, &format!("{images}:{version}"));
        }
        let scene = Self { what, engine, home: tempfile::tempdir().unwrap(), name, images };
        scene.keep_a_backup();
        Some(scene)
    }

    /// What is restored: the volume with another line.
    fn keep_a_backup(&self) {
        self.volume("data", "restored\n");
        let step = "\n  - id: keep\n    uses: docker.volume_backup\n    with: { target: engine, volume: NAME-data, to: HOME/backups, consumers: leave }\n";
        let said = self.upgrade(&["run", &self.write("keep.yaml", step, "now")]);
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
        let mut made = fs::read_dir(self.home.path().join("backups")).unwrap().map(|entry| entry.unwrap().path());
        let made = made.find(|path| path.to_string_lossy().ends_with(".tar.zst")).unwrap();
        fs::copy(made, self.home.path().join("backup.tar.zst")).unwrap();
    }

    fn of(&self, what: &str) -> String {
        format!("{}-{what}", self.name)
    }

    fn docker(&self, arguments: &[&str]) -> String {
        self.engine.docker(arguments)
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.home.path().join("state")
    }

    /// Makes a volume with one file in it, and a container that was never started, through which it is seen.
    fn volume(&self, what: &str, text: &str) {
        let (volume, eye) = (format!("{}:/data", self.of(what)), self.of(&format!("eye-{what}")));
        let image = format!("{}:1", self.images);
        self.docker(&["create", "--network", "none", "--name", &eye, "--volume", &volume, &image]);
        let file = self.home.path().join("text");
        fs::write(&file, text).unwrap();
        self.docker(&["cp", file.to_str().unwrap(), &format!("{eye}:/data/log")]);
    }

    /// Makes what is there before, and no journal.
    pub(crate) fn reset(&self) {
        self.clear();
        match self.what {
            What::Containers => {
                let (image, web, app) = (format!("{}:1", self.images), self.of("web"), self.of("app"));
                self.docker(&["run", "--detach", "--network", "none", "--restart", "always", "--name", &web, &image]);
                self.volume("log", "one\n");
                self.volume("data", "one\n");
                let volume = format!("{}:/data", self.of("data"));
                let mount = ["run", "--detach", "--network", "none", "--volume", &volume, "--name", &app, &image];
                self.docker(&mount);
            }
            What::Project => {
                let directory = self.project();
                fs::create_dir_all(&directory).unwrap();
                fs::write(directory.join("docker-compose.yml"), COMPOSE.replace("IMAGES", &self.images)).unwrap();
                fs::write(directory.join(".env"), "LEVEL=1\n").unwrap();
                let mut compose = Command::new(docker::compose().unwrap());
                compose.args(["up", "--detach"]).current_dir(directory).env("DOCKER_HOST", self.engine.host());
                let done = compose.stdin(Stdio::null()).output().unwrap();
                assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
            }
        }
    }

    fn project(&self) -> PathBuf {
        self.home.path().join(&self.name)
    }

    fn containers(&self) -> Vec<String> {
        let filter = format!("name={}", self.name);
        let all = self.docker(&["ps", "--all", "--quiet", "--no-trunc", "--filter", &filter]);
        all.lines().map(str::to_owned).collect()
    }

    /// Containers of a step's own have names of their own, and the scene's images.
    fn strangers(&self) -> Vec<String> {
        let mut all = Vec::new();
        for version in ["1", "2"] {
            let filter = format!("ancestor={}:{version}", self.images);
            let of = self.docker(&["ps", "--all", "--no-trunc", "--filter", &filter, "--format", "{{.ID}} {{.Names}}"]);
            all.extend(of.lines().filter(|line| !line.contains(&self.name)).map(str::to_owned));
        }
        all
    }

    fn volumes(&self) -> Vec<String> {
        let all = self.docker(&["volume", "ls", "--quiet", "--filter", &format!("name={}", self.name)]);
        all.lines().map(str::to_owned).collect()
    }

    /// Every name of the images: those that keep them as well.
    fn tags(&self) -> Vec<String> {
        let mut all = Vec::new();
        for version in ["1", "2"] {
            let format = "{{range .RepoTags}}{{println .}}{{end}}";
            let tags = self.docker(&["image", "inspect", "--format", format, &format!("{}:{version}", self.images)]);
            all.extend(tags.lines().filter(|line| !line.is_empty()).map(str::to_owned));
        }
        all
    }

    fn clear(&self) {
        let strangers = self.strangers();
        let strangers = strangers.iter().filter_map(|line| line.split(' ').next()).map(str::to_owned);
        for id in self.containers().into_iter().chain(strangers) {
            let _ = self.engine.command(["rm", "--force", "--volumes", &id]).output();
        }
        for volume in self.volumes() {
            let _ = self.engine.command(["volume", "rm", "--force", &volume]).output();
        }
        for tag in self.tags().iter().filter(|tag| tag.starts_with("upgrade-kept:")) {
            let _ = self.engine.command(["image", "rm", tag]).output();
        }
        let _ = fs::remove_dir_all(self.state());
        let _ = fs::remove_dir_all(self.project());
    }

    /// Writes down all that is there: who, of what, how it runs, what the volumes and files hold,
    /// and everything that a run might leave.
    pub(crate) fn observe(&self) -> String {
        let mut lines = Vec::new();
        let format = "{{.Name}} {{.Config.Image}} running {{.State.Running}} restarts {{.HostConfig.RestartPolicy.Name}} \
                      {{range .Config.Env}}{{.}} {{end}}{{range .Mounts}}{{.Name}} {{end}}";
        for id in self.containers() {
            let line = self.docker(&["inspect", "--format", format, &id]);
            // Where Compose 1 took the volumes from.
            let words = line.split(' ').filter(|word| !word.starts_with("affinity:container="));
            lines.push(words.collect::<Vec<_>>().join(" "));
        }
        lines.extend(self.strangers().into_iter().map(|line| format!("left behind: container {line}")));
        lines.extend(self.volumes().into_iter().map(|volume| format!("volume {volume}")));
        lines.extend(self.tags().into_iter().map(|tag| format!("image {tag}")));
        if self.what == What::Containers {
            for what in ["log", "data"] {
                let from = format!("{}:/data/.", self.of(&format!("eye-{what}")));
                let copy = self.home.path().join("copy");
                let _ = fs::remove_dir_all(&copy);
                self.docker(&["cp", &from, copy.to_str().unwrap()]);
                lines.push(files(&copy, what));
            }
        } else {
            lines.push(files(&self.project(), "project"));
        }
        lines.sort_unstable();
        lines.join("\n").replace(&self.name, "NAME")
    }

    /// The container that serves, where it is to be the same one after a rollback; Compose makes another.
    pub(crate) fn serving(&self) -> Option<String> {
        let format = "{{.Id}} {{.State.Running}}";
        (self.what == What::Containers).then(|| self.docker(&["inspect", "--format", format, &self.of("web")]))
    }

    fn write(&self, name: &str, steps: &str, commit: &str) -> String {
        let text = format!(
            "upgrade: killed\ntargets: {{ engine: {{ uses: docker, with: {{ host: \"{}\" }} }} }}\ncommit: {commit}\nsteps:{steps}",
            self.engine.host()
        );
        let text = text.replace("NAME", &self.name).replace("IMAGES", &self.images);
        let text = text.replace("HOME", &self.home.path().display().to_string());
        let file = self.home.path().join(name);
        fs::write(&file, text.replace("GATE", "{ within: 20s, stable: 0s, every: 50ms }")).unwrap();
        file.display().to_string()
    }

    /// Writes a pipeline; returns its file.
    pub(crate) fn pipeline(&self, upgrade: Upgrade) -> String {
        let steps = if self.what == What::Containers { CONTAINERS } else { PROJECT };
        match upgrade {
            Upgrade::Good => self.write("good.yaml", steps, "now"),
            Upgrade::Bad => self.write("bad.yaml", &format!("{steps}{BAD}"), "now"),
            Upgrade::Unconfirmed => self.write("unconfirmed.yaml", steps, "{ confirm_within: 1h }"),
        }
    }

    /// Makes the command, as another program's child where `under` names one.
    pub(crate) fn command(&self, under: &[String], arguments: &[impl AsRef<str>]) -> Command {
        let upgrade = env!("CARGO_BIN_EXE_upgrade").to_owned();
        let words: Vec<_> = under.iter().chain([&upgrade]).collect();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).arg("--state-dir").arg(self.state());
        command.args(arguments.iter().map(AsRef::as_ref)).current_dir(self.home.path());
        for name in ["UPGRADE_STATE_DIR", "UPGRADE_SEAL_KEY", "DOCKER_HOST", "DOCKER_CONTEXT"] {
            command.env_remove(name);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    pub(crate) fn upgrade(&self, arguments: &[impl AsRef<str>]) -> Output {
        self.command(&[], arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap()
    }

    /// Returns the state of the run; none if there is no run.
    pub(crate) fn state_of_the_run(&self) -> Option<String> {
        if !self.state().join("runs").exists() {
            return None;
        }
        let said = self.upgrade(&["history", "--output", "json"]);
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        let mut runs = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()?.get("run").cloned());
        runs.next_back().map(|run| run["state"].as_str().unwrap_or_else(|| panic!("{run}")).to_owned())
    }

    /// The place of a file of this scene.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let cleared = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.clear()));
        drop(cleared);
        for version in ["1", "2"] {
            let tag = format!("{}:{version}", self.images);
            let _ = self.engine.command(["image", "rm", "--force", "--no-prune", &tag]).output();
        }
    }
}

/// Every file below a directory, with what it says.
fn files(directory: &Path, what: &str) -> String {
    let mut lines: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap_or_default();
            format!("{what}/{}: {text:?}", path.file_name().unwrap().to_string_lossy())
        })
        .collect();
    lines.sort_unstable();
    lines.join("\n")
}
