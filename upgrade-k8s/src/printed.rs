//! What a program in a container printed: bounded, its secrets masked.

use std::collections::VecDeque;

use upgrade_core::context::Context;

/// How much of a stream is kept.
const KEPT: usize = 64 << 10;
/// What is cut off besides: a secret that begins before the cut would not be recognised.
const SLACK: usize = 4 << 10;
/// How many lines a person reads of a failure.
const LINES: usize = 40;

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
        lines[lines.len().saturating_sub(LINES)..].join("\n")
    }
}

/// Collects one stream as it comes, and shows its lines as progress.
#[derive(Debug, Default)]
pub(crate) struct Stream {
    bytes: VecDeque<u8>,
    cut: bool,
    begun: Vec<u8>,
    count: u64,
}

impl Stream {
    pub(crate) fn push(&mut self, cx: &Context, bytes: &[u8]) {
        self.bytes.extend(bytes);
        let over = self.bytes.len().saturating_sub(KEPT + SLACK);
        self.bytes.drain(..over);
        self.cut |= over > 0;
        self.show(cx, bytes);
    }

    fn show(&mut self, cx: &Context, bytes: &[u8]) {
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

    pub(crate) fn text(mut self, cx: &Context) -> String {
        let masked = cx.mask(&String::from_utf8_lossy(self.bytes.make_contiguous()));
        let least = if self.cut { SLACK.min(masked.len()) } else { 0 };
        let mut from = masked.len().saturating_sub(KEPT).max(least);
        while !masked.is_char_boundary(from) {
            from += 1;
        }
        masked[from..].trim().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use upgrade_core::testkit::TestContext;

    #[test]
    fn the_end_of_a_long_stream_is_kept_and_whole_lines_are_shown() {
        let test = TestContext::new("run");
        let (cx, mut stream) = (test.forward(), Stream::default());
        stream.push(&cx, b"one\ntw");
        assert_eq!(test.reported().len(), 1);
        stream.push(&cx, b"o\r\n\n");
        let shown: Vec<_> = test.reported().into_iter().map(|progress| (progress.done, progress.message)).collect();
        assert_eq!(shown, [(1, "one".to_owned()), (2, "two".to_owned())]);
        for number in 0..20_000 {
            stream.push(&cx, format!("line {number} ä\n").as_bytes());
        }
        let text = stream.text(&cx);
        assert!(text.ends_with("line 19999 ä") && text.len() <= KEPT, "{}", text.len());
        let printed = Printed { stdout: text, stderr: "it broke\n".into() };
        assert_eq!(printed.detail(), "it broke");
    }
}
