//! The image of the new container: pulled aside, named when it is used, unnamed again by undo.

use std::collections::BTreeSet;

use bollard::Docker;
use bollard::models::ImageInspect;
use bollard::query_parameters::ListImagesOptionsBuilder;
use serde::{Deserialize, Serialize};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use super::BlueGreen;
use crate::error::{DockerError, Doing};
use crate::images::{self, id_of};
use crate::moved_tag::MovedTag;
use crate::reference::ImageReference;

/// Holds what undoing needs to know of the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ImageUndo {
    reference: ImageReference,
    pub(super) id: String,
    /// Whether its name leads elsewhere, or nowhere, until the new container is made.
    moves: bool,
    /// The image that its name led to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    found: Option<String>,
    /// Whether the engine got it only for this.
    pulled: bool,
}

impl BlueGreen {
    /// Obtains the image while everything runs on; none in a dry run that would pull it.
    pub(super) async fn image(
        &self,
        client: &Docker,
        cx: &Context,
    ) -> Result<(ImageUndo, Option<ImageInspect>), StepError> {
        let reference = self.config.image.clone();
        let before = images::local(client, &reference.to_string()).await?;
        let named = before.as_ref().map(id_of).transpose()?;
        let undo = |id: String, pulled| {
            let moves = reference.digest().is_none() && named.as_ref() != Some(&id);
            ImageUndo { reference: reference.clone(), id, moves, found: named.clone().filter(|_| moves), pulled }
        };
        if cx.is_dry_run() {
            return Ok((undo(named.clone().unwrap_or_default(), before.is_none()), before));
        }
        let all = client.list_images(Some(ListImagesOptionsBuilder::new().all(true).build())).await;
        let known: BTreeSet<_> = all.doing(|| "listing images".into())?.into_iter().map(|image| image.id).collect();
        let platform = self.config.platform.as_deref();
        let image = images::obtain_aside(&self.engine, client, cx, &reference, platform, self.config.pull).await?;
        let id = id_of(&image)?;
        let pulled = !known.contains(&id);
        Ok((undo(id, pulled), Some(image)))
    }
}

impl ImageUndo {
    /// Lets the name lead to the image, from which the new container is then made.
    pub(super) async fn name(&self, client: &Docker, cx: &Context) -> Result<(), DockerError> {
        let Some(tag) = self.tag() else { return Ok(()) };
        if let Some(other) = &self.found {
            // Without a name it could be pruned.
            images::keep(client, cx, other).await?;
        }
        tag.give(client, &self.id).await
    }

    /// Lets the name lead where it led, unless somebody moved it on, and removes what was pulled.
    pub(super) async fn take_back(&self, client: &Docker, cx: &Context) -> Result<(), DockerError> {
        if let Some(tag) = self.tag() {
            tag.put_back(client, &self.id).await?;
        }
        self.forget(client, cx).await?;
        if self.pulled { images::remove(client, &self.id, false).await } else { Ok(()) }
    }

    /// Lets go of the image that the name led to.
    pub(super) async fn forget(&self, client: &Docker, cx: &Context) -> Result<(), DockerError> {
        match &self.found {
            Some(found) => images::release(client, cx, found, &self.id).await,
            None => Ok(()),
        }
    }

    fn tag(&self) -> Option<MovedTag> {
        self.moves.then(|| MovedTag { reference: self.reference.clone(), found: self.found.clone() })
    }
}
