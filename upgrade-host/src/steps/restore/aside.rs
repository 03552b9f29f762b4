//! The other tree of the two that a restore exchanges, beside its place until commit.

use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use super::{RestorePlace, conflict, present};
use crate::archive::unpack::fresh_directory;
use crate::archive::{ArchiveError, tree};
use crate::files::durable;

/// Where, beside a place, the other tree of the two is: before the swap the one from the backup,
/// after it the one that was found.
pub(super) struct Aside {
    pub(super) directory: PathBuf,
    pub(super) tree: PathBuf,
    /// On a file system that cannot exchange: where the found tree goes before the other takes its
    /// place, and where the restored one goes on the way back.
    found: PathBuf,
    discarded: PathBuf,
    name: PathBuf,
}

impl Aside {
    pub(super) fn of(place: &RestorePlace, cx: &Context) -> Self {
        let directory = durable::temporary(&place.path, &cx.marker());
        let name = PathBuf::from(place.path.file_name().unwrap_or_default());
        let beside = |suffix: &str| {
            let mut beside = directory.clone().into_os_string();
            beside.push(suffix);
            PathBuf::from(beside)
        };
        Self { tree: directory.join(&name), found: beside(".found"), discarded: beside(".discarded"), directory, name }
    }

    pub(super) fn holds(&self, place: &RestorePlace, cx: &Context) -> Result<bool, StepError> {
        Ok(place.found.is_some() && present(&self.tree, cx)? == place.found)
    }

    /// Tells whether two renames were cut off between them.
    pub(super) fn is_halfway(&self) -> bool {
        self.found.exists() || self.discarded.exists()
    }

    pub(super) fn swap(&self, path: &Path) -> Result<(), StepError> {
        if path.symlink_metadata().is_err() {
            return Ok(tree::place(&self.tree, path)?);
        }
        if self.exchange(&self.tree, path)? {
            return Ok(());
        }
        fresh_directory(&self.found)?;
        tree::place(path, &self.found.join(&self.name))?;
        Ok(tree::place(&self.tree, path)?)
    }

    pub(super) fn swap_back(&self, place: &RestorePlace, cx: &Context) -> Result<(), StepError> {
        if place.found.is_none() {
            fresh_directory(&self.directory)?;
            return Ok(tree::place(&place.path, &self.tree)?);
        }
        let mut held = None;
        for candidate in [self.tree.clone(), self.found.join(&self.name)] {
            if present(&candidate, cx)? == place.found {
                held = Some(candidate);
            }
        }
        let Some(held) = held else {
            let altered = present(&self.tree, cx)?;
            return Err(conflict(&RestorePlace { path: self.tree.clone(), ..place.clone() }, altered));
        };
        if place.path.symlink_metadata().is_err() {
            return Ok(tree::place(&held, &place.path)?);
        }
        if self.exchange(&held, &place.path)? {
            return Ok(());
        }
        fresh_directory(&self.discarded)?;
        tree::place(&place.path, &self.discarded.join(&self.name))?;
        Ok(tree::place(&held, &place.path)?)
    }

    /// Exchanges two trees in one call; `false` if the file system cannot.
    fn exchange(&self, one: &Path, other: &Path) -> Result<bool, StepError> {
        match rustix::fs::renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE) {
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => return Ok(false),
            Err(error) => return Err(ArchiveError::io("exchange", other)(error.into()).into()),
        }
        for directory in [durable::parent(one), durable::parent(other)] {
            durable::sync_directory(&directory).map_err(ArchiveError::io("make durable", &directory))?;
        }
        Ok(true)
    }

    /// Removes all that is aside: only when the place holds what it is to hold.
    pub(super) fn remove(&self) -> Result<(), StepError> {
        for directory in [&self.directory, &self.found, &self.discarded] {
            tree::remove(directory)?;
        }
        Ok(())
    }
}
