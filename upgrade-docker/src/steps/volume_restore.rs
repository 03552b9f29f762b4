//! `docker.volume_restore`: what a backup holds, put into a volume; what it held is kept until commit.

mod swap;

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use bollard::Docker;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::context::{Context, OnConflict, blocking};
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;
use upgrade_core::units::Bytes;

use super::volume_backup::helper_image;
use crate::target::Engine;
use crate::volumes::archive::{self, Proven};
use crate::volumes::check_name;
use crate::volumes::consumers::{self, Consumer, Consumers};
use swap::Swap;

/// Configures `docker.volume_restore`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeRestoreConfig {
    /// The target that names the engine; if absent, the engine that the `docker` command would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The volume that is restored; made as the backup describes it if it is not there.
    pub volume: String,
    /// A backup that `docker.volume_backup` made.
    pub backup: PathBuf,
    /// The SHA-256 digest that the backup must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// What becomes of the running containers that use the volume, while it is restored.
    #[serde(default = "stop")]
    pub consumers: Consumers,
    /// An image on the engine that has the program `rm`; if absent, that of a container that uses
    /// the volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
}

fn stop() -> Consumers {
    Consumers::Stop
}

/// Puts what a backup holds into a volume, in place of all that it held.
///
/// # Guarantees
/// The backup is read to its end and compared with its manifest before anything is changed. What the
/// volume held is copied into a second volume, and the copy compared, before anything of it is
/// removed; it stays there until commit. What was put in, or put back, is read again and compared.
///
/// # Caveats
/// The volume is replaced as a whole. What the engine does not give (sockets, access control lists,
/// fractions of seconds) is not put back either.
///
/// Called again, or after a crash at any point, apply, rollback and commit converge.
#[derive(Clone, Debug)]
pub struct VolumeRestore {
    config: VolumeRestoreConfig,
    engine: Arc<Engine>,
    backup: PathBuf,
}

/// Holds what undoing a restore needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRestoreUndo {
    /// The SHA-256 digest of the backup.
    pub backup_sha256: String,
    /// The digest of what the volume held; absent if there was no volume.
    pub found: Option<String>,
    /// The digest of what the backup holds.
    pub intended: String,
    /// The image of the containers that the volume is reached through.
    pub image: String,
    /// The containers that are stopped or paused meanwhile.
    pub consumers: Vec<Consumer>,
}

/// Tells later steps what was restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRestoreOutput {
    /// The volume that is now as the backup has it.
    pub volume: String,
    /// How many files it holds.
    pub files: u64,
    /// How many bytes the files have.
    pub bytes: u64,
}

impl VolumeRestore {
    /// Makes the step from its configuration; relative paths start from the context's directory.
    ///
    /// # Errors
    /// The digest is not one, or the volume has no name of one.
    pub fn from_config(config: VolumeRestoreConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        check_name(&config.volume)?;
        let hexadecimal = |text: &str| text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if config.sha256.as_deref().is_some_and(|digest| !hexadecimal(digest)) {
            return Err(BuildError::new("a SHA-256 digest has 64 hexadecimal digits")
                .at("sha256")
                .with_hint("`sha256sum BACKUP` prints it, and the output of the step that made it has it"));
        }
        let engine = Engine::named(config.target.as_deref(), cx)?;
        let backup = cx.path(&config.backup);
        Ok(Self { config, engine, backup })
    }

    async fn prove(&self, expected: Option<&str>, cx: &Context) -> Result<Proven, StepError> {
        let (backup, context) = (self.backup.clone(), cx.clone());
        let proven = blocking(move || archive::prove(&backup, &context)).await?;
        match expected.filter(|expected| !expected.eq_ignore_ascii_case(&proven.sha256)) {
            None => Ok(proven),
            Some(expected) => {
                let (backup, found) = (self.backup.display(), &proven.sha256);
                Err(StepError::permanent(format!("{backup} has the SHA-256 digest {found}, not {expected}"))
                    .with_hint("it is another backup, or was changed: find the right one"))
            }
        }
    }

    fn swap<'a>(&'a self, client: &'a Docker, cx: &'a Context, image: &'a str) -> Swap<'a> {
        Swap { client, cx, volume: &self.config.volume, image }
    }

    fn output(&self, proven: &Proven) -> VolumeRestoreOutput {
        let contents = &proven.manifest.contents;
        VolumeRestoreOutput { volume: self.config.volume.clone(), files: contents.files(), bytes: contents.bytes() }
    }

    fn conflict(&self, undo: &VolumeRestoreUndo, present: Option<String>) -> StepError {
        let nothing = || "no volume".to_owned();
        StepError::conflict(Conflict {
            subject: format!("volume {}", self.config.volume),
            found: undo.found.clone().unwrap_or_else(nothing),
            intended: undo.intended.clone(),
            present: present.unwrap_or_else(nothing),
        })
    }

    async fn put_in(&self, swap: &Swap<'_>, undo: &VolumeRestoreUndo, proven: &Proven) -> Result<(), StepError> {
        if swap.is_restored().await? {
            return swap.restored().await;
        }
        let emptied = if !swap.is_replacing().await? {
            let present = swap.contents().await?;
            let token = present.as_ref().map(|present| present.token());
            if token.as_ref() == Some(&undo.intended) {
                return swap.restored().await;
            }
            if token != undo.found && swap.cx.on_conflict() != OnConflict::Overwrite {
                return Err(self.conflict(undo, token));
            }
            if let Some(present) = &present {
                swap.keep(present).await?;
            }
            swap.replacing(present.is_none().then_some(&proven.manifest.volume)).await?;
            present.is_none_or(|present| present.is_empty())
        } else if undo.found.is_none() {
            swap.discard().await?;
            swap.replacing(Some(&proven.manifest.volume)).await?;
            true
        } else {
            false
        };
        if !emptied {
            swap.empty().await?;
        }
        let put_in = swap.fill(&self.backup).await?;
        if let Some(path) = proven.manifest.contents.difference(&put_in) {
            return Err(StepError::permanent(format!(
                "volume {} is not what the backup holds: {path} differs",
                self.config.volume
            ))
            .with_hint("the volume's driver may not keep owners, modes or times; or somebody writes there"));
        }
        swap.restored().await
    }

    async fn put_back(&self, swap: &Swap<'_>, undo: &VolumeRestoreUndo) -> Result<(), StepError> {
        let replacing = swap.is_replacing().await?;
        let present = swap.contents().await?.map(|present| present.token());
        if present != undo.found {
            let ours = replacing || present.as_ref() == Some(&undo.intended);
            if !ours && swap.cx.on_conflict() != OnConflict::Overwrite {
                return Err(self.conflict(undo, present));
            }
            match undo.found {
                Some(_) => swap.put_kept_back().await?,
                None => swap.discard().await?,
            }
        }
        swap.clear().await
    }

    /// Lets the consumers go on, unless what they would find is half of something.
    async fn after(
        &self,
        swap: &Swap<'_>,
        undo: &VolumeRestoreUndo,
        done: Result<(), StepError>,
    ) -> Result<(), StepError> {
        let again = done.is_err();
        if again && swap.is_replacing().await.unwrap_or(true) {
            return done;
        }
        let mode = self.config.consumers;
        done.and(consumers::bring_back(swap.client, swap.cx, mode, &undo.consumers, again).await)
    }

    async fn quiet(&self, swap: &Swap<'_>, undo: &VolumeRestoreUndo) -> Result<(), StepError> {
        let (mode, volume) = (self.config.consumers, &self.config.volume);
        consumers::quiet(swap.client, swap.cx, mode, volume, &undo.consumers).await.map(drop)
    }
}

#[async_trait]
impl Step for VolumeRestore {
    const KIND: &'static str = "docker.volume_restore";
    type Undo = VolumeRestoreUndo;
    type Output = VolumeRestoreOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<VolumeRestoreUndo, VolumeRestoreOutput>, StepError> {
        let proven = self.prove(self.config.sha256.as_deref(), cx).await?;
        let client = self.engine.connect(cx).await?;
        let image = helper_image(&client, &self.config.volume, self.config.image.as_deref()).await?;
        let consumers = consumers::prepare(&client, self.config.consumers, &self.config.volume).await?;
        let found = self.swap(&client, cx, &image).look().await?.map(|found| found.token());
        let (intended, output) = (proven.manifest.contents.token(), self.output(&proven));
        if found.as_ref() == Some(&intended) {
            return Ok(Prepared::unchanged(output, "the volume holds what the backup has"));
        }
        let effect = if found.is_some() { Effect::Modify } else { Effect::Create };
        let names: Vec<_> = consumers.iter().map(|consumer| consumer.name.as_str()).collect();
        let waiting = match self.config.consumers {
            _ if names.is_empty() => String::new(),
            Consumers::Pause => format!("; paused meanwhile: {}", names.join(", ")),
            _ => format!("; stopped meanwhile: {}", names.join(", ")),
        };
        let (files, bytes) = (output.files, Bytes(output.bytes));
        let change = Change::new(effect, format!("volume {}", self.config.volume))
            .with_summary(format!("{files} files, {bytes}, from {}{waiting}", self.backup.display()))
            .undo_loses("what is written there after the restore");
        let undo = VolumeRestoreUndo { backup_sha256: proven.sha256, found, intended, image, consumers };
        Ok(Prepared::change(undo, [change]))
    }

    async fn apply(&self, cx: &Context, undo: &VolumeRestoreUndo) -> Result<VolumeRestoreOutput, StepError> {
        let proven = self.prove(Some(&undo.backup_sha256), cx).await?;
        let client = self.engine.connect(cx).await?;
        let swap = self.swap(&client, cx, &undo.image);
        let done = match self.quiet(&swap, undo).await {
            Ok(()) => self.put_in(&swap, undo, &proven).await,
            Err(error) => Err(error),
        };
        self.after(&swap, undo, done).await?;
        Ok(self.output(&proven))
    }

    async fn settle(&self, cx: &Context, undo: &VolumeRestoreUndo) -> Result<(), StepError> {
        let client = self.engine.connect(cx).await?;
        self.swap(&client, cx, &undo.image).settle().await
    }

    async fn commit(&self, cx: &Context, undo: &VolumeRestoreUndo) -> Result<(), StepError> {
        let client = self.engine.connect(cx).await?;
        self.swap(&client, cx, &undo.image).clear().await
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![self.engine.resource("volume", &self.config.volume)]
    }
}

#[async_trait]
impl Rollback for VolumeRestore {
    async fn rollback(
        &self,
        cx: &Context,
        undo: &VolumeRestoreUndo,
        _: Option<&VolumeRestoreOutput>,
    ) -> Result<(), StepError> {
        let client = self.engine.connect(cx).await?;
        let swap = self.swap(&client, cx, &undo.image);
        let done = match self.quiet(&swap, undo).await {
            Ok(()) => self.put_back(&swap, undo).await,
            Err(error) => Err(error),
        };
        self.after(&swap, undo, done).await
    }
}
