//! A site of the database example at a port of its own, and the command run on it.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use upgrade_testbed::postgres::{Database, Server, Version, own};

/// One of the upgrades of the service at 1.0.0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Upgrade {
    /// To 2.0.0, which works.
    Good,
    /// To a 2.0.0 that never becomes what its verification asks for.
    Bad,
}

/// Holds the site, and a copy of all of it at 1.0.0 to begin again with.
pub(crate) struct Site {
    root: TempDir,
    port: u16,
    database: Database,
    /// From where the database is dropped and copied.
    aside: Database,
    _server: Server,
}

impl Site {
    /// Makes the site at 1.0.0, with the real command.
    pub(crate) fn new() -> Option<Self> {
        let server = own(Version::V15, &[])?;
        let (database, aside) = (server.database(), server.database());
        let root = tempfile::tempdir().unwrap();
        let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let site = Self { root, port, database, aside, _server: server };
        site.lay_out();
        let install = site.arguments("upgrade-1.0.0.yaml");
        let said = site.upgrade(&install);
        assert_eq!(said.status.code(), Some(0), "{said:?}");
        fs::remove_dir_all(site.state()).unwrap();
        site.end_services();
        site.aside.execute(&format!("create database saved template {}", site.database.name()));
        succeeds(Command::new("cp").arg("-a").arg(site.directory()).arg(site.root.path().join("saved")));
        Some(site)
    }

    fn lay_out(&self) {
        let programs = programs();
        for directory in ["run", "logs"] {
            fs::create_dir_all(self.directory().join(directory)).unwrap();
        }
        for version in ["1.0.0", "2.0.0"] {
            let release = self.directory().join("incoming").join(version);
            fs::create_dir_all(release.join("bin")).unwrap();
            let program = programs.join(format!("database-notes-{}", version.replace('.', "_")));
            fs::copy(program, release.join("bin/notes")).unwrap();
            fs::write(release.join("VERSION"), version).unwrap();
        }
        let pipelines = self.root.path().join("pipelines");
        fs::create_dir(&pipelines).unwrap();
        succeeds(Command::new("cp").arg("-a").arg(example().join("migrations")).arg(&pipelines));
        for file in ["upgrade-1.0.0.yaml", "upgrade-2.0.0.yaml"] {
            fs::copy(example().join(file), pipelines.join(file)).unwrap();
        }
        let text = fs::read_to_string(example().join("upgrade-2.0.0.yaml")).unwrap();
        let asked = r#"json: { "/version": "${to}" } }"#;
        assert!(text.contains(asked));
        fs::write(pipelines.join("bad.yaml"), text.replace(asked, r#"json: { "/version": "9.9.9" } }"#)).unwrap();
    }

    /// Puts everything back to 1.0.0, with its service running and no journal.
    pub(crate) fn reset(&self) {
        self.end_services();
        let _ = fs::remove_dir_all(self.state());
        let _ = fs::remove_dir_all(self.directory());
        succeeds(Command::new("cp").arg("-a").arg(self.root.path().join("saved")).arg(self.directory()));
        let name = self.database.name();
        self.aside.execute(&format!("drop database {name} with (force)"));
        self.aside.execute(&format!("create database {name} template saved"));
        let mut start = Command::new(self.directory().join("current/bin/notes"));
        start.arg("start").arg(self.directory().join("config.toml"));
        succeeds(self.with_environment(&mut start));
    }

    pub(crate) fn directory(&self) -> PathBuf {
        self.root.path().join("site")
    }

    fn state(&self) -> PathBuf {
        self.root.path().join("state")
    }

    /// Writes down all that an upgrade changes: two equal worlds give equal texts.
    pub(crate) fn observe(&self) -> String {
        let read = |name: &str| fs::read_to_string(self.directory().join(name)).unwrap();
        let current = fs::read_link(self.directory().join("current")).unwrap();
        let entries = |name: &str| fs::read_dir(self.directory().join(name)).map_or(0, Iterator::count);
        let databases = "select string_agg(datname, ' ' order by datname) from pg_database";
        // When a migration was applied, and how long it took, is each run's own.
        let history = "select format('%s %s %s', version, success, checksum) from _sqlx_migrations order by version";
        let contents = self.database.contents();
        let other_tables = contents.split("public.").filter(|table| !table.starts_with("_sqlx_migrations\n"));
        format!(
            "{} {}\n{}{}{} releases, {} backups\n{}\n{}\n{}{}",
            current.display(),
            self.get("version"),
            read("current/VERSION"),
            read("config.toml"),
            entries("releases"),
            entries("backups"),
            self.aside.text(databases),
            self.database.text(history),
            self.database.schema(),
            other_tables.collect::<String>()
        )
    }

    fn get(&self, what: &str) -> String {
        let url = format!("http://127.0.0.1:{}/{what}", self.port);
        let client = self.directory().join("incoming/1.0.0/bin/notes");
        let output = Command::new(client).args(["get", &url]).output().unwrap();
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    }

    /// Returns the arguments that carry an upgrade out.
    pub(crate) fn run(&self, upgrade: Upgrade) -> Vec<String> {
        self.arguments(match upgrade {
            Upgrade::Good => "upgrade-2.0.0.yaml",
            Upgrade::Bad => "bad.yaml",
        })
    }

    fn arguments(&self, file: &str) -> Vec<String> {
        let file = self.root.path().join("pipelines").join(file).display().to_string();
        let variables = [format!("site={}", self.directory().display()), format!("port={}", self.port)];
        let variables = variables.into_iter().flat_map(|variable| ["--var".to_owned(), variable]);
        ["run".to_owned(), file].into_iter().chain(variables).collect()
    }

    fn with_environment<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("DATABASE_URL", self.database.url())
    }

    /// Makes the command, which says nothing to anybody.
    pub(crate) fn command(&self, arguments: &[String]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_upgrade"));
        command.arg("--state-dir").arg(self.state()).args(arguments);
        for name in ["UPGRADE_STATE_DIR", "UPGRADE_SEAL_KEY", "UPGRADE_JOURNAL"] {
            command.env_remove(name);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.with_environment(&mut command);
        command
    }

    /// Runs the command to its end.
    pub(crate) fn upgrade(&self, arguments: &[String]) -> Output {
        self.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap()
    }

    /// Returns the state of the latest run; none if there is no run.
    pub(crate) fn state_of_the_run(&self) -> Option<String> {
        if !self.state().join("runs").exists() {
            return None;
        }
        let said = self.upgrade(&["history", "--output", "json"].map(str::to_owned));
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        let run =
            text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()?.get("run").cloned()).next_back();
        run.map(|run| run["state"].as_str().unwrap_or_else(|| panic!("{run}")).to_owned())
    }

    /// Counts the processes that serve this site.
    pub(crate) fn services(&self) -> usize {
        self.serving().len()
    }

    fn serving(&self) -> Vec<String> {
        let config = self.directory().join("config.toml");
        let serves = |pid: &String| {
            let line = fs::read(Path::new("/proc").join(pid).join("cmdline")).unwrap_or_default();
            let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
            words.len() > 2 && words[1] == "serve" && Path::new(&*words[2]) == config
        };
        let processes = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
        processes.filter_map(|process| process.file_name().into_string().ok()).filter(serves).collect()
    }

    fn end_services(&self) {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            let serving = self.serving();
            if serving.is_empty() {
                return;
            }
            assert!(Instant::now() < end, "the service cannot be killed");
            let _ = Command::new("kill").arg("-9").args(serving).stderr(Stdio::null()).status();
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.end_services();
    }
}

fn succeeds(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn example() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/database")
}

/// Builds the service's releases where no other build is waited for; returns their directory.
fn programs() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("database-notes");
    succeeds(
        Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--locked", "--offline", "--profile", "quick", "-p", "database-notes"])
            .arg("--target-dir")
            .arg(&target)
            .env("CARGO_PROFILE_QUICK_STRIP", "symbols")
            .current_dir(example()),
    );
    target.join("quick")
}
