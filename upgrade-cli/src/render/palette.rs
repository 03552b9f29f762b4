//! Colours, and texts of others made harmless for a terminal.

use std::fmt::{self, Display};

use anstyle::{AnsiColor, Effects, Style};

/// Colours text, or leaves it as it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Palette {
    on: bool,
}

/// Holds a text with its colour.
pub(crate) struct Painted<T> {
    text: T,
    style: Option<Style>,
}

impl<T: Display> Display for Painted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.style {
            Some(style) => {
                write!(f, "{style}")?;
                self.text.fmt(f)?;
                write!(f, "{style:#}")
            }
            None => self.text.fmt(f),
        }
    }
}

impl Palette {
    pub(crate) fn new(on: bool) -> Self {
        Self { on }
    }

    pub(crate) fn is_on(self) -> bool {
        self.on
    }

    fn paint<T: Display>(self, text: T, style: Style) -> Painted<T> {
        Painted { text, style: self.on.then_some(style) }
    }

    pub(crate) fn good<T: Display>(self, text: T) -> Painted<T> {
        self.paint(text, AnsiColor::Green.on_default())
    }

    pub(crate) fn bad<T: Display>(self, text: T) -> Painted<T> {
        self.paint(text, AnsiColor::Red.on_default().effects(Effects::BOLD))
    }

    pub(crate) fn removed<T: Display>(self, text: T) -> Painted<T> {
        self.paint(text, AnsiColor::Red.on_default())
    }

    pub(crate) fn careful<T: Display>(self, text: T) -> Painted<T> {
        self.paint(text, AnsiColor::Yellow.on_default())
    }

    pub(crate) fn accent<T: Display>(self, text: T) -> Painted<T> {
        self.paint(text, AnsiColor::Cyan.on_default())
    }

    pub(crate) fn strong<T: Display>(self, text: T) -> Painted<T> {
        self.paint(text, Style::new().bold())
    }

    pub(crate) fn faint<T: Display>(self, text: T) -> Painted<T> {
        self.paint(text, Style::new().dimmed())
    }
}

/// Makes a text harmless: what a process or a server said may carry escape sequences, and they
/// must not move the cursor or set the title of whoever reads the journal.
pub(crate) fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}

/// Indents every line of a text.
pub(crate) fn indented(text: &str, by: usize) -> String {
    let margin = " ".repeat(by);
    harmless(text).lines().map(|line| format!("{margin}{line}\n")).collect::<String>().trim_end_matches('\n').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_sequences_of_others_are_shown_not_obeyed() {
        assert_eq!(harmless("a\x1b[2Jb\tc\nd\u{9b}1m"), "a\u{fffd}[2Jb\tc\nd\u{fffd}1m");
    }

    #[test]
    fn without_colours_the_text_is_untouched() {
        assert_eq!(Palette::new(false).bad("x").to_string(), "x");
        assert_eq!(format!("[{:<3}]", Palette::new(false).good("x")), "[x  ]");
        assert!(Palette::new(true).bad("x").to_string().contains("\x1b["));
    }
}
