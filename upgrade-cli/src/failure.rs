//! What the command says when it does not do what it was asked.

use std::error::Error;
use std::fmt::Write as _;
use std::io;

use serde_json::{Value, json};
use upgrade_core::error::{Class, StepError};
use upgrade_core::executor::ExecutorError;
use upgrade_core::file::{FileError, FileMistake};
use upgrade_core::journal::JournalError;

use crate::exit::Exit;
use crate::render::palette::{Palette, harmless, indented};

/// Holds an error with its chain, the line that tells what to do, and the exit status.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    message: String,
    causes: Vec<String>,
    hint: Option<String>,
    detail: Option<String>,
    file: Option<Box<FileError>>,
}

/// Gives a result of the command.
pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), causes: Vec::new(), hint: None, detail: None, file: None }
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    pub(crate) fn refused(message: impl Into<String>) -> Self {
        Self::new(Exit::Refused, message)
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(Exit::Internal, message)
    }

    pub(crate) fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(crate) fn with_cause(mut self, cause: &dyn Error) -> Self {
        let mut next = Some(cause);
        while let Some(error) = next {
            self.causes.push(error.to_string());
            next = error.source();
        }
        self
    }

    /// Renders the error for a person.
    pub(crate) fn text(&self, palette: Palette) -> String {
        if let Some(file) = &self.file {
            return file.render(palette.is_on()).trim_end().to_owned();
        }
        let mut text = format!("{} {}", palette.bad("error:"), harmless(&self.message));
        chain(&mut text, palette, &self.causes, self.detail.as_deref(), self.hint.as_deref());
        text
    }

    /// Renders the error as the last object of JSON output.
    pub(crate) fn object(&self) -> Value {
        let mut object = json!({ "outcome": "error", "message": self.message, "exit": self.exit });
        if !self.causes.is_empty() {
            object["causes"] = json!(self.causes);
        }
        if let Some(hint) = &self.hint {
            object["hint"] = json!(hint);
        }
        if let Some(detail) = &self.detail {
            object["detail"] = json!(detail);
        }
        if let Some(file) = &self.file {
            let mistake = |m: &FileMistake| json!({ "message": m.message(), "line": m.line(), "column": m.column(), "help": m.help() });
            object["file"] = json!(file.path());
            object["mistakes"] = file.mistakes().map(mistake).collect();
        }
        object
    }
}

/// Appends what stands behind a message: its causes, captured output, the hint.
pub(crate) fn chain(text: &mut String, palette: Palette, causes: &[String], detail: Option<&str>, hint: Option<&str>) {
    // Writing to a String cannot fail.
    for cause in causes {
        let _ = write!(text, "\n  {} {}", palette.faint("caused by:"), harmless(cause));
    }
    if let Some(detail) = detail {
        let _ = write!(text, "\n{}", palette.faint(indented(detail, 4)));
    }
    if let Some(hint) = hint {
        let _ = write!(text, "\n  {} {}", palette.accent("hint:"), harmless(hint));
    }
}

impl From<FileError> for Failure {
    fn from(error: FileError) -> Self {
        let hint = error.help().map(str::to_owned);
        Self { hint, file: Some(Box::new(error.clone())), ..Self::usage(error.message()) }
    }
}

impl From<JournalError> for Failure {
    fn from(error: JournalError) -> Self {
        let exit = match error {
            JournalError::Held { .. } | JournalError::LeaseLost { .. } | JournalError::Sequence { .. } => Exit::Refused,
            JournalError::NoRun(_) => Exit::Usage,
            _ => Exit::Internal,
        };
        let failure = Self::new(exit, error.to_string()).with_hint(error.hint());
        match error.source() {
            Some(source) => failure.with_cause(source),
            None => failure,
        }
    }
}

impl From<StepError> for Failure {
    fn from(error: StepError) -> Self {
        // What may pass by itself is no mistake of whoever called: a script may try again.
        let exit = if error.class() == Class::Permanent { Exit::Usage } else { Exit::Internal };
        Self {
            exit,
            causes: error.causes().to_vec(),
            hint: error.hint().map(str::to_owned),
            detail: error.detail().map(str::to_owned),
            ..Self::usage(error.message())
        }
    }
}

impl From<ExecutorError> for Failure {
    fn from(error: ExecutorError) -> Self {
        match error {
            ExecutorError::Refused { message, hint } => Self { hint, ..Self::refused(message) },
            // Held before the run began: nothing halted, the journal's own message says it all.
            ExecutorError::Journal(error @ (JournalError::Held { .. } | JournalError::NoRun(_))) => error.into(),
            ExecutorError::Journal(ref source) => {
                Self { hint: Some(source.hint()), ..Self::internal(error.to_string()).with_cause(source) }
            }
            ExecutorError::Pipeline(error) => error.into(),
            other => Self::internal(other.to_string())
                .with_hint("`upgrade audit verify` names every damaged line; restore the file from a copy"),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::internal("cannot write the result").with_cause(&error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_can_tell_a_server_that_is_down_from_a_mistake_of_its_own() {
        assert_eq!(Failure::from(StepError::transient("the server does not answer")).exit, Exit::Internal);
        assert_eq!(Failure::from(StepError::permanent("the password is wrong")).exit, Exit::Usage);
    }
}
