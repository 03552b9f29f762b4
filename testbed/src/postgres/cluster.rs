//! One data directory and the server on it.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use sqlx::{ConnectOptions, Connection};

use super::{Version, administer};
use crate::blocking::wait;
use crate::guardian::Guardian;
use crate::home::Home;

/// Where every server listens.
pub(crate) const HOST: &str = "127.0.0.1";

/// What a test machine can be kept waiting for a server.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where a server is found.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) port: u16,
    pub(super) data: PathBuf,
    pub(super) log: PathBuf,
    /// None where the path would be too long for a socket's name.
    pub(super) sockets: Option<PathBuf>,
}

impl Place {
    pub(super) fn below(directory: &Path, port: u16) -> Self {
        let short = directory.as_os_str().len() < 80;
        Self {
            port,
            data: directory.join("data"),
            log: directory.join("log"),
            sockets: short.then(|| directory.to_owned()),
        }
    }
}

/// A server of one test's own.
#[derive(Debug)]
pub(super) struct Cluster {
    home: Home,
    bin: PathBuf,
    directory: PathBuf,
    place: Place,
    running: Mutex<Option<Child>>,
    _guardian: Guardian,
}

impl Cluster {
    pub(super) fn create(home: &Home, version: Version, bin: &Path, settings: &[(&str, &str)]) -> Self {
        Self::filled(home, bin, settings, |data| lay_out(home, version, bin, data))
    }

    /// A standby that follows this server and takes reads.
    pub(super) fn standby(&self, settings: &[(&str, &str)]) -> Self {
        Self::filled(&self.home, &self.bin, settings, |data| {
            run(self
                .home
                .command(&self.bin.join("pg_basebackup"))
                .args(["--write-recovery-conf", "--checkpoint=fast", "--no-sync", "--no-password"])
                .args(["--host", HOST, "--port", &self.place.port.to_string(), "--username", super::USER])
                .env("PGPASSWORD", super::PASSWORD)
                .arg("--pgdata")
                .arg(data));
        })
    }

    fn filled(home: &Home, bin: &Path, settings: &[(&str, &str)], fill: impl FnOnce(&Path)) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = home.base.join(format!("own-{}-{number}", std::process::id()));
        // A process of this number that was killed together with its guardian.
        let _ = std::fs::remove_dir_all(&directory);
        home.directory(&directory);
        let guardian = Guardian::over(&directory, END);
        fill(&directory.join("data"));
        let (child, place) = start_anywhere(home, bin, &directory, settings);
        Self {
            home: home.clone(),
            bin: bin.to_owned(),
            directory,
            place,
            running: Mutex::new(Some(child)),
            _guardian: guardian,
        }
    }

    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    pub(super) fn stop(&self, signal: Signal) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mut child) = running.take() {
            end(&mut child, signal);
        }
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    pub(super) fn start(&self) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if running.is_some() {
            return;
        }
        let began = Instant::now();
        *running = Some(loop {
            match try_start(&self.home, &self.bin, &self.place) {
                Ok(child) => break child,
                // An outgoing connection may hold the port for a moment.
                Err(Refused::PortTaken) if began.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(100));
                }
                Err(refused) => panic!("{}", refused.explain(&self.place)),
            }
        });
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop(Signal::QUIT);
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// Ends the server of the directory `$1`.
pub(super) const END: &str = r#"
    pid=$(head -n 1 "$1/data/postmaster.pid" 2>/dev/null)
    # The number alone may be another process's by now, or of one that nobody waited for.
    runs() { [ -n "$pid" ] && [ "$(readlink "/proc/$pid/cwd")" = "$1/data" ]; }
    if runs "$1"; then
        kill -QUIT "$pid"
        while runs "$1"; do sleep 0.1; done
    fi
"#;

/// Makes a data directory, as a copy of one that was made before: that takes a tenth of the time.
pub(super) fn lay_out(home: &Home, version: Version, bin: &Path, data: &Path) {
    let _guard = crate::sharing::lock(&home.base.join(format!("template-{version}.lock")));
    let template = home.base.join(format!("template-{version}"));
    let made = template.join("data");
    if !made.join("PG_VERSION").is_file() {
        let _ = std::fs::remove_dir_all(&template);
        let partial = home.base.join(format!("template-{version}.partial"));
        let _ = std::fs::remove_dir_all(&partial);
        home.directory(&partial);
        let password = partial.join("password");
        home.file(&password, super::PASSWORD);
        run(home
            .command(&bin.join("initdb"))
            .arg("--pgdata")
            .arg(partial.join("data"))
            .arg("--pwfile")
            .arg(&password)
            .args(["--username", super::USER, "--encoding=UTF8", "--locale=C"])
            .args(["--auth-local=trust", "--auth-host=scram-sha-256", "--no-sync"]));
        std::fs::rename(&partial, &template).expect("a directory of ours can be renamed");
    }
    run(Command::new("cp").args(["-a", "--reflink=auto", "--"]).args([&made, data]));
}

/// Runs a command to its end.
fn run(command: &mut Command) {
    let done = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(done.status.success(), "{command:?}: {}\n{}", done.status, String::from_utf8_lossy(&done.stderr));
}

/// Starts a server on a port that turns out to be free.
pub(super) fn start_anywhere(home: &Home, bin: &Path, directory: &Path, settings: &[(&str, &str)]) -> (Child, Place) {
    let base = std::fs::read_to_string(directory.join("data/postgresql.conf")).expect("initdb wrote a configuration");
    let began = Instant::now();
    loop {
        let place = Place::below(directory, free_port());
        configure(&place, &base, settings);
        match try_start(home, bin, &place) {
            Ok(child) => return (child, place),
            Err(Refused::PortTaken) if began.elapsed() < PATIENCE => {}
            Err(refused) => panic!("{}", refused.explain(&place)),
        }
    }
}

/// A port that was free a moment ago. Below those that the kernel gives to outgoing connections, so
/// that a server that is stopped finds it free when it starts again.
pub(crate) fn free_port() -> u16 {
    const FIRST: u16 = 20_000;
    const COUNT: u16 = 10_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let scattered = u16::try_from(std::process::id() % 997).expect("below 997") * 10;
        let number = scattered.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % COUNT;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, FIRST + number)).is_ok() {
            return FIRST + number;
        }
    }
}

fn configure(place: &Place, base: &str, settings: &[(&str, &str)]) {
    let quoted = |value: &str| format!("'{}'", value.replace('\'', "''"));
    let sockets = place.sockets.as_ref().map_or(String::new(), |directory| directory.display().to_string());
    let mut text = base.to_owned();
    let port = place.port.to_string();
    let ours = [
        ("listen_addresses", HOST),
        ("port", port.as_str()),
        ("unix_socket_directories", sockets.as_str()),
        ("log_line_prefix", "%m [%p] %a "),
        ("max_prepared_transactions", "0"),
    ];
    for (name, value) in ours.iter().chain(settings) {
        text.push_str(&format!("\n{name} = {}", quoted(value)));
    }
    text.push('\n');
    std::fs::write(place.data.join("postgresql.conf"), text).expect("it can be written");
}

#[derive(Debug)]
enum Refused {
    PortTaken,
    Ended(String),
    Silent,
}

impl Refused {
    fn explain(&self, place: &Place) -> String {
        let why = match self {
            Self::PortTaken => "its port stayed taken".to_owned(),
            Self::Ended(said) => format!("it said\n{said}"),
            Self::Silent => format!("it did not answer for {PATIENCE:?}"),
        };
        format!("the server at {} did not start: {why}", place.data.display())
    }
}

/// Starts a server and waits until it answers.
fn try_start(home: &Home, bin: &Path, place: &Place) -> Result<Child, Refused> {
    let log = File::options().create(true).append(true).open(&place.log).expect("the log can be written");
    let before = log.metadata().map_or(0, |found| found.len());
    let mut child = home
        .command(&bin.join("postgres"))
        .arg("-D")
        .arg(&place.data)
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a file can be shared"))
        .stderr(log)
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}", bin.display()));
    let began = Instant::now();
    loop {
        if let Ok(Some(_)) = child.try_wait() {
            let said = std::fs::read(&place.log).unwrap_or_default();
            let said = String::from_utf8_lossy(said.get(usize::try_from(before).unwrap_or(0)..).unwrap_or_default())
                .into_owned();
            return Err(if said.contains("could not bind") { Refused::PortTaken } else { Refused::Ended(said) });
        }
        if answers(place) {
            return Ok(child);
        }
        if began.elapsed() > PATIENCE {
            end(&mut child, Signal::QUIT);
            return Err(Refused::Silent);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether the server takes connections.
pub(super) fn answers(place: &Place) -> bool {
    // A connection to a server that is still recovering is refused at once.
    wait(async || {
        let options = administer(place, "postgres");
        match tokio::time::timeout(Duration::from_secs(10), options.connect()).await {
            Ok(Ok(connection)) => connection.close().await.is_ok(),
            _ => false,
        }
    })
}

fn end(child: &mut Child, signal: Signal) {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, signal);
    }
    let _ = child.wait();
}
