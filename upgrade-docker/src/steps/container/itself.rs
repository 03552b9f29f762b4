//! A run inside the container that it replaces.

use bollard::Docker;
use bollard::models::ContainerInspectResponse;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use super::Container;
use crate::containers::{id_of, inspect};
use crate::handover::own_container;

impl Container {
    /// Refuses a run that would end with the container that it replaces.
    pub(super) async fn must_outlive(&self, client: &Docker, id: &str) -> Result<(), StepError> {
        if own_container().as_deref() != Some(id) {
            return Ok(());
        }
        let name = &self.config.name;
        let handover = self.config.handover.as_ref().ok_or_else(|| {
            StepError::permanent(format!("this run is inside container {name}, which it replaces: it would end with it"))
                .with_hint("say how it goes on: `handover: { state: /state, command: [upgrade, --state-dir, /state, resume, --wait, 5m, RUN] }`")
        })?;
        match inspect(client, id).await? {
            Some(container) => handover.check(&container),
            None => Ok(()),
        }
    }

    /// Sees to it that the run goes on when `container`, which is about to be stopped, is the one
    /// around it.
    pub(super) async fn hand_over(
        &self,
        client: &Docker,
        cx: &Context,
        container: &ContainerInspectResponse,
    ) -> Result<(), StepError> {
        match &self.config.handover {
            Some(handover) if own_container().as_deref() == Some(id_of(container)) => {
                cx.progress(2, 4, "handing the run over to a helper: this container is stopped");
                handover.prepare(client, cx, container).await
            }
            _ => Ok(()),
        }
    }
}
