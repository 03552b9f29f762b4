//! A directory with a small system in it, and the command run there.

use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// Holds a system: two files, one of which is there before.
pub(crate) struct World {
    directory: TempDir,
    environment: Vec<(String, String)>,
}

/// What a run of the command left.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    /// Fails unless the exit status is this.
    #[track_caller]
    pub(crate) fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    /// Reads stdout as JSON Lines; anything else on it fails.
    #[track_caller]
    pub(crate) fn objects(&self) -> Vec<Value> {
        self.stdout.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
    }

    #[track_caller]
    pub(crate) fn says(self, text: &str) -> Self {
        assert!(self.stdout.contains(text) || self.stderr.contains(text), "no `{text}` in {self:#?}");
        self
    }
}

impl World {
    pub(crate) fn new() -> Self {
        let world = Self { directory: tempfile::tempdir().unwrap(), environment: Vec::new() };
        world.write("kept.txt", "old\n");
        world
    }

    /// Has every command called with these variables.
    #[cfg(feature = "postgres")]
    pub(crate) fn with(mut self, environment: &[(&str, &str)]) -> Self {
        self.environment.extend(environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        self
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    pub(crate) fn read(&self, name: &str) -> Option<String> {
        std::fs::read_to_string(self.path(name)).ok()
    }

    /// Writes a pipeline of two files with this commit mode.
    pub(crate) fn pipeline(&self, commit: &str) {
        self.write(
            "upgrade.yaml",
            &format!(
                "upgrade: notes\nto: 1.1.0\nvars: {{ text: new }}\nsteps:\n\
                 - {{ id: kept, uses: host.file, with: {{ path: kept.txt, content: \"${{text}}\\n\" }} }}\n\
                 - {{ id: made, uses: host.file, with: {{ path: made.txt, content: \"${{to}}\\n\" }} }}\n\
                 commit: {commit}\n"
            ),
        );
    }

    /// Fails unless the system is as it was.
    #[track_caller]
    pub(crate) fn is_old(&self) {
        assert_eq!((self.read("kept.txt").as_deref(), self.read("made.txt")), (Some("old\n"), None));
    }

    /// Fails unless the system is upgraded.
    #[track_caller]
    pub(crate) fn is_new(&self) {
        assert_eq!(
            (self.read("kept.txt").as_deref(), self.read("made.txt").as_deref()),
            (Some("new\n"), Some("1.1.0\n"))
        );
    }

    fn process(&self, arguments: &[&str]) -> Process {
        let mut process = Process::new(env!("CARGO_BIN_EXE_upgrade"));
        process.args(arguments).current_dir(self.directory.path()).stdin(Stdio::null());
        for name in ["UPGRADE_STATE_DIR", "UPGRADE_JOURNAL", "UPGRADE_SEAL_KEY", "NO_COLOR"] {
            process.env_remove(name);
        }
        process.envs(self.environment.iter().map(|(name, value)| (name, value)));
        process
    }

    pub(crate) fn upgrade(&self, arguments: &[&str]) -> Ran {
        self.upgrade_with(arguments, &[])
    }

    pub(crate) fn upgrade_with(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Ran {
        let mut process = self.process(arguments);
        process.envs(environment.iter().copied());
        let output = assert_cmd::Command::from_std(process).timeout(Duration::from_secs(60)).output().unwrap();
        Ran {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Starts the command and leaves it running.
    pub(crate) fn start(&self, arguments: &[&str]) -> Driver {
        let mut process = self.process(arguments);
        Driver(process.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    /// Waits until the latest run is in this state; returns its id.
    #[track_caller]
    pub(crate) fn reaches(&self, state: &str) -> String {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            let runs = self.runs();
            if let Some(run) = runs.last().filter(|run| run["state"] == state) {
                return run["run"].as_str().unwrap().to_owned();
            }
            assert!(Instant::now() < end, "no run is {state}: {runs:#?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn runs(&self) -> Vec<Value> {
        let listed = self.upgrade(&["history", "--output", "json"]).exits(0).objects();
        listed.into_iter().filter_map(|object| object.get("run").cloned()).collect()
    }

    pub(crate) fn journal(&self, run: &str) -> PathBuf {
        self.path(".upgrade/runs").join(Path::new(run).with_extension("jsonl"))
    }
}

/// Holds a command that runs on.
pub(crate) struct Driver(Child);

impl Driver {
    pub(crate) fn signal(&self, signal: &str) {
        let sent = Process::new("kill").args([signal, &self.0.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// Waits for its end.
    #[track_caller]
    pub(crate) fn ends(mut self) -> Option<i32> {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < end, "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
