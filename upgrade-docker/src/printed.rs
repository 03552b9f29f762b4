//! What a container or a program in one printed: bounded, its secrets masked.

use std::collections::VecDeque;
use std::time::Duration;

use bollard::Docker;
use bollard::container::LogOutput;
use bollard::query_parameters::LogsOptionsBuilder;
use futures_util::StreamExt as _;
use upgrade_core::context::Context;

use crate::containers::message;

/// How much of a stream is kept.
const KEPT: usize = 64 << 10;
/// What is cut off besides: a secret that begins before the cut would not be recognised.
const SLACK: usize = 4 << 10;
/// How long a driver of logs may take to give back what it has.
const PATIENCE: Duration = Duration::from_secs(10);

/// Holds the ends of both streams.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Printed {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Printed {
    /// Returns the last lines that a person would read first: of the errors, else of the output.
    pub(crate) fn detail(&self) -> String {
        let text = if self.stderr.trim().is_empty() { &self.stdout } else { &self.stderr };
        let lines: Vec<_> = text.trim_end().lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

/// Collects both streams as they come.
#[derive(Debug, Default)]
pub(crate) struct Collecting {
    stdout: Tail,
    stderr: Tail,
}

impl Collecting {
    pub(crate) fn push(&mut self, output: &LogOutput) {
        let tail = if matches!(output, LogOutput::StdErr { .. }) { &mut self.stderr } else { &mut self.stdout };
        tail.push(message(output));
    }

    pub(crate) fn finish(self, cx: &Context) -> Printed {
        Printed { stdout: self.stdout.text(cx), stderr: self.stderr.text(cx) }
    }
}

#[derive(Debug, Default)]
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
        let least = if self.cut { SLACK.min(masked.len()) } else { 0 };
        let mut from = masked.len().saturating_sub(KEPT).max(least);
        while !masked.is_char_boundary(from) {
            from += 1;
        }
        masked[from..].trim().to_owned()
    }
}

/// Reads what a container printed from its beginning; as much as is to be had.
pub(crate) async fn of_container(client: &Docker, cx: &Context, id: &str) -> Printed {
    let options = LogsOptionsBuilder::new().stdout(true).stderr(true).build();
    let mut logs = client.logs(id, Some(options));
    let mut collecting = Collecting::default();
    let reading = async {
        while let Some(Ok(output)) = logs.next().await {
            collecting.push(&output);
        }
    };
    // A driver that gives nothing back is not worth a failure: the exit code is the answer.
    let _ = tokio::time::timeout(PATIENCE, reading).await;
    collecting.finish(cx)
}

/// Shows each line that comes as the step's progress, until there are no more.
pub(crate) async fn follow(client: &Docker, cx: &Context, id: &str) {
    let options = LogsOptionsBuilder::new().stdout(true).stderr(true).follow(true).build();
    let mut logs = client.logs(id, Some(options));
    let mut lines = Lines::default();
    while let Some(Ok(output)) = logs.next().await {
        lines.push(cx, message(&output));
    }
}

/// Makes progress of lines.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    begun: Vec<u8>,
    count: u64,
}

impl Lines {
    pub(crate) fn push(&mut self, cx: &Context, bytes: &[u8]) {
        self.begun.extend_from_slice(bytes);
        while let Some(end) = self.begun.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.begun.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let line = line.trim();
            if !line.is_empty() {
                self.count += 1;
                // Masked before it is cut: half a secret would not be recognised.
                cx.progress(self.count, None, cx.mask(line).chars().take(400).collect::<String>());
            }
        }
        // A line without an end is not kept for ever.
        if self.begun.len() > KEPT {
            self.begun.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use upgrade_core::testkit::TestContext;

    #[test]
    fn the_end_of_a_long_stream_is_kept() {
        let cx = TestContext::new("run").forward();
        let mut collecting = Collecting::default();
        for number in 0..20_000 {
            let line = format!("line {number} ä\n");
            collecting.push(&LogOutput::StdOut { message: line.into() });
        }
        collecting.push(&LogOutput::StdErr { message: "it broke\n".into() });
        let printed = collecting.finish(&cx);
        assert!(printed.stdout.ends_with("line 19999 ä") && printed.stdout.len() <= KEPT, "{}", printed.stdout.len());
        assert_eq!((printed.stderr.as_str(), printed.detail().as_str()), ("it broke", "it broke"));
    }

    #[test]
    fn a_line_is_shown_when_it_is_whole() {
        let test = TestContext::new("run");
        let (cx, mut lines) = (test.forward(), Lines::default());
        lines.push(&cx, b"one\ntw");
        assert_eq!(test.reported().len(), 1);
        lines.push(&cx, b"o\r\n\n");
        let shown: Vec<_> = test.reported().into_iter().map(|progress| (progress.done, progress.message)).collect();
        assert_eq!(shown, [(1, "one".to_owned()), (2, "two".to_owned())]);
    }
}
