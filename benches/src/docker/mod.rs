//! What the benchmarks of Docker share: a place on an engine, requests that notice a gap, and runs.

pub mod socket;
pub mod traffic;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use upgrade_core::registry::{AnyTarget, BuildContext};
use upgrade_docker::EngineConfig;
use upgrade_testbed::docker::{self, Engine, Image, Own};

use crate::Outcome;

/// Ends at once when it is stopped, and tells in `/id` which start of which container answers.
const WEB: &str = "cat /proc/sys/kernel/random/uuid >/www/id; exec httpd -f -p ${PORT:-8080} -h /www";

/// Says how requests reach a service at a port of loopback.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reached {
    /// It listens there itself, in the network of the host.
    Directly,
    /// The engine passes them on to its address in a network of the engine's. What arrives before the
    /// address does makes the kernel ask for it, and only ask again after one second.
    Published,
}

impl Reached {
    /// Says it for a person.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Directly => "on the host's network",
            Self::Published => "behind a published port",
        }
    }

    /// Returns the arguments of `docker run`.
    pub fn arguments(self, port: u16, network: &str) -> [String; 4] {
        match self {
            Self::Directly => ["--network", "host", "--env", &format!("PORT={port}")].map(str::to_owned),
            Self::Published => {
                ["--network", network, "--publish", &format!("127.0.0.1:{port}:8080")].map(str::to_owned)
            }
        }
    }

    /// Returns the lines of a service in a file of Compose.
    pub fn lines(self, port: u16) -> String {
        match self {
            Self::Directly => format!("    network_mode: host\n    environment: [PORT={port}]\n"),
            Self::Published => format!("    ports: [\"127.0.0.1:{port}:8080\"]\n"),
        }
    }
}

/// Holds an engine, a directory, and the names that are a benchmark's own; removed on drop.
pub struct Place {
    engine: Engine,
    prefix: String,
    home: tempfile::TempDir,
    _own: Option<Own>,
}

impl Place {
    /// Starts an engine; where `UPGRADE_TEST_DOCKER_HOST` names one, takes a corner of that.
    ///
    /// # Errors
    /// There is none.
    pub fn take(what: &str) -> Outcome<Self> {
        let (engine, own) = if std::env::var_os("UPGRADE_TEST_DOCKER_HOST").is_some() {
            (docker::shared().ok_or("there is no engine")?, None)
        } else {
            let own = docker::own().ok_or("there is no engine: name one in UPGRADE_TEST_DOCKER_HOST")?;
            (own.engine().clone(), Some(own))
        };
        let home = tempfile::tempdir()?;
        Ok(Self { prefix: engine.unique(what), engine, home, _own: own })
    }

    /// Returns the engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Returns a name of the benchmark's own.
    pub fn name(&self, what: &str) -> String {
        format!("{}-{what}", self.prefix)
    }

    /// Returns a directory of the benchmark's own.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// Makes the image of a web service that takes a while until it answers; returns its name.
    pub fn web(&self, tag: &str, ready_after: &str) -> String {
        let pause = if ready_after == "0" { String::new() } else { format!("sleep {ready_after}; ") };
        // A variable that differs, or two tags would be one image.
        self.image(tag, &Image::shell(&format!("{pause}{WEB}")).with(&format!("ENV TAG={tag}")))
    }

    /// Makes an image; returns its name.
    pub fn image(&self, tag: &str, image: &Image) -> String {
        let name = format!("{}:{tag}", self.name("image"));
        image.build(&self.engine, &name);
        name
    }

    /// Makes a network; returns its name.
    pub fn network(&self) -> String {
        let name = self.name("network");
        self.engine.docker(["network", "create", &name]);
        name
    }

    /// Lays out a project of Compose; returns its directory.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn project(&self, text: &str) -> Outcome<PathBuf> {
        let directory = self.home().join(&self.prefix);
        std::fs::create_dir(&directory)?;
        std::fs::write(directory.join("docker-compose.yml"), text)?;
        Ok(directory)
    }

    /// Returns the context in which steps are made, the engine known as `engine`.
    ///
    /// # Errors
    /// The engine's address is none.
    pub fn context(&self, host: &str) -> Outcome<BuildContext> {
        let config = EngineConfig { host: Some(host.to_owned()), ..EngineConfig::default() };
        let engine = upgrade_docker::Engine::from_config(config, &BuildContext::new("/"))?;
        Ok(BuildContext::new("/").with_target("engine", AnyTarget::new("docker", engine)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for (list, remove) in [
            (&["ps", "--all", "--format", "{{.Names}}"][..], &["rm", "--force", "--volumes"][..]),
            (&["network", "ls", "--format", "{{.Name}}"], &["network", "rm"]),
            (&["image", "ls", "--format", "{{.Repository}}:{{.Tag}}"], &["image", "rm", "--force"]),
        ] {
            let Ok(listed) = self.engine.command(list).output() else { return };
            let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
            let own: Vec<&str> = listed.lines().filter(|name| name.starts_with(&self.prefix)).collect();
            if !own.is_empty() {
                let _ = self.engine.command(remove).args(own).output();
            }
        }
    }
}

/// Names Compose as it is here: the program and its first arguments, version 2 before version 1.
///
/// # Errors
/// There is none.
pub fn compose() -> Outcome<Vec<String>> {
    for argv in [&["docker", "compose"][..], &["docker-compose"]] {
        let mut asked = Command::new(argv[0]);
        asked.args(&argv[1..]).arg("version").stdout(Stdio::null()).stderr(Stdio::null());
        if asked.status().is_ok_and(|status| status.success()) {
            return Ok(argv.iter().map(|word| (*word).to_owned()).collect());
        }
    }
    Err("there is no Docker Compose".into())
}

/// Runs Compose on a project, as a person would.
///
/// # Errors
/// It fails; what it said is told.
pub fn run_compose(argv: &[String], place: &Place, directory: &Path, arguments: &[&str]) -> Outcome<()> {
    let (program, first) = argv.split_first().ok_or("there is no Docker Compose")?;
    let mut command = Command::new(program);
    command.args(first).args(arguments).current_dir(directory).env("DOCKER_HOST", place.engine.host());
    let done = command.stdin(Stdio::null()).output()?;
    if done.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&done.stderr).into_owned().into()) }
}

/// Returns a port of loopback that is free.
///
/// # Errors
/// None is.
pub fn free_port() -> Outcome<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
