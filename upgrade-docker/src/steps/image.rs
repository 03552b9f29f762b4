//! `docker.image`: brings an image to an engine under a name, and prunes old ones when that is final.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use async_trait::async_trait;
use bollard::Docker;
use bollard::models::{ImageInspect, ImageSummary};
use bollard::query_parameters::{
    ListContainersOptionsBuilder, ListImagesOptionsBuilder, RemoveImageOptionsBuilder, TagImageOptionsBuilder,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;

use crate::error::{DockerError, Doing, found, not_cancelled};
use crate::images::{self, Pull, id_of, platform_of};
use crate::reference::ImageReference;
use crate::target::Engine;

/// Configures `docker.image`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageConfig {
    /// The engine. Default: the one that the `docker` command would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The image that is pulled; with `from`, the name that an image of the engine is given.
    pub image: ImageReference,
    /// An image of the engine that is given the name, instead of a pull.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<ImageReference>,
    /// The platform. Default: the engine's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// How many images of the repository stay on the engine at commit: the newest, and those that
    /// a container uses. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<u32>,
}

/// Brings an image to an engine under a name.
///
/// What a tag leads to is decided once, when the step is prepared; the image is then pulled by its
/// digest, and the tag moved when it is there.
#[derive(Debug, Clone)]
pub struct Image {
    config: ImageConfig,
    engine: Arc<Engine>,
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
        if config.from.is_some() && config.image.digest().is_some() {
            return Err(BuildError::new("a digest is no name that an image could be given")
                .at("image")
                .with_hint("write it with a tag: `image: shop/web:current`"));
        }
        if config.from.is_some() && config.platform.is_some() {
            return Err(BuildError::new("nothing is pulled that could be for a platform").at("platform"));
        }
        if config.keep == Some(0) {
            return Err(BuildError::new("the image that is brought stays").at("keep").with_hint("write 1 or more"));
        }
        Ok(Self { config, engine })
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
            (intended, _) => Ok(intended.clone()),
        }
    }

    /// Gives the name to an image.
    async fn tag(&self, client: &Docker, id: &str) -> Result<(), DockerError> {
        let image = &self.config.image;
        let options = TagImageOptionsBuilder::new().repo(&image.name()).tag(image.tag().unwrap_or("latest")).build();
        client.tag_image(id, Some(options)).await.doing(|| format!("giving an image the name {image}"))
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

    /// Removes images of the repository but the newest, and but those that somebody uses.
    async fn prune(&self, client: &Docker, cx: &Context, keep: u32) -> Result<(), StepError> {
        let repository = self.config.image.name();
        let current = present(client, &self.name()).await?;
        let filters = HashMap::from([("reference".to_owned(), vec![repository.clone()])]);
        let options = ListImagesOptionsBuilder::new().filters(&filters).build();
        let mut all =
            client.list_images(Some(options)).await.doing(|| format!("listing the images of {repository}"))?;
        let options = ListContainersOptionsBuilder::new().all(true).build();
        let containers = client.list_containers(Some(options)).await.doing(|| "listing the containers".into())?;
        let used: BTreeSet<_> = containers.into_iter().filter_map(|container| container.image_id).collect();
        all.sort_by_key(|image| (Some(&image.id) != current.as_ref(), std::cmp::Reverse(image.created)));
        let old = all.iter().skip(keep as usize).filter(|image| !used.contains(&image.id));
        for image in old {
            not_cancelled(cx)?;
            for name in names_in(image, &repository) {
                cx.progress(0, None, format!("removing image {name}"));
                remove(client, &name).await?;
            }
        }
        Ok(())
    }
}

/// The names that an image has in a repository.
fn names_in(image: &ImageSummary, repository: &str) -> Vec<String> {
    let tags = image.repo_tags.iter().filter(|name| name.rsplit_once(':').is_some_and(|(of, _)| of == repository));
    let digests = image.repo_digests.iter().filter(|name| name.split_once('@').is_some_and(|(of, _)| of == repository));
    tags.chain(digests).cloned().collect()
}

/// Returns the id of an image, if the engine has it.
async fn present(client: &Docker, name: &str) -> Result<Option<String>, StepError> {
    images::local(client, name).await?.as_ref().map(id_of).transpose()
}

/// Takes a name away from an image, and removes the image with its last one. What does not exist,
/// or is used, is left alone.
async fn remove(client: &Docker, name: &str) -> Result<(), DockerError> {
    let options = RemoveImageOptionsBuilder::new().build();
    let removed = client.remove_image(name, Some(options), None).await.doing(|| format!("removing image {name}"));
    match found(removed) {
        // A container is made of it: it is not ours to take away.
        Err(error) if error.is_in_conflict() => Ok(()),
        removed => removed.map(drop),
    }
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
        let (pulled, intended, how) = match &self.config.from {
            Some(from) => match present(&client, &from.to_string()).await? {
                Some(id) => (None, Some(id), format!("becomes {from}")),
                // An earlier step may bring it.
                None if cx.is_dry_run() => (None, None, format!("becomes {from}")),
                None => {
                    return Err(StepError::permanent(format!("image {from} is not on the engine"))
                        .with_hint("pull, load or build it there, or correct `from`"));
                }
            },
            None => match self.pinned(&client, cx).await {
                Ok(pinned) => {
                    let here = present(&client, &pinned.to_string()).await?;
                    let how = format!("{} {pinned}", if here.is_some() { "is here:" } else { "is pulled:" });
                    (Some(pinned), here, how)
                }
                // An earlier step may push it.
                Err(error) if cx.is_dry_run() => (None, None, format!("{error}; asked again before the step")),
                Err(error) => return Err(error),
            },
        };
        if let Some(image) = &found
            && intended.is_some()
            && image.id == intended
        {
            let output = self.output(image, pulled.as_ref())?;
            return Ok(Prepared::unchanged(output, format!("{} is that image already", self.config.image)));
        }
        let undo = ImageUndo { found: found.as_ref().map(id_of).transpose()?, pulled, intended };
        Ok(Prepared::change(undo, [change.with_summary(how)]))
    }

    async fn apply(&self, cx: &Context, undo: &ImageUndo) -> Result<ImageOutput, StepError> {
        let client = self.engine.connect(cx).await?;
        if let Some(found) = &undo.found {
            images::keep(&client, cx, found).await?;
        }
        let image = match (&undo.pulled, &undo.intended) {
            (Some(pulled), _) => {
                let platform = self.config.platform.as_deref();
                images::obtain(&self.engine, &client, cx, pulled, platform, Pull::Missing).await?
            }
            (None, intended) => {
                let id = intended.as_deref().unwrap_or_default();
                images::local(&client, id).await?.ok_or_else(|| {
                    StepError::permanent(format!("the image for {} is gone: somebody removed it", self.config.image))
                        .with_hint("find out who removes images here, bring it back, then run again")
                })?
            }
        };
        let id = id_of(&image)?;
        images::keep(&client, cx, &id).await?;
        if self.is_tagged() {
            let present = present(&client, &self.name()).await?;
            if present.as_ref() != Some(&id) {
                if present != undo.found && cx.on_conflict() == OnConflict::Stop {
                    return Err(self.conflict(undo, Some(&id), present.as_ref()));
                }
                not_cancelled(cx)?;
                self.tag(&client, &id).await?;
            }
        }
        self.output(&image, undo.pulled.as_ref())
    }

    async fn commit(&self, cx: &Context, _: &ImageUndo) -> Result<(), StepError> {
        let client = self.engine.connect(cx).await?;
        for id in images::kept(&client, cx).await? {
            images::let_go(&client, cx, &id).await?;
        }
        match self.config.keep {
            Some(keep) => self.prune(&client, cx, keep).await,
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
        if self.is_tagged() {
            let present = present(&client, &self.name()).await?;
            if present != undo.found {
                let ours = present.is_some() && present == intended;
                if !ours && cx.on_conflict() == OnConflict::Stop {
                    return Err(self.conflict(undo, intended.as_ref(), present.as_ref()));
                }
                match &undo.found {
                    Some(found) => self.tag(&client, found).await?,
                    None => remove(&client, &self.name()).await?,
                }
            }
        }
        // Asked of the engine: with a repository's last tag its digests go as well, and a call that was cut
        // off there leaves nothing by which the next one would know the image that was brought.
        for id in images::kept(&client, cx).await? {
            images::let_go(&client, cx, &id).await?;
        }
        // The last: it is known by it which image was brought.
        match &undo.pulled {
            Some(pulled) if undo.intended.is_none() => Ok(remove(&client, &pulled.to_string()).await?),
            _ => Ok(()),
        }
    }
}
