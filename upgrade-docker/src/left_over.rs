//! Processes of a container that the engine does not know of.
//!
//! An engine that is killed while it starts a container forgets that it did: the container counts as
//! stopped, and its program, or what was about to become it, is there. The engine neither ends it nor
//! starts the container beside it, and removing the container leaves it running. On an engine of this
//! machine it is found by the control group that bears the container's id; and the shim before it, which
//! holds the task that the engine cannot make again, by the id among its arguments.

use std::fs;
use std::time::Duration;

use futures_util::future::BoxFuture;
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{Instant, sleep};
use upgrade_core::context::blocking;
use upgrade_core::error::StepError;

use crate::inside::is_local;
use crate::target::Engine;

const POLL: Duration = Duration::from_millis(20);
/// How long a process that was killed may take to be gone.
const PATIENCE: Duration = Duration::from_secs(10);

/// Ends what is left of a container that the engine says does not run; tells whether there was anything.
/// A second call finds nothing to do.
///
/// # Errors
/// It cannot be ended.
pub(crate) fn end<'a>(engine: &'a Engine, id: &'a str, name: &'a str) -> BoxFuture<'a, Result<bool, StepError>> {
    Box::pin(async move {
        // A short text might be part of another one's name.
        if !is_local(engine) || id.len() < 64 {
            return Ok(false);
        }
        let began = Instant::now();
        let mut any = false;
        loop {
            let wanted = id.to_owned();
            let found = blocking(move || Ok(processes(&wanted))).await?;
            if found.is_empty() {
                return Ok(any);
            }
            if !any {
                tracing::warn!(container = %name, "the engine forgot that it started it: what is left of that is ended");
            }
            any = true;
            for process in &found {
                // One that is gone by now is what is wanted.
                let _ = kill_process(*process, Signal::KILL);
            }
            if began.elapsed() > PATIENCE {
                let numbers: Vec<_> = found.iter().map(|process| process.as_raw_nonzero().to_string()).collect();
                let numbers = numbers.join(" ");
                return Err(StepError::unknown(format!(
                    "processes of container {name} run, the engine does not know of them, and they do not end: {numbers}"
                ))
                .with_hint(format!("end them on the engine's machine (`kill -9 {numbers}`), then try again")));
            }
            sleep(POLL).await;
        }
    })
}

fn processes(id: &str) -> Vec<Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_left = |number: &i32| {
        let groups = fs::read_to_string(format!("/proc/{number}/cgroup")).unwrap_or_default();
        let state = fs::read_to_string(format!("/proc/{number}/stat")).unwrap_or_default();
        let ended = state.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['Z', 'X']));
        let arguments = fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
        (is_in_group_of(&groups, id) || is_shim_of(&arguments, id)) && !ended
    };
    numbers.filter(is_left).filter_map(Pid::from_raw).collect()
}

/// Tells whether a list of control groups names the one of a container: `…/docker/ID`, `…/docker-ID.scope`.
fn is_in_group_of(groups: &str, id: &str) -> bool {
    let parts = groups.lines().flat_map(|line| line.split('/').skip(1));
    let mut bare = parts.map(|part| part.strip_suffix(".scope").unwrap_or(part));
    bare.any(|part| part == id || part.strip_prefix("docker-") == Some(id))
}

/// Tells whether a process, by its arguments, is containerd's shim of a container.
fn is_shim_of(arguments: &[u8], id: &str) -> bool {
    let arguments: Vec<_> = arguments.split(|byte| *byte == 0).collect();
    let program = arguments.first().and_then(|path| path.rsplit(|byte| *byte == b'/').next()).unwrap_or_default();
    program.starts_with(b"containerd-shim") && arguments.windows(2).any(|pair| pair == [b"-id", id.as_bytes()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shim_is_known_by_its_arguments() {
        let id = "4f1e".repeat(16);
        let shim = format!("/usr/bin/containerd-shim-runc-v2\0-namespace\0moby\0-id\0{id}\0-address\0x\0");
        assert!(is_shim_of(shim.as_bytes(), &id));
        assert!(!is_shim_of(shim.as_bytes(), &"1".repeat(64)));
        assert!(!is_shim_of(format!("grep\0-id\0{id}\0").as_bytes(), &id));
    }

    #[test]
    fn a_process_is_known_by_its_control_group() {
        let id = "4f1e".repeat(16);
        for (groups, is_in) in [
            (format!("12:pids:/docker/{id}\n0::/docker/{id}\n"), true),
            (format!("0::/system.slice/docker-{id}.scope\n"), true),
            (format!("0::/system.slice/docker-{id}.scope/init.scope\n"), true),
            (format!("0::/docker/{}\n", "1".repeat(64)), false),
            (format!("0::/docker/{id}0\n"), false),
            ("0::/\n".to_owned(), false),
        ] {
            assert_eq!(is_in_group_of(&groups, &id), is_in, "{groups}");
        }
    }
}
