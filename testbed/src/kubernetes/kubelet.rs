//! A real kubelet beside a control plane: this machine as its node.

use std::path::Path;
use std::process::{Command, Stdio};

use super::Cluster;
use super::control_plane::{self, Nodes, await_that};
use crate::home::Home;

const START: &str = include_str!("kubelet.sh");
const END: &str = include_str!("kubelet_end.sh");

/// Ends the node and its control plane in the directory `$1`.
pub(super) fn end() -> String {
    format!("({END})\n{}", control_plane::END)
}

/// Starts the one that all share; its end is its directory's.
pub(super) fn start_shared(programs: &Path, server: &Path) -> Cluster {
    // What an earlier one left, which nobody ended: the new one would take its state for the machine's.
    let _ = Command::new("sh").args(["-c", END, "sh"]).arg(server).status();
    drop(control_plane::start(programs, server, Nodes::None));
    let log = std::fs::File::create(server.join("node.log")).expect("a file of ours can be written");
    let mut command = Home::apart("bash");
    command.args(["-c", START, "bash"]).arg(server).arg(programs).stdin(Stdio::null());
    command.stdout(log.try_clone().expect("a file of ours can be shared")).stderr(log);
    let done = command.status().expect("bash can be started");
    assert!(done.success(), "no node: {}", std::fs::read_to_string(server.join("node.log")).unwrap_or_default());
    let cluster = control_plane::cluster(programs, server);
    await_that(server, "the kubelet", || {
        let format = "jsonpath={.status.conditions[?(@.type=='Ready')].status}";
        let asked = cluster.command(["get", "node/node", "--output", format]).output();
        asked.is_ok_and(|done| done.stdout == b"True")
    });
    std::fs::write(server.join("ready"), "").expect("a file of ours can be written");
    cluster
}
