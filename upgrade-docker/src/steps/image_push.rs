//! `docker.image_push`: a registry's tag that leads to an image of the engine, and back.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bollard::Docker;
use bollard::models::ImageInspect;
use bollard::query_parameters::PushImageOptionsBuilder;
use futures_util::StreamExt as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::time::sleep;
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::names::LockName;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::sealed::SealedRef;
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;

use crate::error::{Doing, cancelled, not_cancelled};
use crate::images::{self, id_of};
use crate::reference::ImageReference;
use crate::registry::{Manifest, Removal, Repository};
use crate::target::Engine;

/// What a push may take; it is ended by cancelling, not by the clock.
const PUSHING: Duration = Duration::from_secs(7 * 86_400);
/// How long what a registry was sent before a crash may take to show.
const SHOWN: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(200);

/// Configures `docker.image_push`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImagePushConfig {
    /// The engine that has the image. Default: the one that the `docker` command would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The image, by the name that it has on the engine and gets in the registry.
    pub image: ImageReference,
    /// Says that undo may leave a tag that was not there before, where the registry removes none.
    #[serde(default)]
    pub may_stay: bool,
}

/// Pushes an image, so that a registry's tag leads to it.
///
/// # Guarantees
/// The tag is moved only from where it led when the step was prepared, and back only from where
/// the step moved it: back to the same manifest, byte for byte.
///
/// # Caveats
/// A registry compares nothing when it moves a tag: somebody who moves it in the instant between the
/// look and the push is not noticed. What was uploaded stays until the registry collects it.
#[derive(Debug, Clone)]
pub struct ImagePush {
    config: ImagePushConfig,
    engine: Arc<Engine>,
}

/// Holds what letting a tag lead back needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImagePushUndo {
    /// The id of the image that is pushed.
    pub image_id: String,
    /// What the tag led to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found: Option<FoundManifest>,
    /// The digests under which the repository had the image already.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub had: Vec<String>,
}

/// Names a manifest that was found, and where its bytes are kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundManifest {
    /// Its digest.
    pub digest: String,
    /// Its media type.
    pub media_type: String,
    /// Its bytes, which the registry may forget when no tag leads to them.
    pub bytes: SealedRef,
}

/// Tells what the tag leads to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImagePushOutput {
    /// The image with its digest, as whoever pulls it may write it.
    pub image: String,
    /// The digest of its manifest.
    pub digest: String,
    /// Its id on the engine.
    pub image_id: String,
}

impl ImagePush {
    /// Makes the step from its configuration.
    ///
    /// # Errors
    /// There is no such target, or the image has no tag.
    pub fn from_config(config: ImagePushConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        if config.image.digest().is_some() {
            return Err(BuildError::new("an image is pushed to a tag, not to a digest")
                .at("image")
                .with_hint("write it with a tag: `image: registry.example.com/shop/web:2.0`"));
        }
        let engine = Engine::named(config.target.as_deref(), cx)?;
        Ok(Self { config, engine })
    }

    fn tag(&self) -> &str {
        self.config.image.tag().unwrap_or("latest")
    }

    async fn repository(&self, client: &Docker, cx: &Context) -> Result<Repository, StepError> {
        Repository::of(&self.engine, client, cx, &self.config.image).await
    }

    async fn image(&self, client: &Docker) -> Result<ImageInspect, StepError> {
        let name = &self.config.image;
        images::local(client, &name.to_string()).await?.ok_or_else(|| {
            StepError::permanent(format!("image {name} is not on the engine"))
                .with_hint("bring it there under this name first: a step `docker.image` with `build`, `load` or `from`")
        })
    }

    fn output(&self, undo_id: &str, manifest: &Manifest) -> ImagePushOutput {
        ImagePushOutput {
            image: self.config.image.at_digest(&manifest.digest).to_string(),
            digest: manifest.digest.clone(),
            image_id: undo_id.to_owned(),
        }
    }

    fn conflict(&self, undo: &ImagePushUndo, present: Option<&Manifest>) -> StepError {
        let named = |digest: Option<&str>| digest.map_or_else(|| "no tag".to_owned(), str::to_owned);
        StepError::conflict(Conflict {
            subject: format!("tag {}", self.config.image),
            found: named(undo.found.as_ref().map(|found| found.digest.as_str())),
            intended: format!("image {}", undo.image_id),
            present: named(present.map(|manifest| manifest.digest.as_str())),
        })
    }

    async fn push(&self, client: &Docker, cx: &Context) -> Result<(), StepError> {
        let image = &self.config.image;
        let credentials = self.engine.credentials(cx, image.registry()).await?;
        let options = PushImageOptionsBuilder::new().tag(self.tag()).build();
        let patient = client.clone().with_timeout(PUSHING);
        let name = image.name();
        let mut events = patient.push_image(&name, Some(options), credentials);
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = cx.cancelled().cancelled() => return Err(cancelled()),
            };
            let Some(event) = event else { return Ok(()) };
            let event = event.doing(|| format!("pushing image {image}"))?;
            let amount = |count: Option<i64>| count.and_then(|count| u64::try_from(count).ok());
            if let Some(detail) = event.progress_detail
                && let Some(done) = amount(detail.current)
            {
                cx.progress(done, amount(detail.total), format!("pushing image {image}"));
            }
        }
    }

    /// Takes away a tag that was not there before.
    async fn take_away(
        &self,
        cx: &Context,
        repository: &mut Repository,
        undo: &ImagePushUndo,
        present: &Manifest,
    ) -> Result<(), StepError> {
        if repository.remove(cx, self.tag()).await? == Removal::Removed
            && repository.manifest(cx, self.tag()).await?.is_none()
        {
            // Nothing leads to it any more: that it stays where none is removed harms nobody.
            self.forget(cx, repository, undo, present).await?;
            return Ok(());
        }
        if self.forget(cx, repository, undo, present).await? == Removal::Removed {
            return Ok(());
        }
        let image = &self.config.image;
        let stays = format!(
            "registry {} removes no tags here: {image} was not there before, and still leads to {}",
            image.registry(),
            present.digest
        );
        if self.config.may_stay {
            tracing::warn!(%image, "{stays}");
            cx.progress(0, None, stays);
            return Ok(());
        }
        Err(StepError::permanent(stays).with_hint(
            "remove it there by other means, then `upgrade resolve`; `may_stay: true` says beforehand that it may stay",
        ))
    }

    /// Removes the manifest that was pushed, unless somebody else may know it by a tag or its digest.
    async fn forget(
        &self,
        cx: &Context,
        repository: &mut Repository,
        undo: &ImagePushUndo,
        pushed: &Manifest,
    ) -> Result<Removal, StepError> {
        if !pushed.is_of(&undo.image_id)
            || undo.had.contains(&pushed.digest)
            || repository.has_other_tag(cx, self.tag(), &pushed.digest).await?
        {
            return Ok(Removal::Refused);
        }
        repository.remove(cx, &pushed.digest).await
    }
}

#[async_trait]
impl Step for ImagePush {
    const KIND: &'static str = "docker.image_push";
    type Undo = ImagePushUndo;
    type Output = ImagePushOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<ImagePushUndo, ImagePushOutput>, StepError> {
        let client = self.engine.connect(cx).await?;
        let subject = format!("tag {}", self.config.image);
        let image = match self.image(&client).await {
            // An earlier step may bring it.
            Err(error) if cx.is_dry_run() => {
                let undo = ImagePushUndo { image_id: String::new(), found: None, had: Vec::new() };
                let how = format!("{error}; asked again before the step");
                return Ok(Prepared::change(undo, [Change::new(Effect::Modify, subject).with_summary(how)]));
            }
            image => image?,
        };
        let image_id = id_of(&image)?;
        let mut repository = self.repository(&client, cx).await?;
        let found = repository.manifest(cx, self.tag()).await?;
        if let Some(found) = found.as_ref().filter(|found| found.is_of(&image_id)) {
            let reason = format!("{} leads to that image already", self.config.image);
            return Ok(Prepared::unchanged(self.output(&image_id, found), reason));
        }
        let name = self.config.image.name();
        let mut had = Vec::new();
        for digest in image.repo_digests.iter().flatten().filter_map(|known| known.strip_prefix(&format!("{name}@"))) {
            if repository.manifest(cx, digest).await?.is_some() {
                had.push(digest.to_owned());
            }
        }
        let effect = if found.is_some() { Effect::Modify } else { Effect::Create };
        let short = |id: &str| id.chars().take(19).collect::<String>();
        let how = match &found {
            Some(found) => format!("leads to image {} instead of {}", short(&image_id), short(&found.digest)),
            None => format!("leads to image {}", short(&image_id)),
        };
        let found = match found {
            Some(found) => Some(FoundManifest {
                bytes: cx.seal(&found.bytes).await?,
                digest: found.digest,
                media_type: found.media_type,
            }),
            None => None,
        };
        let undo = ImagePushUndo { image_id, found, had };
        Ok(Prepared::change(undo, [Change::new(effect, subject).with_summary(how)]))
    }

    async fn apply(&self, cx: &Context, undo: &ImagePushUndo) -> Result<ImagePushOutput, StepError> {
        let client = self.engine.connect(cx).await?;
        let mut repository = self.repository(&client, cx).await?;
        let present = repository.manifest(cx, self.tag()).await?;
        if let Some(present) = present.as_ref().filter(|present| present.is_of(&undo.image_id)) {
            return Ok(self.output(&undo.image_id, present));
        }
        let is_found = present.as_ref().map(|it| &it.digest) == undo.found.as_ref().map(|it| &it.digest);
        if !is_found && cx.on_conflict() == OnConflict::Stop {
            return Err(self.conflict(undo, present.as_ref()));
        }
        let id = id_of(&self.image(&client).await?)?;
        if id != undo.image_id {
            return Err(StepError::conflict(Conflict {
                subject: format!("image {}", self.config.image),
                found: undo.image_id.clone(),
                intended: undo.image_id.clone(),
                present: id,
            }));
        }
        not_cancelled(cx)?;
        self.push(&client, cx).await?;
        match repository.manifest(cx, self.tag()).await? {
            Some(pushed) if pushed.is_of(&undo.image_id) => Ok(self.output(&undo.image_id, &pushed)),
            other => Err(self.conflict(undo, other.as_ref())),
        }
    }

    async fn settle(&self, cx: &Context, undo: &ImagePushUndo) -> Result<(), StepError> {
        if !cx.is_interrupted() {
            return Ok(());
        }
        // An engine gives a push up when nobody waits for it; what it sent last may be on its way.
        let client = self.engine.connect(cx).await?;
        let mut repository = self.repository(&client, cx).await?;
        let mut waited = Duration::ZERO;
        while waited < SHOWN {
            let present = repository.manifest(cx, self.tag()).await?;
            if present.is_some_and(|present| present.is_of(&undo.image_id)) {
                break;
            }
            sleep(POLL).await;
            waited += POLL;
        }
        Ok(())
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        let lock = LockName::new("registry", &self.config.image.to_string()).expect("a name of an image is printable");
        vec![Arc::new(Tag { lock, registry: self.config.image.registry().to_owned() })]
    }
}

#[async_trait]
impl Rollback for ImagePush {
    async fn rollback(&self, cx: &Context, undo: &ImagePushUndo, _: Option<&ImagePushOutput>) -> Result<(), StepError> {
        let client = self.engine.connect(cx).await?;
        let mut repository = self.repository(&client, cx).await?;
        let present = repository.manifest(cx, self.tag()).await?;
        if present.as_ref().map(|it| &it.digest) == undo.found.as_ref().map(|it| &it.digest) {
            return Ok(());
        }
        let ours = present.as_ref().is_some_and(|present| present.is_of(&undo.image_id));
        if !ours && cx.on_conflict() == OnConflict::Stop {
            return Err(self.conflict(undo, present.as_ref()));
        }
        match (&undo.found, present) {
            (Some(found), present) => {
                let bytes = cx.unseal(&found.bytes).await?;
                let (digest, media_type) = (found.digest.clone(), found.media_type.clone());
                repository.put(cx, self.tag(), &Manifest { digest, media_type, bytes }).await?;
                if let Some(pushed) = present {
                    // Nothing leads to it any more: that it stays where none is removed harms nobody.
                    self.forget(cx, &mut repository, undo, &pushed).await?;
                }
                Ok(())
            }
            (None, Some(present)) => self.take_away(cx, &mut repository, undo, &present).await,
            (None, None) => Ok(()),
        }
    }
}

/// A tag of a registry.
struct Tag {
    lock: LockName,
    registry: String,
}

#[async_trait]
impl Target for Tag {
    fn lock(&self) -> LockName {
        self.lock.clone()
    }

    async fn identity(&self, _: &Context) -> Result<String, StepError> {
        // A registry has no identity but the name that it is reached by.
        Ok(format!("registry {}", self.registry))
    }
}
