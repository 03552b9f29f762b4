//! An image from an archive: looked into before the engine is given it, and loaded without a name.

use std::path::Path;
use std::time::Duration;

use bollard::query_parameters::ImportImageOptionsBuilder;
use bollard::{Docker, body_try_stream};
use futures_util::StreamExt as _;
use serde::{Deserialize, Serialize};
use upgrade_core::context::{Context, blocking};
use upgrade_core::error::StepError;

use super::config::{ImageConfig, LoadConfig};
use crate::error::{DockerError, Doing, cancelled};
use crate::image_archive::{self, Packed};
use crate::images::{self, id_of};
use crate::streams;

/// What a load may take; it is ended by cancelling, not by the clock.
const LOADING: Duration = Duration::from_secs(7 * 86_400);

/// Holds what was found in an archive, by which undo knows the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loaded {
    /// SHA-256 of the archive.
    pub sha256: String,
    /// The digest of the image's configuration.
    pub image_id: String,
}

/// Reads the archive and makes sure that it is the one that is meant.
///
/// # Errors
/// It is damaged, has another digest, or not the image.
pub(super) async fn look(
    client: &Docker,
    cx: &Context,
    config: &ImageConfig,
    load: &LoadConfig,
    archive: &Path,
) -> Result<(Loaded, Packed), StepError> {
    let (path, context) = (archive.to_owned(), cx.clone());
    let found = blocking(move || image_archive::inspect(&path, &context)).await?;
    let wanted = load.sha256.as_ref().map(|digest| digest.to_ascii_lowercase());
    if wanted.as_ref().is_some_and(|wanted| *wanted != found.sha256) {
        let wanted = wanted.unwrap_or_default();
        return Err(StepError::permanent(format!(
            "{} has the SHA-256 {}, and {wanted} is needed",
            archive.display(),
            found.sha256
        ))
        .with_hint("fetch it again, or correct `load.sha256`"));
    }
    let packed = found.choose(load.name.as_ref(), &config.image)?.clone();
    images::verify_platform(
        client,
        std::slice::from_ref(&packed.platform),
        &config.image.to_string(),
        config.platform.as_deref(),
    )
    .await?;
    Ok((Loaded { sha256: found.sha256, image_id: packed.id.clone() }, packed))
}

/// Loads the image that was found in the archive; returns its id.
///
/// # Errors
/// The archive is another one by now; the engine refuses it.
pub(super) async fn load(
    client: &Docker,
    cx: &Context,
    config: &ImageConfig,
    load: &LoadConfig,
    archive: &Path,
    found: &Loaded,
) -> Result<String, StepError> {
    if let Some(image) = images::local(client, &found.image_id).await? {
        return id_of(&image);
    }
    let (now, packed) = look(client, cx, config, load, archive).await?;
    if now != *found {
        return Err(StepError::permanent(format!("{} changed after the step was prepared", archive.display()))
            .with_hint("let nothing write to it meanwhile, then run again"));
    }
    let (path, context) = (archive.to_owned(), cx.clone());
    let (feeding, body) = streams::feed(move |to| image_archive::send_nameless(&path, &packed, to, &context));
    let body = body_try_stream(body.map(|piece| piece.map(Into::into)));
    let patient = client.clone().with_timeout(LOADING);
    let doing = || format!("loading image {} from {}", config.image, archive.display());
    let loading = async {
        let mut events = patient.import_image(ImportImageOptionsBuilder::new().quiet(true).build(), body, None);
        let mut said = String::new();
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = cx.cancelled().cancelled() => return Err(cancelled()),
            };
            let Some(event) = event else { return Ok(said) };
            let event = event.doing(doing)?;
            said.push_str(event.stream.as_deref().unwrap_or_default());
        }
    };
    let (answered, fed) = tokio::join!(loading, feeding);
    let (said, ()) = streams::joined(answered, fed)?;
    // An engine that leaves its images to containerd knows them by another digest.
    let named = said.lines().find_map(|line| line.strip_prefix("Loaded image ID: ")).map(str::trim);
    for id in [named, Some(found.image_id.as_str())].into_iter().flatten() {
        if let Some(image) = images::local(client, id).await? {
            return id_of(&image);
        }
    }
    Err(StepError::unknown(format!("the archive was loaded, and the engine does not have its image: {}", said.trim()))
        .with_hint("somebody may have pruned it: try again"))
}

/// Removes an image that has no name, nor a container. A second call finds nothing to do.
///
/// # Errors
/// The engine cannot be asked.
pub(super) async fn remove_nameless(client: &Docker, id: &str) -> Result<(), DockerError> {
    match images::local(client, id).await? {
        Some(image) if image.repo_tags.as_ref().is_none_or(Vec::is_empty) => images::remove(client, id, false).await,
        _ => Ok(()),
    }
}
