//! What is wrong with a pipeline file, shown with its line.

use std::fmt;
use std::path::{Path, PathBuf};

use super::node::Place;
use super::reader::MAX_MISTAKES;

/// Says one thing that is wrong, before its line is looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mistake {
    pub(super) message: String,
    pub(super) place: Place,
    pub(super) help: Option<String>,
    /// The value may be a secret that should not stand in the file: its characters are not shown.
    pub(super) hidden: bool,
}

impl Mistake {
    pub(super) fn new(message: impl Into<String>, place: Place) -> Self {
        Self { message: message.into(), place, help: None, hidden: false }
    }

    pub(super) fn with_help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

/// Says what is wrong with a pipeline file: every mistake that could be told at once.
///
/// Displayed, it shows each with its line:
///
/// ```text
/// error: unknown key `timeuot`
///   --> pipeline.yaml:12:5
///    |
/// 12 |     timeuot: 10m
///    |     ^^^^^^^
///    = help: did you mean `timeout`?
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileError {
    path: PathBuf,
    first: Box<FileMistake>,
    others: Vec<FileMistake>,
    more: usize,
}

/// Says one thing that is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileMistake {
    message: String,
    help: Option<String>,
    shown: Option<Shown>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Shown {
    line: usize,
    column: usize,
    text: String,
    caret: usize,
    width: usize,
}

/// A screen's width; what is longer is shown around the caret.
const MAX_SHOWN: usize = 120;

const MAX_MESSAGE: usize = 500;

impl FileMistake {
    fn locate(mistake: &Mistake, source: &str) -> Self {
        Self {
            shown: show(&mistake.place, source, mistake.hidden),
            message: one_line(&mistake.message),
            help: mistake.help.as_deref().map(one_line),
        }
    }

    /// Says what is wrong, in one line.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Says what to do about it.
    pub fn help(&self) -> Option<&str> {
        self.help.as_deref()
    }

    /// Returns the line, from one; `None` if the mistake is not in one.
    pub fn line(&self) -> Option<usize> {
        self.shown.as_ref().map(|shown| shown.line)
    }

    /// Returns the column, in characters from one.
    pub fn column(&self) -> Option<usize> {
        self.shown.as_ref().map(|shown| shown.column)
    }

    fn render(&self, path: &Path, paint: Paint) -> String {
        let gutter = self.line().map_or(1, |line| line.to_string().len());
        let bar = paint.mark("|");
        let mut out = format!("{}{}\n", paint.error("error"), paint.strong(&format!(": {}", self.message)));
        match &self.shown {
            Some(Shown { line, column, text, caret, width }) => {
                out += &format!("{:gutter$}{} {}:{line}:{column}\n", "", paint.mark("-->"), path.display());
                out += &format!("{:gutter$} {bar}\n", "");
                out += &format!("{} {bar} {text}\n", paint.mark(&line.to_string()));
                out += &format!("{:gutter$} {bar} {:caret$}{}\n", "", "", paint.error(&"^".repeat(*width)));
            }
            None => out += &format!("{:gutter$}{} {}\n", "", paint.mark("-->"), path.display()),
        }
        if let Some(help) = &self.help {
            out += &format!("{:gutter$} {} help: {help}\n", "", paint.mark("="));
        }
        out
    }
}

fn show(place: &Place, source: &str, hidden: bool) -> Option<Shown> {
    if source.is_empty() || *place == (0..0) {
        return None;
    }
    let start = floor(source, place.start);
    let end = floor(source, place.end).max(start);
    let line_start = source[..start].rfind('\n').map_or(0, |at| at + 1);
    let line_end = source[start..].find('\n').map_or(source.len(), |at| start + at);
    let before = source[line_start..start].chars().count();
    // A mapping or a block of text goes on over many lines: its first is shown.
    let marked = source[start..end.min(line_end)].trim_end().chars().count().max(1);
    let mut line: Vec<char> = source[line_start..line_end].trim_end().chars().map(printable).collect();
    if hidden {
        line.iter_mut().skip(before).for_each(|c| *c = '•');
    }
    let from = if line.len() > MAX_SHOWN { before.saturating_sub(MAX_SHOWN / 2).min(line.len()) } else { 0 };
    let to = line.len().min(from + MAX_SHOWN);
    Some(Shown {
        line: source[..start].matches('\n').count() + 1,
        column: before + 1,
        text: line[from..to].iter().collect(),
        caret: before - from,
        width: marked.min(to.saturating_sub(before)).max(1),
    })
}

/// Messages repeat what stands in the file, which may be long and may be anything.
fn one_line(text: &str) -> String {
    let mut line: String = text.chars().take(MAX_MESSAGE).map(printable).collect();
    if line.len() < text.len() && text.chars().count() > MAX_MESSAGE {
        line.push('…');
    }
    line
}

/// A file must not be able to write to the terminal by being wrong.
fn printable(c: char) -> char {
    match c {
        '\t' => ' ',
        c if c.is_control() => '\u{fffd}',
        c => c,
    }
}

fn floor(source: &str, at: usize) -> usize {
    (0..=at.min(source.len())).rev().find(|at| source.is_char_boundary(*at)).unwrap_or_default()
}

#[derive(Clone, Copy)]
struct Paint(bool);

impl Paint {
    fn with(self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn error(self, text: &str) -> String {
        self.with("1;31", text)
    }

    fn mark(self, text: &str) -> String {
        self.with("1;34", text)
    }

    fn strong(self, text: &str) -> String {
        self.with("1", text)
    }
}

impl FileError {
    pub(super) fn one(path: &Path, source: &str, mistake: &Mistake) -> Self {
        Self {
            path: path.to_path_buf(),
            first: Box::new(FileMistake::locate(mistake, source)),
            others: Vec::new(),
            more: 0,
        }
    }

    /// Collects mistakes in the order of their lines; `None` if there is none.
    pub(super) fn collect(path: &Path, source: &str, mistakes: &[Mistake]) -> Option<Self> {
        let mut mistakes: Vec<&Mistake> = mistakes.iter().collect();
        mistakes.sort_by_key(|mistake| mistake.place.start);
        mistakes.dedup();
        let more = mistakes.len().saturating_sub(MAX_MISTAKES);
        let mut located = mistakes.into_iter().take(MAX_MISTAKES).map(|mistake| FileMistake::locate(mistake, source));
        let first = Box::new(located.next()?);
        Some(Self { path: path.to_path_buf(), first, others: located.collect(), more })
    }

    /// Returns the mistakes, in the order of their lines.
    pub fn mistakes(&self) -> impl Iterator<Item = &FileMistake> {
        std::iter::once(&*self.first).chain(&self.others)
    }

    /// Says what is wrong first, in one line.
    pub fn message(&self) -> &str {
        self.first.message()
    }

    /// Returns the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the line of the first mistake, from one; `None` if it is not in one.
    pub fn line(&self) -> Option<usize> {
        self.first.line()
    }

    /// Returns the column of the first mistake, in characters from one.
    pub fn column(&self) -> Option<usize> {
        self.first.column()
    }

    /// Says what to do about the first mistake.
    pub fn help(&self) -> Option<&str> {
        self.first.help()
    }

    /// Shows every mistake with its line, in colours if they are asked for.
    pub fn render(&self, color: bool) -> String {
        let shown: Vec<_> = self.mistakes().map(|mistake| mistake.render(&self.path, Paint(color))).collect();
        let more = if self.more == 0 { String::new() } else { format!("\nand {} more mistakes\n", self.more) };
        format!("{}{more}", shown.join("\n")).trim_end().to_owned()
    }
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

impl std::error::Error for FileError {}
