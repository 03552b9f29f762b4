//! One control plane: how it is started, asked, stopped and ended.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::Cluster;
use crate::guardian::Guardian;
use crate::home::Home;
use crate::postgres::cluster::{HOST, free_port};

/// What a test machine can be kept waiting for a control plane.
const PATIENCE: Duration = Duration::from_secs(120);

/// Ends what left its process number in the directory `$1`, the API server before its storage.
pub(super) const END: &str = r#"
    for part in nodes scheduler controller-manager apiserver etcd; do
        pid=$(cat "$1/$part.pid" 2>/dev/null)
        # The number alone may be another process's by now.
        [ -n "$pid" ] && [ "$(readlink "/proc/$pid/cwd")" = "$1" ] && kill -KILL "$pid"
    done
"#;

const CERTIFICATES: &str = include_str!("certificates.sh");
const NODES: &str = include_str!("nodes.py");

/// What tells this make of control planes from others.
pub(super) fn make() -> String {
    use std::hash::{DefaultHasher, Hash as _, Hasher as _};
    let mut hasher = DefaultHasher::new();
    (NODES, CERTIFICATES).hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// A control plane of one test's own.
#[derive(Debug)]
pub struct ControlPlane {
    cluster: Cluster,
    programs: PathBuf,
    directory: PathBuf,
    apiserver: Mutex<Option<Child>>,
    others: Vec<Child>,
    _guardian: Guardian,
}

impl ControlPlane {
    pub(super) fn create(programs: &Path) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = Home::of_this_user().base.join(format!("kubernetes-{}-{number}", std::process::id()));
        let guardian = Guardian::over(&directory, END);
        let (apiserver, others) = start(programs, &directory, Nodes::Told);
        let cluster = cluster(programs, &directory);
        let apiserver = Mutex::new(Some(apiserver));
        Self { cluster, programs: programs.to_owned(), directory, apiserver, others, _guardian: guardian }
    }

    /// The cluster.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Kills the API server; its storage and its controllers go on.
    pub fn kill(&self) {
        if let Some(mut child) = self.apiserver.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts the API server again, and waits until it is ready.
    ///
    /// # Panics
    /// It does not start.
    pub fn start(&self) {
        let mut apiserver = self.apiserver.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if apiserver.is_none() {
            *apiserver = Some(start_apiserver(&self.programs, &self.directory));
            await_ready(&self.programs, &self.directory);
        }
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        self.kill();
        for child in &mut self.others {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub(super) fn cluster(programs: &Path, directory: &Path) -> Cluster {
    Cluster { kubeconfig: directory.join("pki/admin.kubeconfig"), kubectl: programs.join("kubectl") }
}

/// The one that an earlier process started, if it answers.
pub(super) fn running(programs: &Path, server: &Path) -> Option<Cluster> {
    (server.join("ready").is_file() && is_ready(programs, server)).then(|| cluster(programs, server))
}

/// Starts the one that all share; its end is its directory's.
pub(super) fn start_shared(programs: &Path, server: &Path) -> Cluster {
    drop(start(programs, server, Nodes::Told));
    std::fs::write(server.join("ready"), "").expect("a file of ours can be written");
    cluster(programs, server)
}

/// Who says what becomes of pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Nodes {
    /// `nodes.py`, for three nodes.
    Told,
    /// Nobody yet.
    None,
}

pub(super) fn start(programs: &Path, directory: &Path, nodes: Nodes) -> (Child, Vec<Child>) {
    let _ = Command::new("sh").args(["-c", END, "sh"]).arg(directory).status();
    let _ = std::fs::remove_dir_all(directory);
    let pki = directory.join("pki");
    std::fs::create_dir_all(&pki).unwrap_or_else(|error| panic!("{}: {error}", pki.display()));
    let (port, client, peer) = (free_port(), free_port(), free_port());
    std::fs::write(directory.join("ports"), format!("{port} {client}")).expect("a file of ours can be written");
    let made = Command::new("bash").args(["-c", CERTIFICATES, "bash"]).arg(&pki).arg(port.to_string()).output();
    let made = made.expect("bash can be started");
    assert!(made.status.success(), "certificates: {}", String::from_utf8_lossy(&made.stderr));

    let (client, peer) = (format!("http://{HOST}:{client}"), format!("http://{HOST}:{peer}"));
    let etcd = spawn(directory, "etcd", &programs.join("etcd"), |command| {
        command.args(["--data-dir", "etcd-data", "--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &format!("default={peer}")]);
    });
    let apiserver = start_apiserver(programs, directory);
    await_ready(programs, directory);
    let manager = spawn(directory, "controller-manager", &programs.join("kube-controller-manager"), |command| {
        command.args(["--kubeconfig", "pki/controller-manager.kubeconfig", "--leader-elect=false"]);
        command.args(["--port=0", "--secure-port=0", "--use-service-account-credentials=true"]);
        command.args(["--service-account-private-key-file", "pki/service-account.key", "--root-ca-file", "pki/ca.crt"]);
        // As fast as a test has use for.
        command.args(["--kube-api-qps=200", "--kube-api-burst=400", "--concurrent-deployment-syncs=20"]);
    });
    let scheduler = spawn(directory, "scheduler", &programs.join("kube-scheduler"), |command| {
        command.args([
            "--kubeconfig",
            "pki/scheduler.kubeconfig",
            "--leader-elect=false",
            "--port=0",
            "--secure-port=0",
        ]);
        command.args(["--kube-api-qps=200", "--kube-api-burst=400"]);
    });
    let mut others = vec![etcd, manager, scheduler];
    let mut awaited = vec!["get", "serviceaccount/default", "--output", "name"];
    if nodes == Nodes::Told {
        std::fs::write(directory.join("nodes.py"), NODES).expect("a file of ours can be written");
        others.push(spawn(directory, "nodes", Path::new("python3"), |command| {
            command.args(["nodes.py", "pki", &port.to_string(), "node1,node2,node3"]);
        }));
        awaited.push("node/node3");
    }
    let cluster = cluster(programs, directory);
    await_that(directory, "nodes and the default service account", || {
        cluster.command(&awaited).output().is_ok_and(|done| done.status.success())
    });
    (apiserver, others)
}

fn start_apiserver(programs: &Path, directory: &Path) -> Child {
    let ports = std::fs::read_to_string(directory.join("ports")).expect("a file of ours can be read");
    let (port, etcd) = ports.split_once(' ').expect("two numbers");
    let range = "--service-cluster-ip-range=10.96.0.0/16";
    spawn(directory, "apiserver", &programs.join("kube-apiserver"), |command| {
        command.arg(format!("--etcd-servers=http://{HOST}:{etcd}"));
        command.args(["--bind-address", HOST, "--advertise-address", HOST, "--secure-port", port, range]);
        command.args(["--endpoint-reconciler-type=none", "--client-ca-file=pki/ca.crt"]);
        command.args(["--tls-cert-file=pki/apiserver.crt", "--tls-private-key-file=pki/apiserver.key"]);
        command.args(["--service-account-key-file=pki/service-account.pub"]);
        command.args(["--service-account-signing-key-file=pki/service-account.key"]);
        command.args(["--service-account-issuer=https://kubernetes.default.svc", "--authorization-mode=Node,RBAC"]);
        command.args(["--enable-admission-plugins=NodeRestriction", "--allow-privileged=true"]);
        command.args(["--kubelet-client-certificate=pki/admin.crt", "--kubelet-client-key=pki/admin.key"]);
        command.arg("--kubelet-preferred-address-types=InternalIP");
    })
}

fn spawn(directory: &Path, part: &str, program: &Path, arguments: impl FnOnce(&mut Command)) -> Child {
    let log = std::fs::File::options().create(true).append(true).open(directory.join(format!("{part}.log")));
    let log = log.unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut command = Home::apart(&program.to_string_lossy());
    command.current_dir(directory).stdin(Stdio::null());
    command.stdout(log.try_clone().expect("a file of ours can be shared")).stderr(log);
    arguments(&mut command);
    let child = command.spawn().unwrap_or_else(|error| panic!("{}: {error}", program.display()));
    std::fs::write(directory.join(format!("{part}.pid")), child.id().to_string()).expect("a file of ours");
    child
}

fn is_ready(programs: &Path, directory: &Path) -> bool {
    let asked = cluster(programs, directory).command(["get", "--raw", "/readyz", "--request-timeout=5s"]).output();
    asked.is_ok_and(|done| done.status.success())
}

fn await_ready(programs: &Path, directory: &Path) {
    await_that(directory, "the API server", || is_ready(programs, directory));
}

pub(super) fn await_that(directory: &Path, what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < PATIENCE, "{what} did not become ready; see the logs in {}", directory.display());
        std::thread::sleep(Duration::from_millis(100));
    }
}
