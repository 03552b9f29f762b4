//! A directory with canaries in it, the command run there, and the search for them.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// What every canary holds, and nothing else in the world.
pub(crate) const MARK: &str = "cAnArY";

/// The secrets that the pipelines refer to by the environment.
const ENVIRONMENT: [(&str, &str); 3] = [
    ("NOTES_PASSWORD", "pass-cAnArY-1f\"2\\e'7 9b"),
    ("NOTES_TOKEN", "token-cAnArY-77ad"),
    ("NOTES_KEY", "first-cAnArY-line\nsecond-cAnArY-line"),
];

/// Holds the world of one test, with or without a key for what is sealed.
pub(crate) struct World {
    directory: TempDir,
    key: Option<&'static str>,
}

/// A run of the command: how it ended, and that it told nothing, was seen to already.
pub(crate) struct Ran {
    code: i32,
    text: String,
}

impl Ran {
    #[track_caller]
    pub(crate) fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{}", self.text);
        self
    }

    #[track_caller]
    pub(crate) fn says(self, text: &str) -> Self {
        assert!(self.text.contains(text), "no `{text}` in\n{}", self.text);
        self
    }
}

impl World {
    pub(crate) fn new() -> Self {
        let world = Self { directory: tempfile::tempdir().unwrap(), key: None };
        world.write("password.txt", "file-cAnArY-31c5\n");
        world
    }

    pub(crate) fn with_key() -> Self {
        Self { key: Some("0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"), ..Self::new() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    fn process(&self, arguments: &[&str]) -> Command {
        let mut process = Command::new(env!("CARGO_BIN_EXE_upgrade"));
        process.args(arguments).current_dir(self.directory.path()).stdin(Stdio::null());
        for name in ["UPGRADE_STATE_DIR", "UPGRADE_SEAL_KEY", "NO_COLOR"] {
            process.env_remove(name);
        }
        process.envs(ENVIRONMENT).envs(self.key.map(|key| ("UPGRADE_SEAL_KEY", key)));
        process
    }

    /// Runs the command and looks for canaries in what it prints and keeps.
    #[track_caller]
    pub(crate) fn upgrade(&self, arguments: &[&str]) -> Ran {
        let output = self.process(arguments).output().unwrap();
        let text = [&output.stdout[..], &output.stderr[..]].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        let text = text.join("\n");
        assert!(!self.key.is_some_and(|key| text.contains(key)), "the key was printed:\n{text}");
        assert!(!text.contains(MARK), "`upgrade {}` printed a canary:\n{text}", arguments.join(" "));
        self.keeps_no_canary();
        Ran { code: output.status.code().unwrap_or(-1), text }
    }

    /// Asks everything that may be asked of the latest run.
    #[track_caller]
    pub(crate) fn ask(&self) {
        for format in ["text", "json"] {
            for question in [&["status", "-v"][..], &["history", "-v"], &["audit", "verify"], &["audit", "export"]] {
                self.upgrade(&[question, &["--output", format]].concat()).exits(0);
            }
        }
    }

    /// Starts the command, waits until `name` is there, and kills it.
    #[track_caller]
    pub(crate) fn kill_at(&self, arguments: &[&str], name: &str) {
        let printed = fs::File::create(self.path("printed")).unwrap();
        let mut process = self.process(arguments);
        let child = process.stdout(printed.try_clone().unwrap()).stderr(printed).spawn().unwrap();
        let mut running = Running(child);
        let end = Instant::now() + Duration::from_secs(60);
        while !self.path(name).exists() {
            assert!(Instant::now() < end, "{}", fs::read_to_string(self.path("printed")).unwrap());
            std::thread::sleep(Duration::from_millis(10));
        }
        running.0.kill().unwrap();
        running.0.wait().unwrap();
        let printed = fs::read_to_string(self.path("printed")).unwrap();
        assert!(!printed.contains(MARK), "printed before it was killed:\n{printed}");
        self.keeps_no_canary();
    }

    /// Fails if a canary is kept, but in sealed files of the owner's alone where there is no key.
    #[track_caller]
    pub(crate) fn keeps_no_canary(&self) {
        self.keeps_no_key();
        for path in self.with_canaries(".upgrade") {
            let sealed = self.key.is_none() && path.starts_with(".upgrade/sealed");
            assert!(
                sealed,
                "a canary in {}: {}",
                path.display(),
                around_mark(&fs::read(self.path("").join(&path)).unwrap())
            );
            let mode = fs::metadata(self.path(path.to_str().unwrap())).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "mode of {}", path.display());
        }
    }

    /// Fails unless the key is in none of these files.
    #[track_caller]
    fn keeps_no_key(&self) {
        let Some(key) = self.key else { return };
        for path in files(&self.path(".upgrade")) {
            assert!(!holds(&fs::read(&path).unwrap_or_default(), key), "the key is in {}", path.display());
        }
    }

    /// Fails unless what was sealed is gone.
    #[track_caller]
    pub(crate) fn seals_nothing(&self) {
        assert_eq!(self.with_canaries(".upgrade"), BTreeSet::new());
        assert_eq!(files(&self.path(".upgrade/sealed")), Vec::<PathBuf>::new());
    }

    /// Lists the files of a directory here whose bytes or names hold a canary.
    pub(crate) fn with_canaries(&self, directory: &str) -> BTreeSet<PathBuf> {
        let held = |path: &PathBuf| {
            let bytes = fs::read(path).unwrap_or_default();
            path.to_string_lossy().contains(MARK) || holds(&bytes, MARK)
        };
        let here = self.directory.path();
        let found = files(&self.path(directory)).into_iter().filter(held);
        found.map(|path| path.strip_prefix(here).unwrap().to_path_buf()).collect()
    }
}

fn holds(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|part| part == text.as_bytes())
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

fn around_mark(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines = text.lines().filter(|line| line.contains(MARK));
    lines.map(|line| line.trim_matches('\0')).collect::<Vec<_>>().join("\n")
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
