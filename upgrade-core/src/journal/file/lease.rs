//! Leases as OS file locks: a holder that dies frees them, however it dies.
//!
//! Each lock name has a file that is never removed. It holds the epoch, in two slots, and who
//! holds it. A holder has the file locked exclusively; for a path it also has the files of all
//! directories above locked shared, so that nobody can take one of them meanwhile.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::slots::{SLOTS, Slots};
use super::{storage, sync_directory};
use crate::journal::JournalError;
use crate::names::{Actor, LockName};
use crate::sealed::sha256_hex;

/// What a lock file says.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Holding {
    epoch: u64,
    holder: String,
    since: Timestamp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Exclusive,
    Shared,
}

#[derive(Debug)]
struct LockFile {
    name: LockName,
    path: PathBuf,
    file: File,
    identity: (u64, u64),
    mode: Mode,
    /// What the file holds while this lease stands; empty for a shared one.
    contents: Vec<u8>,
}

/// Holds the locked files of a lease; dropped, they are free.
#[derive(Debug)]
pub(super) struct Locks {
    files: Vec<LockFile>,
    epoch: u64,
}

impl Locks {
    /// Takes all the names, or none and says which is held.
    pub(super) fn try_take(directory: &Path, names: &[LockName]) -> Result<Self, JournalError> {
        let files =
            plan(names).into_iter().map(|(name, mode)| take(directory, name, mode)).collect::<Result<Vec<_>, _>>()?;
        let mut locks = Self { files, epoch: 0 };
        locks.begin()?;
        sync_directory(directory)?;
        Ok(locks)
    }

    /// Returns the epoch of the lease.
    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Makes a new epoch durable in every file.
    fn begin(&mut self) -> Result<(), JournalError> {
        let mut held = Vec::new();
        for lock in self.files.iter_mut().filter(|lock| lock.mode == Mode::Exclusive) {
            let slots = read(&lock.file).map_err(storage("read", &lock.path))?;
            held.push((lock, slots));
        }
        let last = held.iter().filter_map(|(_, slots)| slots.as_ref().map(|slots| slots.value.epoch)).max();
        let epoch = last.unwrap_or_default() + 1;
        let holding = Holding { epoch, holder: describe(&Actor::current()), since: Timestamp::now() };
        for (lock, slots) in held {
            match slots {
                Some(mut slots) => slots.write(&lock.file, holding.clone()),
                None => Slots::start(holding.clone()).and_then(|(_, bytes)| lock.file.write_all_at(&bytes, 0)),
            }
            .and_then(|()| lock.file.sync_data())
            .map_err(storage("write", &lock.path))?;
            lock.contents = read_bytes(&lock.file).map_err(storage("read", &lock.path))?;
        }
        self.epoch = epoch;
        Ok(())
    }

    /// Checks that every file is still the one that was locked, with the epoch of this lease.
    pub(super) fn verify(&self) -> Result<(), JournalError> {
        for lock in &self.files {
            let lost = |how: &str| JournalError::LeaseLost { reason: format!("the lock file of {} {how}", lock.name) };
            // By its path: whoever finds another file there locks that one.
            match std::fs::metadata(&lock.path) {
                Ok(found) if (found.dev(), found.ino()) == lock.identity => {}
                Ok(_) => return Err(lost("was replaced")),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(lost("was removed")),
                Err(error) => return Err(storage("read", &lock.path)(error)),
            }
            if lock.mode == Mode::Shared {
                continue;
            }
            // Asked before every append: compared, and read only to say what is wrong.
            let present = read_bytes(&lock.file).map_err(storage("read", &lock.path))?;
            if present != lock.contents {
                return Err(lost(&match Slots::<Holding>::read(&present) {
                    Some(slots) => format!("is at epoch {}, not {}", slots.value.epoch, self.epoch),
                    None => "cannot be read".into(),
                }));
            }
        }
        Ok(())
    }
}

/// Says how each name must be locked, in the order that everybody keeps.
fn plan(names: &[LockName]) -> BTreeMap<LockName, Mode> {
    let mut plan: BTreeMap<_, _> = names.iter().map(|name| (name.clone(), Mode::Exclusive)).collect();
    for name in names {
        if let ("path", path) = name.parts() {
            for above in Path::new(path).ancestors().skip(1) {
                if let Ok(above) = LockName::new("path", &above.to_string_lossy()) {
                    plan.entry(above).or_insert(Mode::Shared);
                }
            }
        }
    }
    plan
}

fn take(directory: &Path, name: LockName, mode: Mode) -> Result<LockFile, JournalError> {
    let path = directory.join(format!("{}.lock", file_name(name.as_str())));
    loop {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(storage("open", &path))?;
        let taken = match mode {
            Mode::Exclusive => file.try_lock(),
            Mode::Shared => file.try_lock_shared(),
        };
        match taken {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(JournalError::Held { holder: holder(&file, mode), lock: name });
            }
            Err(TryLockError::Error(error)) => return Err(storage("lock", &path)(error)),
        }
        let locked = file.metadata().map_err(storage("read", &path))?;
        let identity = (locked.dev(), locked.ino());
        // Removed between open and lock, it excludes nobody: take the one that is there now.
        if std::fs::metadata(&path).is_ok_and(|found| (found.dev(), found.ino()) == identity) {
            return Ok(LockFile { name, path, file, identity, mode, contents: Vec::new() });
        }
    }
}

/// Says who holds a file that could not be locked, as far as it tells.
fn holder(file: &File, mode: Mode) -> String {
    if mode == Mode::Exclusive && file.try_lock_shared().is_ok() {
        // What the file says is then about an earlier holder.
        return "a run on something inside it".into();
    }
    match read(file) {
        Ok(Some(slots)) => format!("{}, since {}", slots.value.holder, slots.value.since),
        _ => "another process".into(),
    }
}

fn read(file: &File) -> io::Result<Option<Slots<Holding>>> {
    // Empty when it was made and nothing written yet: no lease was ever granted on it.
    Ok(Slots::read(&read_bytes(file)?))
}

fn read_bytes(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; SLOTS];
    match file.read_exact_at(&mut bytes, 0) {
        Ok(()) => Ok(bytes),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Describes the holder in what fits into a slot whatever its account and host are called.
fn describe(actor: &Actor) -> String {
    let plain = |text: &str| text.chars().filter(|c| c.is_ascii_graphic()).take(48).collect::<String>();
    format!("{}@{} (pid {})", plain(&actor.user), plain(&actor.host), actor.pid)
}

/// Names a file after any text: legible, never a path, and no two texts the same.
pub(super) fn file_name(text: &str) -> String {
    let legible: String = text
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_') { c } else { '_' })
        .take(60)
        .collect();
    let mut digest = sha256_hex(text.as_bytes());
    digest.truncate(24);
    format!("{legible}-{digest}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_are_safe_and_distinct() {
        for text in ["path:/etc/../x", "path:.", "a:\u{e9}", &format!("path:/{}", "x".repeat(4000))] {
            let name = file_name(text);
            assert!(name.len() < 100 && !name.contains(['/', '.']), "{name}");
        }
        assert_ne!(file_name("path:/a_b"), file_name("path:/a/b"));
    }

    #[test]
    fn a_path_is_locked_with_the_directories_above_it() {
        let name = |path: &str| LockName::new("path", path).unwrap();
        let plan = plan(&[name("/srv/app"), name("/srv"), LockName::new("pipeline", "notes").unwrap()]);
        let modes: Vec<_> = plan.iter().map(|(name, mode)| (name.as_str(), *mode)).collect();
        assert_eq!(
            modes,
            [
                ("path:/", Mode::Shared),
                ("path:/srv", Mode::Exclusive),
                ("path:/srv/app", Mode::Exclusive),
                ("pipeline:notes", Mode::Exclusive)
            ]
        );
    }
}
