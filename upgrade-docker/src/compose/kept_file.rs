//! A file of a project as it was found and as it is to be, both kept sealed: they may hold secrets.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use upgrade_core::context::{Context, OnConflict, blocking};
use upgrade_core::error::{Class, Conflict, StepError};
use upgrade_core::sealed::{SealedRef, sha256_hex};

use crate::naming::mark;

/// Holds what putting a file back needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileUndo {
    path: PathBuf,
    found: Option<FoundFile>,
    intended: SealedRef,
}

/// Holds a file that was there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FoundFile {
    contents: SealedRef,
    mode: u32,
    user: u32,
    group: u32,
}

/// Says which of its states a file is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum At {
    Found,
    Intended,
}

/// Reads a file as text; none if it is not there.
pub(crate) async fn read(path: &Path) -> Result<Option<String>, StepError> {
    let path = path.to_path_buf();
    blocking(move || match look(&path)? {
        None => Ok(None),
        Some((bytes, _)) => String::from_utf8(bytes).map(Some).map_err(|_| {
            StepError::permanent(format!("{} is not text in UTF-8", path.display())).with_hint("correct the file")
        }),
    })
    .await
}

fn failed(path: &Path, doing: &str, error: &io::Error) -> StepError {
    let class = match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Class::Permanent,
        _ => Class::Transient,
    };
    StepError::new(class, format!("{} cannot be {doing}", path.display()))
        .with_cause(error)
        .with_hint("look at the file and its directory: who may write there, is there space?")
}

fn look(path: &Path) -> Result<Option<(Vec<u8>, Metadata)>, StepError> {
    let reading = |error: io::Error| failed(path, "read", &error);
    match fs::read(path) {
        Ok(bytes) => Ok(Some((bytes, fs::metadata(path).map_err(reading)?))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(reading(error)),
    }
}

impl FileUndo {
    /// Records a file before its first change; `text` is what it is to hold.
    pub(crate) async fn record(cx: &Context, path: &Path, text: &str) -> Result<Self, StepError> {
        // What a link leads to is changed, and the link stays.
        let path = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        let at = path.clone();
        let found = match blocking(move || look(&at)).await? {
            None => None,
            Some((bytes, metadata)) => Some(FoundFile {
                contents: cx.seal(&bytes).await?,
                mode: metadata.mode() & 0o7777,
                user: metadata.uid(),
                group: metadata.gid(),
            }),
        };
        Ok(Self { path, found, intended: cx.seal(text.as_bytes()).await? })
    }

    /// Returns where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Tells in which state it is; a third one is somebody else's.
    pub(crate) async fn state(&self, cx: &Context) -> Result<At, StepError> {
        let path = self.path.clone();
        let present = blocking(move || Ok(look(&path)?.map(|(bytes, _)| sha256_hex(&bytes)))).await?;
        let found = self.found.as_ref().map(|found| found.contents.sha256.clone());
        if present.as_ref() == Some(&self.intended.sha256) {
            Ok(At::Intended)
        } else if present == found {
            Ok(At::Found)
        } else if cx.on_conflict() == OnConflict::Overwrite {
            // Whatever it holds is written over.
            Ok(if cx.direction() == upgrade_core::context::Direction::Back { At::Intended } else { At::Found })
        } else {
            let token =
                |sha: Option<String>| sha.map_or_else(|| "absent".to_owned(), |sha| format!("sha256 {}", &sha[..12]));
            Err(StepError::conflict(Conflict {
                subject: format!("file {}", self.path.display()),
                found: token(found),
                intended: token(Some(self.intended.sha256.clone())),
                present: token(present),
            }))
        }
    }

    /// Makes it as it is to be.
    pub(crate) async fn apply(&self, cx: &Context) -> Result<(), StepError> {
        if self.state(cx).await? == At::Intended {
            return Ok(());
        }
        let bytes = cx.unseal(&self.intended).await?;
        self.write(cx, bytes, self.found.as_ref()).await
    }

    /// Makes it as it was.
    pub(crate) async fn put_back(&self, cx: &Context) -> Result<(), StepError> {
        let found = self.state(cx).await? == At::Found;
        match &self.found {
            _ if found => {}
            Some(before) => self.write(cx, cx.unseal(&before.contents).await?, Some(before)).await?,
            None => self.remove(self.path.clone()).await?,
        }
        self.sweep(cx).await
    }

    /// Removes what an interrupted write left.
    pub(crate) async fn sweep(&self, cx: &Context) -> Result<(), StepError> {
        self.remove(self.temporary(cx)).await
    }

    fn temporary(&self, cx: &Context) -> PathBuf {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        self.path.with_file_name(format!(".{name}.upgrade-{}", mark(cx)))
    }

    async fn remove(&self, path: PathBuf) -> Result<(), StepError> {
        blocking(move || match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done.and_then(|()| sync_directory(&path)).map_err(|error| failed(&path, "removed", &error)),
        })
        .await
    }

    /// Replaces it at once: nobody reads half of it, and it is durable when this returns.
    async fn write(&self, cx: &Context, bytes: Vec<u8>, like: Option<&FoundFile>) -> Result<(), StepError> {
        let (path, temporary, like) = (self.path.clone(), self.temporary(cx), like.cloned());
        blocking(move || {
            let written = write(&temporary, &bytes, like.as_ref())
                .and_then(|()| fs::rename(&temporary, &path))
                .and_then(|()| sync_directory(&path));
            written.map_err(|error| failed(&path, "written", &error))
        })
        .await
    }
}

fn write(temporary: &Path, bytes: &[u8], like: Option<&FoundFile>) -> io::Result<()> {
    match fs::remove_file(temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Private until owner and mode are what they should be.
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(temporary)?;
    file.write_all(bytes)?;
    match like {
        Some(found) => {
            fchown(&file, Some(found.user), Some(found.group))?;
            file.set_permissions(fs::Permissions::from_mode(found.mode))?;
        }
        None => file.set_permissions(fs::Permissions::from_mode(0o644))?,
    }
    file.sync_all()
}

fn sync_directory(of: &Path) -> io::Result<()> {
    File::open(of.parent().unwrap_or(Path::new("/")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use upgrade_core::testkit::TestContext;

    #[tokio::test]
    async fn a_file_is_changed_and_put_back_with_its_mode() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(".env");
        fs::write(&path, "TAG=1\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let test = TestContext::new("stack");
        let undo = FileUndo::record(&test.forward(), &path, "TAG=2\n").await.unwrap();
        for _ in 0..2 {
            undo.apply(&test.forward()).await.unwrap();
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "TAG=2\n");
        assert_eq!(undo.state(&test.back()).await.unwrap(), At::Intended);
        for _ in 0..2 {
            undo.put_back(&test.back()).await.unwrap();
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "TAG=1\n");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o640);
        fs::write(&path, "TAG=3\n").unwrap();
        assert!(undo.apply(&test.forward()).await.unwrap_err().as_conflict().is_some());
        assert!(undo.put_back(&test.back()).await.unwrap_err().as_conflict().is_some());
        assert!(!serde_json::to_string(&undo).unwrap().contains("TAG"));
    }

    #[tokio::test]
    async fn a_file_that_was_not_there_goes_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("compose.override.yaml");
        let test = TestContext::new("stack");
        let undo = FileUndo::record(&test.forward(), &path, "services: {}\n").await.unwrap();
        undo.apply(&test.forward()).await.unwrap();
        assert!(path.is_file());
        undo.put_back(&test.back()).await.unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
