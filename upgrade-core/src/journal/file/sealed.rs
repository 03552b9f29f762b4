//! Found contents beside the journal: a file each, named by its digest.

use std::io;
use std::path::{Path, PathBuf};

use async_trait::async_trait;

use super::requests::make_directory;
use super::run::write_durably;
use super::{off_thread, storage, sync_directory};
use crate::error::StepError;
use crate::journal::JournalError;
use crate::sealed::{SealedRef, SealedStorage};

/// Encrypts what is put, where a key is configured.
#[derive(Clone)]
pub(super) enum Seal {
    /// Contents are kept as they are, readable by the owner alone.
    Plain,
    /// Contents are encrypted.
    #[cfg(feature = "encryption")]
    Key(std::sync::Arc<crate::journal::cipher::Cipher>),
}

pub(super) struct FileSealed {
    pub(super) directory: PathBuf,
    pub(super) seal: Seal,
}

#[async_trait]
impl SealedStorage for FileSealed {
    async fn put(&self, contents: &[u8]) -> Result<SealedRef, StepError> {
        let reference = SealedRef::of(contents);
        let (directory, seal, kept, contents) =
            (self.directory.clone(), self.seal.clone(), reference.clone(), contents.to_vec());
        off_thread(move || {
            make_directory(&directory)?;
            let (path, contents) = match &seal {
                Seal::Plain => (plain_path(&directory, &kept), contents),
                #[cfg(feature = "encryption")]
                Seal::Key(cipher) => {
                    let path = encrypted_path(&directory, &kept);
                    let sealed = cipher.seal(&kept.sha256, &contents).map_err(storage("encrypt", &path))?;
                    (path, sealed)
                }
            };
            // Written again even if it is there: an earlier sync may have failed.
            write_durably(&path, &contents)
        })
        .await
        .and_then(|written| written)
        .map_err(|error| failed(&error, "the contents found cannot be kept"))?;
        Ok(reference)
    }

    async fn get(&self, reference: &SealedRef) -> Result<Vec<u8>, StepError> {
        let (directory, seal, wanted) = (self.directory.clone(), self.seal.clone(), reference.clone());
        off_thread(move || read(&directory, &seal, &wanted))
            .await
            .map_err(|error| failed(&error, "the contents found before cannot be read"))?
    }

    async fn clear(&self) -> Result<(), StepError> {
        let directory = self.directory.clone();
        off_thread(move || match std::fs::remove_dir_all(&directory) {
            Ok(()) => directory.parent().map_or(Ok(()), sync_directory),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(storage("remove", &directory)(error)),
        })
        .await
        .and_then(|cleared| cleared)
        .map_err(|error| failed(&error, "the contents found before cannot be removed"))
    }
}

fn read(directory: &Path, seal: &Seal, wanted: &SealedRef) -> Result<Vec<u8>, StepError> {
    // A reference comes out of a journal; it names a file only if it is a digest.
    if wanted.sha256.len() != 64 || !wanted.sha256.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(StepError::permanent(format!("`{}` is not a digest of sealed contents", wanted.sha256))
            .with_hint("the undo record is not one that this program wrote"));
    }
    let unreadable = |error: &io::Error| {
        let gone = error.kind() == io::ErrorKind::NotFound;
        let (new, hint): (fn(String) -> StepError, _) = if gone {
            (
                StepError::permanent,
                "restore the file from a copy, or put the contents back by hand and resolve with --skip",
            )
        } else {
            (StepError::transient, "look at the disk of the state directory")
        };
        new(format!("the sealed contents {} cannot be read from {}", wanted.sha256, directory.display()))
            .with_cause(error)
            .with_hint(hint)
    };
    // Both ways: a key may have been configured, or taken away, since the contents were put.
    let contents = match std::fs::read(plain_path(directory, wanted)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let sealed = std::fs::read(encrypted_path(directory, wanted)).map_err(|error| unreadable(&error))?;
            unseal(seal, wanted, sealed)?
        }
        read => read.map_err(|error| unreadable(&error))?,
    };
    if SealedRef::of(&contents) != *wanted {
        return Err(StepError::permanent(format!("the sealed contents {} are damaged", wanted.sha256))
            .with_hint("restore the file from a copy, or put the contents back by hand and resolve with --skip"));
    }
    Ok(contents)
}

fn unseal(seal: &Seal, wanted: &SealedRef, sealed: Vec<u8>) -> Result<Vec<u8>, StepError> {
    match seal {
        #[cfg(feature = "encryption")]
        Seal::Key(cipher) => cipher.open(&wanted.sha256, &sealed).map_err(|error| {
            StepError::permanent(format!("the sealed contents {} cannot be decrypted", wanted.sha256))
                .with_cause(&error)
                .with_hint("set UPGRADE_SEAL_KEY to the key that the run was started with")
        }),
        Seal::Plain => {
            drop(sealed);
            Err(StepError::permanent(format!("the sealed contents {} are encrypted", wanted.sha256))
                .with_hint("set UPGRADE_SEAL_KEY to the key that the run was started with"))
        }
    }
}

fn plain_path(directory: &Path, reference: &SealedRef) -> PathBuf {
    directory.join(&reference.sha256)
}

fn encrypted_path(directory: &Path, reference: &SealedRef) -> PathBuf {
    directory.join(format!("{}.chacha20poly1305", reference.sha256))
}

fn failed(error: &JournalError, what: &str) -> StepError {
    // Not the journal's own hint: the run goes on, back if need be, and is not there to be resumed.
    let hint = "look at the disk of the state directory: whether it has room, and can be written";
    StepError::unknown(what).with_cause(error).with_hint(hint)
}
