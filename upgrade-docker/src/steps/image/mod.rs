//! `docker.image`: brings an image to an engine under a name, and prunes old ones when that is final.

mod config;
mod load;
mod prune;

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use bollard::Docker;
use bollard::models::ImageInspect;
use bollard::query_parameters::TagImageOptionsBuilder;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;

use crate::building::{self, Built, Directory};
use crate::error::{DockerError, Doing, not_cancelled};
use crate::images::{self, Pull, id_of, platform_of};
use crate::reference::ImageReference;
use crate::target::Engine;
pub use config::{ImageConfig, LoadConfig};
pub use load::Loaded;

/// Brings an image to an engine under a name.
///
/// What a tag leads to is decided once, when the step is prepared; the image is then pulled by its
/// digest, and the tag moved when it is there.
#[derive(Debug, Clone)]
pub struct Image {
    config: ImageConfig,
    engine: Arc<Engine>,
    /// The directory or the archive that it comes from, if it does.
    place: PathBuf,
}

/// Holds what putting a name back needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageUndo {
    /// The id of the image that had the name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found: Option<String>,
    /// The image by digest, if it is pulled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pulled: Option<ImageReference>,
    /// The id of the image that gets the name, if the engine has it already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub intended: Option<String>,
    /// What was found before, if it is built.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub built: Option<Built>,
    /// What the archive holds, if it is loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loaded: Option<Loaded>,
}

/// Says what a step that is prepared will do.
#[derive(Default)]
struct Plan {
    pulled: Option<ImageReference>,
    intended: Option<String>,
    built: Option<Built>,
    loaded: Option<Loaded>,
    how: String,
}

/// Tells which image has the name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageOutput {
    /// Its id.
    pub image_id: String,
    /// Its digest in the registry, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Its platform.
    pub platform: String,
}

impl Image {
    /// Makes the step from its configuration.
    ///
    /// # Errors
    /// There is no such target, or keys contradict each other.
    pub fn from_config(config: ImageConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let engine = Engine::named(config.target.as_deref(), cx)?;
        config.validate()?;
        let place = match (&config.build, &config.load) {
            (Some(build), _) => cx.path(&build.context),
            (_, Some(load)) => cx.path(&load.archive),
            _ => PathBuf::new(),
        };
        Ok(Self { config, engine, place })
    }

    fn name(&self) -> String {
        self.config.image.to_string()
    }

    /// Tells whether the image has a tag that is moved, and not a digest alone.
    fn is_tagged(&self) -> bool {
        self.config.image.digest().is_none()
    }

    /// Asks the registry what the name leads to now.
    async fn pinned(&self, client: &Docker, cx: &Context) -> Result<ImageReference, StepError> {
        let image = &self.config.image;
        if let Some(digest) = image.digest() {
            return Ok(image.at_digest(digest));
        }
        let credentials = self.engine.credentials(cx, image.registry()).await?;
        let doing = || format!("asking the registry for image {image}");
        let answer = client.inspect_registry_image(&image.to_string(), credentials).await.doing(doing)?;
        let digest = answer.descriptor.digest.ok_or_else(|| {
            StepError::permanent(format!("the registry names no digest for image {image}"))
                .with_hint("write the image with its digest: `image: NAME@sha256:…`")
        })?;
        Ok(image.at_digest(&digest))
    }

    /// Returns the id of the image that gets the name, if the engine has it.
    async fn intended(&self, client: &Docker, undo: &ImageUndo) -> Result<Option<String>, StepError> {
        match (&undo.intended, &undo.pulled) {
            (None, Some(pulled)) => present(client, &pulled.to_string()).await,
            (None, None) => match &undo.loaded {
                Some(loaded) => present(client, &loaded.image_id).await,
                None => Ok(None),
            },
            (intended, _) => Ok(intended.clone()),
        }
    }

    /// Says where the image will come from.
    async fn plan(&self, client: &Docker, cx: &Context) -> Result<Plan, StepError> {
        let config = &self.config;
        if let Some(from) = &config.from {
            let how = format!("becomes {from}");
            return match present(client, &from.to_string()).await? {
                Some(id) => Ok(Plan { intended: Some(id), how, ..Plan::default() }),
                None => Err(StepError::permanent(format!("image {from} is not on the engine"))
                    .with_hint("pull, load or build it there, or correct `from`")),
            };
        }
        if let Some(build) = &config.build {
            let (built, sent) = building::prepare(client, cx, build, &self.directory(&build.dockerfile)).await?;
            let (files, bytes) = (sent.files, upgrade_core::units::Bytes(sent.bytes));
            let how = format!(
                "is built from {}: {files} files, {bytes}, digest {}",
                self.place.display(),
                sent.sha256.chars().take(12).collect::<String>()
            );
            return Ok(Plan { built: Some(built), how, ..Plan::default() });
        }
        if let Some(load) = &config.load {
            let (loaded, packed) = load::look(client, cx, config, load, &self.place).await?;
            let intended = present(client, &loaded.image_id).await?;
            let named = if packed.names.is_empty() { "without a name".to_owned() } else { packed.names.join(", ") };
            let from = self.place.display();
            let how = match intended {
                Some(_) => format!("is here: {named} of {from}"),
                None => format!("is loaded: {named} of {from}"),
            };
            return Ok(Plan { intended, loaded: Some(loaded), how, ..Plan::default() });
        }
        let pinned = self.pinned(client, cx).await?;
        let intended = present(client, &pinned.to_string()).await?;
        let how = format!("{} {pinned}", if intended.is_some() { "is here:" } else { "is pulled:" });
        Ok(Plan { pulled: Some(pinned), intended, how, ..Plan::default() })
    }

    fn directory(&self, dockerfile: &str) -> Directory {
        Directory { root: self.place.clone(), dockerfile: dockerfile.to_owned() }
    }

    /// Brings the image to the engine, under no name but those that keep it; returns its id.
    async fn bring(&self, client: &Docker, cx: &Context, undo: &ImageUndo) -> Result<String, StepError> {
        let platform = self.config.platform.as_deref();
        if let (Some(build), Some(built)) = (&self.config.build, &undo.built) {
            let directory = self.directory(&build.dockerfile);
            return building::build(&self.engine, client, cx, build, &directory, platform, built).await;
        }
        if let (Some(load), Some(loaded)) = (&self.config.load, &undo.loaded) {
            return load::load(client, cx, &self.config, load, &self.place, loaded).await;
        }
        if let Some(pulled) = &undo.pulled {
            return id_of(&images::obtain(&self.engine, client, cx, pulled, platform, Pull::Missing).await?);
        }
        let id = undo.intended.clone().unwrap_or_default();
        if present(client, &id).await?.is_none() {
            return Err(StepError::permanent(format!(
                "the image for {} is gone: somebody removed it",
                self.config.image
            ))
            .with_hint("find out who removes images here, bring it back, then run again"));
        }
        Ok(id)
    }

    /// Gives a name to an image.
    async fn tag(&self, client: &Docker, image: &ImageReference, id: &str) -> Result<(), DockerError> {
        let options = TagImageOptionsBuilder::new().repo(&image.name()).tag(image.tag().unwrap_or("latest")).build();
        client.tag_image(id, Some(options)).await.doing(|| format!("giving an image the name {image}"))
    }

    /// Gives a name back to the image that had it, or takes it away.
    async fn give_back(&self, client: &Docker, name: &ImageReference, found: Option<&str>) -> Result<(), DockerError> {
        match found {
            // A base that somebody pruned meanwhile is pulled by whoever needs it.
            Some(id) if *name != self.config.image => crate::error::found(self.tag(client, name, id).await).map(drop),
            Some(id) => self.tag(client, name, id).await,
            None => images::remove(client, &name.to_string(), false).await,
        }
    }

    fn conflict(&self, undo: &ImageUndo, intended: Option<&String>, present: Option<&String>) -> StepError {
        let short = |id: Option<&String>| match id {
            Some(id) => id.chars().take(19).collect(),
            None => "none".to_owned(),
        };
        StepError::conflict(Conflict {
            subject: format!("image {}", self.config.image),
            found: short(undo.found.as_ref()),
            intended: short(intended),
            present: short(present),
        })
    }

    fn output(&self, image: &ImageInspect, pulled: Option<&ImageReference>) -> Result<ImageOutput, StepError> {
        let digests = image.repo_digests.iter().flatten().filter_map(|name| name.split_once('@'));
        let repository = self.config.image.name();
        let own = digests.into_iter().find(|(name, _)| *name == repository).map(|(_, digest)| digest.to_owned());
        let pulled = pulled.and_then(ImageReference::digest).map(str::to_owned);
        Ok(ImageOutput { image_id: id_of(image)?, digest: pulled.or(own), platform: platform_of(image) })
    }
}

/// Returns the id of an image, if the engine has it.
async fn present(client: &Docker, name: &str) -> Result<Option<String>, StepError> {
    images::local(client, name).await?.as_ref().map(id_of).transpose()
}

#[async_trait]
impl Step for Image {
    const KIND: &'static str = "docker.image";
    type Undo = ImageUndo;
    type Output = ImageOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<ImageUndo, ImageOutput>, StepError> {
        let client = self.engine.connect(cx).await?;
        let found = images::local(&client, &self.name()).await?;
        let effect = if found.is_some() { Effect::Modify } else { Effect::Create };
        let change = Change::new(effect, format!("image {}", self.config.image));
        let plan = match self.plan(&client, cx).await {
            // An earlier step may bring, push or write what is missing.
            Err(error) if cx.is_dry_run() => {
                Plan { how: format!("{error}; asked again before the step"), ..Plan::default() }
            }
            plan => plan?,
        };
        let Plan { pulled, intended, built, loaded, how } = plan;
        if let Some(image) = &found
            && intended.is_some()
            && image.id == intended
        {
            let output = self.output(image, pulled.as_ref())?;
            return Ok(Prepared::unchanged(output, format!("{} is that image already", self.config.image)));
        }
        let undo = ImageUndo { found: found.as_ref().map(id_of).transpose()?, pulled, intended, built, loaded };
        Ok(Prepared::change(undo, [change.with_summary(how)]))
    }

    async fn apply(&self, cx: &Context, undo: &ImageUndo) -> Result<ImageOutput, StepError> {
        let client = self.engine.connect(cx).await?;
        if let Some(found) = &undo.found {
            images::keep(&client, cx, found).await?;
        }
        let id = self.bring(&client, cx, undo).await?;
        images::keep(&client, cx, &id).await?;
        if self.is_tagged() {
            let present = present(&client, &self.name()).await?;
            if present.as_ref() != Some(&id) {
                if present != undo.found && cx.on_conflict() == OnConflict::Stop {
                    return Err(self.conflict(undo, Some(&id), present.as_ref()));
                }
                not_cancelled(cx)?;
                self.tag(&client, &self.config.image, &id).await?;
            }
        }
        let image = images::local(&client, &id).await?.ok_or_else(|| {
            StepError::unknown(format!("image {} was brought, and the engine does not have it", self.config.image))
                .with_hint("somebody may have removed it: try again")
        })?;
        self.output(&image, undo.pulled.as_ref())
    }

    async fn commit(&self, cx: &Context, undo: &ImageUndo) -> Result<(), StepError> {
        let client = self.engine.connect(cx).await?;
        let named = present(&client, &self.name()).await?;
        for id in images::kept(&client, cx).await? {
            match (&undo.built, &named) {
                // What a build goes through stays as the engine's cache, as after any build.
                (Some(_), Some(named)) if *named != id && undo.found.as_ref() != Some(&id) => {
                    images::forget(&client, cx, &id, named).await?;
                }
                _ => images::let_go(&client, cx, &id).await?,
            }
        }
        match self.config.keep {
            Some(keep) => prune::prune(&client, cx, &self.config.image, keep).await,
            None => Ok(()),
        }
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![self.engine.resource("image", &self.name())]
    }
}

#[async_trait]
impl Rollback for Image {
    async fn rollback(&self, cx: &Context, undo: &ImageUndo, _: Option<&ImageOutput>) -> Result<(), StepError> {
        let client = self.engine.connect(cx).await?;
        let intended = self.intended(&client, undo).await?;
        // Asked of the engine: with a repository's last tag its digests go as well, and a call that was cut
        // off there leaves nothing by which the next one would know the image that was brought.
        let kept = images::kept_newest_first(&client, cx).await?;
        if self.is_tagged() {
            let present = present(&client, &self.name()).await?;
            if present != undo.found {
                // What is kept is what was found and what the step brought.
                let is_base =
                    |id: &String| undo.built.iter().any(|built| built.bases.values().flatten().any(|base| base == id));
                let brought = |id: &String| Some(id) == intended.as_ref() || kept.contains(id) && !is_base(id);
                let ours = present.as_ref().is_some_and(brought);
                if !ours && cx.on_conflict() == OnConflict::Stop {
                    return Err(self.conflict(undo, intended.as_ref(), present.as_ref()));
                }
                self.give_back(&client, &self.config.image, undo.found.as_deref()).await?;
            }
        }
        for (base, found) in undo.built.iter().flat_map(|built| &built.bases) {
            let Ok(base) = base.parse::<ImageReference>() else { continue };
            let present = present(&client, &base.to_string()).await?;
            // One that somebody else moved meanwhile is theirs: the build only read it.
            if base.digest().is_none() && present != *found && present.is_some_and(|id| kept.contains(&id)) {
                self.give_back(&client, &base, found.as_deref()).await?;
            }
        }
        for id in kept {
            images::let_go(&client, cx, &id).await?;
        }
        match undo {
            // The last: it is known by it which image was brought.
            ImageUndo { pulled: Some(pulled), intended: None, .. } => {
                Ok(images::remove(&client, &pulled.to_string(), false).await?)
            }
            ImageUndo { loaded: Some(loaded), intended: None, .. } => {
                Ok(load::remove_nameless(&client, &loaded.image_id).await?)
            }
            _ => Ok(()),
        }
    }
}
