//! The check and the reload of a proxy that runs on this machine.

use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::process::Command;
use tokio::time::timeout;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::leftovers;

use crate::error::cancelled;

/// How much of what a program says is kept.
const KEPT: u64 = 64 * 1024;

/// Writes a command as a person would type it.
pub(super) fn line(argv: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    let quoted = |word: &String| match word.as_str() {
        word if !word.is_empty() && word.chars().all(plain) => word.to_owned(),
        word => format!("'{}'", word.replace('\'', r"'\''")),
    };
    argv.iter().map(quoted).collect::<Vec<_>>().join(" ")
}

/// Runs a program to its end; returns what it exits with, and what it said.
///
/// # Errors
/// It cannot be started, or the call was cancelled: what it started has then been ended.
pub(super) async fn run(cx: &Context, argv: &[String], directory: &Path) -> Result<(i64, String), StepError> {
    let [program, arguments @ ..] = argv else {
        return Err(StepError::permanent("there is no program").with_hint("name one: [program, argument]"));
    };
    let path = if program.contains('/') { directory.join(program) } else { program.into() };
    let mut command = Command::new(path);
    command.args(arguments).current_dir(directory).process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // The key to what is sealed is the upgrade's own.
    command.env_remove("UPGRADE_SEAL_KEY").env_remove(leftovers::STARTER).env(Context::MARKER, cx.marker());
    let mut child = command.spawn().map_err(|error| not_started(argv, program, &error))?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let reading = tokio::spawn(async move {
        let (mut first, mut second) = (Vec::new(), Vec::new());
        let (out, err) = (out.map(|pipe| pipe.take(KEPT)), err.map(|pipe| pipe.take(KEPT)));
        // What cannot be read of its output is not why it failed.
        let _ = tokio::join!(
            async {
                if let Some(mut out) = out {
                    let _ = out.read_to_end(&mut first).await;
                }
            },
            async {
                if let Some(mut err) = err {
                    let _ = err.read_to_end(&mut second).await;
                }
            },
        );
        first.append(&mut second);
        String::from_utf8_lossy(&first).into_owned()
    });
    let status = tokio::select! {
        status = child.wait() => status,
        () = cx.cancelled().cancelled() => {
            leftovers::end(cx).await?;
            return Err(cancelled());
        }
    };
    let status = status
        .map_err(|error| StepError::unknown(format!("the end of `{}` was not seen", line(argv))).with_cause(&error))?;
    // A service that it started keeps the pipe open.
    let said = timeout(Duration::from_secs(1), reading).await;
    let said = said.ok().and_then(Result::ok).unwrap_or_default();
    Ok((status.code().map_or(-1, i64::from), said))
}

fn not_started(argv: &[String], program: &str, error: &io::Error) -> StepError {
    let (class, hint): (fn(String) -> StepError, _) = match error.kind() {
        io::ErrorKind::NotFound => (StepError::permanent, format!("install {program}, or write its path")),
        io::ErrorKind::PermissionDenied => {
            (StepError::permanent, format!("make {program} executable for the account that runs the upgrade"))
        }
        _ => (StepError::transient, "the machine may be short of processes".to_owned()),
    };
    class(format!("`{}` cannot be started", line(argv))).with_cause(error).with_hint(hint)
}
