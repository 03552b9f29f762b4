//! `host.restore`: what a backup holds, swapped into place; what was there is kept until commit.

mod aside;

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

use crate::archive::manifest::{Entry, Kind, Manifest, RawPath};
use crate::archive::pack;
use crate::archive::prove::{self, Proven};
use crate::archive::unpack::{Rules, fresh_directory, unpack};
use crate::archive::{ArchiveError, is_sha256, tree};
use crate::error::blocking;
use crate::files::{absolute, durable};
use crate::machine::MachineTarget;
use aside::Aside;

/// Configures `host.restore`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreConfig {
    /// A backup that `host.backup` made.
    pub backup: PathBuf,
    /// A directory below which each path is restored in full; the original places if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<PathBuf>,
    /// The SHA-256 digest that the backup must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

/// Puts back what a backup holds, each of its paths as a whole.
///
/// # Guarantees
/// The backup is read to its end and compared with its manifest before anything is written. Each
/// path is restored beside its place and exchanged with what is there in one call, where the file
/// system can (else in two renames); what was there stays beside it until commit.
///
/// # Caveats
/// A path is replaced as a whole: what the backup left out (`exclude`, sockets) is not there
/// afterwards, and after commit it is gone.
///
/// Called again, or after a crash at any point, apply, rollback and commit converge.
#[derive(Debug, Clone)]
pub struct Restore {
    config: RestoreConfig,
    backup: PathBuf,
    to: Option<PathBuf>,
    /// What is changed, as far as it is known before the backup is proven.
    changed: Vec<PathBuf>,
}

/// Holds what undoing a restore needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreUndo {
    /// The SHA-256 digest of the backup.
    pub backup_sha256: String,
    /// What is swapped, in order.
    pub places: Vec<RestorePlace>,
}

/// Describes one path that is swapped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestorePlace {
    /// The path.
    pub path: PathBuf,
    /// The digest of the tree that was there; absent if there was none.
    pub found: Option<String>,
    /// The digest of the tree in the backup.
    pub intended: String,
    /// The topmost directory above it that was not there; absent if all were.
    pub made: Option<PathBuf>,
}

/// Tells later steps what was restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreOutput {
    /// The paths that are now as the backup has them.
    pub paths: Vec<PathBuf>,
    /// How many files they hold.
    pub files: u64,
    /// How many bytes the files have.
    pub bytes: u64,
}

/// One path of a backup on its way to its place.
struct Restored {
    place: RestorePlace,
    root: PathBuf,
    tree: Manifest,
}

impl Restore {
    /// Makes the step from its configuration; relative paths start from the context's directory.
    ///
    /// # Errors
    /// The digest is not one.
    pub fn from_config(config: RestoreConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        if config.sha256.as_deref().is_some_and(|digest| !is_sha256(digest)) {
            return Err(BuildError::new("a SHA-256 digest has 64 hexadecimal digits").at("sha256"));
        }
        let absolute = |path: &PathBuf| absolute(&cx.path(path));
        let (backup, to) = (absolute(&config.backup), config.to.as_ref().map(absolute));
        // The original places stand in the backup; one that an earlier step has yet to make says
        // nothing, and the pipeline names them as targets.
        let changed = match &to {
            Some(to) => vec![to.clone()],
            None => prove::roots(&backup).unwrap_or_default(),
        };
        Ok(Self { config, backup, to, changed })
    }

    fn prove(&self, expected: Option<&str>, cx: &Context) -> Result<Proven, StepError> {
        let proven = prove::prove(&self.backup, cx)?;
        match expected.filter(|expected| !expected.eq_ignore_ascii_case(&proven.sha256)) {
            None => Ok(proven),
            Some(expected) => Err(StepError::permanent(format!(
                "{} has the SHA-256 digest {}, not {expected}",
                self.backup.display(),
                proven.sha256
            ))
            .with_hint("it is another backup, or was changed: find the right one")),
        }
    }

    /// Pairs each path of the backup with its place; `found` is left to the caller.
    fn pair(&self, proven: &Proven) -> Result<Vec<Restored>, StepError> {
        let mut pairs = Vec::new();
        for root in &proven.manifest.roots {
            let root = root.to_path();
            let relative = root.strip_prefix("/").unwrap_or(&root).to_path_buf();
            // A backup is a file that somebody may have made by hand: its manifest is checked too.
            let plain = relative.components().all(|part| matches!(part, std::path::Component::Normal(_)));
            let Some(above) = relative.parent().filter(|_| plain && root.is_absolute()) else {
                return Err(StepError::permanent(format!(
                    "{} names a path that cannot be restored",
                    self.backup.display()
                ))
                .with_hint("use a backup that `host.backup` made"));
            };
            let path = self.to.as_ref().map_or_else(|| root.clone(), |to| to.join(&relative));
            let entries =
                proven.manifest.tree.entries.iter().filter(|entry| entry.path.as_path().starts_with(&relative));
            let entries = entries.map(|entry| {
                let path = entry.path.as_path().strip_prefix(above).unwrap_or(entry.path.as_path());
                Entry { path: RawPath::of(path), ..entry.clone() }
            });
            let tree = Manifest::new(entries.collect());
            let place = RestorePlace { intended: tree.token(), path, found: None, made: None };
            pairs.push(Restored { place, root, tree });
        }
        Ok(pairs)
    }

    fn read(&self, cx: &Context) -> Result<(RestoreUndo, Vec<Change>, RestoreOutput), StepError> {
        let proven = self.prove(self.config.sha256.as_deref(), cx)?;
        let mut changes = Vec::new();
        let (mut places, mut output) = (Vec::new(), RestoreOutput { paths: Vec::new(), files: 0, bytes: 0 });
        for Restored { mut place, tree, .. } in self.pair(&proven)? {
            place.found = present(&place.path, cx)?;
            let parent = durable::parent(&place.path);
            place.made = durable::topmost_missing(&parent);
            let free = tree::free(&parent)?;
            if tree.bytes() > free {
                return Err(StepError::permanent(format!(
                    "{} needs {} beside it, where {} are free",
                    place.path.display(),
                    Bytes(tree.bytes()),
                    Bytes(free)
                ))
                .with_hint("free some space there, or restore to another place with `to`"));
            }
            if place.found.as_ref() != Some(&place.intended) {
                let effect = if place.found.is_some() { Effect::Modify } else { Effect::Create };
                let summary =
                    format!("{} files, {}, from {}", tree.files(), Bytes(tree.bytes()), self.backup.display());
                changes.push(
                    Change::new(effect, place.path.display().to_string())
                        .with_summary(summary)
                        .undo_loses("what is written there after the restore"),
                );
            }
            output.paths.push(place.path.clone());
            output.files += tree.files();
            output.bytes += tree.bytes();
            places.push(place);
        }
        Ok((RestoreUndo { backup_sha256: proven.sha256, places }, changes, output))
    }

    fn make(&self, cx: &Context, undo: &RestoreUndo) -> Result<RestoreOutput, StepError> {
        let proven = self.prove(Some(&undo.backup_sha256), cx)?;
        let mut output = RestoreOutput { paths: Vec::new(), files: 0, bytes: 0 };
        for (restored, place) in self.pair(&proven)?.into_iter().zip(&undo.places) {
            output.paths.push(place.path.clone());
            output.files += restored.tree.files();
            output.bytes += restored.tree.bytes();
            let aside = Aside::of(place, cx);
            let present = present(&place.path, cx)?;
            if present.as_ref() == Some(&place.intended) {
                continue;
            }
            if present.is_none() && place.found.is_some() && aside.is_halfway() {
                tree::place(&aside.tree, &place.path)?;
                continue;
            }
            // What was found may be aside already, if a swapped tree was changed since: no
            // overwriting then, it would go with it.
            let overwrite = cx.on_conflict() == OnConflict::Overwrite && !aside.holds(place, cx)?;
            if present != place.found && !overwrite {
                return Err(conflict(place, present));
            }
            durable::create_directories(&durable::parent(&place.path))
                .map_err(ArchiveError::io("make the directory of", &place.path))?;
            fresh_directory(&aside.directory)?;
            if let Err(error) = self.lay_down(&restored, &aside, cx) {
                // What counts is why it failed; nothing was swapped yet.
                let _ = tree::remove(&aside.directory);
                return Err(error);
            }
            aside.swap(&place.path)?;
        }
        Ok(output)
    }

    fn lay_down(&self, restored: &Restored, aside: &Aside, cx: &Context) -> Result<(), StepError> {
        let mut only = vec![pack::FILES.as_bytes().to_vec()];
        only.extend(restored.root.components().skip(1).map(|part| part.as_os_str().as_encoded_bytes().to_vec()));
        let rules = Rules { strip: only.len() - 1, only, ..prove::rules() };
        unpack(&self.backup, &rules, Some(&aside.directory), cx)?;
        for entry in &restored.tree.entries {
            let link = aside.directory.join(entry.path.as_path());
            if let (Kind::Symlink, Some(target)) = (entry.kind, &entry.target)
                && RawPath::of(&fs::read_link(&link).map_err(ArchiveError::io("read", &link))?) != *target
            {
                // A tar spells `a//b` as `a/b`.
                tree::remove(&link)?;
                std::os::unix::fs::symlink(target.as_path(), &link).map_err(ArchiveError::io("make", &link))?;
            }
        }
        tree::dress(&aside.directory, &restored.tree)?;
        let laid = tree::survey(&aside.directory, None, cx)?;
        if let Some(path) = restored.tree.compare(&laid).altered {
            return Err(StepError::unknown(format!(
                "{} is not what the backup holds",
                aside.directory.join(path).display()
            ))
            .with_hint("the file system may not keep owners, modes or times; or somebody writes there"));
        }
        Ok(tree::sync(&aside.directory)?)
    }

    fn put_back(&self, cx: &Context, undo: &RestoreUndo) -> Result<(), StepError> {
        for place in undo.places.iter().rev() {
            let aside = Aside::of(place, cx);
            let present = present(&place.path, cx)?;
            if present != place.found {
                let ours = present.as_ref() == Some(&place.intended);
                let halfway = present.is_none() && aside.is_halfway();
                if !ours && !halfway && cx.on_conflict() != OnConflict::Overwrite {
                    return Err(conflict(place, present));
                }
                aside.swap_back(place, cx)?;
            }
            aside.remove()?;
            tree::remove_made(&durable::parent(&place.path), place.made.as_deref())?;
        }
        Ok(())
    }
}

/// Returns the token of what is at a path: its kind, contents, modes, owners and times.
fn present(path: &Path, cx: &Context) -> Result<Option<String>, StepError> {
    let name = path.file_name().map(Path::new);
    let manifest = tree::survey(&durable::parent(path), name, cx)?;
    Ok((!manifest.entries.is_empty()).then(|| manifest.token()))
}

fn conflict(place: &RestorePlace, present: Option<String>) -> StepError {
    let nothing = || "nothing".to_owned();
    StepError::conflict(Conflict {
        subject: place.path.display().to_string(),
        found: place.found.clone().unwrap_or_else(nothing),
        intended: place.intended.clone(),
        present: present.unwrap_or_else(nothing),
    })
}

#[async_trait]
impl Step for Restore {
    const KIND: &'static str = "host.restore";
    type Undo = RestoreUndo;
    type Output = RestoreOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<RestoreUndo, RestoreOutput>, StepError> {
        let (step, context) = (self.clone(), cx.clone());
        let (undo, changes, output) = blocking(move || step.read(&context)).await?;
        if changes.is_empty() {
            return Ok(Prepared::unchanged(output, "everything is as the backup has it"));
        }
        Ok(Prepared::change(undo, changes))
    }

    async fn apply(&self, cx: &Context, undo: &RestoreUndo) -> Result<RestoreOutput, StepError> {
        let (step, context, undo) = (self.clone(), cx.clone(), undo.clone());
        blocking(move || step.make(&context, &undo)).await
    }

    async fn commit(&self, cx: &Context, undo: &RestoreUndo) -> Result<(), StepError> {
        let (context, undo) = (cx.clone(), undo.clone());
        blocking(move || {
            for place in &undo.places {
                Aside::of(place, &context).remove()?;
            }
            Ok(())
        })
        .await
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        self.changed.iter().map(MachineTarget::path).collect()
    }
}

#[async_trait]
impl Rollback for Restore {
    async fn rollback(&self, cx: &Context, undo: &RestoreUndo, _: Option<&RestoreOutput>) -> Result<(), StepError> {
        let (step, context, undo) = (self.clone(), cx.clone(), undo.clone());
        blocking(move || step.put_back(&context, &undo)).await
    }
}
