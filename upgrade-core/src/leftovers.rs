//! Finds and ends what an interrupted call left running.
//!
//! Every process that a step starts carries the step's marker in its environment, and so do its
//! children, whatever session or group they move to. A service that is meant to outlive the step
//! must not be found that way: the command that starts one carries [`STARTER`] instead, which
//! counts only while that command itself, the leader of the group made for it, still runs.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{Instant, sleep};

use crate::context::Context;
use crate::error::StepError;

/// Names the environment variable of a command that starts a service.
pub const STARTER: &str = "UPGRADE_STARTER";

/// How long a process may take to end by itself before it is killed.
pub const GRACE: Duration = Duration::from_secs(5);

const POLL: Duration = Duration::from_millis(20);

/// Describes one process as `/proc/<pid>/stat` does; the start time tells it from a later one
/// that was given the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Process {
    pid: i32,
    parent: i32,
    group: i32,
    session: i32,
    started: u64,
}

impl Process {
    /// Reads a process that is alive; `None` if it ended, a zombie included.
    fn read(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name of the program stands in parentheses and may hold any character.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
        if matches!(*fields.first()?, "Z" | "X") {
            return None;
        }
        let number = |index: usize| fields.get(index)?.parse::<i32>().ok();
        Some(Self {
            pid,
            parent: number(1)?,
            group: number(2)?,
            session: number(3)?,
            started: fields.get(19)?.parse().ok()?,
        })
    }

    /// Tells whether the process was started with `name=value` in its environment.
    fn carries(self, name: &str, value: &str) -> bool {
        let Ok(environment) = fs::read(format!("/proc/{}/environ", self.pid)) else { return false };
        environment.split(|byte| *byte == 0).any(|entry| {
            entry
                .strip_prefix(name.as_bytes())
                .and_then(|rest| rest.strip_prefix(b"="))
                .is_some_and(|found| found == value.as_bytes())
        })
    }

    fn signal(self, signal: Signal) {
        // Between the scan and now the number may have gone to another process.
        if Self::read(self.pid) == Some(self)
            && let Some(pid) = Pid::from_raw(self.pid)
            && let Err(error) = kill_process(pid, signal)
            && error != Errno::SRCH
        {
            tracing::warn!(pid = self.pid, %error, "a leftover process could not be signalled");
        }
    }
}

fn processes() -> io::Result<Vec<Process>> {
    let entries = fs::read_dir("/proc")?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).filter_map(Process::read).collect())
}

/// Returns this process and those it descends from: an upgrade may itself run under a step of
/// another, and carry that step's marker.
fn ourselves(all: &[Process]) -> BTreeSet<i32> {
    let mut line = BTreeSet::new();
    let mut next = i32::try_from(std::process::id()).ok();
    while let Some(pid) = next.filter(|pid| line.insert(*pid)) {
        next = all.iter().find(|process| process.pid == pid).map(|process| process.parent);
    }
    line
}

fn leftovers(marker: &str) -> io::Result<Vec<Process>> {
    let all = processes()?;
    let ourselves = ourselves(&all);
    let starting: BTreeSet<i32> = all
        .iter()
        .filter(|process| process.pid == process.group && process.pid != process.session)
        .filter(|process| process.carries(STARTER, marker))
        .map(|process| process.pid)
        .collect();
    Ok(all
        .into_iter()
        .filter(|process| !ourselves.contains(&process.pid))
        .filter(|process| starting.contains(&process.group) || process.carries(Context::MARKER, marker))
        .collect())
}

/// Tells whether a process group has a member that is alive.
pub fn group_is_alive(group: i32) -> bool {
    match processes() {
        Ok(all) => all.iter().any(|process| process.group == group),
        Err(_) => Pid::from_raw(group).is_some_and(|group| rustix::process::test_kill_process_group(group).is_ok()),
    }
}

/// Ends every process that this step left running, and returns when they are gone.
///
/// What `Step::settle` of every kind that runs programs calls.
///
/// A second call finds nothing to do.
///
/// # Errors
/// `/proc` cannot be read, or a process survives `SIGKILL`.
pub async fn end(cx: &Context) -> Result<(), StepError> {
    let marker = cx.marker();
    let begun = Instant::now();
    let mut asked = BTreeSet::new();
    let mut clean = 0;
    // A process may fork while the list is read, its child take a number already passed: only
    // two clean lists in a row say that there is none.
    while clean < 2 {
        let found = find(&marker).await?;
        clean = if found.is_empty() { clean + 1 } else { 0 };
        let past = begun.elapsed();
        if past > GRACE * 2 && !found.is_empty() {
            let pids: Vec<_> = found.iter().map(|process| process.pid.to_string()).collect();
            return Err(StepError::unknown(format!(
                "processes that this step started do not end: {}",
                pids.join(", ")
            ))
            .with_hint("look what they wait for (`ps -o pid,stat,wchan,args -p PID`), end them, then try again"));
        }
        for process in found {
            if past > GRACE {
                process.signal(Signal::KILL);
            } else if asked.insert(process) {
                process.signal(Signal::TERM);
            }
        }
        sleep(POLL).await;
    }
    Ok(())
}

async fn find(marker: &str) -> Result<Vec<Process>, StepError> {
    let marker = marker.to_owned();
    let found = tokio::task::spawn_blocking(move || leftovers(&marker)).await;
    let found = found.map_err(|error| StepError::unknown("the list of processes was not read").with_cause(&error))?;
    found.map_err(|error| {
        StepError::unknown("the list of processes cannot be read")
            .with_cause(&error)
            .with_hint("mount /proc: without it nobody can tell whether an interrupted command still runs")
    })
}
