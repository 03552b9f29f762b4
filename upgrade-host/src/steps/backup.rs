//! `host.backup`: paths kept in an archive that is proven by reading it back.

mod exclude;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;
use upgrade_core::units::Bytes;

use crate::archive::manifest::{Manifest, RawPath};
use crate::archive::pack::{self, BackupManifest, Selection};
use crate::archive::prove::{self, Proven};
use crate::archive::{ArchiveError, tree};
use crate::error::blocking;
use crate::files::{absolute, durable};
use crate::machine::MachineTarget;

/// What the names of backups end with.
pub(crate) const SUFFIX: &str = ".tar.zst";

/// Configures `host.backup`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BackupConfig {
    /// The files and directories that are kept.
    pub paths: Vec<PathBuf>,
    /// A directory, or a file whose name ends in `.tar.zst`.
    pub to: PathBuf,
    /// What is left out: names, or paths with `*`, `**` and `?`.
    #[serde(default)]
    pub exclude: Vec<String>,
    /// The level of compression, from 1 to 19.
    #[serde(default = "default_level")]
    pub level: i32,
    /// How many backups of this step are kept in the directory after commit; all if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<usize>,
    /// What must stay free on the file system of the backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free: Option<Bytes>,
    /// What becomes of the backup when the run is rolled back.
    #[serde(default)]
    pub on_rollback: OnRollback,
}

fn default_level() -> i32 {
    3
}

/// Says what becomes of a backup when the run that made it is rolled back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnRollback {
    /// It is removed: everything is as it was.
    #[default]
    Remove,
    /// It stays.
    Keep,
}

/// Keeps paths in an archive before an upgrade touches them.
///
/// # Guarantees
/// The archive appears under its name only when it is durable and every entry, read back from it,
/// has the digest that was written down while it was read. It is readable by its owner alone.
///
/// # Caveats
/// Each file is kept as it was at one instant, the tree as a whole is not: stop what writes to it
/// first. Hard links are kept as copies, sockets, pipes and devices not at all; extended attributes
/// and ACLs are not kept.
///
/// Called again, or after a crash at any point, apply, rollback and commit converge.
#[derive(Debug, Clone)]
pub struct Backup {
    config: BackupConfig,
    roots: Vec<PathBuf>,
    to: PathBuf,
}

/// Holds what undoing a backup needs: nothing was there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupUndo {
    /// The archive that is made.
    pub path: PathBuf,
    /// The topmost directory that was not there; absent if all were.
    pub made: Option<PathBuf>,
}

/// Tells later steps where the backup is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupOutput {
    /// The archive.
    pub path: PathBuf,
    /// Its SHA-256 digest.
    pub sha256: String,
    /// How many files it holds.
    pub files: u64,
    /// How many bytes they have.
    pub bytes: u64,
    /// How many sockets, pipes and devices were left out.
    pub skipped: u64,
    /// How many entries were removed while the backup was made, and are not in it.
    #[serde(default)]
    pub vanished: u64,
}

impl Backup {
    /// Makes the step from its configuration; relative paths start from the context's directory.
    ///
    /// # Errors
    /// The configuration contradicts itself.
    pub fn from_config(config: BackupConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        if config.paths.is_empty() {
            return Err(BuildError::new("there is nothing to keep").at("paths"));
        }
        if !(1..=19).contains(&config.level) {
            return Err(BuildError::new("the level of compression is from 1 to 19").at("level"));
        }
        let roots: Vec<_> = config.paths.iter().map(|path| plain(&cx.path(path))).collect();
        for (at, root) in roots.iter().enumerate() {
            let key = format!("paths.{at}");
            if root.parent().is_none() {
                return Err(BuildError::new("the root directory as a whole cannot be kept").at(key));
            }
            if roots.iter().enumerate().any(|(other, path)| other != at && root.starts_with(path)) {
                return Err(BuildError::new("this path is within another one of the list").at(key));
            }
        }
        let to = plain(&cx.path(&config.to));
        if is_archive(&to) && config.keep.is_some() {
            return Err(BuildError::new("`keep` counts the backups in a directory; `to` names a file").at("keep"));
        }
        Ok(Self { config, roots, to })
    }

    /// Names the archive of this run; the same in every call.
    fn path(&self, cx: &Context) -> PathBuf {
        if is_archive(&self.to) {
            return self.to.clone();
        }
        let version = cx.from().or(cx.to()).map_or_else(|| "0.0.0".to_owned(), ToString::to_string);
        self.to.join(format!("{}-{version}-{}{SUFFIX}", cx.subject(), cx.run()))
    }

    fn excluded(&self, path: &Path) -> bool {
        self.config.exclude.iter().any(|pattern| exclude::names(pattern, &self.roots, path))
    }

    fn select(&self, cx: &Context) -> Result<Selection, StepError> {
        Ok(pack::select(&self.roots, &|path| self.excluded(path), cx)?)
    }

    fn read(&self, cx: &Context) -> Result<(BackupUndo, Change), StepError> {
        let path = self.path(cx);
        if path.symlink_metadata().is_ok() {
            return Err(StepError::permanent(format!("{} is there already", path.display()))
                .with_hint("move it away, or let `to` name a directory: each run then makes a file of its own"));
        }
        // The directory is above the file: whoever leaves out one of them leaves out the backup.
        let inside = self.roots.iter().any(|root| path.starts_with(root));
        if inside && !path.ancestors().any(|above| self.excluded(above)) {
            return Err(StepError::permanent(format!("{} would hold itself", path.display()))
                .with_hint("let `to` name a place outside of `paths`, or list it under `exclude`"));
        }
        let selection = self.select(cx)?;
        let needed = selection.bytes.saturating_add(self.config.free.unwrap_or_default().0);
        let free = tree::free(&path)?;
        if needed > free {
            return Err(StepError::permanent(format!(
                "the backup may need {} below {}, which has {} free",
                Bytes(needed),
                durable::parent(&path).display(),
                Bytes(free)
            ))
            .with_hint("free some space there, or let `to` name another file system"));
        }
        let made = durable::topmost_missing(&durable::parent(&path));
        let summary = format!("{} entries, {}", selection.paths.len(), Bytes(selection.bytes));
        let change = Change::new(Effect::Create, path.display().to_string()).with_summary(summary);
        Ok((BackupUndo { path, made }, change))
    }

    fn make(&self, cx: &Context, undo: &BackupUndo) -> Result<BackupOutput, StepError> {
        if undo.path.symlink_metadata().is_ok() {
            let proven = self.expect_ours(cx, undo)?;
            return Ok(output(undo, &proven));
        }
        let parent = durable::parent(&undo.path);
        durable::create_directories(&parent).map_err(ArchiveError::io("make", &parent))?;
        let temporary = durable::temporary(&undo.path, &cx.marker());
        let made = self.write(&temporary, cx, undo);
        if made.is_err() {
            // What counts is why it failed; what stays is removed by settle or rollback.
            let _ = tree::remove(&temporary);
        }
        made
    }

    fn write(&self, temporary: &Path, cx: &Context, undo: &BackupUndo) -> Result<BackupOutput, StepError> {
        let selection = self.select(cx)?;
        let manifest = BackupManifest {
            format: 1,
            made_by: cx.marker(),
            created: jiff::Timestamp::now().to_string(),
            roots: self.roots.iter().map(|root| RawPath::of(root)).collect(),
            skipped: selection.skipped.clone(),
            vanished: Vec::new(),
            tree: Manifest::new(Vec::new()),
        };
        let written = pack::pack(temporary, &selection, manifest, self.config.level, cx)?;
        let proven = prove::prove(temporary, cx)?;
        if proven.manifest != written {
            return Err(StepError::unknown(format!("{} does not read back as it was written", temporary.display()))
                .with_hint("the medium may be failing: look at the kernel's log, and let `to` name another one"));
        }
        tree::place(temporary, &undo.path)?;
        Ok(output(undo, &proven))
    }

    /// Reads the archive and makes sure that this run made it.
    fn expect_ours(&self, cx: &Context, undo: &BackupUndo) -> Result<Proven, StepError> {
        let present = match prove::prove(&undo.path, cx) {
            Ok(proven) if proven.manifest.made_by == cx.marker() => return Ok(proven),
            Ok(proven) => format!("a backup made by {}", proven.manifest.made_by),
            Err(error @ (ArchiveError::Cancelled | ArchiveError::Io { .. })) => return Err(error.into()),
            Err(error) => error.to_string(),
        };
        Err(StepError::conflict(Conflict {
            subject: undo.path.display().to_string(),
            found: "nothing".to_owned(),
            intended: format!("a backup made by {}", cx.marker()),
            present,
        }))
    }

    fn put_back(&self, cx: &Context, undo: &BackupUndo, output: Option<&BackupOutput>) -> Result<(), StepError> {
        clear(cx, undo)?;
        if self.config.on_rollback == OnRollback::Keep {
            return Ok(());
        }
        if undo.path.symlink_metadata().is_ok() {
            let known = match output {
                Some(output) => tree::digest(&undo.path, cx)?.0 == output.sha256,
                None => false,
            };
            if !known && cx.on_conflict() != OnConflict::Overwrite {
                self.expect_ours(cx, undo)?;
            }
            tree::remove(&undo.path)?;
        }
        Ok(tree::remove_made(&durable::parent(&undo.path), undo.made.as_deref())?)
    }

    fn prune(&self, cx: &Context, undo: &BackupUndo) -> Result<(), StepError> {
        clear(cx, undo)?;
        let Some(keep) = self.config.keep else { return Ok(()) };
        let listing = fs::read_dir(&self.to).map_err(ArchiveError::io("list", &self.to))?;
        let names = listing.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        for name in durable::beyond_newest(names, cx.subject(), SUFFIX, keep) {
            let path = self.to.join(name);
            if path != undo.path {
                tree::remove(&path)?;
            }
        }
        Ok(())
    }
}

fn clear(cx: &Context, undo: &BackupUndo) -> Result<(), StepError> {
    Ok(tree::remove(&durable::temporary(&undo.path, &cx.marker()))?)
}

fn output(undo: &BackupUndo, proven: &Proven) -> BackupOutput {
    BackupOutput {
        path: undo.path.clone(),
        sha256: proven.sha256.clone(),
        files: proven.manifest.tree.files(),
        bytes: proven.manifest.tree.bytes(),
        skipped: proven.manifest.skipped.len() as u64,
        vanished: proven.manifest.vanished.len() as u64,
    }
}

fn is_archive(path: &Path) -> bool {
    path.to_string_lossy().ends_with(SUFFIX)
}

/// Spells a path absolute and without `.` and `..`, links left as they are: the link itself is kept.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in absolute(path).components() {
        match part {
            std::path::Component::ParentDir => {
                plain.pop();
            }
            other => plain.push(other),
        }
    }
    plain
}

#[async_trait]
impl Step for Backup {
    const KIND: &'static str = "host.backup";
    type Undo = BackupUndo;
    type Output = BackupOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<BackupUndo, BackupOutput>, StepError> {
        let (step, context) = (self.clone(), cx.clone());
        let (undo, change) = blocking(move || step.read(&context)).await?;
        Ok(Prepared::change(undo, [change]))
    }

    async fn apply(&self, cx: &Context, undo: &BackupUndo) -> Result<BackupOutput, StepError> {
        let (step, context, undo) = (self.clone(), cx.clone(), undo.clone());
        blocking(move || step.make(&context, &undo)).await
    }

    async fn settle(&self, cx: &Context, undo: &BackupUndo) -> Result<(), StepError> {
        let (context, undo) = (cx.clone(), undo.clone());
        blocking(move || clear(&context, &undo)).await
    }

    async fn commit(&self, cx: &Context, undo: &BackupUndo) -> Result<(), StepError> {
        let (step, context, undo) = (self.clone(), cx.clone(), undo.clone());
        blocking(move || step.prune(&context, &undo)).await
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![MachineTarget::path(&self.to)]
    }
}

#[async_trait]
impl Rollback for Backup {
    async fn rollback(&self, cx: &Context, undo: &BackupUndo, output: Option<&BackupOutput>) -> Result<(), StepError> {
        let (step, context, undo, output) = (self.clone(), cx.clone(), undo.clone(), output.cloned());
        blocking(move || step.put_back(&context, &undo, output.as_ref())).await
    }
}
