//! `docker.container`: replaces a container by one from another image, everything else the same.
//!
//! The next container is made beside the old one, so that the service stands still only for a stop,
//! two renames and a start. Every stage shows in names, which outlive a crash of the engine; the old
//! container's name then holds the id of the new one, so no crash leaves a doubt whose is whose.
//!
//! ```text
//!              found     made             complete        aside             in place           committed
//! NAME         old       old              old: stopping   –                 new: starting      new
//! …incoming-M  –         new, unfinished  –               –                 –                  –
//! …next-M      –         –                new             new               –                  –
//! …kept-M-ID   –         –                –               old, restart no   old, restart no    –
//! ```

mod back;
mod config;
mod forward;
mod itself;
mod plan;
mod recognise;
mod situation;

use std::sync::Arc;

use async_trait::async_trait;
use bollard::Docker;
use bollard::models::{ContainerUpdateBody, RestartPolicy};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::sealed::SealedRef;
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::target::Target;

pub use config::ContainerConfig;

use crate::error::{DockerError, Doing};
use crate::images;
use crate::moved_tag::MovedTag;
use crate::target::Engine;

/// Replaces a container by one from another image, everything else the same.
#[derive(Debug, Clone)]
pub struct Container {
    config: ContainerConfig,
    engine: Arc<Engine>,
}

/// Holds what undoing needs; the container's settings, which may be secret, are sealed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerUndo {
    name: String,
    found: Found,
    intended: Intended,
    /// The tag that comes to name the next image, where it did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tag: Option<MovedTag>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Found {
    id: String,
    image: String,
    image_id: String,
    running: bool,
    restart: Restart,
    inspect: SealedRef,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Restart {
    name: String,
    #[serde(default)]
    maximum_retry_count: i64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Intended {
    image: String,
    image_id: String,
    /// Whether the engine got the image only for this.
    pulled: bool,
}

/// Tells which container serves now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerOutput {
    /// Its id.
    pub id: String,
    /// Its image, as it was named.
    pub image: String,
    /// The id of its image.
    pub image_id: String,
}

impl Container {
    /// Makes the step from its configuration.
    ///
    /// # Errors
    /// There is no such target, or a key is wrong.
    pub fn from_config(config: ContainerConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        config.validate()?;
        let engine = Engine::named(config.target.as_deref(), cx)?;
        Ok(Self { config, engine })
    }
}

impl Restart {
    fn policy(&self) -> RestartPolicy {
        RestartPolicy { name: self.name.parse().ok(), maximum_retry_count: Some(self.maximum_retry_count) }
    }

    /// What the engine does not start again by itself.
    fn never() -> Self {
        Self { name: "no".into(), maximum_retry_count: 0 }
    }

    /// Gives it to a container. A second call changes nothing.
    async fn give(&self, client: &Docker, id: &str, name: &str) -> Result<(), DockerError> {
        let update = ContainerUpdateBody { restart_policy: Some(self.policy()), ..ContainerUpdateBody::default() };
        let doing = || format!("setting the restart policy of container {name} to `{}`", self.name);
        client.update_container(id, update).await.doing(doing).map(|_| ())
    }
}

impl ContainerUndo {
    /// The images that are kept from being pruned until the run is over.
    fn images(&self) -> impl Iterator<Item = &str> {
        let Self { found, intended, tag, .. } = self;
        // An image that both have is kept by whichever of them is there.
        let other = found.image_id != intended.image_id;
        let tagged = tag.as_ref().and_then(|tag| tag.found.as_deref());
        let tagged = tagged.filter(|id| *id != found.image_id && *id != intended.image_id);
        let both = [found.image_id.as_str(), intended.image_id.as_str()].into_iter().filter(move |_| other);
        tagged.into_iter().chain(both)
    }

    /// Lets the images go; those that were pulled for nothing are removed.
    async fn release_images(&self, client: &Docker, cx: &Context, back: bool) -> Result<(), DockerError> {
        for image in self.images() {
            let other = if image == self.intended.image_id { &self.found.image_id } else { &self.intended.image_id };
            images::release(client, cx, image, other).await?;
        }
        if back && self.intended.pulled {
            images::remove(client, &self.intended.image_id, false).await?;
        }
        Ok(())
    }
}

#[async_trait]
impl Step for Container {
    const KIND: &'static str = "docker.container";
    type Undo = ContainerUndo;
    type Output = ContainerOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<ContainerUndo, ContainerOutput>, StepError> {
        Box::pin(self.plan(cx)).await
    }

    async fn apply(&self, cx: &Context, undo: &ContainerUndo) -> Result<ContainerOutput, StepError> {
        Box::pin(self.replace(cx, undo)).await
    }

    async fn settle(&self, cx: &Context, undo: &ContainerUndo) -> Result<(), StepError> {
        Box::pin(self.wait_out(cx, undo)).await
    }

    async fn commit(&self, cx: &Context, undo: &ContainerUndo) -> Result<(), StepError> {
        self.forget(cx, undo).await
    }

    fn definition(&self) -> Value {
        let mut definition = serde_json::to_value(&self.config).unwrap_or_default();
        if let Some(gate) = definition.get_mut("health").and_then(Value::as_object_mut) {
            gate.retain(|key, _| !matches!(key.as_str(), "within" | "stable" | "every"));
        }
        definition
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![self.engine.resource("container", &self.config.name)]
    }
}

#[async_trait]
impl Rollback for Container {
    async fn rollback(
        &self,
        cx: &Context,
        undo: &ContainerUndo,
        output: Option<&ContainerOutput>,
    ) -> Result<(), StepError> {
        Box::pin(self.put_back(cx, undo, output)).await
    }
}
