//! One file swapped for another and back: what `host.file` and `host.config` have in common.

use std::fs::{self, File};
use std::io::{self, Cursor, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::sealed::SealedRef;

use crate::error::{blocking, io_error, not_cancelled};
use crate::files::durable::{self, Ownership};
use crate::files::path_state::{self, Modified, Observed, PathState, observe};

/// Holds what undoing a change of one file needs; the content itself is sealed or kept aside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileUndo {
    /// The file that is changed: absolute, links resolved where they are followed.
    pub path: PathBuf,
    /// The state found.
    pub found: PathState,
    /// The state intended.
    pub intended: PathState,
    /// Where the content found is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<Kept>,
    /// When what was found had last been modified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modified: Option<Modified>,
    /// Directories that did not exist, topmost first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub directories: Vec<PathBuf>,
}

/// Says where the content found is kept until commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Kept {
    /// In the run's sealed storage.
    Sealed(SealedRef),
    /// Beside the file, under this name: it is too large to be sealed.
    Aside(PathBuf),
}

/// Carries the content that a file is to have. Not `Debug`: it may be secret.
pub(crate) enum Contents {
    Bytes(Vec<u8>),
    /// Copied from a file, so that a large one is never held in memory.
    CopyOf(PathBuf),
}

impl FileUndo {
    /// Records a change from what was observed; seals the content found.
    pub(crate) async fn record(
        cx: &Context,
        path: PathBuf,
        observed: &Observed,
        intended: PathState,
        directories: Vec<PathBuf>,
    ) -> Result<Self, StepError> {
        let kept = match (&observed.state, &observed.contents) {
            // A plan seals nothing: nobody will ask for it.
            (PathState::File { .. }, Some(contents)) if cx.is_dry_run() => Some(Kept::Sealed(SealedRef::of(contents))),
            (PathState::File { .. }, Some(contents)) => Some(Kept::Sealed(cx.seal(contents).await?)),
            (PathState::File { .. }, None) => Some(Kept::Aside(aside(&path, cx))),
            _ => None,
        };
        Ok(Self { path, found: observed.state.clone(), intended, kept, modified: observed.modified, directories })
    }

    fn conflict(&self, present: &PathState) -> StepError {
        StepError::conflict(Conflict {
            subject: self.path.display().to_string(),
            found: self.found.to_string(),
            intended: self.intended.to_string(),
            present: present.to_string(),
        })
    }
}

fn aside(path: &Path, cx: &Context) -> PathBuf {
    let mut name = durable::temporary(path, &cx.marker()).into_os_string();
    name.push("-found");
    PathBuf::from(name)
}

/// Brings the state intended about, unless a third state is met; `contents` is asked only if the
/// file must be written.
pub(crate) async fn apply(
    cx: &Context,
    undo: &FileUndo,
    contents: impl AsyncFnOnce(&Observed) -> Result<Contents, StepError>,
) -> Result<(), StepError> {
    let path = undo.path.clone();
    let observed = blocking(move || observe(&path)).await?;
    if observed.state == undo.intended {
        // The call that brought it about may have died before the name was durable.
        let path = undo.path.clone();
        return blocking(move || sync_existing(&durable::parent(&path))).await;
    }
    if observed.state != undo.found && cx.on_conflict() == OnConflict::Stop {
        return Err(undo.conflict(&observed.state));
    }
    let contents = match undo.intended {
        PathState::File { .. } => Some(contents(&observed).await?),
        _ => None,
    };
    not_cancelled(cx)?;
    let (undo, key) = (undo.clone(), cx.marker());
    blocking(move || {
        let failed = |error: io::Error| io_error(format!("{} cannot be changed", undo.path.display()), &error);
        if !undo.directories.is_empty() {
            durable::create_directories(&durable::parent(&undo.path)).map_err(failed)?;
        }
        if let Some(Kept::Aside(aside)) = &undo.kept
            && observed.state == undo.found
        {
            keep_aside(&undo.path, aside).map_err(failed)?;
        }
        match (&undo.intended, contents) {
            (PathState::File { sha256, mode, user, group, .. }, Some(contents)) => {
                let ownership = Ownership { mode: Some(*mode), owner: Some((*user, *group)) };
                write(&undo.path, contents, sha256, ownership, &key)
            }
            _ => durable::remove_file(&undo.path).map_err(failed),
        }
    })
    .await
}

fn write(path: &Path, contents: Contents, sha256: &str, ownership: Ownership, key: &str) -> Result<(), StepError> {
    let changed = || {
        StepError::permanent(format!("what {} is to hold has changed since the step was prepared", path.display()))
            .with_hint("a source, template or secret was changed meanwhile: roll back and run again")
    };
    let failed = |error: io::Error| io_error(format!("{} cannot be written", path.display()), &error);
    let mut reader: Box<dyn Read> = match contents {
        Contents::Bytes(bytes) => {
            if upgrade_core::sealed::sha256_hex(&bytes) != sha256 {
                return Err(changed());
            }
            Box::new(Cursor::new(bytes))
        }
        Contents::CopyOf(source) => {
            let read = |error: io::Error| io_error(format!("{} cannot be read", source.display()), &error);
            let (digest, ..) = path_state::digest(&mut File::open(&source).map_err(read)?, false).map_err(read)?;
            if digest != sha256 {
                return Err(changed());
            }
            Box::new(File::open(&source).map_err(read)?)
        }
    };
    durable::replace(path, &mut reader, ownership, None, key).map_err(failed)
}

fn keep_aside(path: &Path, aside: &Path) -> io::Result<()> {
    match fs::hard_link(path, aside) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    durable::sync_directory(&durable::parent(path))
}

/// Puts back what was found, unless a third state is met.
pub(crate) async fn rollback(cx: &Context, undo: &FileUndo) -> Result<(), StepError> {
    settle(cx, undo).await?;
    let path = undo.path.clone();
    let present = blocking(move || observe(&path)).await?.state;
    if present != undo.found {
        if present != undo.intended && cx.on_conflict() == OnConflict::Stop {
            return Err(undo.conflict(&present));
        }
        let contents = match &undo.kept {
            Some(Kept::Sealed(reference)) => Some(cx.unseal(reference).await?),
            _ => None,
        };
        let (undo, key) = (undo.clone(), cx.marker());
        blocking(move || put_back(&undo, contents, &key)).await?;
    }
    let undo = undo.clone();
    blocking(move || {
        remove_aside(&undo)?;
        sync_existing(&durable::parent(&undo.path))?;
        let (Some(topmost), Some(lowest)) = (undo.directories.first(), undo.directories.last()) else { return Ok(()) };
        durable::remove_made(lowest, Some(topmost))
            .map_err(|error| io_error(format!("{} cannot be removed", topmost.display()), &error))
    })
    .await
}

fn put_back(undo: &FileUndo, contents: Option<Vec<u8>>, key: &str) -> Result<(), StepError> {
    let failed = |error: io::Error| io_error(format!("{} cannot be put back", undo.path.display()), &error);
    match (&undo.found, &undo.kept, contents) {
        (PathState::Absent, ..) => durable::remove_file(&undo.path).map_err(failed),
        (PathState::Symlink { target, user, group }, ..) => {
            durable::switch_link(&undo.path, target, key).map_err(failed)?;
            std::os::unix::fs::lchown(&undo.path, Some(*user), Some(*group)).map_err(failed)?;
            undo.modified.map_or(Ok(()), |modified| link_modified(&undo.path, modified).map_err(failed))
        }
        (PathState::File { mode, user, group, .. }, _, Some(contents)) => {
            let ownership = Ownership { mode: Some(*mode), owner: Some((*user, *group)) };
            let modified = undo.modified.map(Modified::time);
            durable::replace(&undo.path, &mut Cursor::new(contents), ownership, modified, key).map_err(failed)
        }
        (PathState::File { .. }, Some(Kept::Aside(aside)), None) => {
            if observe(aside)?.state != undo.found {
                return Err(StepError::permanent(format!("{} is not what was found any more", aside.display()))
                    .with_hint(format!(
                        "put {} back by hand from a backup, then resolve the step with --skip",
                        undo.path.display()
                    )));
            }
            fs::rename(aside, &undo.path).map_err(failed)?;
            durable::sync_directory(&durable::parent(&undo.path)).map_err(failed)
        }
        _ => Err(StepError::permanent("the undo record does not say where the content found is kept")
            .with_hint("put the file back by hand, then resolve the step with --skip")),
    }
}

fn link_modified(link: &Path, modified: Modified) -> io::Result<()> {
    let time = rustix::fs::Timespec { tv_sec: modified.seconds, tv_nsec: i64::from(modified.nanoseconds) };
    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(rustix::fs::CWD, link, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(())
}

/// Removes the temporary file that an interrupted call left.
pub(crate) async fn settle(cx: &Context, undo: &FileUndo) -> Result<(), StepError> {
    let temporary = durable::temporary(&undo.path, &cx.marker());
    blocking(move || match durable::remove_file(&temporary) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(|error| io_error(format!("{} cannot be removed", temporary.display()), &error)),
    })
    .await
}

/// Removes the content that was kept aside.
pub(crate) async fn commit(undo: &FileUndo) -> Result<(), StepError> {
    let undo = undo.clone();
    blocking(move || remove_aside(&undo)).await
}

fn remove_aside(undo: &FileUndo) -> Result<(), StepError> {
    let Some(Kept::Aside(aside)) = &undo.kept else { return Ok(()) };
    match durable::remove_file(aside) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(|error| io_error(format!("{} cannot be removed", aside.display()), &error)),
    }
}

fn sync_existing(directory: &Path) -> Result<(), StepError> {
    match durable::sync_directory(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(|error| io_error(format!("{} cannot be made durable", directory.display()), &error)),
    }
}

/// Lists the directories above `path` that do not exist, topmost first.
pub(crate) fn missing_directories(path: &Path) -> Vec<PathBuf> {
    let mut missing: Vec<_> = path
        .ancestors()
        .skip(1)
        .take_while(|directory| !directory.as_os_str().is_empty() && !directory.exists())
        .map(Path::to_path_buf)
        .collect();
    missing.reverse();
    missing
}
