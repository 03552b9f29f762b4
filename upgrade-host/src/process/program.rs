//! Runs a program under control: its own process group, a marker, bounded output, an end.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::leftovers::{self, GRACE, STARTER};
use upgrade_core::secret::ExposeSecret;

use super::output::Output;
use upgrade_core::text_or_secret::TextOrSecret;

/// The variable that the command takes the key of sealed contents from.
const SEAL_KEY: &str = "UPGRADE_SEAL_KEY";

/// Says what becomes of a program whose caller is gone.
#[derive(Debug, Clone)]
pub(crate) enum Role {
    /// Belongs to a step: found by its marker and ended when the step is settled.
    Step,
    /// Belongs to a check, which nobody settles: killed when the call is dropped.
    Check,
    /// Starts a service, which outlives the step and may write on where this program did: into
    /// the log, or a file without a name. Into a pipe, its first line after our end would kill it.
    Starter {
        /// Where what the program and the service say is appended.
        log: Option<PathBuf>,
    },
}

/// Names a program and all it is run with.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    pub(crate) argv: Vec<String>,
    pub(crate) env: BTreeMap<String, TextOrSecret>,
    pub(crate) directory: PathBuf,
    pub(crate) role: Role,
}

/// Tells how a program ended; its output is masked and bounded.
#[derive(Debug)]
pub(crate) struct Ended {
    /// The exit code; `None` if a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) signal: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    /// Says in a few words how it ended.
    pub(crate) fn how(&self) -> String {
        match (self.code, self.signal) {
            (Some(code), _) => format!("exit code {code}"),
            (None, Some(signal)) => format!("signal {signal}"),
            (None, None) => "an unknown end".to_owned(),
        }
    }

    /// Returns what a person would read first: the errors, else the output.
    pub(crate) fn detail(&self) -> &str {
        if self.stderr.trim().is_empty() { &self.stdout } else { &self.stderr }
    }
}

impl Program {
    /// Writes the command as a person would type it.
    pub(crate) fn line(&self) -> String {
        line(&self.argv)
    }

    /// Runs the program to its end.
    ///
    /// # Errors
    /// It cannot be started, a secret cannot be resolved, or the call was cancelled: the program
    /// and its group have then been ended. An exit code is not an error.
    pub(crate) async fn run(&self, cx: &Context) -> Result<Ended, StepError> {
        if cx.cancelled().is_cancelled() {
            return Err(self.cancelled("was not started"));
        }
        let mut command = self.command(cx).await?;
        let output = Output::prepare(&mut command, &self.role)
            .map_err(|error| self.failed("the file for its output cannot be opened", &error))?;
        let mut child = command.spawn().map_err(|error| self.not_started(&error))?;
        let group = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        let mut guard = Guard(group.filter(|_| matches!(self.role, Role::Check)));
        let collecting = output.collect(&mut child);

        let status = tokio::select! {
            biased;
            () = cx.cancelled().cancelled() => {
                end_group(&mut child, group).await;
                guard.0 = None;
                let (stdout, stderr) = collecting.finish(cx).await;
                let detail = if stderr.trim().is_empty() { stdout } else { stderr };
                return Err(self.cancelled("was ended").with_detail(detail));
            }
            status = child.wait() => status,
        };
        guard.0 = None;
        let status = status.map_err(|error| self.failed("its end was not seen", &error))?;
        let (stdout, stderr) = collecting.finish(cx).await;
        Ok(Ended { code: status.code(), signal: status.signal(), stdout, stderr })
    }

    async fn command(&self, cx: &Context) -> Result<Command, StepError> {
        let [program, arguments @ ..] = self.argv.as_slice() else {
            return Err(StepError::permanent("the command is empty").with_hint("name a program: [program, argument]"));
        };
        // A path is looked up from the working directory, as people expect; the standard library
        // leaves it open which directory counts.
        let path = if program.contains('/') { self.directory.join(program) } else { PathBuf::from(program) };
        let mut command = Command::new(path);
        command.args(arguments).current_dir(&self.directory).stdin(Stdio::null()).process_group(0);
        for (name, value) in &self.env {
            command.env(name, value.resolve(cx).await?.expose_secret());
        }
        command.env_remove(Context::MARKER).env_remove(STARTER);
        // The key to what is sealed is the upgrade's own: no program needs it, and one may print it.
        if !self.env.contains_key(SEAL_KEY) {
            command.env_remove(SEAL_KEY);
        }
        match self.role {
            Role::Step | Role::Check => command.env(Context::MARKER, cx.marker()),
            Role::Starter { .. } => command.env(STARTER, cx.marker()),
        };
        Ok(command)
    }

    fn not_started(&self, error: &io::Error) -> StepError {
        let text = format!("`{}` cannot be started", self.line());
        let program = self.argv.first().map_or("", String::as_str);
        let directory = self.directory.display();
        match error.kind() {
            _ if !self.directory.is_dir() => StepError::permanent(text)
                .with_cause(error)
                .with_hint(format!("make the working directory {directory}, or name another with `directory:`")),
            io::ErrorKind::NotFound if program.contains('/') => StepError::permanent(text).with_cause(error).with_hint(
                format!("check that {program} is there, seen from {directory}, and that its `#!` names a program"),
            ),
            io::ErrorKind::NotFound => StepError::permanent(text)
                .with_cause(error)
                .with_hint(format!("install {program}, or write its path: it is not in PATH")),
            io::ErrorKind::PermissionDenied => StepError::permanent(text)
                .with_cause(error)
                .with_hint(format!("make {program} executable for the account that runs the upgrade")),
            _ => StepError::transient(text).with_cause(error).with_hint("the machine may be short of processes"),
        }
    }

    fn failed(&self, what: &str, error: &io::Error) -> StepError {
        StepError::unknown(format!("`{}`: {what}", self.line()))
            .with_cause(error)
            .with_hint("look at the machine: its disk may be full, or its process table")
    }

    fn cancelled(&self, what: &str) -> StepError {
        StepError::unknown(format!("`{}` {what}: the call was cancelled or ran out of time", self.line()))
            .with_hint("if it only needs longer, raise the step's `timeout:`")
    }
}

/// Writes a command as a person would type it.
pub(crate) fn line(argv: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    let quoted = |word: &String| match word.as_str() {
        word if !word.is_empty() && word.chars().all(plain) => word.to_owned(),
        word => format!("'{}'", word.replace('\'', r"'\''")),
    };
    argv.iter().map(quoted).collect::<Vec<_>>().join(" ")
}

/// Kills a check's processes when the call is dropped before they ended.
struct Guard(Option<Pid>);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // Nobody is left who could be told.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

/// Asks a group to end, kills it if it does not, and returns when it is gone.
async fn end_group(child: &mut Child, group: Option<Pid>) {
    for signal in [Signal::TERM, Signal::KILL] {
        if let Some(group) = group {
            // A group that is gone already is what is wanted.
            let _ = kill_process_group(group, signal);
        }
        if timeout(GRACE, gone(child, group)).await.is_ok() {
            return;
        }
    }
}

async fn gone(child: &mut Child, group: Option<Pid>) {
    // The status of what was killed says nothing.
    let _ = child.wait().await;
    let Some(group) = group.map(|group| group.as_raw_nonzero().get()) else { return };
    while tokio::task::spawn_blocking(move || leftovers::group_is_alive(group)).await.unwrap_or(false) {
        sleep(Duration::from_millis(20)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_it_would_be_typed() {
        let argv = ["grep", "-q", "it's here", ""].map(str::to_owned);
        assert_eq!(line(&argv), r"grep -q 'it'\''s here' ''");
    }
}
