//! The command inside the container that it replaces.

#![cfg(test)]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use upgrade_testbed::docker::{self, Engine, Image};

/// A container with the command in it, its state on a volume, and images to go to.
struct Service {
    engine: Engine,
    name: String,
}

impl Service {
    fn start(what: &str) -> Option<Self> {
        let engine = docker::shared()?;
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
        service.docker(&["run", "--detach", "--name", &service.name, "--volume", &state, "--volume", &socket, &image]);
        Some(service)
    }

    fn image(&self, version: &str, program: &Path, healthy: bool) {
        let image = Image::web(version).program(program);
        let image = if healthy { image } else { image.healthcheck("echo the queue is not reachable; false") };
        image.build(&self.engine, &self.image_of(version));
    }

    fn image_of(&self, version: &str) -> String {
        format!("{}:{version}", self.name)
    }

    fn docker(&self, arguments: &[&str]) -> String {
        self.engine.docker(arguments)
    }

    fn id(&self) -> String {
        self.docker(&["inspect", "--format", "{{.Id}}", &self.name])
    }

    fn inspect(&self, format: &str) -> String {
        self.docker(&["inspect", "--format", format, &self.name])
    }

    /// Begins an upgrade from inside the container, and returns when the command there is no more.
    fn upgrade_to(&self, version: &str, meanwhile: impl FnOnce(&Self)) -> String {
        let pipeline = format!(
            "upgrade: web\nto: {version}\nsteps:\n  - id: web\n    uses: docker.container\n    with:\n      name: {}\n      \
             image: {}\n      pull: never\n      health: {{ http: {{ port: 8080, path: /version }}, within: 20s, stable: 500ms, every: 50ms }}\n      \
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
    fn await_outcome(&self, outcome: &str, said: &str) {
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

    fn helpers(&self) -> Vec<String> {
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

#[test]
fn a_run_outlives_its_own_container_both_ways() {
    let Some(service) = Service::start("itself") else { return };
    let first = service.id();
    let said = service.upgrade_to("2.0.0", |_| {});
    service.await_outcome("committed", &said);
    let second = service.id();
    assert_ne!(first, second);
    assert_eq!(service.inspect("{{.Config.Image}} {{.State.Running}}"), format!("{} true", service.image_of("2.0.0")));

    // The next one is never healthy: the container that began it serves again.
    let said = service.upgrade_to("2.1.0", |_| {});
    service.await_outcome("rolled back", &said);
    assert_eq!(service.id(), second);
    assert_eq!(service.inspect("{{.State.Running}}"), "true");
}

#[test]
fn a_helper_that_is_killed_goes_on() {
    let Some(service) = Service::start("helped") else { return };
    let said = service.upgrade_to("2.0.0", |service| {
        let began = Instant::now();
        let mut killed = 0;
        while killed < 2 && began.elapsed() < Duration::from_secs(30) {
            for helper in service.helpers() {
                // By its own process: a `docker kill` is what somebody asked for, and ends it for good.
                let pid = service.docker(&["inspect", "--format", "{{.State.Pid}}", &helper]);
                if pid != "0" && Command::new("kill").args(["-KILL", &pid]).status().unwrap().success() {
                    killed += 1;
                }
            }
            std::thread::sleep(Duration::from_millis(150));
        }
        assert!(killed > 0, "there was no helper");
    });
    service.await_outcome("committed", &said);
    assert_eq!(service.inspect("{{.Config.Image}} {{.State.Running}}"), format!("{} true", service.image_of("2.0.0")));
}

#[test]
fn a_journal_that_would_end_with_its_container_is_refused_in_the_plan() {
    let Some(service) = Service::start("lost") else { return };
    let pipeline = format!(
        "upgrade: web\nto: 2.0.0\nsteps:\n  - {{ id: web, uses: docker.container, with: {{ name: {}, image: \"{}\", pull: never }} }}\n",
        service.name,
        service.image_of("2.0.0")
    );
    let ask = |pipeline: &str| {
        let script = format!(
            "cat >/tmp/pipeline.yaml <<'END'\n{pipeline}END\nexec upgrade --state-dir /tmp/state plan /tmp/pipeline.yaml"
        );
        let done = service.engine.command(["exec", &service.name, "sh", "-c", &script]).output().unwrap();
        assert!(!done.status.success());
        String::from_utf8_lossy(&done.stderr).into_owned() + &String::from_utf8_lossy(&done.stdout)
    };
    let said = ask(&pipeline);
    assert!(said.contains("it would end with it") && said.contains("handover:"), "{said}");
    let elsewhere = "handover: { state: /tmp/state, command: [upgrade, resume, RUN] }";
    let said = ask(&pipeline.replace("pull: never", &format!("pull: never, {elsewhere}")));
    assert!(said.contains("the journal at /tmp/state is inside container") && said.contains("--volume"), "{said}");
}
