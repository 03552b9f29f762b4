//! `docker.volume_backup`: a volume kept in an archive that is proven by reading it back.
//!
//! A kind of its own beside `docker.volume_restore`: the two share nothing but the volume's name,
//! and each undo record says only what its own undo needs.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bollard::Docker;
use bollard::models::VolumeCreateRequest;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::context::{Context, OnConflict, blocking};
use upgrade_core::durable;
use upgrade_core::error::{Class, Conflict, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;
use upgrade_core::units::Bytes;

use crate::error::Doing;
use crate::images;
use crate::naming::labels;
use crate::target::Engine;
use crate::volumes::archive::{self, Description, Proven, Writing};
use crate::volumes::consumers::{self, Consumer, Consumers};
use crate::volumes::helper::{self, Helper};
use crate::volumes::{self, beside, check_name, storage};

/// What the names of backups end with.
const SUFFIX: &str = ".tar.zst";

/// Configures `docker.volume_backup`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeBackupConfig {
    /// The target that names the engine; if absent, the engine that the `docker` command would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The volume that is kept.
    pub volume: String,
    /// A directory, or a file whose name ends in `.tar.zst`.
    pub to: PathBuf,
    /// What becomes of the running containers that use the volume, while it is read.
    #[serde(default = "leave")]
    pub consumers: Consumers,
    /// How the backup is proven.
    #[serde(default)]
    pub prove: Prove,
    /// An image on the engine, of which the container is made that the volume is read through; if
    /// absent, that of a container that uses the volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
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

fn leave() -> Consumers {
    Consumers::Leave
}

fn default_level() -> i32 {
    3
}

/// Says how a backup is proven.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Prove {
    /// It is read back, and every entry compared with what was read from the volume.
    #[default]
    List,
    /// In addition it is restored into a volume of its own, which is compared and removed.
    Restore,
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

/// Keeps what a volume holds in an archive before an upgrade touches it.
///
/// # Guarantees
/// The archive appears under its name only when it is durable and every entry, read back from it,
/// has the digest that it had when the engine sent it. It is readable by its owner alone. Containers
/// that were stopped or paused for it go on, whatever came of it.
///
/// # Caveats
/// Of one instant only if the consumers wait. Not kept: sockets, access control lists, extended
/// attributes but capabilities, and fractions of seconds, none of which the engine gives.
///
/// Called again, or after a crash at any point, apply, rollback and commit converge.
#[derive(Clone, Debug)]
pub struct VolumeBackup {
    config: VolumeBackupConfig,
    engine: Arc<Engine>,
    to: PathBuf,
}

/// Holds what undoing a backup needs: nothing was there, and these containers ran.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeBackupUndo {
    /// The archive that is made.
    pub path: PathBuf,
    /// The topmost directory that was not there; absent if all were.
    pub made: Option<PathBuf>,
    /// The image of the container that the volume is read through.
    pub image: String,
    /// The containers that are stopped or paused meanwhile.
    pub consumers: Vec<Consumer>,
}

/// Tells later steps where the backup is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeBackupOutput {
    /// The archive.
    pub path: PathBuf,
    /// Its SHA-256 digest.
    pub sha256: String,
    /// How many files it holds.
    pub files: u64,
    /// How many bytes they have.
    pub bytes: u64,
}

impl VolumeBackup {
    /// Makes the step from its configuration; relative paths start from the context's directory.
    ///
    /// # Errors
    /// The configuration contradicts itself.
    pub fn from_config(config: VolumeBackupConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        check_name(&config.volume)?;
        if !(1..=19).contains(&config.level) {
            return Err(BuildError::new("the level of compression is from 1 to 19").at("level"));
        }
        let to = cx.path(&config.to);
        let to = std::path::absolute(&to).unwrap_or(to);
        if is_archive(&to) && config.keep.is_some() {
            return Err(BuildError::new("`keep` counts the backups in a directory; `to` names a file")
                .at("keep")
                .with_hint("let `to` name a directory"));
        }
        let engine = Engine::named(config.target.as_deref(), cx)?;
        Ok(Self { config, engine, to })
    }

    /// Names the archive of this run; the same in every call.
    fn path(&self, cx: &Context) -> PathBuf {
        if is_archive(&self.to) {
            return self.to.clone();
        }
        let version = cx.from().or(cx.to()).map_or_else(|| "0.0.0".to_owned(), ToString::to_string);
        self.to.join(format!("{}-{version}-{}{SUFFIX}", cx.subject(), cx.run()))
    }

    fn helper(&self, cx: &Context) -> String {
        beside(&self.config.volume, "backup", cx)
    }

    fn scratch(&self, cx: &Context) -> String {
        beside(&self.config.volume, "scratch", cx)
    }

    async fn description(&self, client: &Docker) -> Result<Description, StepError> {
        let volume = volumes::inspect(client, &self.config.volume).await?;
        volume.as_ref().map(Description::of).ok_or_else(|| {
            StepError::permanent(format!("there is no volume {}", self.config.volume))
                .with_hint("`docker volume ls` lists those there are; Compose puts the project's name before its own")
        })
    }

    async fn make(&self, client: &Docker, cx: &Context, undo: &VolumeBackupUndo) -> Result<Proven, StepError> {
        let parent = storage::parent(&undo.path);
        storage::create_directories(&parent)
            .map_err(|error| storage::failed(format!("cannot make {}", parent.display()), &error))?;
        let temporary = storage::temporary(&undo.path, &cx.marker());
        let read = match consumers::quiet(client, cx, self.config.consumers, &self.config.volume, &undo.consumers).await
        {
            Ok(_) => self.read(client, cx, undo, temporary.clone()).await,
            Err(error) => Err(error),
        };
        let again = read.is_err();
        let back = consumers::bring_back(client, cx, self.config.consumers, &undo.consumers, again).await;
        read.and(back)?;
        let (at, context) = (temporary.clone(), cx.clone());
        let proven = blocking(move || archive::prove(&at, &context)).await?;
        if self.config.prove == Prove::Restore {
            self.restore(client, cx, undo, temporary.clone(), &proven).await?;
        }
        storage::place(&temporary, &undo.path)
            .map_err(|error| storage::failed(format!("cannot make {}", undo.path.display()), &error))?;
        Ok(proven)
    }

    async fn read(&self, client: &Docker, cx: &Context, undo: &VolumeBackupUndo, to: PathBuf) -> Result<(), StepError> {
        let volume = self.description(client).await?;
        let name = self.helper(cx);
        let id = Helper::new(&name, &undo.image, &self.config.volume).create(client, cx).await?;
        let free = self.config.free.unwrap_or_default().0;
        let (writing, context) = (Writing { to, level: self.config.level, free, volume }, cx.clone());
        let written = helper::download(client, cx, &id, move |stream| writing.write(stream, &context)).await;
        helper::remove(client, cx, &name).await?;
        written
    }

    /// Restores the backup into a volume of its own and compares what that then holds.
    async fn restore(
        &self,
        client: &Docker,
        cx: &Context,
        undo: &VolumeBackupUndo,
        from: PathBuf,
        proven: &Proven,
    ) -> Result<(), StepError> {
        let name = self.scratch(cx);
        self.clear_scratch(client, cx).await?;
        let request = VolumeCreateRequest {
            name: Some(name.clone()),
            labels: Some(labels(cx)),
            ..VolumeCreateRequest::default()
        };
        client.create_volume(request).await.doing(|| format!("making volume {name}"))?;
        let id = Helper::new(&name, &undo.image, &name).create(client, cx).await?;
        let context = cx.clone();
        helper::upload(client, cx, &id, move |to| archive::replay(&from, to, &context).map(drop)).await?;
        let restored = helper::contents(client, cx, &id).await?;
        if let Some(path) = proven.manifest.contents.difference(&restored) {
            return Err(StepError::permanent(format!(
                "restored for proof, volume {} differs from its backup: {path}",
                self.config.volume
            ))
            .with_hint("the engine cannot put this entry back as it is; `prove: list` keeps it all the same"));
        }
        self.clear_scratch(client, cx).await
    }

    async fn clear_scratch(&self, client: &Docker, cx: &Context) -> Result<(), StepError> {
        helper::remove(client, cx, &self.scratch(cx)).await?;
        volumes::remove_own(client, cx, &self.scratch(cx)).await
    }

    /// Removes what an interrupted call left, here and at the engine, when it has ended.
    async fn clear(&self, client: &Docker, cx: &Context, undo: &VolumeBackupUndo) -> Result<(), StepError> {
        helper::remove(client, cx, &self.helper(cx)).await?;
        self.clear_scratch(client, cx).await?;
        let temporary = storage::temporary(&undo.path, &cx.marker());
        storage::remove(&temporary)
            .map_err(|error| storage::failed(format!("cannot remove {}", temporary.display()), &error))
    }

    fn remove(&self, cx: &Context, undo: &VolumeBackupUndo) -> Result<(), StepError> {
        let cannot = |error| storage::failed(format!("cannot remove {}", undo.path.display()), &error);
        if undo.path.symlink_metadata().is_ok() {
            if cx.on_conflict() != OnConflict::Overwrite {
                ours(cx, undo)?;
            }
            storage::remove(&undo.path).map_err(cannot)?;
        }
        storage::remove_made(&storage::parent(&undo.path), undo.made.as_deref()).map_err(cannot)
    }

    fn prune(&self, cx: &Context, undo: &VolumeBackupUndo) -> Result<(), StepError> {
        let Some(keep) = self.config.keep else { return Ok(()) };
        let cannot = |what: &Path| {
            let what = format!("cannot remove old backups in {}", what.display());
            move |error| storage::failed(what, &error)
        };
        let listing = fs::read_dir(&self.to).map_err(cannot(&self.to))?;
        let names = listing.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        for name in durable::beyond_newest(names, cx.subject(), SUFFIX, keep) {
            let path = self.to.join(name);
            if path != undo.path {
                storage::remove(&path).map_err(cannot(&self.to))?;
            }
        }
        Ok(())
    }
}

/// Reads the archive and makes sure that this run made it.
fn ours(cx: &Context, undo: &VolumeBackupUndo) -> Result<Proven, StepError> {
    let present = match archive::prove(&undo.path, cx) {
        Ok(proven) if proven.manifest.made_by == cx.marker() => return Ok(proven),
        Ok(proven) => format!("a backup made by {}", proven.manifest.made_by),
        Err(error) if error.class() == Class::Transient => return Err(error),
        Err(error) => error.message().to_owned(),
    };
    Err(StepError::conflict(Conflict {
        subject: undo.path.display().to_string(),
        found: "nothing".to_owned(),
        intended: format!("a backup made by {}", cx.marker()),
        present,
    }))
}

fn is_archive(path: &Path) -> bool {
    path.to_string_lossy().ends_with(SUFFIX)
}

fn output(undo: &VolumeBackupUndo, proven: &Proven) -> VolumeBackupOutput {
    VolumeBackupOutput {
        path: undo.path.clone(),
        sha256: proven.sha256.clone(),
        files: proven.manifest.contents.files(),
        bytes: proven.manifest.contents.bytes(),
    }
}

/// Finds the image that helpers on a volume are made of: it must be on the engine already.
pub(super) async fn helper_image(client: &Docker, volume: &str, named: Option<&str>) -> Result<String, StepError> {
    match named {
        Some(name) => match images::local(client, name).await? {
            Some(image) => images::id_of(&image),
            None => Err(StepError::permanent(format!("image {name} is not on the engine"))
                .with_hint("pull it there first, or name as `image` one that is there: any will do")),
        },
        None => consumers::image(client, volume).await?.ok_or_else(|| {
            StepError::permanent(format!("no container uses volume {volume}, so that none tells an image"))
                .with_hint("name as `image` one that is on the engine: `docker images` lists them")
        }),
    }
}

#[async_trait]
impl Step for VolumeBackup {
    const KIND: &'static str = "docker.volume_backup";
    type Undo = VolumeBackupUndo;
    type Output = VolumeBackupOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<VolumeBackupUndo, VolumeBackupOutput>, StepError> {
        let client = self.engine.connect(cx).await?;
        let volume = self.description(&client).await?;
        let image = helper_image(&client, &self.config.volume, self.config.image.as_deref()).await?;
        let consumers = consumers::prepare(&client, self.config.consumers, &self.config.volume).await?;
        let path = self.path(cx);
        if path.symlink_metadata().is_ok() {
            return Err(StepError::permanent(format!("{} is there already", path.display()))
                .with_hint("move it away, or let `to` name a directory: each run then makes a file of its own"));
        }
        archive::expect_room(&path, self.config.free.unwrap_or_default().0)?;
        let names: Vec<_> = consumers.iter().map(|consumer| consumer.name.as_str()).collect();
        let waiting = match self.config.consumers {
            _ if names.is_empty() => String::new(),
            Consumers::Pause => format!("; paused meanwhile: {}", names.join(", ")),
            _ => format!("; stopped meanwhile: {}", names.join(", ")),
        };
        let change = Change::new(Effect::Create, path.display().to_string())
            .with_summary(format!("volume {} ({}){waiting}", volume.name, volume.driver));
        let made = storage::topmost_missing(&storage::parent(&path));
        Ok(Prepared::change(VolumeBackupUndo { path, made, image, consumers }, [change]))
    }

    async fn apply(&self, cx: &Context, undo: &VolumeBackupUndo) -> Result<VolumeBackupOutput, StepError> {
        if undo.path.symlink_metadata().is_ok() {
            let (context, known) = (cx.clone(), undo.clone());
            let proven = blocking(move || ours(&context, &known)).await?;
            return Ok(output(undo, &proven));
        }
        let client = self.engine.connect(cx).await?;
        let made = self.make(&client, cx, undo).await;
        if made.is_err() {
            // What counts is why it failed; what stays is removed by settle or rollback.
            let _ = self.clear(&client, cx, undo).await;
        }
        made.map(|proven| output(undo, &proven))
    }

    async fn settle(&self, cx: &Context, undo: &VolumeBackupUndo) -> Result<(), StepError> {
        let client = self.engine.connect(cx).await?;
        self.clear(&client, cx, undo).await?;
        consumers::bring_back(&client, cx, self.config.consumers, &undo.consumers, cx.is_interrupted()).await
    }

    async fn commit(&self, cx: &Context, undo: &VolumeBackupUndo) -> Result<(), StepError> {
        let (step, context, undo) = (self.clone(), cx.clone(), undo.clone());
        blocking(move || step.prune(&context, &undo)).await
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![self.engine.resource("volume", &self.config.volume)]
    }
}

#[async_trait]
impl Rollback for VolumeBackup {
    async fn rollback(
        &self,
        cx: &Context,
        undo: &VolumeBackupUndo,
        _: Option<&VolumeBackupOutput>,
    ) -> Result<(), StepError> {
        let client = self.engine.connect(cx).await?;
        self.clear(&client, cx, undo).await?;
        if self.config.on_rollback == OnRollback::Keep {
            return Ok(());
        }
        let (step, context, undo) = (self.clone(), cx.clone(), undo.clone());
        blocking(move || step.remove(&context, &undo)).await
    }
}
