//! Images: obtained and verified before anything is stopped, and kept until commit.

use std::collections::{BTreeMap, HashMap};

use bollard::Docker;
use bollard::models::ImageInspect;
use bollard::query_parameters::{
    CreateImageOptionsBuilder, ListContainersOptionsBuilder, ListImagesOptionsBuilder, RemoveImageOptionsBuilder,
    TagImageOptionsBuilder,
};
use futures_util::StreamExt as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use crate::error::{DockerError, Doing, found, unless_cancelled};
use crate::naming::kept_image;
use crate::reference::ImageReference;
use crate::target::Engine;

/// Says when an image is pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Pull {
    /// Always: a tag may lead to another image by now.
    #[default]
    Always,
    /// Only if the engine does not have it.
    Missing,
    /// Never: the engine must have it.
    Never,
}

/// Looks an image up on the engine, by name or id.
///
/// # Errors
/// The engine cannot be asked.
pub async fn local(client: &Docker, name: &str) -> Result<Option<ImageInspect>, DockerError> {
    found(client.inspect_image(name).await.doing(|| format!("looking at image {name}")))
}

/// Returns the id of an image: `sha256:…`, the digest of its configuration.
///
/// # Errors
/// The engine names none.
pub fn id_of(image: &ImageInspect) -> Result<String, StepError> {
    image.id.clone().ok_or_else(|| StepError::unknown("the engine names no id for an image"))
}

/// Returns the platform of an image: `linux/arm64/v8`.
pub fn platform_of(image: &ImageInspect) -> String {
    let parts = [&image.os, &image.architecture, &image.variant];
    parts.into_iter().flatten().filter(|part| !part.is_empty()).map(String::as_str).collect::<Vec<_>>().join("/")
}

/// Obtains an image: pulls it as `pull` says, and verifies its digest and its platform.
///
/// Changes nothing that runs. A second call pulls again where `pull` says so, which costs a look
/// at the registry.
///
/// # Errors
/// It cannot be had, or is not what was asked for.
pub async fn obtain(
    engine: &Engine,
    client: &Docker,
    cx: &Context,
    reference: &ImageReference,
    platform: Option<&str>,
    pull: Pull,
) -> Result<ImageInspect, StepError> {
    let name = reference.to_string();
    let here = local(client, &name).await?;
    let image = match (here, pull) {
        // What a digest names cannot have changed.
        (Some(image), Pull::Always) if reference.digest().is_some() => image,
        (Some(image), Pull::Missing | Pull::Never) => image,
        (None, Pull::Never) => {
            return Err(StepError::permanent(format!("image {name} is not on the engine, and `pull: never` is set"))
                .with_hint("load or build it there, or let it be pulled (`pull: missing`)"));
        }
        (_, Pull::Always) | (None, Pull::Missing) => {
            unless_cancelled(cx, fetch(engine, client, cx, reference, platform)).await?;
            local(client, &name).await?.ok_or_else(|| {
                StepError::unknown(format!("image {name} was pulled, and the engine does not have it"))
                    .with_hint("somebody may have removed it: try again")
            })?
        }
    };
    verify_platform(client, &[platform_of(&image)], &name, platform).await?;
    Ok(image)
}

/// Obtains an image as [`obtain`] does, and leaves every tag of the engine where it is.
///
/// What is pulled is pulled by its digest, so that nobody who starts the image by its tag gets
/// another one before the upgrade says so.
///
/// # Errors
/// As [`obtain`].
pub async fn obtain_aside(
    engine: &Engine,
    client: &Docker,
    cx: &Context,
    reference: &ImageReference,
    platform: Option<&str>,
    pull: Pull,
) -> Result<ImageInspect, StepError> {
    let here = match pull {
        Pull::Never => true,
        Pull::Missing => local(client, &reference.to_string()).await?.is_some(),
        Pull::Always => false,
    };
    if here || reference.digest().is_some() {
        return obtain(engine, client, cx, reference, platform, pull).await;
    }
    let credentials = engine.credentials(cx, reference.registry()).await?;
    let name = reference.to_string();
    let asked = unless_cancelled(cx, async {
        let asked = client.inspect_registry_image(&name, credentials).await;
        Ok(asked.doing(|| format!("asking the registry for image {name}"))?)
    });
    let asked = asked.await?;
    let has = asked.platforms.iter().map(|platform| {
        let part = |part: &Option<String>| part.clone().unwrap_or_default();
        format!("{}/{}", part(&platform.os), part(&platform.architecture))
    });
    let has: Vec<_> = has.filter(|has| has != "/").collect();
    if !has.is_empty() {
        // Before it is pulled for nothing.
        verify_platform(client, &has, &name, platform).await?;
    }
    let digest = asked.descriptor.digest.unwrap_or_default();
    let pinned = format!("{}@{digest}", reference.name()).parse::<ImageReference>().map_err(|error| {
        StepError::permanent(format!("the registry names no digest for image {name}"))
            .with_cause(&error)
            .with_hint("name the image by its digest: NAME@sha256:…")
    })?;
    obtain(engine, client, cx, &pinned, platform, Pull::Always).await
}

/// Says at once that an image cannot run here, instead of when it was started in the old one's place.
pub(crate) async fn verify_platform(
    client: &Docker,
    has: &[String],
    name: &str,
    wanted: Option<&str>,
) -> Result<(), StepError> {
    let wanted = match wanted {
        Some(wanted) => wanted.to_owned(),
        None => {
            let version = client.version().await.doing(|| "asking the engine for its platform".into())?;
            format!("{}/{}", version.os.unwrap_or_default(), version.arch.unwrap_or_default())
        }
    };
    let start = |platform: &str| platform.splitn(3, '/').take(2).map(str::to_owned).collect::<Vec<_>>();
    if has.iter().any(|has| start(has) == start(&wanted)) {
        return Ok(());
    }
    let has = has.join(", ");
    Err(StepError::permanent(format!("image {name} is for {has}, and {wanted} is needed")).with_hint(
        "build and push the image for this platform as well (`docker buildx build --platform`), or name its `platform` if the engine emulates it",
    ))
}

/// Pulls an image, with progress.
async fn fetch(
    engine: &Engine,
    client: &Docker,
    cx: &Context,
    reference: &ImageReference,
    platform: Option<&str>,
) -> Result<(), StepError> {
    let credentials = engine.credentials(cx, reference.registry()).await?;
    let mut options = CreateImageOptionsBuilder::new();
    options = match reference.digest() {
        Some(digest) => options.from_image(&format!("{}@{digest}", reference.name())),
        None => options.from_image(&reference.name()).tag(reference.tag().unwrap_or("latest")),
    };
    if let Some(platform) = platform {
        options = options.platform(platform);
    }
    let doing = || format!("pulling image {reference}");
    let mut pulling = client.create_image(Some(options.build()), None, credentials);
    // By layer: how much of it has come, of how much.
    let mut layers: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    while let Some(event) = pulling.next().await {
        let event = event.doing(doing)?;
        let unsigned = |count: Option<i64>| count.and_then(|count| u64::try_from(count).ok());
        if let (Some(layer), Some(detail)) = (event.id, event.progress_detail)
            && let (Some(done), Some(total)) = (unsigned(detail.current), unsigned(detail.total))
            && event.status.as_deref() == Some("Downloading")
        {
            layers.insert(layer, (done, total));
            let (done, total) = layers.values().fold((0, 0), |sum, layer| (sum.0 + layer.0, sum.1 + layer.1));
            cx.progress(done, total, doing());
        }
    }
    Ok(())
}

/// Keeps an image from being pruned, under a tag of the run's own. A second call changes nothing.
///
/// # Errors
/// The image is gone, or the engine cannot be asked.
pub async fn keep(client: &Docker, cx: &Context, image_id: &str) -> Result<(), DockerError> {
    let (name, tag) = kept_image(image_id, cx);
    let options = TagImageOptionsBuilder::new().repo(&name).tag(&tag).build();
    client.tag_image(image_id, Some(options)).await.doing(|| format!("keeping image {image_id}"))
}

/// Lists the ids of the images that this step keeps.
///
/// # Errors
/// The engine cannot be asked.
pub async fn kept(client: &Docker, cx: &Context) -> Result<Vec<String>, DockerError> {
    let (name, tag) = kept_image("*", cx);
    let filters = HashMap::from([("reference".to_owned(), vec![format!("{name}:{tag}")])]);
    let options = ListImagesOptionsBuilder::new().filters(&filters).build();
    let found = client.list_images(Some(options)).await.doing(|| "asking which images are kept".into())?;
    Ok(found.into_iter().map(|image| image.id).collect())
}

/// Lists what [`kept`] does, the newest first: an image before those that it was built from, which
/// the engine does not remove while it has it.
///
/// # Errors
/// The engine cannot be asked.
pub(crate) async fn kept_newest_first(client: &Docker, cx: &Context) -> Result<Vec<String>, DockerError> {
    let mut all = Vec::new();
    for id in kept(client, cx).await? {
        let created = local(client, &id).await?.and_then(|image| image.created?.parse::<jiff::Timestamp>().ok());
        all.push((std::cmp::Reverse(created), id));
    }
    all.sort();
    Ok(all.into_iter().map(|(_, id)| id).collect())
}

/// Takes the tag away that [`keep`] gave, and leaves the image itself even if it has no other name.
///
/// An engine removes an image with its last name: the name is moved to `other` before it is taken away.
///
/// # Errors
/// The engine cannot be asked.
pub(crate) async fn forget(client: &Docker, cx: &Context, image_id: &str, other: &str) -> Result<(), DockerError> {
    let (name, tag) = kept_image(image_id, cx);
    let options = TagImageOptionsBuilder::new().repo(&name).tag(&tag).build();
    client.tag_image(other, Some(options)).await.doing(|| format!("letting go of image {image_id}"))?;
    let_go(client, cx, image_id).await
}

/// Takes a name away from an image, and removes the image with its last one. What does not exist,
/// or is used, is left alone; with `keep_parents`, so are nameless images that it was built from.
///
/// # Errors
/// The engine cannot be asked.
pub(crate) async fn remove(client: &Docker, name: &str, keep_parents: bool) -> Result<(), DockerError> {
    let options = RemoveImageOptionsBuilder::new().noprune(keep_parents).build();
    let removed = client.remove_image(name, Some(options), None).await.doing(|| format!("removing image {name}"));
    match found(removed) {
        // A container is made of it: it is not ours to take away.
        Err(error) if error.is_in_conflict() => Ok(()),
        removed => removed.map(drop),
    }
}

/// Takes the tag away that [`keep`] gave. A second call finds nothing to do.
///
/// Where it is an image's last name and a stopped container is of that image, the tag stays: without
/// it, the engine would remove the image under the container.
///
/// # Errors
/// The engine cannot be asked.
pub async fn let_go(client: &Docker, cx: &Context, image_id: &str) -> Result<(), DockerError> {
    let (name, tag) = kept_image(image_id, cx);
    let remove = async |force: bool| {
        let options = RemoveImageOptionsBuilder::new().noprune(true).force(force).build();
        let removed = client.remove_image(&format!("{name}:{tag}"), Some(options), None).await;
        found(removed.doing(|| format!("letting go of image {image_id}"))).map(|_| ())
    };
    match remove(false).await {
        Err(error) if error.is_in_conflict() => {}
        done => return done,
    }
    // "container … is using its referenced image": by force, the engine takes the name away and leaves
    // the image to a container that runs.
    let filters = HashMap::from([("ancestor".to_owned(), vec![image_id.to_owned()])]);
    let options = ListContainersOptionsBuilder::new().filters(&filters).build();
    let running = client.list_containers(Some(options)).await.doing(|| format!("asking who uses image {image_id}"))?;
    if running.is_empty() {
        tracing::warn!(image = image_id, "its tag {name}:{tag} stays: a stopped container has no other name for it");
        return Ok(());
    }
    remove(true).await
}

/// Takes the tag away that [`keep`] gave, of an image that may have no other name and be in use.
///
/// An engine refuses to take the last name of an image that a container uses. The name is moved to
/// `other` then, which leaves the image as nameless as it was, and is taken from that one.
///
/// # Errors
/// The engine cannot be asked.
pub async fn release(client: &Docker, cx: &Context, image_id: &str, other: &str) -> Result<(), DockerError> {
    match let_go(client, cx, image_id).await {
        Err(error) if error.is_in_conflict() && other != image_id => {}
        // Nothing to move it to: a name more does no harm.
        Err(error) if error.is_in_conflict() => return Ok(()),
        done => return done,
    }
    let (name, tag) = kept_image(image_id, cx);
    let options = TagImageOptionsBuilder::new().repo(&name).tag(&tag).build();
    match found(client.tag_image(other, Some(options)).await.doing(|| format!("letting go of image {image_id}")))? {
        Some(()) => let_go(client, cx, image_id).await,
        None => Ok(()),
    }
}
