//! A site of the quickstart at a port of its own, and the command run on it.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// How long any one command may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// One of the upgrades of the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Upgrade {
    /// From 1.0.0 to 1.1.0, which works.
    Good,
    /// The same, not committed before somebody confirms.
    Unconfirmed,
    /// From 1.1.0 to 1.2.0, which is never healthy.
    Bad,
}

impl Upgrade {
    pub(crate) fn versions(self) -> (&'static str, &'static str) {
        match self {
            Self::Good | Self::Unconfirmed => ("1.0.0", "1.1.0"),
            Self::Bad => ("1.1.0", "1.2.0"),
        }
    }

    fn file(self) -> &'static str {
        match self {
            Self::Good => "good.yaml",
            Self::Unconfirmed => "unconfirmed.yaml",
            Self::Bad => "bad.yaml",
        }
    }
}

/// Holds a directory in which the site is made anew for each case, always at the same path.
pub(crate) struct Site {
    root: TempDir,
    port: u16,
    client: PathBuf,
}

impl Site {
    /// Makes the site, and the sites to start from.
    pub(crate) fn new() -> Self {
        let programs = programs();
        let site = Self { root: tempfile::tempdir().unwrap(), port: port(), client: programs.join("notes-1_0_0") };
        site.write_pipelines();
        let prepare = example().join("prepare");
        let port = site.port.to_string();
        succeeds(Command::new(prepare).arg(&programs).arg(site.directory()).arg(port));
        site.keep("1.0.0");
        site.service("start");
        assert_eq!(site.command(&site.run(Upgrade::Good)).status().unwrap().code(), Some(0));
        site.service("stop");
        site.keep("1.1.0");
        site
    }

    /// Puts the site back to a version, with its service running and no journal.
    pub(crate) fn reset(&self, version: &str) {
        self.end_services();
        let _ = fs::remove_dir_all(self.directory());
        succeeds(Command::new("cp").arg("-a").arg(self.root.path().join(version)).arg(self.directory()));
        self.service("start");
    }

    fn keep(&self, version: &str) {
        succeeds(Command::new("cp").arg("-a").arg(self.directory()).arg(self.root.path().join(version)));
        let _ = fs::remove_dir_all(self.root.path().join(version).join("state"));
    }

    fn write_pipelines(&self) {
        let write = |name: &str, source: &str, replace: &[(&str, &str)]| {
            let mut text = fs::read_to_string(example().join(source)).unwrap();
            for (old, new) in replace {
                assert!(text.contains(old), "{source} has no `{old}`");
                text = text.replace(old, new);
            }
            fs::write(self.root.path().join(name), text).unwrap();
        };
        write("good.yaml", "upgrade-1.1.0.yaml", &[]);
        write("unconfirmed.yaml", "upgrade-1.1.0.yaml", &[("commit: now", "commit: { confirm_within: 1h }")]);
        write("bad.yaml", "upgrade-1.2.0.yaml", &[("within: 5s", "within: 300ms")]);
    }

    pub(crate) fn directory(&self) -> PathBuf {
        self.root.path().join("live")
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.directory().join("state")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory().join("site").join(name)
    }

    pub(crate) fn root(&self) -> &Path {
        self.root.path()
    }

    /// Asks the service.
    pub(crate) fn get(&self, what: &str) -> String {
        let url = format!("http://127.0.0.1:{}/{what}", self.port);
        let output = Command::new(&self.client).args(["get", &url]).output().unwrap();
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    }

    fn service(&self, verb: &str) {
        succeeds(Command::new(self.path("current/bin/notes")).arg(verb).arg(self.path("config.toml")));
    }

    /// Lists the processes that serve this site: their ids and programs.
    pub(crate) fn services(&self) -> Vec<(u32, String)> {
        let config = self.path("config.toml");
        let mut found = Vec::new();
        for process in fs::read_dir("/proc").unwrap().filter_map(Result::ok) {
            let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
            let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
            if words.len() > 2 && words[1] == "serve" && Path::new(&*words[2]) == config {
                found.push((pid, words[0].clone().into_owned()));
            }
        }
        found
    }

    fn end_services(&self) {
        for (pid, _) in self.services() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).stderr(Stdio::null()).status();
        }
        let end = Instant::now() + PATIENCE;
        while !self.services().is_empty() {
            assert!(Instant::now() < end, "the service cannot be killed");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Returns the arguments that carry an upgrade out.
    pub(crate) fn run(&self, upgrade: Upgrade) -> Vec<String> {
        let variables = [format!("site={}", self.directory().join("site").display()), format!("port={}", self.port)];
        let file = self.root.path().join(upgrade.file()).display().to_string();
        let variables = variables.into_iter().flat_map(|variable| ["--var".to_owned(), variable]);
        ["run".to_owned(), file].into_iter().chain(variables).collect()
    }

    /// Writes a pipeline that changes nothing; returns its file.
    pub(crate) fn run_nothing(&self) -> String {
        let file = self.root.path().join("nothing.yaml");
        let steps = "- { id: nothing, uses: host.command, with: { run: ['true'], undo: ['true'] } }";
        fs::write(&file, format!("upgrade: nothing\nsteps:\n{steps}\n")).unwrap();
        file.display().to_string()
    }

    /// Makes the command, which says nothing to anybody.
    pub(crate) fn command(&self, arguments: &[impl AsRef<str>]) -> Command {
        self.command_under(&[], arguments)
    }

    /// Makes the command as another program's child.
    pub(crate) fn command_under(&self, under: &[String], arguments: &[impl AsRef<str>]) -> Command {
        let upgrade = env!("CARGO_BIN_EXE_upgrade").to_owned();
        let words: Vec<_> = under.iter().chain([&upgrade]).collect();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).arg("--state-dir").arg(self.state());
        command.args(arguments.iter().map(AsRef::as_ref)).current_dir(self.root.path());
        for name in ["UPGRADE_STATE_DIR", "UPGRADE_SEAL_KEY"] {
            command.env_remove(name);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Runs the command to its end; what it said is in the answer.
    pub(crate) fn upgrade(&self, arguments: &[&str]) -> Result<Said, String> {
        said(&mut self.command(arguments)).map_err(|why| format!("`upgrade {}`: {why}", arguments.join(" ")))
    }

    /// Returns the state of the latest run; none if there is no run.
    pub(crate) fn latest(&self) -> Result<Option<String>, String> {
        if !self.state().join("runs").exists() {
            return Ok(None);
        }
        let said = self.upgrade(&["history", "--output", "json"])?;
        if said.code != 0 {
            return Err(format!("the history cannot be read: {said:?}"));
        }
        let mut runs =
            said.stdout.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()?.get("run").cloned());
        match runs.next_back() {
            Some(run) if !run["damage"].is_null() => Err(format!("a damaged run: {run}")),
            Some(run) => Ok(Some(run["state"].as_str().unwrap_or_default().to_owned())),
            None => Ok(None),
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.end_services();
    }
}

/// What a command left.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs a command that must end in time.
pub(crate) fn said(command: &mut Command) -> Result<Said, String> {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(|error| error.to_string())?;
    let pid = child.id().to_string();
    let waiting = std::thread::spawn(move || child.wait_with_output());
    let end = Instant::now() + PATIENCE;
    while !waiting.is_finished() {
        if Instant::now() > end {
            let _ = Command::new("kill").args(["-9", &pid]).status();
            return Err("it does not end".into());
        }
        std::thread::sleep(Duration::from_millis(3));
    }
    let Output { status, stdout, stderr } = waiting.join().unwrap().map_err(|error| error.to_string())?;
    Ok(Said {
        code: status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&stdout).into_owned(),
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
    })
}

/// Waits for the end of a child, which must come in time.
pub(crate) fn ends(child: &mut Child) -> Result<ExitStatus, String> {
    let end = Instant::now() + PATIENCE;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status),
            Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(3)),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err("the command does not end".into());
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}

fn succeeds(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn example() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/quickstart")
}

/// Builds the service's releases where no other build is waited for; returns their directory.
fn programs() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("notes");
    succeeds(
        Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--locked", "--offline", "--profile", "quick", "-p", "quickstart-notes"])
            .arg("--target-dir")
            .arg(&target)
            // Each case copies the releases a few times.
            .env("CARGO_PROFILE_QUICK_STRIP", "symbols")
            .current_dir(example()),
    );
    target.join("quick")
}

/// Finds a port that is free, and below those that the system gives to clients.
fn port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    for _ in 0..10_000 {
        let next = std::process::id() * 64 + NEXT.fetch_add(1, Ordering::Relaxed);
        let port = u16::try_from(10_000 + next % 20_000).unwrap();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no port is free")
}
