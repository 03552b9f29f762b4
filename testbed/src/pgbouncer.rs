//! PgBouncer before a server, in each of its modes.

use std::fmt;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::guardian::{END_BY_NUMBER, Guardian};
use crate::home::Home;
use crate::postgres::cluster::{HOST, free_port};
use crate::postgres::{PASSWORD, Server, USER};

/// Says when a client's session on the server may become another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// When the client goes.
    Session,
    /// After each transaction.
    Transaction,
    /// After each statement.
    Statement,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Session => "session",
            Self::Transaction => "transaction",
            Self::Statement => "statement",
        })
    }
}

/// A running PgBouncer, ended on drop.
#[derive(Debug)]
pub struct Pooler {
    port: u16,
    directory: PathBuf,
    child: Child,
    _guardian: Guardian,
}

/// Starts PgBouncer before a server; `settings` go to its configuration.
///
/// None, with a printed reason, where the program is missing.
///
/// # Panics
/// Under `CI=true` where the program is missing, and where it does not start.
pub fn start(server: &Server, mode: Mode, settings: &[(&str, &str)]) -> Option<Pooler> {
    let Some(program) = program() else {
        let reason = "there is no pgbouncer; on Debian: apt-get install pgbouncer";
        assert!(std::env::var("CI").as_deref() != Ok("true"), "promised under CI, but {reason}");
        eprintln!("skipped: {reason}");
        return None;
    };
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let home = Home::of_this_user();
    let directory = home.base.join(format!("pgbouncer-{}-{number}", std::process::id()));
    let _ = std::fs::remove_dir_all(&directory);
    home.directory(&directory);
    home.file(&directory.join("users"), &format!("\"{USER}\" \"{PASSWORD}\"\n"));
    for _ in 0..20 {
        let port = free_port();
        let mut text = format!(
            "[databases]\n* = host={HOST} port={}\n[pgbouncer]\nlisten_addr = {HOST}\nlisten_port = {port}\n\
             unix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {}\npool_mode = {mode}\nmax_client_conn = 200\n",
            server.port(),
            directory.join("users").display(),
        );
        for (name, value) in settings {
            text.push_str(&format!("{name} = {value}\n"));
        }
        let configuration = directory.join("pgbouncer.ini");
        home.file(&configuration, &text);
        let mut child = home
            .command(&program)
            .arg(&configuration)
            .current_dir(&directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        if comes_up(&mut child, port) {
            home.file(&directory.join("pid"), &child.id().to_string());
            let guardian = Guardian::over(&directory, END_BY_NUMBER);
            return Some(Pooler { port, directory, child, _guardian: guardian });
        }
        let _ = child.kill();
        let _ = child.wait();
    }
    panic!("pgbouncer did not start; its configuration is in {}", directory.display());
}

impl Pooler {
    /// The port on loopback.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The URL of a database through this pooler.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://{USER}:{PASSWORD}@{HOST}:{}/{database}", self.port)
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn program() -> Option<PathBuf> {
    let places = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&places)
        .chain([PathBuf::from("/usr/sbin")])
        .map(|directory| directory.join("pgbouncer"))
        .find(|path| path.is_file())
}

fn comes_up(child: &mut Child, port: u16) -> bool {
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(20) {
        if !matches!(child.try_wait(), Ok(None)) {
            return false;
        }
        if std::net::TcpStream::connect((HOST, port)).is_ok() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}
