//! The names that a journal keeps: runs, steps, checks, locks, actors.

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Says why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a {what}: {reason}")]
pub struct NameError {
    what: &'static str,
    text: String,
    reason: &'static str,
}

fn check_name(what: &'static str, text: &str) -> Result<(), NameError> {
    let reason = if text.is_empty() {
        "it is empty"
    } else if text.len() > 100 {
        "it is longer than 100 bytes"
    } else if !text.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        "it must start with a letter or a digit"
    } else if !text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')) {
        "it may hold only letters, digits, `-`, `_` and `.`"
    } else {
        return Ok(());
    };
    Err(NameError { what, text: text.chars().take(120).collect(), reason })
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            /// Returns the name as it is written.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                check_name($what, &text)?;
                Ok(Self(text))
            }
        }

        impl TryFrom<&str> for $type {
            type Error = NameError;
            fn try_from(text: &str) -> Result<Self, NameError> {
                Self::try_from(text.to_owned())
            }
        }

        impl FromStr for $type {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::try_from(text)
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> String {
                name.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

name!(
    /// Names one execution of a pipeline: a UUID version 7, so that names sort by time.
    RunId,
    "run id"
);
name!(
    /// Names one step of a pipeline; unique within it.
    StepId,
    "step id"
);
name!(
    /// Names one check or guard of a pipeline; unique within its phase.
    CheckId,
    "check id"
);
name!(
    /// Names what is upgraded: the `upgrade:` of a pipeline file.
    PipelineName,
    "pipeline name"
);

impl RunId {
    /// Makes a new name; no two calls give the same.
    pub fn generate() -> Self {
        Self(uuid::Uuid::now_v7().to_string())
    }
}

/// Counts the entries of one run's journal, from zero.
pub type Seq = u64;

/// Names a thing that only one run may change at a time, in one canonical spelling.
///
/// A lock name is `namespace:resource`. Names of the namespace `path` form a tree: a directory
/// overlaps with everything below it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LockName(String);

impl LockName {
    /// Makes a lock name from a namespace (a kind of resource) and a resource.
    ///
    /// # Errors
    /// The namespace is not a name, or the resource is empty or holds a control character.
    pub fn new(namespace: &str, resource: &str) -> Result<Self, NameError> {
        check_name("lock namespace", namespace)?;
        if resource.is_empty() || resource.chars().any(char::is_control) {
            return Err(NameError {
                what: "lock resource",
                text: resource.escape_debug().take(120).collect(),
                reason: "it is empty or holds a control character",
            });
        }
        Ok(Self(format!("{namespace}:{resource}")))
    }

    /// Makes the lock name of a path, absolute and without links as far as the path exists.
    ///
    /// # Errors
    /// The path holds a control character.
    pub fn path(path: &Path) -> Result<Self, NameError> {
        Self::new("path", &canonical(path).to_string_lossy())
    }

    /// Makes the lock name of a pipeline.
    pub fn pipeline(name: &PipelineName) -> Self {
        Self(format!("pipeline:{name}"))
    }

    /// Returns the name as it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Splits the name into namespace and resource.
    pub fn parts(&self) -> (&str, &str) {
        self.0.split_once(':').unwrap_or((&self.0, ""))
    }

    /// Tells whether a change of one may be a change of the other.
    pub fn overlaps(&self, other: &LockName) -> bool {
        self.covers(other) || other.covers(self)
    }

    /// Tells whether `other` is this resource or, for paths, lies below it.
    pub fn covers(&self, other: &LockName) -> bool {
        match (self.parts(), other.parts()) {
            (("path", mine), ("path", theirs)) => Path::new(theirs).starts_with(mine),
            _ => self == other,
        }
    }
}

impl TryFrom<String> for LockName {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        match text.split_once(':') {
            Some((namespace, resource)) => Self::new(namespace, resource),
            None => Err(NameError { what: "lock name", text, reason: "it must be written namespace:resource" }),
        }
    }
}

impl From<LockName> for String {
    fn from(name: LockName) -> String {
        name.0
    }
}

impl fmt::Display for LockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// Spells a path absolute, links resolved in the part of it that exists.
fn canonical(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let mut plain = PathBuf::new();
    for part in absolute.components() {
        match part {
            Component::ParentDir => {
                plain.pop();
            }
            Component::CurDir => {}
            other => plain.push(other),
        }
    }
    // What is upgraded may not exist yet: the nearest ancestor that does gives the spelling.
    for ancestor in plain.ancestors() {
        if let (Ok(real), Ok(rest)) = (ancestor.canonicalize(), plain.strip_prefix(ancestor)) {
            return if rest.as_os_str().is_empty() { real } else { real.join(rest) };
        }
    }
    plain
}

/// Says who acts: a person or a program, on a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actor {
    /// The account that acts.
    pub user: String,
    /// The machine it acts from.
    pub host: String,
    /// The process that acts.
    pub pid: u32,
}

impl Actor {
    /// Describes this process: the account from its user id, never from the environment, which
    /// anybody can set; the host from the kernel.
    pub fn current() -> Self {
        let uid = rustix::process::getuid().as_raw();
        let user = account(uid).unwrap_or_else(|| format!("uid {uid}"));
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        Self { user, host, pid: std::process::id() }
    }
}

/// Looks an account's name up in passwd(5).
fn account(uid: u32) -> Option<String> {
    let passwd = std::fs::read_to_string("/etc/passwd").ok()?;
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, id) = (fields.next()?, fields.nth(1)?);
        (id.parse() == Ok(uid)).then(|| name.to_owned())
    })
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{} (pid {})", self.user, self.host, self.pid)
    }
}
