//! The two streams: results on stdout, the story and the errors on stderr.

use std::fmt::Display;
use std::io::{self, BufRead, IsTerminal, Write};

use serde::Serialize;

use crate::arguments::{Global, Output};
use crate::render::palette::Palette;

/// Knows where what is said goes, and how it looks there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Console {
    json: bool,
    quiet: bool,
    verbose: u8,
    yes: bool,
    out: Palette,
    err: Palette,
    bars: bool,
}

impl Console {
    pub(crate) fn new(global: &Global) -> Self {
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let refused = global.no_color || std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let colours = !dumb && !refused;
        let json = global.output == Output::Json;
        Self {
            json,
            quiet: global.quiet,
            verbose: global.verbose,
            yes: global.yes,
            out: Palette::new(colours && io::stdout().is_terminal()),
            err: Palette::new(colours && io::stderr().is_terminal()),
            bars: !json && !dumb && !global.quiet && io::stderr().is_terminal(),
        }
    }

    pub(crate) fn json(&self) -> bool {
        self.json
    }

    pub(crate) fn quiet(&self) -> bool {
        self.quiet
    }

    pub(crate) fn verbose(&self) -> bool {
        self.verbose > 0
    }

    /// Tells whether a person watches stderr, so that lines may be drawn over.
    pub(crate) fn bars(&self) -> bool {
        self.bars
    }

    pub(crate) fn out(&self) -> Palette {
        self.out
    }

    pub(crate) fn err(&self) -> Palette {
        self.err
    }

    /// Writes a result; nothing in JSON mode, where only objects may stand on stdout.
    ///
    /// A reader that went away is not an error: `upgrade history | head`.
    pub(crate) fn line(&self, text: impl Display) -> io::Result<()> {
        if self.json {
            return Ok(());
        }
        unless_gone(writeln!(io::stdout().lock(), "{text}"))
    }

    /// Writes one object on one line of stdout; nothing in text mode.
    pub(crate) fn object(&self, object: &impl Serialize) -> io::Result<()> {
        if self.json { raw_object(object) } else { Ok(()) }
    }

    /// Writes a line of the story to stderr, unless it is to be quiet.
    pub(crate) fn note(&self, text: impl Display) {
        if !self.quiet {
            // stderr is the last resort: there is nowhere to report that it failed.
            let _ = writeln!(io::stderr().lock(), "{text}");
        }
    }

    /// Writes an error to stderr, also where it is to be quiet.
    pub(crate) fn alarm(&self, text: impl Display) {
        let _ = writeln!(io::stderr().lock(), "{text}");
    }

    /// Asks before something that cannot be taken back; without a person to ask, goes on.
    ///
    /// A script, an alert's handler or a supervisor named the command and its run: it must
    /// neither hang nor fail at night for want of an answer.
    pub(crate) fn confirm(&self, question: &str) -> io::Result<bool> {
        if self.yes || self.json || !io::stdin().is_terminal() || !io::stderr().is_terminal() {
            return Ok(true);
        }
        write!(io::stderr().lock(), "{question} [y/N] ")?;
        io::stderr().flush()?;
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer)?;
        Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
    }
}

/// Writes text to stdout in every mode: for commands whose result is a document.
pub(crate) fn document(text: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    unless_gone(stdout.write_all(text).and_then(|()| stdout.flush()))
}

/// Writes one object on one line of stdout, in every mode.
pub(crate) fn raw_object(object: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(object)?;
    line.push(b'\n');
    document(&line)
}

fn unless_gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}
