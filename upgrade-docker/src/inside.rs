//! Programs run inside a container that runs already, and found again after a crash.
//!
//! A program carries the step's marker in its environment. On an engine of this machine it is found
//! by that among all processes; elsewhere a shell within the container looks for it. Whether one is
//! left is asked of the engine itself, which knows what is run in a container by whom.

use std::time::Duration;

use bollard::Docker;
use bollard::exec::StartExecResults;
use bollard::models::ExecConfig;
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use tokio::time::{Instant, sleep};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::leftovers;

use crate::containers::{self, is_running, message};
use crate::error::{Doing, cancelled, found};
use crate::oneoff::Ended;
use crate::printed::{Collecting, Lines};
use crate::target::Engine;

const POLL: Duration = Duration::from_millis(50);
/// How long a program that was killed may take to be gone.
const PATIENCE: Duration = Duration::from_secs(10);

/// Ends every process of the container whose environment holds the line `$1`, with signal `$2`.
const END: &str = r#"
for each in /proc/[0-9]*; do
    if tr '\000' '\n' <"$each/environ" 2>/dev/null | grep -qxF "$1"; then
        kill -"$2" "${each#/proc/}" 2>/dev/null
    fi
done
exit 0
"#;

/// Names a program and all it is run with.
#[derive(Debug, Clone, Default)]
pub(crate) struct Program {
    pub(crate) argv: Vec<String>,
    /// `NAME=value`, secrets among them: shown nowhere.
    pub(crate) env: Vec<String>,
    pub(crate) user: Option<String>,
    pub(crate) directory: Option<String>,
}

/// A container in which programs of the step that is called are run.
pub(crate) struct Inside<'a> {
    pub(crate) client: &'a Docker,
    pub(crate) cx: &'a Context,
    /// The id of the container.
    pub(crate) id: &'a str,
    /// Whether its processes are to be found among those of this machine.
    pub(crate) local: bool,
}

/// Tells whether the processes of an engine's containers are this machine's.
pub(crate) fn is_local(engine: &Engine) -> bool {
    engine.host().starts_with("unix://")
}

/// Waits until a program has ended that was run in a container; returns what it exited with.
///
/// The end of its output is not its end: one that closed that goes on, and of one that ended the
/// engine may not know the code yet.
pub(crate) fn ended<'a>(client: &'a Docker, exec: &'a str, doing: String) -> BoxFuture<'a, Result<i64, StepError>> {
    Box::pin(async move {
        loop {
            let state = client.inspect_exec(exec).await.doing(|| doing.clone())?;
            match (state.running, state.exit_code) {
                (Some(true), _) | (_, None) => sleep(POLL).await,
                (_, Some(code)) => return Ok(code),
            }
        }
    })
}

impl Inside<'_> {
    /// Runs a program to its end, its lines shown as progress.
    ///
    /// # Errors
    /// It cannot be started, or the call was cancelled: it has been ended then.
    pub(crate) async fn run(&self, program: &Program) -> Result<Ended, StepError> {
        let line = program.argv.join(" ");
        let doing = || format!("running `{line}` in a container");
        let mut env = program.env.clone();
        env.push(format!("{}={}", Context::MARKER, self.cx.marker()));
        let config = ExecConfig {
            cmd: Some(program.argv.clone()),
            env: Some(env),
            user: program.user.clone(),
            working_dir: program.directory.clone(),
            attach_stdout: Some(true),
            attach_stderr: Some(true),
            ..ExecConfig::default()
        };
        let made = self.client.create_exec(self.id, config).await.doing(doing)?.id;
        let (mut collecting, mut lines) = (Collecting::default(), Lines::default());
        let running = async {
            if let StartExecResults::Attached { mut output, .. } =
                self.client.start_exec(&made, None).await.doing(doing)?
            {
                while let Some(piece) = output.next().await {
                    let piece = piece.doing(doing)?;
                    lines.push(self.cx, message(&piece));
                    collecting.push(&piece);
                }
            }
            ended(self.client, &made, doing()).await
        };
        let code = tokio::select! {
            code = running => code,
            () = self.cx.cancelled().cancelled() => Err(cancelled()),
        };
        let printed = collecting.finish(self.cx);
        match code {
            Ok(code) => Ok(Ended { code, out_of_memory: false, printed }),
            Err(error) if self.cx.cancelled().is_cancelled() => {
                self.end(&[&program.argv]).await?;
                Err(error.with_detail(printed.detail()))
            }
            Err(error) => Err(error),
        }
    }

    /// Ends what the step left running there, and returns when it is gone. A second call finds
    /// nothing to do.
    ///
    /// # Errors
    /// One of `programs` still runs there, and nobody here can end it.
    pub(crate) async fn end(&self, programs: &[&Vec<String>]) -> Result<(), StepError> {
        if self.local {
            leftovers::end(self.cx).await?;
        }
        let began = Instant::now();
        let mut why = None;
        while let Some(line) = self.left(programs).await? {
            if began.elapsed() > PATIENCE {
                let error =
                    StepError::unknown(format!("`{line}` still runs in the container, and cannot be ended from here"));
                let error = why.map_or(error.clone(), |why: String| error.with_detail(why));
                return Err(error.with_hint(
                    "end it there (`docker top CONTAINER`, `kill` on the engine's machine), then try again",
                ));
            }
            let signal = if began.elapsed() < PATIENCE / 2 { "TERM" } else { "KILL" };
            why = self.signal(signal).await?.or(why);
            sleep(POLL * 4).await;
        }
        Ok(())
    }

    /// Asks the engine for one of the programs that still runs.
    async fn left(&self, programs: &[&Vec<String>]) -> Result<Option<String>, StepError> {
        let Some(container) = containers::inspect(self.client, self.id).await? else { return Ok(None) };
        if !is_running(&container) {
            return Ok(None);
        }
        for id in container.exec_ids.iter().flatten() {
            let answer = self.client.inspect_exec(id).await.doing(|| "looking at what runs in a container".into());
            let Some(state) = found(answer)? else { continue };
            let argv: Vec<String> = state.process_config.map_or_else(Vec::new, |process| {
                process.entrypoint.into_iter().chain(process.arguments.into_iter().flatten()).collect()
            });
            if state.running == Some(true) && programs.contains(&&argv) {
                return Ok(Some(argv.join(" ")));
            }
        }
        Ok(None)
    }

    /// Signals what carries the marker, by a shell within the container; says why that did not go.
    async fn signal(&self, signal: &str) -> Result<Option<String>, StepError> {
        let marker = format!("{}={}", Context::MARKER, self.cx.marker());
        let argv = ["sh", "-c", END, "sh", &marker, signal].map(str::to_owned).to_vec();
        // As root, who may look at all processes.
        let config = ExecConfig {
            cmd: Some(argv),
            user: Some("0".into()),
            attach_stdout: Some(true),
            attach_stderr: Some(true),
            ..ExecConfig::default()
        };
        let doing = || "ending a program in a container".to_owned();
        let made = self.client.create_exec(self.id, config).await.doing(doing)?.id;
        let mut collecting = Collecting::default();
        if let StartExecResults::Attached { mut output, .. } = self.client.start_exec(&made, None).await.doing(doing)? {
            while let Some(piece) = output.next().await {
                collecting.push(&piece.doing(doing)?);
            }
        }
        let said = collecting.finish(self.cx).detail();
        let code = ended(self.client, &made, doing()).await?;
        Ok((code != 0 || !said.is_empty()).then_some(said))
    }
}
