//! What a program says: its end is kept, bounded and masked.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use upgrade_core::context::Context;

use super::program::Role;

/// How much of what a program says is kept, from the end.
const KEPT: usize = 64 << 10;

/// How much more is read and dropped again: a cut may go through a secret, whose rest no mask
/// would know.
const SLACK: usize = 8 << 10;

/// How long output is awaited after the program ended: a child may hold the pipe open for ever.
const DRAIN: Duration = Duration::from_millis(500);

/// Says where a program writes to.
pub(super) enum Output {
    Pipes,
    File { file: File, from: u64 },
}

impl Output {
    pub(super) fn prepare(command: &mut Command, role: &Role) -> io::Result<Self> {
        let Role::Starter { log } = role else {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            return Ok(Self::Pipes);
        };
        let file = match log {
            Some(path) => File::options().read(true).append(true).create(true).mode(0o600).open(path)?,
            None => tempfile::tempfile()?,
        };
        command.stdout(file.try_clone()?).stderr(file.try_clone()?);
        let from = file.metadata()?.len();
        Ok(Self::File { file, from })
    }

    pub(super) fn collect(self, child: &mut Child) -> Collecting {
        match self {
            Self::Pipes => Collecting::Pipes(Reader::start(child.stdout.take()), Reader::start(child.stderr.take())),
            Self::File { file, from } => Collecting::File { file, from },
        }
    }
}

pub(super) enum Collecting {
    Pipes(Reader, Reader),
    File { file: File, from: u64 },
}

impl Collecting {
    pub(super) async fn finish(self, cx: &Context) -> (String, String) {
        match self {
            Self::Pipes(stdout, stderr) => {
                let (stdout, stderr) = tokio::join!(stdout.finish(), stderr.finish());
                (stdout.text(cx), stderr.text(cx))
            }
            // Both streams go to the one file, as they would to a terminal.
            Self::File { file, from } => (String::new(), tail_of(&file, from).text(cx)),
        }
    }
}

fn tail_of(file: &File, from: u64) -> Tail {
    let mut tail = Tail::default();
    let end = file.metadata().map_or(from, |metadata| metadata.len());
    let start = from.max(end.saturating_sub((KEPT + SLACK) as u64));
    let mut buffer = vec![0; usize::try_from(end.saturating_sub(start)).unwrap_or(0)];
    // Read by position: the service that goes on writing shares the file's offset with us.
    let read = file.read_at(&mut buffer, start).unwrap_or(0);
    tail.push(&buffer[..read]);
    tail.cut |= start > from;
    tail
}

pub(super) struct Reader {
    tail: Arc<Mutex<Tail>>,
    task: JoinHandle<()>,
}

impl Reader {
    fn start(stream: Option<impl AsyncRead + Unpin + Send + 'static>) -> Self {
        let tail = Arc::new(Mutex::new(Tail::default()));
        let into = tail.clone();
        let task = tokio::spawn(async move {
            let Some(mut stream) = stream else { return };
            let mut buffer = vec![0; 16 << 10];
            while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                into.lock().unwrap_or_else(PoisonError::into_inner).push(&buffer[..read]);
            }
        });
        Self { tail, task }
    }

    async fn finish(mut self) -> Tail {
        if timeout(DRAIN, &mut self.task).await.is_err() {
            self.task.abort();
        }
        std::mem::take(&mut self.tail.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Keeps the end of a stream.
#[derive(Default)]
struct Tail {
    bytes: VecDeque<u8>,
    cut: bool,
}

impl Tail {
    fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
        let over = self.bytes.len().saturating_sub(KEPT + SLACK);
        self.bytes.drain(..over);
        self.cut |= over > 0;
    }

    fn text(mut self, cx: &Context) -> String {
        let masked = cx.mask(&String::from_utf8_lossy(self.bytes.make_contiguous()));
        let over = masked.len().saturating_sub(KEPT).max(if self.cut { SLACK.min(masked.len()) } else { 0 });
        let start = (over..=masked.len()).find(|at| masked.is_char_boundary(*at)).unwrap_or(masked.len());
        if start == 0 { masked } else { format!("[…]{}", &masked[start..]) }
    }
}

#[cfg(test)]
mod tests {
    use upgrade_core::secret::{SecretString, Secrets};
    use upgrade_core::testkit::TestContext;

    use super::*;

    #[test]
    fn a_secret_that_the_cut_goes_through_leaves_nothing() {
        let secrets = Secrets::default();
        let secret = "hunter2-".repeat(64);
        secrets.remember(&SecretString::from(secret.clone()));
        let test = TestContext::new("step").secrets(secrets);
        for ahead in 0..secret.len() {
            let mut tail = Tail::default();
            tail.push(secret.as_bytes());
            tail.push(&vec![b'x'; KEPT + SLACK - secret.len() + ahead]);
            let text = tail.text(&test.forward());
            assert!(!text.contains("hunter2"), "cut {ahead} bytes into the secret");
            assert!(text.len() <= KEPT + 8);
        }
    }
}
