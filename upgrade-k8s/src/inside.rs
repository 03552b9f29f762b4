//! Programs run inside a container of a pod, and found again after a crash.
//!
//! A cluster runs a program in a container with the container's own environment, and knows nothing of it
//! afterwards: it cannot say whether it still runs. So a shell of the container's gives it its variables,
//! the step's marker among them, by which another one finds it.
//!
//! ```text
//! this side                        the shell in the container
//!     │ ── connect ──────────────────▶ │
//!     │ ◀────────────────── "ready" ── │ reads lines; at their end without "go": exits
//!     │ ── variables, "go" ──────────▶ │ takes them, and becomes the program
//!     │ ◀───────── output, exit code ─ │
//! ```
//!
//! A request that is still on its way when this side dies starts nothing: nobody says "go". And secrets
//! stand neither in an address, which an API server writes to its log, nor in a command line.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Status;
use kube::Api;
use kube::api::{AttachParams, AttachedProcess};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Instant, sleep, timeout};
use upgrade_core::context::Context;
use upgrade_core::error::{Class, StepError};

use crate::error::{Answer, KubeError, cancelled};
use crate::printed::{Printed, Stream};
use crate::server::ApiServer;

/// Waits for the word, takes the variables, and becomes the program `$2`…; `$1` is the marker.
const RUN: &str = r#"
script=
echo ready
while IFS= read -r line; do
    if [ "$line" = go ]; then
        eval "$script"
        export "$1"
        shift
        exec "$@" </dev/null
    fi
    script="$script${line#:}
"
done
exit 125
"#;

/// Signals with `$2` every process that has the marker `$1` in its environment, or that waits for the word;
/// prints how many there are.
const END: &str = r#"
left=0
for each in /proc/[0-9]*; do
    for file in environ cmdline; do
        if { tr '\000' '\n' <"$each/$file"; } 2>/dev/null | grep -qxF "UPGRADE_MARKER=$1"; then
            kill -"$2" "${each#/proc/}" 2>/dev/null
            left=$((left + 1))
            break
        fi
    done
done
echo "$left"
"#;

/// Tells whether [`RUN`] and [`END`] find what they need.
const TRY: &str = "command -v tr >/dev/null && command -v grep >/dev/null && [ -r /proc/self/environ ]";

/// How long a connection and a shell may take to come about.
const START: Duration = Duration::from_secs(30);
/// How long a program that was signalled may take to be gone; after half of it, it is killed.
const PATIENCE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(200);

/// Names a program and all it is run with.
#[derive(Debug, Clone, Default)]
pub(crate) struct Program {
    pub(crate) argv: Vec<String>,
    /// Names and values, secrets among them: shown nowhere.
    pub(crate) env: Vec<(String, String)>,
    pub(crate) directory: Option<String>,
}

impl Program {
    /// What the shell is told before it becomes the program.
    fn told(&self) -> String {
        let variables = self.env.iter().map(|(name, value)| format!("export {name}={}", quoted(value)));
        let directory = self.directory.iter().map(|directory| format!("cd {} || exit 126", quoted(directory)));
        let lines: Vec<_> = variables.chain(directory).collect();
        let lines = lines.join("\n");
        let lines = lines.split('\n').map(|line| format!(":{line}\n"));
        lines.chain(["go\n".to_owned()]).collect()
    }
}

/// A text as a shell reads it.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Tells how a program ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: i64,
    pub(crate) printed: Printed,
}

impl Ended {
    /// Says that a program failed, with the end of what it printed.
    pub(crate) fn failure(&self, line: &str) -> StepError {
        let class = match self.code {
            75 => Class::Transient,
            137 | 143 => Class::Unknown,
            _ => Class::Permanent,
        };
        let error = StepError::new(class, format!("`{line}` ended with exit code {}", self.code));
        let detail = self.printed.detail();
        let error = if detail.is_empty() { error } else { error.with_detail(detail) };
        error.with_hint(match self.code {
            126 | 127 => {
                "the program or the directory is not there, or may not be used: check `command` and `directory`"
            }
            137 | 143 => "it was ended from outside: look at the pod's events and its memory limit, then run again",
            _ => "read what it said, mend that, and run it by hand to see it pass",
        })
    }
}

/// A container of a pod in which programs of the step that is called are run.
pub(crate) struct Inside<'a> {
    pub(crate) server: &'a ApiServer,
    pub(crate) namespace: &'a str,
    pub(crate) pod: &'a str,
    pub(crate) container: &'a str,
}

impl Inside<'_> {
    /// Finds out whether programs can be run there, and found again.
    ///
    /// # Errors
    /// The node is not reached, this user may not, or the image lacks what it takes.
    pub(crate) async fn probe(&self) -> Result<(), StepError> {
        let ended = self.plainly(&["sh", "-c", TRY]).await?;
        if ended.code == 0 {
            return Ok(());
        }
        Err(StepError::permanent(format!(
            "container {} of pod {} lacks `tr`, `grep` or a readable /proc: what a crash leaves running would not be found",
            self.container, self.pod
        ))
        .with_hint("run the command as a Job of its own: k8s.job takes any image"))
    }

    /// Runs a program to its end, its lines shown as progress.
    ///
    /// # Errors
    /// It cannot be started; the connection was lost, so that nobody saw its end; or the call was cancelled,
    /// and it has been ended.
    pub(crate) async fn run(&self, program: &Program) -> Result<Ended, StepError> {
        let cx = self.server.context();
        let (mut out, mut err) = (Stream::default(), Stream::default());
        let ended = tokio::select! {
            ended = self.start(program, &mut out, &mut err) => ended,
            () = cx.cancelled().cancelled() => Err(cancelled()),
        };
        let printed = Printed { stdout: out.text(cx), stderr: err.text(cx) };
        match ended {
            Ok(code) => Ok(Ended { code, printed }),
            Err(error) if cx.cancelled().is_cancelled() => {
                self.end().await?;
                Err(error.with_detail(printed.detail()))
            }
            Err(error) => Err(error),
        }
    }

    async fn start(&self, program: &Program, out: &mut Stream, err: &mut Stream) -> Result<i64, StepError> {
        let marker = format!("{}={}", Context::MARKER, self.server.context().marker());
        let wrapped = ["sh", "-c", RUN, "sh", &marker].into_iter().map(str::to_owned);
        let argv: Vec<_> = wrapped.chain(program.argv.iter().cloned()).collect();
        let mut process = self.attach(&argv, true).await?;
        let mut stdout = process.stdout();
        let mut stdin = process.stdin();
        let status = process.take_status();
        let is_ready = match &mut stdout {
            Some(stdout) => {
                timeout(START, first_line(stdout)).await.map_err(|_| self.silent())?.as_deref() == Some("ready")
            }
            None => false,
        };
        if is_ready && let Some(stdin) = &mut stdin {
            let said = async {
                stdin.write_all(program.told().as_bytes()).await?;
                stdin.flush().await
            };
            said.await.map_err(|_| self.lost())?;
        }
        self.read(&mut process, stdout, out, err).await;
        // Let go of earlier, it would end the connection.
        let status = match status {
            Some(status) => status.await,
            None => None,
        };
        drop(stdin);
        self.code(status)
    }

    /// Runs a program that needs nothing and changes nothing, or not for long.
    async fn plainly(&self, argv: &[&str]) -> Result<Ended, StepError> {
        let argv: Vec<_> = argv.iter().map(|word| (*word).to_owned()).collect();
        let running = async {
            let mut process = self.attach(&argv, false).await?;
            let (stdout, status) = (process.stdout(), process.take_status());
            let (mut out, mut err) = (Stream::default(), Stream::default());
            self.read(&mut process, stdout, &mut out, &mut err).await;
            let status = match status {
                Some(status) => status.await,
                None => None,
            };
            let code = self.code(status)?;
            let cx = self.server.context();
            Ok(Ended { code, printed: Printed { stdout: out.text(cx), stderr: err.text(cx) } })
        };
        timeout(START, running).await.map_err(|_| self.silent())?
    }

    async fn attach(&self, argv: &[String], with_input: bool) -> Result<AttachedProcess, StepError> {
        let pods: Api<Pod> = Api::namespaced(self.server.client().clone(), self.namespace);
        let how = AttachParams::default().stdin(with_input).container(self.container);
        let connected = timeout(START, pods.exec(self.pod, argv, &how)).await.map_err(|_| self.silent())?;
        connected.map_err(|error| self.refused(error))
    }

    async fn read(
        &self,
        process: &mut AttachedProcess,
        stdout: Option<impl AsyncRead + Unpin>,
        out: &mut Stream,
        err: &mut Stream,
    ) {
        let cx = self.server.context();
        tokio::join!(drain(cx, stdout, out), drain(cx, process.stderr(), err));
    }

    /// Ends what the step left running there, and returns when it is gone. A second call finds nothing to do.
    ///
    /// # Errors
    /// The container cannot be looked into, or what runs there cannot be ended.
    pub(crate) async fn end(&self) -> Result<(), StepError> {
        let (began, marker) = (Instant::now(), self.server.context().marker());
        loop {
            let signal = if began.elapsed() < PATIENCE / 2 { "TERM" } else { "KILL" };
            let ended = self.plainly(&["sh", "-c", END, "sh", &marker, signal]).await?;
            match (ended.code, ended.printed.stdout.trim()) {
                (0, "0") => return Ok(()),
                (0, left) if began.elapsed() > PATIENCE => {
                    return Err(StepError::unknown(format!(
                        "{left} processes of this step still run in container {} of pod {}, and cannot be ended",
                        self.container, self.pod
                    ))
                    .with_hint(format!("`kubectl delete pod {}` ends them, then try again", self.pod)));
                }
                (0, _) => sleep(POLL).await,
                _ => return Err(ended.failure("sh")),
            }
        }
    }

    /// Reads the exit code of what the node says in the end.
    fn code(&self, status: Option<Status>) -> Result<i64, StepError> {
        let Some(status) = status else { return Err(self.lost()) };
        if status.status.as_deref() == Some("Success") {
            return Ok(0);
        }
        let causes = status.details.as_ref().and_then(|details| details.causes.as_ref()).into_iter().flatten();
        let mut codes = causes.filter(|cause| cause.reason.as_deref() == Some("ExitCode"));
        if let Some(code) = codes.find_map(|cause| cause.message.as_ref()?.parse().ok()) {
            return Ok(code);
        }
        let said = status.message.unwrap_or_default();
        let where_ = format!("container {} of pod {}", self.container, self.pod);
        if said.contains("executable file not found") || said.contains("no such file or directory") {
            return Err(StepError::permanent(format!("{where_} has no shell, or none that runs"))
                .with_detail(said)
                .with_hint("run the command as a Job of its own: k8s.job needs no shell in the image"));
        }
        Err(StepError::transient(format!("nothing can be run in {where_}: {said}"))
            .with_hint(format!("`kubectl describe pod {}` tells how it is", self.pod)))
    }

    fn refused(&self, error: kube::Error) -> StepError {
        let doing = format!("running a command in pod {}/{}", self.namespace, self.pod);
        match answer_of(error, doing) {
            KubeError::Refused { doing, answer } => match (answer.status, answer.reason.as_str()) {
                (403, _) => StepError::from(KubeError::Refused { doing, answer })
                    .with_hint("give the user this right: the verbs `get` and `create` on `pods/exec`"),
                (404, "NotFound") => StepError::from(KubeError::Refused { doing, answer })
                    .with_hint("the pod is gone: `kubectl get pods`"),
                // What else answers so is not the API server: something stands where the kubelet should be.
                (404 | 500..=599, _) => {
                    let said = if answer.message.is_empty() { "no reason given" } else { &answer.message };
                    StepError::transient(format!("{doing} failed: {} {said}", answer.status)).with_hint(
                        "the API server does not reach the kubelet of the pod's node: `kubectl get nodes`, `kubectl logs` of the pod",
                    )
                }
                _ => KubeError::Refused { doing, answer }.into(),
            },
            lost => lost.into(),
        }
    }

    fn silent(&self) -> StepError {
        StepError::transient(format!("pod {} does not answer within {} s", self.pod, START.as_secs()))
            .with_hint("`kubectl exec` tries it; `kubectl get nodes` tells whether its node is there")
    }

    fn lost(&self) -> StepError {
        StepError::transient(format!("the connection to pod {} was lost: nobody saw how the command ended", self.pod))
            .with_hint("whether the pod and its node are there: `kubectl get pods,nodes`")
    }
}

/// Reads what a server said to a request that was to become a connection.
pub(crate) fn answer_of(error: kube::Error, doing: String) -> KubeError {
    match error {
        kube::Error::Api(status) => {
            let answer = Answer {
                status: status.code,
                reason: status.reason.clone(),
                message: status.message.clone(),
                causes: Vec::new(),
                retry_after: None,
            };
            KubeError::Refused { doing, answer }
        }
        source => KubeError::Lost { doing, source },
    }
}

/// Reads a line, byte for byte, so that nothing after it is lost.
async fn first_line(from: &mut (impl AsyncRead + Unpin)) -> Option<String> {
    let mut line = Vec::new();
    loop {
        match from.read_u8().await {
            Ok(b'\n') => return String::from_utf8(line).ok(),
            Ok(byte) if line.len() < 100 => line.push(byte),
            _ => return None,
        }
    }
}

async fn drain(cx: &Context, from: Option<impl AsyncRead + Unpin>, to: &mut Stream) {
    let Some(mut from) = from else { return };
    let mut buffer = vec![0; 4096];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        to.push(cx, &buffer[..read]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    /// The script is a shell's, whichever the container has.
    fn shell(told: &str) -> (Option<i32>, String) {
        let mut child = Command::new("sh")
            .args(["-c", RUN, "sh", "UPGRADE_MARKER=run/step", "sh", "-c"])
            .arg("echo \"$UPGRADE_MARKER|$WORD|$PWD\"; cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(told.as_bytes()).unwrap();
        let done = child.wait_with_output().unwrap();
        (done.status.code(), String::from_utf8(done.stdout).unwrap())
    }

    #[test]
    fn a_shell_takes_variables_and_becomes_the_program() {
        let word = "it's\ngo\n:$HOME `x` \"y\"";
        let env = vec![("WORD".to_owned(), word.to_owned())];
        let program = Program { argv: Vec::new(), env, directory: Some("/tmp".into()) };
        assert_eq!(shell(&program.told()), (Some(0), format!("ready\nrun/step|{word}|/tmp\n")));
        let nowhere = Program { directory: Some("/nowhere".into()), ..Program::default() };
        assert_eq!(shell(&nowhere.told()).0, Some(126));
    }

    #[test]
    fn nothing_runs_without_the_word() {
        assert_eq!(shell(""), (Some(125), "ready\n".into()));
        assert_eq!(shell(":export WORD='x'\n"), (Some(125), "ready\n".into()));
        // Cut off in the middle of it.
        assert_eq!(shell("g").0, Some(125));
    }
}
