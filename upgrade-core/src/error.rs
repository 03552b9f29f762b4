//! What a step or a check says when it fails: classed, journaled as data, with a line on what to do.

use std::error::Error;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Says what a failure promises about trying again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// It may pass by itself: the same call is worth repeating.
    Transient,
    /// The same call will fail again until something is changed.
    Permanent,
    /// Nobody knows, and nobody knows what was done.
    Unknown,
}

/// Describes somebody else's change met in the middle of an upgrade.
///
/// Each text is a token (digest, resource version, id) or a short description, never the content
/// itself: contents may be secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conflict {
    /// What was changed: a path, a table, an object.
    pub subject: String,
    /// The state that `prepare` found.
    pub found: String,
    /// The state that `apply` intends.
    pub intended: String,
    /// The state that is there now, which is neither.
    pub present: String,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} was changed by somebody else: found {}, intended {}, present {}",
            self.subject, self.found, self.intended, self.present
        )
    }
}

/// Tells why a step did not do what it was asked, as data that a journal keeps.
///
/// Display gives the message alone; [`StepError::causes`] gives the rest of the chain and
/// [`StepError::hint`] the line that a tired person can act on.
///
/// Boxed inside, so that a `Result` with it stays small.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StepError(Box<Parts>);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Parts {
    class: Class,
    message: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    causes: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    conflict: Option<Conflict>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
}

impl StepError {
    /// Makes an error of the given class.
    pub fn new(class: Class, message: impl Into<String>) -> Self {
        let message = message.into();
        Self(Box::new(Parts { class, message, causes: Vec::new(), hint: None, conflict: None, detail: None }))
    }

    /// Makes an error that may pass by itself.
    pub fn transient(message: impl Into<String>) -> Self {
        Self::new(Class::Transient, message)
    }

    /// Makes an error that will come again until something is changed.
    pub fn permanent(message: impl Into<String>) -> Self {
        Self::new(Class::Permanent, message)
    }

    /// Makes an error after which nobody knows what was done.
    pub fn unknown(message: impl Into<String>) -> Self {
        Self::new(Class::Unknown, message)
    }

    /// Makes the error of a third state: neither found nor intended.
    pub fn conflict(conflict: Conflict) -> Self {
        let mut error = Self::permanent(conflict.to_string());
        error.0.hint = Some(format!(
            "look at {}: make it as found or as intended and resolve with --retry, or keep the change and resolve \
             with --skip; `on_conflict: overwrite` on the step lets later runs win",
            conflict.subject
        ));
        error.0.conflict = Some(conflict);
        error
    }

    /// Adds the line that tells what to do.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Adds the error behind this one, and those behind it.
    #[must_use]
    pub fn with_cause(mut self, cause: &(dyn Error + '_)) -> Self {
        let mut next = Some(cause);
        while let Some(error) = next {
            self.0.causes.push(error.to_string());
            next = error.source();
        }
        self
    }

    /// Adds captured output: the last lines that a process or a server said.
    #[must_use]
    pub fn with_detail(mut self, detail: impl Into<String>) -> Self {
        self.0.detail = Some(detail.into());
        self
    }

    /// Says what the failure promises about trying again.
    pub fn class(&self) -> Class {
        self.0.class
    }

    /// Returns the message, without causes.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Returns the messages of the errors behind this one, nearest first.
    pub fn causes(&self) -> &[String] {
        &self.0.causes
    }

    /// Returns the line that tells what to do.
    pub fn hint(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// Returns the foreign change behind this error, if it is one.
    pub fn as_conflict(&self) -> Option<&Conflict> {
        self.0.conflict.as_ref()
    }

    /// Returns captured output.
    pub fn detail(&self) -> Option<&str> {
        self.0.detail.as_deref()
    }

    /// Rewrites every text of the error, so that what must not be kept can be masked.
    #[must_use]
    pub fn map_text(mut self, mut rewrite: impl FnMut(&str) -> String) -> Self {
        self.0.message = rewrite(&self.0.message);
        for cause in &mut self.0.causes {
            *cause = rewrite(cause);
        }
        self.0.hint = self.0.hint.as_deref().map(&mut rewrite);
        self.0.detail = self.0.detail.as_deref().map(&mut rewrite);
        if let Some(conflict) = &mut self.0.conflict {
            for text in [&mut conflict.subject, &mut conflict.found, &mut conflict.intended, &mut conflict.present] {
                *text = rewrite(text);
            }
        }
        self
    }
}

impl fmt::Display for StepError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl Error for StepError {}

/// Tells why a measurement could not be made; its verdict is *unknown*, never a pass.
pub type CheckError = StepError;
