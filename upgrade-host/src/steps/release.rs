//! `host.release`: a release laid down beside the old one, and a link that is switched at once.

mod configuration;
mod prune;
mod source;
mod undo;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::sealed::SealedRef;
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;
use upgrade_core::units::Bytes;

use crate::archive::manifest::Manifest;
use crate::archive::{ArchiveError, tree, unpack};
use crate::error::blocking;
use crate::files::durable;
use crate::machine::MachineTarget;
pub use configuration::ReleaseConfig;
use source::{Expected, Source, Verified, source_of};

/// Lays a release down in `<root>/releases/<version>` and switches `<root>/current` to it.
///
/// # Guarantees
/// Digest and signature are verified, and every entry is checked, before anything is written. The
/// release appears under its name whole or not at all, the link is switched in one rename, and the
/// old release stays until commit.
///
/// # Caveats
/// A rollback removes the release only as it was laid down. With files that were added since (logs,
/// caches) it is set aside as `releases/.<version>.rolled-back-…`; one whose own files were altered
/// is a conflict.
///
/// Called again, or after a crash at any point, apply, rollback and commit converge.
#[derive(Debug, Clone)]
pub struct Release {
    config: ReleaseConfig,
    root: PathBuf,
    version: String,
    source: Source,
}

/// Holds what undoing a release needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseUndo {
    /// Where the link pointed; absent if it was not there.
    pub found_link: Option<PathBuf>,
    /// Where the link is to point.
    pub intended_link: PathBuf,
    /// Whether the same release was laid down already; it is then left in place.
    pub found_release: bool,
    /// The topmost directory that was not there; absent if all were.
    pub made: Option<PathBuf>,
    /// The SHA-256 digest of the archive; a directory has none.
    pub archive_sha256: Option<String>,
    /// The release, entry by entry.
    pub manifest: SealedRef,
}

/// Tells later steps where the release is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseOutput {
    /// The directory of the release.
    pub path: PathBuf,
    /// Its name.
    pub version: String,
    /// Where the link pointed before; absent if it was not there or pointed here already.
    pub previous: Option<PathBuf>,
}

impl Release {
    /// Makes the step from its configuration; relative paths start from the context's directory.
    ///
    /// # Errors
    /// The configuration contradicts itself.
    pub fn from_config(config: ReleaseConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let version = config.version.clone().or_else(|| cx.to().map(ToString::to_string)).ok_or_else(|| {
            BuildError::new("the release has no name")
                .at("version")
                .with_hint("give `version`, or `to` in the pipeline")
        })?;
        plain_name(&version, "version")?;
        plain_name(&config.current, "current")?;
        if config.current == RELEASES {
            return Err(BuildError::new("the link would replace the releases").at("current"));
        }
        let root = cx.path(&config.root);
        let source = source_of(&config, cx)?;
        Ok(Self { config, root, version, source })
    }

    fn releases(&self) -> PathBuf {
        self.root.join(RELEASES)
    }

    fn release(&self) -> PathBuf {
        self.releases().join(&self.version)
    }

    fn link(&self) -> PathBuf {
        self.root.join(&self.config.current)
    }

    /// Where this run lays the release down before it gets its name; the same in every call.
    fn temporary(&self, cx: &Context) -> PathBuf {
        durable::temporary(&self.release(), &cx.marker())
    }

    fn present_link(&self) -> Result<Option<PathBuf>, StepError> {
        let link = self.link();
        match link.symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ArchiveError::io("read", &link)(error).into()),
            Ok(metadata) if metadata.is_symlink() => {
                Ok(Some(fs::read_link(&link).map_err(ArchiveError::io("read", &link))?))
            }
            Ok(metadata) => {
                let what = if metadata.is_dir() { "a directory" } else { "a file" };
                Err(StepError::permanent(format!("{} is {what}, not a symbolic link", link.display())).with_hint(
                    format!(
                        "stop the service, move it to {}/<its version> and link it: ln -s {RELEASES}/<its version> {}",
                        self.releases().display(),
                        link.display()
                    ),
                ))
            }
        }
    }

    fn conflict(&self, undo: &ReleaseUndo, present: Option<&Path>) -> StepError {
        StepError::conflict(Conflict {
            subject: self.link().display().to_string(),
            found: shown(undo.found_link.as_deref()),
            intended: shown(Some(&undo.intended_link)),
            present: shown(present),
        })
    }

    fn output(&self, previous: Option<PathBuf>) -> ReleaseOutput {
        ReleaseOutput { path: self.release(), version: self.version.clone(), previous }
    }

    fn read(&self, cx: &Context) -> Result<(Verified, ReleaseUndo), StepError> {
        let verified = self.source.verify(cx)?;
        let found_link = self.present_link()?;
        let release = self.release();
        let found_release = match release.symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(ArchiveError::io("read", &release)(error).into()),
            Ok(_) if tree::survey(&release, None, cx)?.contents() == verified.manifest && !release.is_symlink() => true,
            Ok(_) => {
                return Err(StepError::permanent(format!(
                    "{} is there already, with other content",
                    release.display()
                ))
                .with_hint(
                    "another build of the same version? give the release another `version`, or move the directory away",
                ));
            }
        };
        let made = durable::topmost_missing(&self.releases());
        let undo = ReleaseUndo {
            found_link,
            intended_link: Path::new(RELEASES).join(&self.version),
            found_release,
            made,
            archive_sha256: verified.sha256.clone(),
            manifest: SealedRef::of(&verified.manifest.canonical()),
        };
        let needed = if found_release { 0 } else { verified.manifest.bytes() };
        let free = tree::free(&self.releases())?;
        if needed > free {
            return Err(StepError::permanent(format!(
                "the release needs {} below {}, which has {} free",
                Bytes(needed),
                self.root.display(),
                Bytes(free)
            ))
            .with_hint("free some space there, or lower `keep`"));
        }
        Ok((verified, undo))
    }

    fn changes(&self, verified: &Verified, undo: &ReleaseUndo) -> Vec<Change> {
        let mut changes = Vec::new();
        if !undo.found_release {
            let summary = format!(
                "{} files, {}, from {}, {}",
                verified.manifest.files(),
                Bytes(verified.manifest.bytes()),
                self.source.path().display(),
                verified.by
            );
            changes.push(Change::new(Effect::Create, self.release().display().to_string()).with_summary(summary));
        }
        let effect = if undo.found_link.is_some() { Effect::Modify } else { Effect::Create };
        let summary = format!("{} → {}", shown(undo.found_link.as_deref()), shown(Some(&undo.intended_link)));
        changes.push(Change::new(effect, self.link().display().to_string()).with_summary(summary));
        changes
    }

    fn make(&self, cx: &Context, undo: &ReleaseUndo, manifest: Manifest) -> Result<ReleaseOutput, StepError> {
        let present = self.present_link()?;
        let expected = present == undo.found_link || present.as_deref() == Some(&undo.intended_link);
        if !expected && cx.on_conflict() != OnConflict::Overwrite {
            return Err(self.conflict(undo, present.as_deref()));
        }
        let release = self.release();
        if release.symlink_metadata().is_ok() {
            self.expect_unaltered(&manifest, undo, cx)?;
        } else {
            durable::create_directories(&self.releases()).map_err(ArchiveError::io("make", &self.releases()))?;
            let temporary = self.temporary(cx);
            unpack::fresh_directory(&temporary)?;
            let verified = Verified { manifest, sha256: undo.archive_sha256.clone(), by: "" };
            let laid = self.lay_down(&temporary, &verified, cx);
            if let Err(error) = laid {
                // What counts is why it failed; what stays is removed by settle or rollback.
                let _ = tree::remove(&temporary);
                return Err(error);
            }
        }
        if present.as_deref() != Some(&undo.intended_link) {
            durable::switch_link(&self.link(), &undo.intended_link, &cx.marker())
                .map_err(ArchiveError::io("switch", &self.link()))?;
        }
        Ok(self.output(undo.found_link.clone()))
    }

    fn lay_down(&self, temporary: &Path, verified: &Verified, cx: &Context) -> Result<(), StepError> {
        self.source.lay_down(temporary, verified, cx)?;
        if tree::survey(temporary, None, cx)?.contents() != verified.manifest {
            return Err(StepError::unknown(format!("{} is not what was unpacked into it", temporary.display()))
                .with_hint("somebody writes there, or the medium is failing: look at the kernel's log"));
        }
        tree::sync(temporary)?;
        Ok(tree::place(temporary, &self.release())?)
    }

    /// Returns how many entries came in addition; altered ones are somebody else's change.
    fn expect_unaltered(&self, manifest: &Manifest, undo: &ReleaseUndo, cx: &Context) -> Result<usize, StepError> {
        let comparison = manifest.compare(&tree::survey(&self.release(), None, cx)?.contents());
        match comparison.altered {
            None => Ok(comparison.added),
            Some(path) => Err(StepError::conflict(Conflict {
                subject: self.release().display().to_string(),
                found: if undo.found_release { undo.manifest.sha256.clone() } else { "nothing".to_owned() },
                intended: undo.manifest.sha256.clone(),
                present: format!("`{}` is another or gone", path.display()),
            })),
        }
    }

    /// Removes what an interrupted call left: never a release, never the link.
    fn clear(&self, cx: &Context) -> Result<(), StepError> {
        tree::remove(&self.temporary(cx))?;
        tree::remove(&durable::temporary(&self.link(), &cx.marker()))?;
        Ok(())
    }
}

const RELEASES: &str = "releases";

fn shown(link: Option<&Path>) -> String {
    link.map_or_else(|| "nothing".to_owned(), |path| path.display().to_string())
}

fn plain_name(name: &str, key: &str) -> Result<(), BuildError> {
    let fits = !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\']) && name.len() <= 200;
    if fits && !name.chars().any(char::is_control) {
        return Ok(());
    }
    Err(BuildError::new(format!("`{}` cannot be the name of a directory here", name.escape_debug()))
        .at(key)
        .with_hint("use one name without `/` that does not start with a dot"))
}

#[async_trait]
impl Step for Release {
    const KIND: &'static str = "host.release";
    type Undo = ReleaseUndo;
    type Output = ReleaseOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<ReleaseUndo, ReleaseOutput>, StepError> {
        let (step, context) = (self.clone(), cx.clone());
        let (verified, undo) = blocking(move || step.read(&context)).await?;
        if undo.found_release && undo.found_link.as_deref() == Some(&undo.intended_link) {
            return Ok(Prepared::unchanged(self.output(None), format!("{} is current", self.version)));
        }
        if !cx.is_dry_run() {
            cx.seal(&verified.manifest.canonical()).await?;
        }
        let changes = self.changes(&verified, &undo);
        Ok(Prepared::change(undo, changes))
    }

    async fn apply(&self, cx: &Context, undo: &ReleaseUndo) -> Result<ReleaseOutput, StepError> {
        let manifest = manifest(cx, undo).await?;
        let (step, context, undo) = (self.clone(), cx.clone(), undo.clone());
        blocking(move || step.make(&context, &undo, manifest)).await
    }

    async fn settle(&self, cx: &Context, _undo: &ReleaseUndo) -> Result<(), StepError> {
        let (step, context) = (self.clone(), cx.clone());
        blocking(move || step.clear(&context)).await
    }

    async fn commit(&self, cx: &Context, undo: &ReleaseUndo) -> Result<(), StepError> {
        let (step, context, undo) = (self.clone(), cx.clone(), undo.clone());
        blocking(move || step.prune(&context, &undo)).await
    }

    fn definition(&self) -> Value {
        let version = Some(self.version.clone());
        serde_json::to_value(ReleaseConfig { version, ..self.config.clone() }).unwrap_or_default()
    }

    fn inputs(&self) -> Vec<PathBuf> {
        // A digest or a key in the definition binds the archive already, and the file itself may
        // only come with an earlier step.
        match &self.source {
            Source::Archive { digest: Some(Expected::Sha256(_)), .. } | Source::Directory { .. } => Vec::new(),
            Source::Archive { digest: Some(Expected::File(file)), .. } => vec![file.clone()],
            Source::Archive { signature: Some(_), .. } => Vec::new(),
            Source::Archive { path, .. } => vec![path.clone()],
        }
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![MachineTarget::path(&self.root)]
    }
}

#[async_trait]
impl Rollback for Release {
    async fn rollback(&self, cx: &Context, undo: &ReleaseUndo, _: Option<&ReleaseOutput>) -> Result<(), StepError> {
        let manifest = manifest(cx, undo).await?;
        let (step, context, undo) = (self.clone(), cx.clone(), undo.clone());
        blocking(move || step.put_back(&context, &undo, &manifest)).await
    }
}

async fn manifest(cx: &Context, undo: &ReleaseUndo) -> Result<Manifest, StepError> {
    let text = cx.unseal(&undo.manifest).await?;
    serde_json::from_slice(&text).map_err(|error| {
        StepError::permanent("the list of the release's files cannot be read")
            .with_cause(&error)
            .with_hint("switch the link back by hand and resolve the step with --skip")
    })
}
