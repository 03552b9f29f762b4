//! A service that has the command in its own container.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use upgrade_testbed::docker::{self, Engine, Image};

/// A container with the command in it, its state on a volume, and images to go to.
pub(crate) struct Service {
    pub(crate) engine: Engine,
    pub(crate) name: String,
}

impl Service {
    pub(crate) fn start(what: &str) -> Option<Self> {
        docker::shared().map(|engine| Self::start_on(engine, what, "bridge"))
    }

    pub(crate) fn start_on(engine: Engine, what: &str, network: &str) -> Self {
        let service = Self { name: engine.unique(what), engine };
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("upgrade");
        let stripped = Command::new("strip").arg("-o").arg(&program).arg(env!("CARGO_BIN_EXE_upgrade")).status();
        assert!(stripped.is_ok_and(|status| status.success()), "binutils has `strip`");
        service.image("1.0.0", &program, true);
        service.image("2.0.0", &program, true);
        service.image("2.1.0", &program, false);
        let socket = service.engine.host().strip_prefix("unix://").expect("the engine of the tests is on this machine");
        let (state, socket) = (format!("{}-state:/state", service.name), format!("{socket}:/var/run/docker.sock"));
        let image = service.image_of("1.0.0");
        let name = ["run", "--detach", "--name", &service.name, "--network", network, "--restart", "always"];
        service.docker(&[&name[..], &["--volume", &state, "--volume", &socket, &image]].concat());
        service
    }

    fn image(&self, version: &str, program: &Path, healthy: bool) {
        let image = Image::web(version).program(program);
        let image = if healthy { image } else { image.healthcheck("echo the queue is not reachable; false") };
        image.build(&self.engine, &self.image_of(version));
    }

    pub(crate) fn image_of(&self, version: &str) -> String {
        format!("{}:{version}", self.name)
    }

    pub(crate) fn docker(&self, arguments: &[&str]) -> String {
        self.engine.docker(arguments)
    }

    pub(crate) fn id(&self) -> String {
        self.docker(&["inspect", "--format", "{{.Id}}", &self.name])
    }

    pub(crate) fn inspect(&self, format: &str) -> String {
        self.docker(&["inspect", "--format", format, &self.name])
    }

    /// Begins an upgrade from inside the container, and returns when the command there is no more.
    pub(crate) fn upgrade_to(&self, version: &str, meanwhile: impl FnOnce(&Self)) -> String {
        let pipeline = format!(
            "upgrade: web\nto: {version}\nsteps:\n  - id: web\n    uses: docker.container\n    with:\n      name: {}\n      \
             image: {}\n      pull: never\n      health: {{ exec: [wget, -qO-, \"http://127.0.0.1:8080/version\"], within: 20s, stable: 500ms, every: 50ms }}\n      \
             handover: {{ state: /state, command: [upgrade, --state-dir, /state, resume, --wait, 1m, RUN] }}\ncommit: now\n",
            self.name,
            self.image_of(version)
        );
        let script = format!("cat >/state/pipeline.yaml <<'END'\n{pipeline}END");
        self.docker(&["exec", &self.name, "sh", "-c", &script]);
        let mut command = self.engine.command(["exec", &self.name, "upgrade", "--state-dir", "/state", "run"]);
        command.args(["/state/pipeline.yaml", "--yes"]);
        let running = std::thread::spawn(move || command.output().unwrap());
        meanwhile(self);
        let done = running.join().unwrap();
        String::from_utf8_lossy(&done.stderr).into_owned() + &String::from_utf8_lossy(&done.stdout)
    }

    /// Waits until the last run is as it is to be, asked from inside whatever serves by then.
    pub(crate) fn await_outcome(&self, outcome: &str, said: &str) {
        let began = Instant::now();
        loop {
            let asked =
                self.engine.command(["exec", &self.name, "upgrade", "--state-dir", "/state", "status"]).output();
            let status = asked.map(|done| String::from_utf8_lossy(&done.stdout).into_owned()).unwrap_or_default();
            if status.contains(outcome) {
                return;
            }
            let all = || self.docker(&["ps", "--all", "--filter", &format!("name={}", self.name)]);
            assert!(began.elapsed() < Duration::from_secs(60), "{said}\n{status}\n{}", all());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    pub(crate) fn helpers(&self) -> Vec<String> {
        let filter = format!("label=io.github.upgrade-rs.helper-for={}", self.name);
        let found = self.docker(&["ps", "--all", "--quiet", "--filter", &filter]);
        found.lines().map(str::to_owned).collect()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let named =
            self.engine.command(["ps", "--all", "--quiet", "--filter", &format!("name={}", self.name)]).output();
        for id in String::from_utf8_lossy(&named.map(|done| done.stdout).unwrap_or_default()).lines() {
            let _ = self.engine.command(["rm", "--force", "--volumes", id]).output();
        }
        let _ = self.engine.command(["volume", "rm", "--force", &format!("{}-state", self.name)]).output();
        for version in ["1.0.0", "2.0.0", "2.1.0"] {
            let _ = self.engine.command(["image", "rm", "--force", "--no-prune", &self.image_of(version)]).output();
        }
    }
}
