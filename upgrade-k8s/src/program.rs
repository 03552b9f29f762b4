//! Programs run on this machine to their end: nothing of them runs on behind the step's back.

use std::path::Path;
use std::pin::pin;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;
use tokio::time::timeout;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::leftovers;

use crate::error::{cancelled, not_cancelled};

/// How much is kept of what a program says, from the end.
const KEPT: usize = 16 << 10;
/// How much is read of a program whose answer is wanted whole.
const READ: usize = 64 << 20;
/// How much more is kept while it is read: a cut may go through a secret, whose rest no mask would know.
const SLACK: usize = 8 << 10;
/// How long output is awaited after the program ended.
const DRAIN: Duration = Duration::from_millis(500);
/// The variable that the command takes the key of sealed contents from: no program needs it.
const SEAL_KEY: &str = "UPGRADE_SEAL_KEY";

/// Runs a program to its end, found after a crash by the marker in its environment.
///
/// Returns the last of what it printed, masked. What is said of it begins with `subject`.
///
/// # Errors
/// It cannot be started or ends otherwise than with 0; the call is cancelled: it has been ended then, with
/// all else that this step runs.
pub(crate) async fn run(
    cx: &Context,
    subject: &str,
    argv: &[String],
    env: &[(String, String)],
    directory: &Path,
) -> Result<String, StepError> {
    Ok(text(cx, &ended(cx, subject, argv, env, directory, KEPT).await?))
}

/// As [`run`], and returns all that it printed, as it printed it: to be read, not to be shown.
///
/// # Errors
/// As [`run`]; it prints more than anybody would read.
pub(crate) async fn read(
    cx: &Context,
    subject: &str,
    argv: &[String],
    env: &[(String, String)],
    directory: &Path,
) -> Result<Vec<u8>, StepError> {
    let printed = ended(cx, subject, argv, env, directory, READ).await?;
    if printed.len() > READ {
        return Err(StepError::permanent(format!(
            "{subject}: `{}` printed more than {READ} bytes",
            cx.mask(&line(argv))
        ))
        .with_hint("run it by hand to see what that is"));
    }
    Ok(printed)
}

/// Runs a program to its end and returns the end of what it printed, `keep` bytes of it or somewhat more.
async fn ended(
    cx: &Context,
    subject: &str,
    argv: &[String],
    env: &[(String, String)],
    directory: &Path,
    keep: usize,
) -> Result<Vec<u8>, StepError> {
    not_cancelled(cx)?;
    let line = format!("{subject}: `{}`", cx.mask(&line(argv)));
    let [program, arguments @ ..] = argv else {
        return Err(StepError::permanent(format!("{subject}: the command is empty"))
            .with_hint("name a program: [program, argument]"));
    };
    // A path is looked up from the working directory, as people expect.
    let path = if program.contains('/') { directory.join(program) } else { program.into() };
    let mut command = Command::new(path);
    command.args(arguments).current_dir(directory).process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.env_remove(SEAL_KEY).envs(env.iter().map(|(name, value)| (name, value)));
    command.env_remove(leftovers::STARTER).env(Context::MARKER, cx.marker());
    let mut child = command.spawn().map_err(|error| {
        let text = format!("{line} cannot be started");
        match error.kind() {
            std::io::ErrorKind::NotFound => StepError::permanent(text)
                .with_hint(format!("install {program} or write its path; the directory is {}", directory.display())),
            std::io::ErrorKind::PermissionDenied => StepError::permanent(text)
                .with_hint(format!("make {program} executable for the account that runs the upgrade")),
            _ => StepError::transient(text).with_hint("the machine may be short of processes"),
        }
        .with_cause(&error)
    })?;
    let (pipes, mut kept) = ((child.stdout.take(), child.stderr.take()), (Vec::new(), Vec::new()));
    let ended = async {
        let mut read =
            pin!(async { tokio::join!(end_of(pipes.0, &mut kept.0, keep), end_of(pipes.1, &mut kept.1, KEPT)) });
        tokio::select! {
            _ = &mut read => child.wait().await,
            status = child.wait() => {
                // What it left running on purpose may hold the pipes open for ever.
                let _ = timeout(DRAIN, &mut read).await;
                status
            }
        }
    };
    let status = tokio::select! {
        biased;
        status = ended => status,
        () = cx.cancelled().cancelled() => {
            leftovers::end(cx).await?;
            return Err(cancelled());
        }
    };
    let status =
        status.map_err(|error| StepError::unknown(format!("{line}: its end was not seen")).with_cause(&error))?;
    let error = match status.code() {
        Some(0) => return Ok(kept.0),
        // EX_TEMPFAIL
        Some(75) => StepError::transient(format!("{line} ended with exit code 75")),
        Some(code) => StepError::permanent(format!("{line} ended with exit code {code}")),
        // Nobody knows what it did.
        None => StepError::unknown(format!("{line} was ended by a signal")),
    };
    let (stdout, stderr) = (text(cx, &kept.0), text(cx, &kept.1));
    let detail = if stderr.trim().is_empty() { stdout } else { stderr };
    Err(error.with_detail(detail).with_hint("read what it said, mend that, and run it by hand to see it pass"))
}

/// Writes a command as a person would type it.
pub(crate) fn line(argv: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,{}".contains(c);
    let quoted = |word: &String| match word.as_str() {
        word if !word.is_empty() && word.chars().all(plain) => word.to_owned(),
        word => format!("'{}'", word.replace('\'', r"'\''")),
    };
    argv.iter().map(quoted).collect::<Vec<_>>().join(" ")
}

async fn end_of(stream: Option<impl AsyncRead + Unpin>, kept: &mut Vec<u8>, keep: usize) {
    let mut chunk = vec![0; KEPT];
    let Some(mut stream) = stream else { return };
    // What broke off is judged by the exit code.
    while let Ok(read @ 1..) = stream.read(&mut chunk).await {
        kept.extend_from_slice(&chunk[..read]);
        if kept.len() > 2 * (keep + SLACK) {
            kept.drain(..kept.len() - keep - SLACK);
        }
    }
}

fn text(cx: &Context, bytes: &[u8]) -> String {
    let masked = cx.mask(&String::from_utf8_lossy(bytes));
    let from = masked.len().saturating_sub(KEPT);
    let from = (from..=masked.len()).find(|at| masked.is_char_boundary(*at)).unwrap_or(masked.len());
    masked[from..].trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use upgrade_core::error::Class;
    use upgrade_core::testkit::TestContext;

    fn sh(script: &str) -> Vec<String> {
        ["sh", "-c", script].map(str::to_owned).into()
    }

    #[tokio::test]
    async fn what_a_program_says_and_how_it_ends_is_told() {
        let test = TestContext::new("nodes");
        let cx = test.forward();
        let run =
            async |argv: &[String]| super::run(&cx, "node n1", argv, &[("A".into(), "1".into())], "/".as_ref()).await;
        assert_eq!(run(&sh("echo $A; pwd")).await.unwrap(), "1\n/");
        let long = run(&sh("head -c 200000 /dev/zero | tr '\\0' x; echo end")).await.unwrap();
        let whole = read(&cx, "node n1", &sh("head -c 200000 /dev/zero"), &[], "/".as_ref()).await.unwrap();
        assert_eq!(whole.len(), 200_000);
        assert!(long.len() <= KEPT && long.ends_with("xend"), "{}", long.len());
        let error = run(&sh("echo no room >&2; exit 3")).await.unwrap_err();
        assert_eq!((error.class(), error.detail()), (Class::Permanent, Some("no room")));
        assert!(error.message().starts_with("node n1: `sh -c "), "{error}");
        assert_eq!(run(&sh("exit 75")).await.unwrap_err().class(), Class::Transient);
        assert_eq!(run(&sh("kill -9 $$")).await.unwrap_err().class(), Class::Unknown);
        let error = run(&["no-such-program".to_owned()]).await.unwrap_err();
        assert!(error.hint().unwrap().contains("install no-such-program"), "{error:?}");
    }

    #[tokio::test]
    async fn a_call_that_is_cancelled_leaves_no_program() {
        let test = TestContext::new("nodes");
        let (cx, token) = (test.forward(), test.cancellation().clone());
        let long = sh("sleep 300 & sleep 300");
        let (ended, ()) = tokio::join!(run(&cx, "node n1", &long, &[], "/".as_ref()), async {
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
            token.cancel();
        });
        assert_eq!(ended.unwrap_err().message(), "cancelled");
    }
}
