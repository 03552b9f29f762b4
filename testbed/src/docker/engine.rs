//! One engine and what the tests ask it by its own command.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::certificates::{Authority, Holder};
use crate::guardian::Guardian;
use crate::home::Home;
use crate::postgres::cluster::{HOST, free_port};

/// What a test machine can be kept waiting for an engine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Ends the engine of the directory `$1`, its containers and what it mounted.
pub(super) const END: &str = r#"
    pid=$(cat "$1/docker.pid" 2>/dev/null)
    # The number alone may be another process's by now.
    runs() { [ -n "$pid" ] && [ "$(readlink "/proc/$pid/cwd")" = "$1" ]; }
    runs "$1" && kill -KILL "$pid"
    # The shims of containers, and containerd: their command lines name the directory.
    for each in /proc/[0-9]*; do
        tr '\0' ' ' <"$each/cmdline" 2>/dev/null | grep -qF "$1/exec" || continue
        shim=${each#/proc/}
        [ "$shim" = "$$" ] && continue
        for child in $(cat "$each"/task/*/children 2>/dev/null); do kill -KILL "$child" 2>/dev/null; done
        kill -KILL "$shim" 2>/dev/null
    done
    while runs "$1"; do sleep 0.1; done
    bridge=$(cat "$1/bridge" 2>/dev/null)
    [ -z "$bridge" ] || ip link delete "$bridge" 2>/dev/null
    awk -v below="$1/" 'index($2, below) == 1 { print $2 }' /proc/mounts | sort -r |
        while read -r mounted; do umount -l "$mounted" 2>/dev/null; done
"#;

/// A running engine.
#[derive(Clone, Debug)]
pub struct Engine {
    host: String,
}

impl Engine {
    pub(super) fn at(host: String) -> Self {
        Self { host }
    }

    /// The engine that an earlier process started, if it answers.
    pub(super) fn running(server: &Path) -> Option<Self> {
        let engine = Self::at(host_of(server));
        (server.join("docker.sock").exists() && engine.answers()).then_some(engine)
    }

    /// Starts the engine that all share.
    pub(super) fn start(program: &Path, server: &Path, bridged: bool) -> Self {
        lay_out(server, bridged);
        // It outlives this process; its end is its directory's.
        drop(spawn(program, server));
        let engine = Self::at(host_of(server));
        engine.await_answer(server);
        engine
    }

    /// Where it is, as `DOCKER_HOST` spells it.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The `docker` command on this engine.
    pub fn command<I: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = I>) -> Command {
        let mut command = Command::new("docker");
        command.args(arguments).env("DOCKER_HOST", &self.host).env("DOCKER_BUILDKIT", "0").env_remove("DOCKER_CONTEXT");
        command.stdin(Stdio::null());
        command
    }

    /// Runs the `docker` command and returns what it printed, without the last line's end.
    ///
    /// # Panics
    /// It failed.
    pub fn docker<I: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = I>) -> String {
        let mut command = self.command(arguments);
        let done = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        assert!(done.status.success(), "{command:?}: {}{}", done.status, String::from_utf8_lossy(&done.stderr));
        String::from_utf8_lossy(&done.stdout).trim_end().to_owned()
    }

    /// A name that no other test uses.
    pub fn unique(&self, what: &str) -> String {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        format!("{what}-{}-{number}", std::process::id())
    }

    fn answers(&self) -> bool {
        let asked = self.command(["version", "--format", "{{.Server.Version}}"]).stderr(Stdio::null()).output();
        asked.is_ok_and(|done| done.status.success())
    }

    fn await_answer(&self, server: &Path) {
        let began = Instant::now();
        while !self.answers() {
            let log = || std::fs::read_to_string(server.join("log")).unwrap_or_default();
            assert!(began.elapsed() < PATIENCE, "the engine does not answer:\n{}", log());
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// An engine of one test's own.
#[derive(Debug)]
pub struct Own {
    engine: Engine,
    program: PathBuf,
    directory: PathBuf,
    running: Mutex<Option<Child>>,
    _guardian: Guardian,
}

impl Own {
    pub(super) fn create(program: &Path, secured: bool, disk: Option<u32>) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = Home::of_this_user().base.join(format!("docker-{}-{number}", std::process::id()));
        lay_out(&directory, false);
        if secured {
            let authority = Authority::create(&directory.join("tls"));
            authority.sign(Holder::Engine, 2, &directory.join("tls/engine"));
            std::fs::write(directory.join("tls/port"), free_port().to_string()).expect("a file of ours can be written");
        }
        let guardian = Guardian::over(&directory, END);
        if let Some(size) = disk {
            let root = directory.join("root");
            std::fs::create_dir(&root).unwrap_or_else(|error| panic!("{}: {error}", root.display()));
            let size = format!("size={size}m");
            let done = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&root).output();
            let done = done.expect("mount can be started");
            assert!(done.status.success(), "a disk of {size}: {}", String::from_utf8_lossy(&done.stderr));
        }
        let child = spawn(program, &directory);
        let engine = Engine::at(host_of(&directory));
        engine.await_answer(&directory);
        Self { engine, program: program.to_owned(), directory, running: Mutex::new(Some(child)), _guardian: guardian }
    }

    /// The engine. Its default network is none: containers name a network of their own.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Where it is over TCP, if it was started as [`super::secured`].
    ///
    /// # Panics
    /// It was not.
    pub fn over_tcp(&self) -> String {
        let port = std::fs::read_to_string(self.directory.join("tls/port")).expect("it was started as secured");
        format!("tcp://{HOST}:{port}")
    }

    /// Who signed its certificate and its clients', if it was started as [`super::secured`].
    pub fn authority(&self) -> Authority {
        Authority::of(&self.directory.join("tls"))
    }

    /// Gives it another certificate, which it takes when it is started again.
    pub fn certify(&self, authority: &Authority, days: i32) {
        authority.sign(Holder::Engine, days, &self.directory.join("tls/engine"));
    }

    /// Where it keeps everything.
    pub fn root(&self) -> PathBuf {
        self.directory.join("root")
    }

    /// Kills the engine; its containers go on.
    pub fn kill(&self) {
        let mut running = self.running.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(mut child) = running.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Ends the engine as `systemctl stop docker` does, and its containers with it.
    pub fn stop(&self) {
        let mut running = self.running.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(mut child) = running.take() {
            if let Some(pid) = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            }
            let _ = child.wait();
        }
    }

    /// Starts it again, and waits until it answers.
    pub fn start(&self) {
        let mut running = self.running.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if running.is_none() {
            // A number that another process has by now would be taken for the containerd that ended with it.
            for stale in ["docker.pid", "exec/containerd/containerd.pid", "exec/containerd/containerd.sock"] {
                let _ = std::fs::remove_file(self.directory.join(stale));
            }
            *running = Some(spawn(&self.program, &self.directory));
            self.engine.await_answer(&self.directory);
        }
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        self.kill();
    }
}

fn host_of(server: &Path) -> String {
    format!("unix://{}", server.join("docker.sock").display())
}

fn lay_out(server: &Path, bridged: bool) {
    let _ = Command::new("sh").args(["-c", END, "sh"]).arg(server).status();
    let _ = std::fs::remove_dir_all(server);
    std::fs::create_dir_all(server).unwrap_or_else(|error| panic!("{}: {error}", server.display()));
    // Not the machine's own, which may say anything.
    std::fs::write(server.join("daemon.json"), "{}").expect("a file of ours can be written");
    if !bridged {
        return;
    }
    let bridge = "upgrade-test0";
    let _ = Command::new("ip").args(["link", "delete", bridge]).stderr(Stdio::null()).status();
    for arguments in [
        vec!["link", "add", bridge, "type", "bridge"],
        vec!["addr", "add", "10.213.255.1/24", "dev", bridge],
        vec!["link", "set", bridge, "up"],
    ] {
        let done = Command::new("ip").args(&arguments).output().expect("ip can be started");
        assert!(done.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    }
    std::fs::write(server.join("bridge"), bridge).expect("a file of ours can be written");
}

fn spawn(program: &Path, server: &Path) -> Child {
    let log = std::fs::File::options().create(true).append(true).open(server.join("log"));
    let log = log.unwrap_or_else(|error| panic!("{}: {error}", server.display()));
    let bridge = std::fs::read_to_string(server.join("bridge")).unwrap_or_else(|_| "none".into());
    // Several engines side by side: none touches the machine's firewall, each has its own addresses,
    // and a publishing proxy does what rules would.
    let name = server.file_name().and_then(OsStr::to_str).unwrap_or_default();
    let pool = if bridge == "none" { 214 + std::process::id() % 40 } else { 213 };
    let mut command = Home::apart(&program.to_string_lossy());
    if let Ok(port) = std::fs::read_to_string(server.join("tls/port")) {
        command.arg("--host").arg(format!("tcp://{HOST}:{port}")).arg("--tlsverify");
        for (key, file) in [("--tlscacert", "ca.pem"), ("--tlscert", "engine/cert.pem"), ("--tlskey", "engine/key.pem")]
        {
            command.arg(key).arg(server.join("tls").join(file));
        }
    }
    command
        .current_dir(server)
        .arg("--host")
        .arg(host_of(server))
        .arg("--data-root")
        .arg(server.join("root"))
        .arg("--exec-root")
        .arg(server.join("exec"))
        .arg("--pidfile")
        .arg(server.join("docker.pid"))
        .arg("--config-file")
        .arg(server.join("daemon.json"))
        .args(["--bridge", &bridge, "--iptables=false", "--ip6tables=false", "--ip-masq=false"])
        .args(["--default-address-pool", &format!("base=10.{pool}.0.0/17,size=26")])
        .args(["--containerd-namespace", &format!("upgrade-{name}"), "--containerd-plugins-namespace"])
        .arg(format!("upgrade-plugins-{name}"))
        .args(["--max-concurrent-downloads=3", "--log-level=warn"])
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a file of ours can be shared"))
        .stderr(log)
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}", program.display()))
}
