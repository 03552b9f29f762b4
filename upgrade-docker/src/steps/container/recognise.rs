//! Whose a container is whose id nobody kept.

use bollard::Docker;
use bollard::models::ContainerInspectResponse;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use super::forward::{specification, unsealed};
use super::situation::{Situation, Stage};
use super::{Container, ContainerUndo};
use crate::containers::id_of;
use crate::specification::{Changes, Specification};
use crate::verbatim;

impl Container {
    /// Says whose the container in place is when somebody removed the old one, and with it the name
    /// that holds the new one's id: one with every setting that was found is the old one, made again;
    /// one with every setting that is intended is the new one.
    pub(super) async fn recognise(
        &self,
        client: &Docker,
        cx: &Context,
        undo: &ContainerUndo,
        at: &mut Situation,
    ) -> Result<(), StepError> {
        if at.old.is_some() {
            return Ok(());
        }
        let Some(foreign) = &at.foreign else { return Ok(()) };
        let image = foreign.image.clone().unwrap_or_default();
        let found = unsealed(cx, undo).await?;
        if image == undo.found.image_id {
            let wanted = specification(client, &found, &image, &Changes::default()).await?;
            if has(client, foreign, &wanted).await? {
                at.old = at.foreign.take();
                return Ok(());
            }
        }
        if image == undo.intended.image_id && at.new.is_none() {
            // The way back must not hang on a secret that is gone.
            let Ok(changes) = self.config.changes(cx, &undo.intended.image).await else { return Ok(()) };
            let wanted = specification(client, &found, &image, &changes).await?;
            if has(client, foreign, &wanted).await? {
                at.new = at.foreign.take().map(|new| (Stage::InPlace, new));
            }
        }
        Ok(())
    }
}

async fn has(client: &Docker, container: &ContainerInspectResponse, wanted: &Specification) -> Result<bool, StepError> {
    let Some(present) = verbatim::inspect(client, id_of(container)).await? else { return Ok(false) };
    let image = container.image.clone().unwrap_or_default();
    let present = specification(client, &present, &image, &Changes::default()).await?;
    Ok(present.differences(wanted).is_empty())
}
