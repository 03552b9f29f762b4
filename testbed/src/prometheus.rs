//! A Prometheus that scrapes what a test serves.

use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::guardian::{END_BY_NUMBER, Guardian};
use crate::home::Home;
use crate::postgres::cluster::{HOST, free_port};

/// A running Prometheus, ended on drop.
#[derive(Debug)]
pub struct Prometheus {
    port: u16,
    directory: PathBuf,
    child: Child,
    _guardian: Guardian,
}

/// Starts a Prometheus that scrapes `/metrics` of ports on loopback, five times a second.
///
/// None, with a printed reason, where the program is missing.
///
/// # Panics
/// Under `CI=true` where the program is missing, and where it does not start.
pub fn start(targets: &[u16]) -> Option<Prometheus> {
    let Some(program) = program() else {
        let reason = "there is no prometheus; on Debian: apt-get install prometheus";
        assert!(std::env::var("CI").as_deref() != Ok("true"), "promised under CI, but {reason}");
        eprintln!("skipped: {reason}");
        return None;
    };
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let home = Home::of_this_user();
    let directory = home.base.join(format!("prometheus-{}-{number}", std::process::id()));
    let _ = std::fs::remove_dir_all(&directory);
    home.directory(&directory);
    let configuration = directory.join("prometheus.yml");
    home.file(&configuration, &text(targets));
    for _ in 0..20 {
        let port = free_port();
        let mut child = home
            .command(&program)
            .arg(format!("--config.file={}", configuration.display()))
            .arg(format!("--storage.tsdb.path={}", directory.join("data").display()))
            .arg(format!("--web.listen-address={HOST}:{port}"))
            .arg("--log.level=error")
            .current_dir(&directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        if comes_up(&mut child, port) {
            home.file(&directory.join("pid"), &child.id().to_string());
            let guardian = Guardian::over(&directory, END_BY_NUMBER);
            return Some(Prometheus { port, directory, child, _guardian: guardian });
        }
        let _ = child.kill();
        let _ = child.wait();
    }
    panic!("prometheus did not start; its configuration is in {}", directory.display());
}

impl Prometheus {
    /// The URL of this Prometheus.
    pub fn url(&self) -> String {
        format!("http://{HOST}:{}", self.port)
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn text(targets: &[u16]) -> String {
    let mut text = String::from(
        "global: { scrape_interval: 200ms, scrape_timeout: 200ms }\nscrape_configs:\n  - job_name: test\n    static_configs:\n",
    );
    for port in targets {
        let _ = writeln!(text, "      - targets: ['{HOST}:{port}']");
    }
    if targets.is_empty() {
        text.push_str("      - targets: []\n");
    }
    text
}

fn program() -> Option<PathBuf> {
    let places = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&places)
        .chain([Path::new("/usr/bin").to_owned()])
        .map(|directory| directory.join("prometheus"))
        .find(|path| path.is_file())
}

/// Waits until it says that it is ready: it listens some time before it answers queries.
fn comes_up(child: &mut Child, port: u16) -> bool {
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(30) {
        if !matches!(child.try_wait(), Ok(None)) {
            return false;
        }
        if is_ready(port).unwrap_or(false) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    false
}

fn is_ready(port: u16) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect((HOST, port))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    stream.write_all(b"GET /-/ready HTTP/1.0\r\n\r\n")?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    Ok(reply.split(' ').nth(1) == Some("200"))
}
