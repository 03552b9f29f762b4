//! `host.file`: writes, copies or removes one file, with its mode and owner.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;

use crate::error::{blocking, io_error};
use crate::files::masked_diff::{Shown, masked_diff};
use crate::files::ownership::{self, Mode};
use crate::files::path_state::{Observed, PathState, digest, observe};
use crate::files::swap::{self, Contents, FileUndo};
use crate::files::template::{self, Template};
use crate::machine::MachineTarget;

/// Says whether a file is to be there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Presence {
    /// It is to be there.
    #[default]
    Present,
    /// It is not to be there.
    Absent,
}

/// Configures `host.file`. With none of `content`, `source` and `template`, only mode and owner
/// of a file that is there are set.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileConfig {
    /// The file that is written or removed.
    pub path: PathBuf,
    /// Whether it is to be there.
    #[serde(default)]
    pub state: Presence,
    /// Its content, as it stands here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// A file whose content it takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<PathBuf>,
    /// A template that its content is made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<Template>,
    /// Its permissions in octal, `"0640"`. If absent: those found, else those of `source`, else
    /// 0644; 0600 with secrets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// Its owner and group, by name or id: `notes`, `notes:www-data`, `:www-data`, `1000:1000`.
    /// If absent: those found, else those of the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Makes the directories above it that are missing.
    #[serde(default)]
    pub create_directories: bool,
    /// Changes the file that a symbolic link leads to, and not the link.
    #[serde(default)]
    pub follow: bool,
}

/// Tells later steps what a file became.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileOutput {
    /// The file.
    pub path: PathBuf,
    /// SHA-256 of its content, if it is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

/// Writes, copies or removes one file.
///
/// A write is a temporary file renamed over the old one: nobody reads half of it, and it is
/// durable when `apply` returns. The content found is sealed, or kept beside the file where it
/// is larger than 16 MiB, until the upgrade is committed.
#[derive(Debug, Clone)]
pub struct File {
    config: FileConfig,
}

impl File {
    /// Makes the step from its configuration; relative paths start from the context's directory.
    ///
    /// # Errors
    /// The configuration contradicts itself.
    pub fn from_config(mut config: FileConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        config.path = cx.path(&config.path);
        config.source = config.source.map(|source| cx.path(source));
        if let Some(template) = &mut config.template {
            template.file = template.file.take().map(|file| cx.path(file));
        }
        let given = [config.content.is_some(), config.source.is_some(), config.template.is_some()];
        let contents = given.iter().filter(|given| **given).count();
        if contents > 1 {
            return Err(BuildError::new("`content`, `source` and `template` exclude each other")
                .with_hint("keep the one that the file's content comes from"));
        }
        if config.state == Presence::Absent {
            let idle = contents > 0 || config.mode.is_some() || config.owner.is_some() || config.create_directories;
            if idle {
                return Err(BuildError::new("with `state: absent` nothing else is said about the file")
                    .at("state")
                    .with_hint("remove `content`, `source`, `template`, `mode`, `owner` and `create_directories`"));
            }
        } else if contents == 0 && config.mode.is_none() && config.owner.is_none() {
            return Err(BuildError::new("the step says nothing about the file")
                .with_hint("give `content`, `source` or `template`, `mode`, `owner`, or `state: absent`"));
        }
        if config.path.file_name().is_none() {
            return Err(BuildError::new("the path does not name a file").at("path"));
        }
        if let Some(template) = &config.template {
            template.validate()?;
        }
        Ok(Self { config })
    }

    async fn contents(&self, cx: &Context, observed: &Observed, at: &Path) -> Result<Wanted, StepError> {
        let config = &self.config;
        if let Some(content) = &config.content {
            return Ok(Wanted::of(content.clone().into_bytes(), Shown::Clear(content.clone()), 0o644));
        }
        if let Some(template) = &config.template {
            let (bytes, shown) = template::render(cx, template).await?;
            let mode = if template.secrets.is_empty() { 0o644 } else { 0o600 };
            return Ok(Wanted::of(bytes, shown, mode));
        }
        let source = match (&config.source, &observed.state) {
            (Some(source), _) => source.clone(),
            (None, PathState::File { sha256, length, mode, .. }) => {
                let (sha256, length, mode) = (sha256.clone(), *length, *mode);
                return Ok(Wanted { contents: Contents::CopyOf(at.to_path_buf()), sha256, length, mode, shown: None });
            }
            (None, _) => {
                return Err(StepError::permanent(format!("{} is not there to set its mode or owner", at.display()))
                    .with_hint("give `content`, `source` or `template`, or correct `path`"));
            }
        };
        blocking(move || {
            let failed = |error: std::io::Error| io_error(format!("{} cannot be read", source.display()), &error);
            let mut file = fs::File::open(&source).map_err(failed)?;
            let metadata = file.metadata().map_err(failed)?;
            if !metadata.is_file() {
                return Err(StepError::permanent(format!("{} is not a file", source.display()))
                    .with_hint("`source` copies one regular file; host.release copies directories"));
            }
            let (sha256, length, text) = digest(&mut file, true).map_err(failed)?;
            let mode = std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o777;
            let shown = text.and_then(|text| String::from_utf8(text).ok()).map(Shown::Masked);
            Ok(Wanted { contents: Contents::CopyOf(source), sha256, length, mode, shown })
        })
        .await
    }

    fn output(path: &Path, state: &PathState) -> FileOutput {
        FileOutput { path: path.to_path_buf(), sha256: state.sha256().map(str::to_owned) }
    }
}

/// Carries what a file is to hold. Not `Debug`: it may be secret.
struct Wanted {
    contents: Contents,
    sha256: String,
    length: u64,
    mode: u32,
    shown: Option<Shown>,
}

impl Wanted {
    fn of(bytes: Vec<u8>, shown: Shown, mode: u32) -> Self {
        let reference = upgrade_core::sealed::SealedRef::of(&bytes);
        let contents = Contents::Bytes(bytes);
        Self { contents, sha256: reference.sha256, length: reference.length, mode, shown: Some(shown) }
    }
}

/// Names the file that is changed: the one that links lead to, where they are followed.
pub(crate) fn resolved(path: &Path, follow: bool) -> Result<PathBuf, StepError> {
    if !follow || !path.is_symlink() {
        return std::path::absolute(path).map_err(|error| io_error(format!("{} is no path", path.display()), &error));
    }
    path.canonicalize().map_err(|error| {
        io_error(format!("{} leads nowhere", path.display()), &error)
            .with_hint("mend the symbolic link, or leave `follow` out to replace it by a file")
    })
}

#[async_trait]
impl Step for File {
    const KIND: &'static str = "host.file";
    type Undo = FileUndo;
    type Output = FileOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<FileUndo, FileOutput>, StepError> {
        let (path, follow) = (self.config.path.clone(), self.config.follow);
        let (path, observed, missing) = blocking(move || {
            let path = resolved(&path, follow)?;
            let observed = observe(&path)?;
            let missing = swap::missing_directories(&path);
            Ok((path, observed, missing))
        })
        .await?;
        if self.config.state == Presence::Absent {
            if observed.state == PathState::Absent {
                return Ok(Prepared::unchanged(Self::output(&path, &PathState::Absent), "the file is not there"));
            }
            let diff = masked_diff(observed.contents.as_deref(), Some(&Shown::Clear(String::new())), b"");
            let mut change = Change::new(Effect::Remove, path.display().to_string());
            change.diff = diff;
            let undo = FileUndo::record(cx, path, &observed, PathState::Absent, Vec::new()).await?;
            return Ok(Prepared::change(undo, [change]));
        }
        // A plan must not fail because the step that makes the directory has not run.
        if !missing.is_empty() && !self.config.create_directories && !cx.is_dry_run() {
            return Err(StepError::permanent(format!("the directory of {} does not exist", path.display()))
                .with_hint("set `create_directories: true`, or make it in an earlier step"));
        }
        let wanted = self.contents(cx, &observed, &path).await?;
        let (mode, found_owner) = match &observed.state {
            PathState::File { mode, user, group, .. } => (*mode, Some((*user, *group))),
            _ => (wanted.mode, None),
        };
        let (user, group) = ownership::resolve(self.config.owner.clone(), found_owner).await?;
        let intended = PathState::File {
            sha256: wanted.sha256.clone(),
            length: wanted.length,
            mode: self.config.mode.map_or(mode, Mode::bits),
            user,
            group,
        };
        if intended == observed.state {
            return Ok(Prepared::unchanged(Self::output(&path, &intended), "the file is as it should be"));
        }
        let effect = if observed.state == PathState::Absent { Effect::Create } else { Effect::Modify };
        let mut change =
            Change::new(effect, path.display().to_string()).with_summary(summary(&observed.state, &intended));
        if observed.state.sha256() != intended.sha256() {
            let bytes: &[u8] = match &wanted.contents {
                Contents::Bytes(bytes) => bytes,
                Contents::CopyOf(_) => b"",
            };
            change.diff = masked_diff(
                observed.contents.as_deref().or((observed.state == PathState::Absent).then_some(b"".as_slice())),
                wanted.shown.as_ref(),
                bytes,
            );
        }
        let directories = if self.config.create_directories { missing } else { Vec::new() };
        let undo = FileUndo::record(cx, path, &observed, intended, directories).await?;
        Ok(Prepared::change(undo, [change]))
    }

    async fn apply(&self, cx: &Context, undo: &FileUndo) -> Result<FileOutput, StepError> {
        swap::apply(cx, undo, async |observed: &Observed| Ok(self.contents(cx, observed, &undo.path).await?.contents))
            .await?;
        Ok(Self::output(&undo.path, &undo.intended))
    }

    async fn settle(&self, cx: &Context, undo: &FileUndo) -> Result<(), StepError> {
        swap::settle(cx, undo).await
    }

    async fn commit(&self, _cx: &Context, undo: &FileUndo) -> Result<(), StepError> {
        swap::commit(undo).await
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn inputs(&self) -> Vec<PathBuf> {
        let template = self.config.template.as_ref().and_then(|template| template.file.clone());
        self.config.source.clone().into_iter().chain(template).collect()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![MachineTarget::path(&self.config.path)]
    }
}

#[async_trait]
impl Rollback for File {
    async fn rollback(&self, cx: &Context, undo: &FileUndo, _output: Option<&FileOutput>) -> Result<(), StepError> {
        swap::rollback(cx, undo).await
    }
}

fn summary(found: &PathState, intended: &PathState) -> String {
    let PathState::File { length, mode, user, group, sha256 } = intended else { return "removed".into() };
    let mut parts = Vec::new();
    match found {
        PathState::File { sha256: was, length: old, mode: old_mode, user: old_user, group: old_group } => {
            if was != sha256 {
                parts.push(format!("{old} → {length} bytes"));
            }
            if old_mode != mode {
                parts.push(format!("mode {old_mode:04o} → {mode:04o}"));
            }
            if (old_user, old_group) != (user, group) {
                parts.push(format!("owner {old_user}:{old_group} → {user}:{group}"));
            }
        }
        PathState::Symlink { .. } => parts.push(format!("the symbolic link becomes a file of {length} bytes")),
        PathState::Absent => parts.push(format!("{length} bytes, mode {mode:04o}")),
    }
    parts.join(", ")
}
