//! What is pending, and where files and history contradict each other.

use std::collections::BTreeMap;
use std::fmt;

use upgrade_core::error::StepError;

use super::history::Applied;
use super::layout::{Directory, Migration};
use super::version::MigrationVersion;

/// Says what is asked for, and what is put up with.
#[derive(Debug, Clone, Default)]
pub struct Terms {
    /// The version that is asked for; the newest if absent.
    pub to: Option<MigrationVersion>,
    /// Applies migrations that are older than the newest one applied.
    pub out_of_order: bool,
    /// Puts up with migrations that were applied and whose files are gone.
    pub ignore_missing: bool,
}

/// Tells where files and history contradict each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Drift {
    /// The script is not the one that was applied.
    Changed {
        /// The file.
        file: String,
        /// The version.
        version: MigrationVersion,
    },
    /// What was applied has no file.
    Missing {
        /// The version.
        version: MigrationVersion,
    },
    /// A migration is older than the newest one applied.
    OutOfOrder {
        /// The file.
        file: String,
        /// The version.
        version: MigrationVersion,
        /// The newest one applied.
        newest: MigrationVersion,
    },
    /// A migration failed under another tool, which left it half done.
    Failed {
        /// The version.
        version: MigrationVersion,
    },
}

impl fmt::Display for Drift {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Drift::Changed { file, version } => {
                write!(f, "{file}: version {version} was applied from another text than it has now")
            }
            Drift::Missing { version } => write!(f, "version {version} was applied, and there is no file for it"),
            Drift::OutOfOrder { file, version, newest } => {
                write!(f, "{file}: version {version} is not applied, but the newer {newest} is")
            }
            Drift::Failed { version } => {
                write!(f, "version {version} is marked as failed: another tool left it half done")
            }
        }
    }
}

impl Drift {
    /// Returns the line that tells what to do.
    pub fn hint(&self) -> &'static str {
        match self {
            Drift::Changed { .. } => {
                "put the old text back and write the change as a new migration; line ends count, see `.gitattributes`"
            }
            Drift::Missing { .. } => {
                "bring the file back (is this an older release, or another branch?), or set `ignore_missing: true`"
            }
            Drift::OutOfOrder { .. } => "give it a version newer than that, or set `out_of_order: true`",
            Drift::Failed { .. } => {
                "look what of it was done, undo or finish it by hand, and correct its row; then try again"
            }
        }
    }
}

/// Turns what was found into one error: the first, and how many more.
pub fn error_of(drift: &[Drift]) -> Option<StepError> {
    let first = drift.first()?;
    let error = StepError::permanent(match drift.len() {
        1 => first.to_string(),
        more => format!("{first}; and {} more", more - 1),
    })
    .with_hint(first.hint());
    Some(match drift {
        [_] => error,
        all => error.with_detail(all.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")),
    })
}

/// Lists what is to be done.
#[derive(Debug, Clone)]
pub enum Pending<'a> {
    /// Migrations to apply, oldest first.
    Up(Vec<&'a Migration>),
    /// Versions to take back, newest first.
    Down(Vec<MigrationVersion>),
}

/// Compares the files of a directory with what was applied.
///
/// # Errors
/// `to` names no version that is known.
pub fn compare<'a>(
    directory: &'a Directory,
    applied: &BTreeMap<MigrationVersion, Applied>,
    checksum: impl Fn(&Migration) -> Option<String>,
    terms: &Terms,
) -> Result<(Pending<'a>, Vec<Drift>), StepError> {
    let mut drift = Vec::new();
    for (version, row) in applied {
        match directory.find(version) {
            _ if row.failed => drift.push(Drift::Failed { version: version.clone() }),
            None if !terms.ignore_missing => drift.push(Drift::Missing { version: version.clone() }),
            Some(migration) if row.checksum.is_some() && checksum(migration) != row.checksum => {
                drift.push(Drift::Changed { file: migration.up.file.clone(), version: version.clone() });
            }
            _ => {}
        }
    }
    let to = match &terms.to {
        Some(to) if !to.is_zero() && directory.find(to).is_none() && !applied.contains_key(to) => {
            let newest = directory.migrations.last().map(|newest| newest.version.to_string()).unwrap_or_default();
            return Err(StepError::permanent(format!("there is no migration of version {to}"))
                .with_hint(format!("correct `to`; the newest is {newest}")));
        }
        Some(to) => Some(to),
        None => None,
    };
    let newer: Vec<_> = applied.keys().rev().filter(|version| to.is_some_and(|to| *version > to)).cloned().collect();
    if !newer.is_empty() {
        return Ok((Pending::Down(newer), drift));
    }
    let pending: Vec<_> = directory
        .migrations
        .iter()
        .filter(|migration| to.is_none_or(|to| migration.version <= *to))
        .filter(|migration| !applied.contains_key(&migration.version))
        .collect();
    if !terms.out_of_order
        && let Some(newest) = applied.keys().next_back()
    {
        drift.extend(pending.iter().filter(|migration| migration.version < *newest).map(|migration| {
            Drift::OutOfOrder {
                file: migration.up.file.clone(),
                version: migration.version.clone(),
                newest: newest.clone(),
            }
        }));
    }
    Ok((Pending::Up(pending), drift))
}
