//! The way back from a release, and the end of the old ones.

use std::fs;

use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::StepError;

use super::prune::{self, Candidate};
use super::{Release, ReleaseUndo};
use crate::archive::manifest::Manifest;
use crate::archive::{ArchiveError, tree};
use crate::files::durable;

impl Release {
    pub(super) fn put_back(&self, cx: &Context, undo: &ReleaseUndo, manifest: &Manifest) -> Result<(), StepError> {
        let present = self.present_link()?;
        let overwrite = cx.on_conflict() == OnConflict::Overwrite;
        if present != undo.found_link {
            if present.as_deref() != Some(&undo.intended_link) && !overwrite {
                return Err(self.conflict(undo, present.as_deref()));
            }
            // The link first: what serves again must not wait for a removal.
            self.link_back(cx, undo)?;
        }
        self.clear(cx)?;
        let release = self.release();
        if !undo.found_release && release.symlink_metadata().is_ok() {
            match self.expect_unaltered(manifest, undo, cx) {
                Ok(0) => {
                    // Under another name before it is removed: a crash leaves no half release.
                    tree::place(&release, &self.temporary(cx))?;
                    tree::remove(&self.temporary(cx))?;
                }
                Err(error) if !overwrite => return Err(error),
                _ => self.set_aside(cx)?,
            }
        }
        Ok(tree::remove_made(&self.releases(), undo.made.as_deref())?)
    }

    fn link_back(&self, cx: &Context, undo: &ReleaseUndo) -> Result<(), StepError> {
        let Some(found) = &undo.found_link else {
            return Ok(durable::remove_file(&self.link()).map_err(ArchiveError::io("remove", &self.link()))?);
        };
        if !self.root.join(found).exists() {
            return Err(StepError::permanent(format!(
                "{} cannot be linked back: {} is gone",
                self.link().display(),
                found.display()
            ))
            .with_hint("restore that release, then --retry; or link a working one by hand and resolve with --skip"));
        }
        Ok(durable::switch_link(&self.link(), found, &cx.marker()).map_err(ArchiveError::io("switch", &self.link()))?)
    }

    fn set_aside(&self, cx: &Context) -> Result<(), StepError> {
        let key = upgrade_core::sealed::sha256_hex(cx.marker().as_bytes());
        let aside = self.releases().join(format!(".{}.rolled-back-{}", self.version, &key[..12]));
        tracing::warn!(
            release = %self.release().display(),
            aside = %aside.display(),
            "the release was written to while it ran: it is set aside, not removed"
        );
        Ok(tree::place(&self.release(), &aside)?)
    }

    pub(super) fn prune(&self, cx: &Context, undo: &ReleaseUndo) -> Result<(), StepError> {
        self.clear(cx)?;
        let releases = self.releases();
        let mut candidates = Vec::new();
        for entry in fs::read_dir(&releases).map_err(ArchiveError::io("list", &releases))? {
            let entry = entry.map_err(ArchiveError::io("list", &releases))?;
            let metadata = entry.metadata().map_err(ArchiveError::io("read", &entry.path()))?;
            if let (true, Ok(name), Ok(modified)) =
                (metadata.is_dir(), entry.file_name().into_string(), metadata.modified())
                && !name.starts_with('.')
            {
                candidates.push(Candidate { name, modified });
            }
        }
        let links = [self.present_link()?, undo.found_link.clone(), Some(undo.intended_link.clone())];
        let spared: Vec<_> = links
            .into_iter()
            .flatten()
            .filter_map(|link| Some(link.file_name()?.to_string_lossy().into_owned()))
            .collect();
        for name in prune::beyond(candidates, self.config.keep, &spared) {
            if cx.cancelled().is_cancelled() {
                return Err(ArchiveError::Cancelled.into());
            }
            let hidden = durable::temporary(&releases.join(&name), &cx.marker());
            tree::remove(&hidden)?;
            tree::place(&releases.join(&name), &hidden)?;
            tree::remove(&hidden)?;
        }
        Ok(())
    }
}
