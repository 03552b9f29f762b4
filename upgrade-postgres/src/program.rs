//! PostgreSQL's own programs, and other people's: run from an argv, without a shell, to their end.
//!
//! A program is led to its database by environment variables: no password stands where `ps` shows it.
//! What it leaves running after a crash is found twice: its processes by the marker in their
//! environment ([`end_leftovers`]), its sessions on the server by their `application_name`
//! ([`Database::settle`](crate::Database::settle)).

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use secrecy::{ExposeSecret, SecretString};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use upgrade_core::context::Context;
use upgrade_core::error::{Class, StepError};
use upgrade_core::leftovers::{self, GRACE};

use crate::address::Address;
use crate::error::PostgresError;
use crate::session::application_name;

/// How much of the end of what a program complains is kept.
const COMPLAINTS: usize = 64 << 10;

/// How much is read beyond that and dropped again: a cut may go through a secret, whose rest no
/// mask would know.
const SLACK: usize = 8 << 10;

/// How much a program may print where its output is asked for.
const PRINTED: usize = 16 << 20;

/// How long output is awaited after the program ended: a child may hold the pipe open for ever.
const DRAIN: Duration = Duration::from_millis(500);

/// Lead a program elsewhere than the address that it is given.
const MISLEADING: [&str; 4] = ["PGHOSTADDR", "PGSERVICE", "PGSERVICEFILE", "UPGRADE_SEAL_KEY"];

/// Names a program and all it is run with.
#[derive(Debug, Clone, Default)]
pub struct Program {
    argv: Vec<String>,
    environment: Vec<(String, SecretString)>,
    directory: Option<PathBuf>,
    input: Option<PathBuf>,
    output: Option<PathBuf>,
}

/// Tells how a program ended.
#[derive(Debug)]
pub struct Ended {
    /// The exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// What it printed, unless that went to a file.
    pub stdout: String,
    /// The end of what it complained about, masked.
    pub stderr: String,
}

impl Ended {
    /// Says in a few words how it ended.
    pub fn how(&self) -> String {
        match (self.code, self.signal) {
            (Some(code), _) => format!("exit code {code}"),
            (None, Some(signal)) => format!("signal {signal}"),
            (None, None) => "an unknown end".to_owned(),
        }
    }
}

impl Program {
    /// Names a program and its arguments; the first word is looked up in `PATH` unless it is a path.
    pub fn new(argv: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { argv: argv.into_iter().map(Into::into).collect(), ..Self::default() }
    }

    /// Adds arguments.
    #[must_use]
    pub fn with(mut self, arguments: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.argv.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn with_env(mut self, name: impl Into<String>, value: impl Into<SecretString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Leads it to a database, under the name by which its sessions are found again.
    ///
    /// For a target that is reached through a tunnel, `address` is the near end, open for as long as
    /// the session that it was taken from: [`Session::address`](crate::session::Session::address).
    ///
    /// # Errors
    /// A parameter of the address has no such value.
    pub fn on(mut self, cx: &Context, address: &Address) -> Result<Self, PostgresError> {
        for (name, value) in address.environment()? {
            self = self.with_env(name, value);
        }
        Ok(self.with_env("PGAPPNAME", application_name(&cx.marker())))
    }

    /// Runs it in a directory.
    #[must_use]
    pub fn within(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// Lets it read a file as its standard input; else it has none.
    #[must_use]
    pub fn reading(mut self, path: impl Into<PathBuf>) -> Self {
        self.input = Some(path.into());
        self
    }

    /// Lets it print into a file, made anew and for its owner alone.
    #[must_use]
    pub fn writing(mut self, path: impl Into<PathBuf>) -> Self {
        self.output = Some(path.into());
        self
    }

    /// Writes the command as a person would type it.
    pub fn line(&self) -> String {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
        let quoted = |word: &String| match word.as_str() {
            word if !word.is_empty() && word.chars().all(plain) => word.to_owned(),
            word => format!("'{}'", word.replace('\'', r"'\''")),
        };
        self.argv.iter().map(quoted).collect::<Vec<_>>().join(" ")
    }

    /// Runs it to its end.
    ///
    /// # Guarantees
    /// When this returns, nothing of its process group runs any more if the call was cancelled.
    /// Dropped before, the group is killed.
    ///
    /// # Errors
    /// It cannot be started, or the call was cancelled. An exit code is not an error.
    pub async fn run(&self, cx: &Context) -> Result<Ended, StepError> {
        if cx.cancelled().is_cancelled() {
            return Err(self.cancelled("was not started"));
        }
        let mut command = self.command(cx)?;
        let mut child = command.spawn().map_err(|error| self.not_started(&error))?;
        let group = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        let mut guard = Guard(group);
        let printed = Reader::start(child.stdout.take(), PRINTED + 1);
        let complained = Reader::start(child.stderr.take(), COMPLAINTS + SLACK);
        let status = tokio::select! {
            biased;
            () = cx.cancelled().cancelled() => {
                end_group(&mut child, group).await;
                guard.0 = None;
                let stderr = complained.finish().await;
                printed.task.abort();
                return Err(self.cancelled("was ended").with_detail(complaints(cx, stderr)));
            }
            status = child.wait() => status,
        };
        guard.0 = None;
        let status = status.map_err(|error| {
            StepError::unknown(format!("the end of `{}` was not seen", self.line())).with_cause(&error)
        })?;
        let (stdout, stderr) = tokio::join!(printed.finish(), complained.finish());
        if stdout.len() > PRINTED {
            return Err(StepError::permanent(format!("`{}` printed more than {PRINTED} bytes", self.line()))
                .with_hint("let it print only what is asked for"));
        }
        let stdout = String::from_utf8_lossy(Vec::from(stdout).as_slice()).into_owned();
        Ok(Ended { code: status.code(), signal: status.signal(), stdout, stderr: complaints(cx, stderr) })
    }

    /// Runs it to an end without complaint: exit code 0.
    ///
    /// # Errors
    /// As [`Program::run`], and any other end: *transient* where the connection broke.
    pub async fn succeed(&self, cx: &Context) -> Result<Ended, StepError> {
        let ended = self.run(cx).await?;
        if ended.code == Some(0) { Ok(ended) } else { Err(self.failed(&ended)) }
    }

    fn command(&self, cx: &Context) -> Result<Command, StepError> {
        let [program, arguments @ ..] = self.argv.as_slice() else {
            return Err(StepError::permanent("the command is empty").with_hint("name a program: [program, argument]"));
        };
        // A path is looked up from the working directory, as people expect; the standard library
        // leaves it open which directory counts.
        let path = match &self.directory {
            Some(directory) if program.contains('/') => directory.join(program),
            _ => PathBuf::from(program),
        };
        let mut command = Command::new(path);
        command.args(arguments).process_group(0).stderr(Stdio::piped());
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        for name in MISLEADING {
            command.env_remove(name);
        }
        for (name, value) in &self.environment {
            command.env(name, value.expose_secret());
        }
        command.env(Context::MARKER, cx.marker());
        let opened = |path: &Path, result: io::Result<File>| {
            result.map(Stdio::from).map_err(|error| {
                StepError::permanent(format!("{} cannot be opened for `{}`", path.display(), self.line()))
                    .with_cause(&error)
                    .with_hint("look at its directory: is it there, and may this user write to it?")
            })
        };
        command.stdin(match &self.input {
            Some(path) => opened(path, File::open(path))?,
            None => Stdio::null(),
        });
        command.stdout(match &self.output {
            Some(path) => {
                let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path);
                opened(path, file)?
            }
            None => Stdio::piped(),
        });
        Ok(command)
    }

    fn not_started(&self, error: &io::Error) -> StepError {
        let text = format!("`{}` cannot be started", self.line());
        let program = self.argv.first().map_or("", String::as_str);
        let directory = self.directory.as_deref().filter(|directory| !directory.is_dir());
        let (class, hint) = match (error.kind(), directory) {
            (_, Some(directory)) => (Class::Permanent, format!("make the working directory {}", directory.display())),
            (io::ErrorKind::NotFound, _) if program.contains('/') => {
                (Class::Permanent, format!("check that {program} is there, and that its `#!` names a program"))
            }
            (io::ErrorKind::NotFound, _) => {
                (Class::Permanent, format!("install {program}, or write its path: it is not in PATH"))
            }
            (io::ErrorKind::PermissionDenied, _) => {
                (Class::Permanent, format!("make {program} executable for the account that runs the upgrade"))
            }
            _ => (Class::Transient, "the machine may be short of processes or memory".to_owned()),
        };
        StepError::new(class, text).with_cause(error).with_hint(hint)
    }

    /// Says that it ended otherwise than it should have.
    pub fn failed(&self, ended: &Ended) -> StepError {
        let said = |texts: &[&str]| texts.iter().any(|text| ended.stderr.contains(text));
        let text = format!("`{}` failed: {}", self.line(), ended.how());
        let error = if said(&["No space left on device", "Disk quota exceeded", "File too large"]) {
            StepError::permanent(text).with_hint("free space on the file system it writes to, then try again")
        } else if said(&["permission denied", "must be superuser", "must be owner"]) {
            StepError::permanent(text).with_hint("grant the privilege that the detail names, or connect as the owner")
        } else if said(&[
            "server closed the connection",
            "terminating connection",
            "connection to server",
            "no connection to the server",
            "could not receive data from server",
            "the database system is",
            "SSL connection has been closed",
            // The session that keeps the snapshot ended.
            "invalid snapshot identifier",
        ]) {
            StepError::transient(text)
                .with_hint("the connection broke or could not be made: `upgrade resume` when the server is reachable")
        } else {
            StepError::permanent(text).with_hint("the detail holds what it said last")
        };
        error.with_detail(ended.stderr.clone())
    }

    fn cancelled(&self, what: &str) -> StepError {
        StepError::transient(format!("`{}` {what}: the call was cancelled or ran out of time", self.line()))
            .with_hint("if it only needs longer, raise the step's `timeout`; `upgrade resume` goes on")
    }
}

/// Ends the processes that an interrupted call of this step left on this machine.
///
/// # Errors
/// A process survives, or `/proc` cannot be read.
pub async fn end_leftovers(cx: &Context) -> Result<(), StepError> {
    leftovers::end(cx).await
}

/// Reads a stream to its end and keeps the last bytes of it.
struct Reader {
    kept: Arc<Mutex<VecDeque<u8>>>,
    task: JoinHandle<()>,
}

impl Reader {
    fn start(stream: Option<impl AsyncRead + Unpin + Send + 'static>, most: usize) -> Self {
        let kept = Arc::new(Mutex::new(VecDeque::new()));
        let into = kept.clone();
        let task = tokio::spawn(async move {
            let Some(mut stream) = stream else { return };
            let mut buffer = vec![0; 16 << 10];
            while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                let mut kept = into.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend(&buffer[..read]);
                let over = kept.len().saturating_sub(most);
                kept.drain(..over);
            }
        });
        Self { kept, task }
    }

    async fn finish(mut self) -> VecDeque<u8> {
        if timeout(DRAIN, &mut self.task).await.is_err() {
            self.task.abort();
        }
        std::mem::take(&mut self.kept.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn complaints(cx: &Context, mut bytes: VecDeque<u8>) -> String {
    let cut = bytes.len() == COMPLAINTS + SLACK;
    let masked = cx.mask(&String::from_utf8_lossy(bytes.make_contiguous()));
    let over = if cut { masked.len().saturating_sub(COMPLAINTS).max(SLACK.min(masked.len())) } else { 0 };
    let start = (over..=masked.len()).find(|at| masked.is_char_boundary(*at)).unwrap_or(masked.len());
    if start == 0 { masked.trim_end().to_owned() } else { format!("[…]{}", masked[start..].trim_end()) }
}

/// Kills a program when its call is dropped before it ended.
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
        let gone = async {
            // The status of what was ended says nothing.
            let _ = child.wait().await;
            let Some(group) = group.map(|group| group.as_raw_nonzero().get()) else { return };
            while tokio::task::spawn_blocking(move || leftovers::group_is_alive(group)).await.unwrap_or(false) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if timeout(GRACE, gone).await.is_ok() {
            return;
        }
    }
}
