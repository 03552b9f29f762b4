//! Kubernetes control planes with nodes that tell of pods what a kubelet would tell.
//!
//! etcd, the API server, the controller manager and the scheduler are real. Nothing runs on the nodes: the
//! tag of an image says what becomes of a pod, as `nodes.py` lists.

mod control_plane;
mod kubelet;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

pub use control_plane::ControlPlane;

use crate::home::Home;
use crate::sharing::Share;

/// As in `scripts/kubernetes`, which builds it.
const VERSION: &str = "1.20.2";

/// A cluster that tests speak to.
#[derive(Clone, Debug)]
pub struct Cluster {
    kubeconfig: PathBuf,
    kubectl: PathBuf,
}

impl Cluster {
    /// The kubeconfig of its administrator.
    pub fn kubeconfig(&self) -> &std::path::Path {
        &self.kubeconfig
    }

    /// The directory of its `kubectl`.
    pub fn programs(&self) -> &std::path::Path {
        self.kubectl.parent().unwrap_or(std::path::Path::new(""))
    }

    /// The kubeconfig of another of its users: `stranger`, who may do nothing, or `expired`, whose
    /// certificate is of the past. None for a cluster that the tests did not start.
    pub fn kubeconfig_of(&self, user: &str) -> Option<PathBuf> {
        let path = self.kubeconfig.with_file_name(format!("{user}.kubeconfig"));
        path.is_file().then_some(path)
    }

    /// The `kubectl` command on this cluster.
    pub fn command<I: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = I>) -> Command {
        let mut command = Command::new(&self.kubectl);
        command.arg("--kubeconfig").arg(&self.kubeconfig).args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs the `kubectl` command and returns what it printed, without the last line's end.
    ///
    /// # Panics
    /// It failed.
    pub fn kubectl<I: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = I>) -> String {
        let mut command = self.command(arguments);
        let done = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        assert!(done.status.success(), "{command:?}: {}{}", done.status, String::from_utf8_lossy(&done.stderr));
        String::from_utf8_lossy(&done.stdout).trim_end().to_owned()
    }

    /// Makes objects from a manifest, in a namespace.
    ///
    /// # Panics
    /// The cluster refuses them.
    pub fn apply(&self, namespace: &str, manifest: &str) {
        use std::io::Write as _;
        let mut command = self.command(["apply", "--namespace", namespace, "--filename", "-"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let mut input = child.stdin.take().expect("its input is a pipe");
        input.write_all(manifest.as_bytes()).expect("kubectl reads its input");
        drop(input);
        let done = child.wait_with_output().expect("it was started");
        assert!(done.status.success(), "{}\n{manifest}", String::from_utf8_lossy(&done.stderr));
    }

    /// A namespace of the caller's own, deleted on drop.
    ///
    /// # Panics
    /// The cluster refuses it.
    pub fn namespace(&self, what: &str) -> Namespace {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{what}-{}-{number}", std::process::id());
        self.kubectl(["create", "namespace", &name]);
        Namespace { cluster: self.clone(), name }
    }
}

/// A namespace, deleted on drop.
#[derive(Debug)]
pub struct Namespace {
    cluster: Cluster,
    /// Its name.
    pub name: String,
}

impl Namespace {
    /// Runs the `kubectl` command in the namespace and returns what it printed.
    ///
    /// # Panics
    /// It failed.
    pub fn kubectl(&self, arguments: &[&str]) -> String {
        self.cluster.kubectl(["--namespace", &self.name].iter().chain(arguments))
    }

    /// Makes objects from a manifest.
    ///
    /// # Panics
    /// The cluster refuses them.
    pub fn apply(&self, manifest: &str) {
        self.cluster.apply(&self.name, manifest);
    }

    /// The cluster.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let mut command = self.cluster.command(["delete", "namespace", &self.name, "--wait=false"]);
        let _ = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
}

/// The cluster that all test processes share; it ends when nobody has used it for some seconds.
///
/// Where `UPGRADE_TEST_KUBECONFIG` names a kubeconfig, its cluster. None, with a printed reason, where
/// there is no control plane.
///
/// # Panics
/// Under `CI=true` where there is none, and where it cannot be started.
pub fn shared() -> Option<Cluster> {
    static SHARE: Mutex<Option<Share<Cluster>>> = Mutex::new(None);
    if let Some(kubeconfig) = std::env::var_os("UPGRADE_TEST_KUBECONFIG") {
        return Some(Cluster { kubeconfig: kubeconfig.into(), kubectl: "kubectl".into() });
    }
    share(&SHARE, "")
}

/// A second cluster that all test processes share, for tests that change its nodes: those of the first
/// would notice. Never a caller's own: a test that lets nodes tell what it wants needs ours.
///
/// # Panics
/// Under `CI=true` where there is no control plane, and where it cannot be started.
pub fn shared_nodes() -> Option<Cluster> {
    static SHARE: Mutex<Option<Share<Cluster>>> = Mutex::new(None);
    share(&SHARE, "nodes-")
}

fn share(share: &Mutex<Option<Share<Cluster>>>, which: &str) -> Option<Cluster> {
    let programs = programs()?;
    let mut share = share.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let share = share.get_or_insert_with(|| {
        // Nodes of another make, which another version of the tests started, would tell something else.
        let directory = Home::of_this_user().base.join(format!("kubernetes-{which}{}", control_plane::make()));
        Share::take(
            &directory,
            30,
            control_plane::END,
            |server| control_plane::running(&programs, server),
            |server| control_plane::start_shared(&programs, &server),
        )
    });
    Some(share.service.clone())
}

/// A control plane of the caller's own, whose API server can be stopped and started; ended on drop.
///
/// None, with a printed reason, where there is no control plane.
///
/// # Panics
/// As [`shared`].
pub fn own() -> Option<ControlPlane> {
    programs().map(|programs| ControlPlane::create(&programs))
}

/// A cluster whose one node, `node`, is this machine: containers run there, and can be entered and reached.
///
/// It has three images: `upgrade.test/busybox:1` and `upgrade.test/bare:1`, which sleep until they are ended,
/// the latter without a shell, and a pause. All test processes share it; some seconds after the last one, it ends
/// and puts back what it changed of the machine. It takes root, cgroups of version 1 and a `containerd`.
///
/// # Panics
/// There is no kubelet, which `scripts/kubernetes --kubelet` builds; or it cannot be started.
pub fn kubelet() -> Cluster {
    static SHARE: Mutex<Option<Share<Cluster>>> = Mutex::new(None);
    let programs = programs().expect("scripts/kubernetes --kubelet builds a control plane and a kubelet");
    assert!(programs.join("kubelet").is_file(), "there is no kubelet: scripts/kubernetes --kubelet builds it");
    let mut share = SHARE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let share = share.get_or_insert_with(|| {
        Share::take(
            &Home::of_this_user().base.join("kubelet"),
            30,
            &kubelet::end(),
            |server| control_plane::running(&programs, server),
            |server| kubelet::start_shared(&programs, &server),
        )
    });
    share.service.clone()
}

/// The directory that `scripts/kubernetes` made.
fn programs() -> Option<PathBuf> {
    let path = crate::home::cache().join("kubernetes").join(VERSION);
    if path.join("kube-scheduler").is_file() {
        return Some(path);
    }
    let reason = format!(
        "there is no control plane in {}: scripts/kubernetes builds it, or name a cluster in UPGRADE_TEST_KUBECONFIG",
        path.display()
    );
    assert!(std::env::var("CI").as_deref() != Ok("true"), "promised under CI, but {reason}");
    eprintln!("skipped: {reason}");
    None
}
