//! Which old backups of a step go at commit.

use std::fs;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use upgrade_core::error::StepError;
use upgrade_core::units::Span;

use crate::backup::manifest::{Manifest, ManifestError};
use crate::backup::storage;
use crate::identifier::Identifier;

/// Chooses the backups in `directory` beyond the newest `keep` that are also older than `keep_for`.
///
/// Only those count whose manifest says that the same step made them of the same database; `own`
/// always stays. Each comes with the copy on the server that it names.
pub(super) fn beyond(
    directory: &Path,
    own: &Path,
    keep: Option<usize>,
    keep_for: Option<Span>,
    now: Timestamp,
) -> Result<Vec<(PathBuf, Option<Identifier>)>, StepError> {
    let this = match Manifest::read(own) {
        Ok(manifest) => manifest,
        // Somebody moved it away already: then nobody can tell which others are alike.
        Err(ManifestError::Missing(_)) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let failed = |error: &std::io::Error| storage::failed(format!("{} cannot be listed", directory.display()), error);
    let mut others = Vec::new();
    for entry in fs::read_dir(directory).map_err(|error| failed(&error))? {
        let path = entry.map_err(|error| failed(&error))?.path();
        let hidden = path.file_name().is_none_or(|name| name.to_string_lossy().starts_with('.'));
        // What does not read as a backup is not ours to remove.
        let Ok(manifest) = Manifest::read(&path) else { continue };
        let same = manifest.step == this.step
            && manifest.source.system == this.source.system
            && manifest.source.database == this.source.database;
        if same && !hidden && path != own {
            others.push((manifest.taken, path, manifest.archive.copy));
        }
    }
    others.sort_by_key(|other| std::cmp::Reverse(other.0));
    // Its own backup is one of those that are kept.
    let beyond = keep.map_or(0, |keep| keep.saturating_sub(1));
    let old = |taken: Timestamp| keep_for.is_none_or(|span| now.duration_since(taken).unsigned_abs() > span.0);
    Ok(others
        .into_iter()
        .skip(beyond)
        .filter(|(taken, _, _)| old(*taken))
        .map(|(_, path, copy)| (path, copy))
        .collect())
}
