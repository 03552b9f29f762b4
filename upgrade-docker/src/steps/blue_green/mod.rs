//! `docker.blue_green`: a new container beside the old one, tried at its own address, then given the
//! traffic; the old one runs on until commit.
//!
//! ```text
//!          found      made       serving    switched     committed
//! new      –          tried  ──► both   ──► traffic      traffic
//! old      traffic    traffic    both       idle         removed
//!                        ▲          │          │
//!                        └──────────┴──────────┘ undo: traffic back first, then the new one is removed
//! ```

mod beside;
mod config;
mod image;
mod names;
mod program;
mod proxy;
mod replacement;
mod template;

pub use config::{AliasSwitch, BlueGreenConfig, ProxySwitch, Switch};
pub use names::NamesUndo;
pub use proxy::ProxyUndo;

use std::sync::Arc;

use async_trait::async_trait;
use bollard::Docker;
use bollard::models::ContainerInspectResponse;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::time::sleep;
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::leftovers;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::sealed::SealedRef;
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::target::Target;

use crate::containers::{self, id_of, name_of};
use crate::error::{DockerError, not_cancelled, unless_cancelled};
use crate::target::Engine;
use beside::MADE_BY;
use image::ImageUndo;
use proxy::Proxy;

/// How long a request that was sent just before a crash may take to be begun by the engine.
const IN_FLIGHT: std::time::Duration = std::time::Duration::from_millis(200);

/// Replaces a container by a new one beside it, and gives that the traffic without a failed request.
#[derive(Debug, Clone)]
pub struct BlueGreen {
    config: BlueGreenConfig,
    engine: Arc<Engine>,
    proxy: Option<Proxy>,
}

/// Holds what undoing needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlueGreenUndo {
    old: Standing,
    /// The name of the new container.
    new: String,
    /// The image that the new container is made from.
    image: ImageUndo,
    /// How the new container is made; it may hold secrets.
    made: SealedRef,
    switch: SwitchUndo,
}

/// Names a container that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Standing {
    name: String,
    id: String,
}

/// Holds what undoing the switch needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum SwitchUndo {
    Alias(NamesUndo),
    Proxy(ProxyUndo),
}

/// Tells what serves now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlueGreenOutput {
    /// The name of the container that has the traffic.
    pub container: String,
    /// Its id.
    pub id: String,
    /// The id of its image.
    pub image: String,
    /// The name of the container that had the traffic; none if nothing was to be done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaced: Option<String>,
}

impl BlueGreen {
    /// Makes the step from its configuration.
    ///
    /// # Errors
    /// The target is not an engine, or the configuration contradicts itself.
    pub fn from_config(config: BlueGreenConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        config.validate()?;
        let engine = Engine::named(config.target.as_deref(), cx)?;
        let proxy = match &config.switch {
            Switch::Proxy(proxy) => Some(Proxy::new(proxy, cx)),
            Switch::Alias(_) => None,
        };
        Ok(Self { config, engine, proxy })
    }

    /// Finds the old container: the one that was found, whatever its name is by now.
    async fn old(
        &self,
        client: &Docker,
        cx: &Context,
        undo: &BlueGreenUndo,
    ) -> Result<Option<ContainerInspectResponse>, StepError> {
        let by_id = containers::inspect(client, &undo.old.id).await?;
        let other = by_name(client, &undo.old.name).await?.filter(|other| id_of(other) != undo.old.id);
        if (by_id.is_none() || other.is_some()) && cx.on_conflict() == OnConflict::Stop {
            return Err(StepError::conflict(Conflict {
                subject: format!("container {}", undo.old.name),
                found: undo.old.id.clone(),
                intended: undo.old.id.clone(),
                present: other.as_ref().map_or("absent", id_of).to_owned(),
            }));
        }
        Ok(by_id)
    }

    /// Finds the new container, if it is the one of this step.
    async fn new_one(
        &self,
        client: &Docker,
        cx: &Context,
        undo: &BlueGreenUndo,
    ) -> Result<Option<ContainerInspectResponse>, StepError> {
        let Some(found) = by_name(client, &undo.new).await? else { return Ok(None) };
        if is_ours(&found, cx) {
            return Ok(Some(found));
        }
        if cx.on_conflict() == OnConflict::Stop {
            return Err(StepError::conflict(Conflict {
                subject: format!("container {}", undo.new),
                found: "absent".into(),
                intended: format!("one of image {}", undo.image.id),
                present: id_of(&found).to_owned(),
            }));
        }
        containers::remove(client, id_of(&found), &undo.new, false).await?;
        Ok(None)
    }

    async fn drained(&self, cx: &Context, name: &str) -> Result<(), StepError> {
        cx.progress(0, None, format!("requests under way in container {name} may end within {}", self.config.drain));
        unless_cancelled(cx, async {
            sleep(self.config.drain.0).await;
            Ok(())
        })
        .await
    }
}

/// Looks a container up by its name alone, where the engine would take an id as well.
async fn by_name(client: &Docker, name: &str) -> Result<Option<ContainerInspectResponse>, DockerError> {
    Ok(containers::inspect(client, name).await?.filter(|container| name_of(container) == name))
}

fn is_ours(container: &ContainerInspectResponse, cx: &Context) -> bool {
    let labels = container.config.as_ref().and_then(|config| config.labels.as_ref());
    labels.and_then(|labels| labels.get(MADE_BY)) == Some(&cx.marker())
}

#[async_trait]
impl Step for BlueGreen {
    const KIND: &'static str = "docker.blue_green";
    type Undo = BlueGreenUndo;
    type Output = BlueGreenOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<BlueGreenUndo, BlueGreenOutput>, StepError> {
        let client = self.engine.connect(cx).await?;
        self.look(&client, cx).await
    }

    async fn apply(&self, cx: &Context, undo: &BlueGreenUndo) -> Result<BlueGreenOutput, StepError> {
        let client = self.engine.connect(cx).await?;
        let old = self.old(&client, cx, undo).await?;
        let new = Box::pin(self.bring_up(&client, cx, undo)).await?;
        not_cancelled(cx)?;
        match (&undo.switch, &self.proxy) {
            (SwitchUndo::Alias(names), _) => {
                names.give(&client, id_of(&new)).await?;
                // From here on it has traffic, at another address and perhaps cut off from what it needs.
                self.config.health.wait(&client, cx, id_of(&new), &undo.new).await?;
                not_cancelled(cx)?;
                if let Some(old) = &old {
                    names.take(&client, id_of(old)).await?;
                }
            }
            (SwitchUndo::Proxy(file), Some(proxy)) => proxy.switch(&client, cx, file, &new).await?,
            (SwitchUndo::Proxy(_), None) => return Err(another_definition()),
        }
        self.drained(cx, &undo.old.name).await?;
        Ok(BlueGreenOutput {
            container: undo.new.clone(),
            id: id_of(&new).to_owned(),
            image: undo.image.id.clone(),
            replaced: Some(undo.old.name.clone()),
        })
    }

    async fn settle(&self, cx: &Context, _undo: &BlueGreenUndo) -> Result<(), StepError> {
        // A request that the engine has begun is waited out by the next look at the same container,
        // which it holds a lock on.
        sleep(IN_FLIGHT).await;
        leftovers::end(cx).await
    }

    async fn commit(&self, cx: &Context, undo: &BlueGreenUndo) -> Result<(), StepError> {
        let client = self.engine.connect(cx).await?;
        if let Some(old) = containers::inspect(&client, &undo.old.id).await? {
            containers::stop(&client, &undo.old.id, &undo.old.name, containers::grace_of(&old)).await?;
            containers::remove(&client, &undo.old.id, &undo.old.name, false).await?;
        }
        Ok(undo.image.forget(&client, cx).await?)
    }

    fn definition(&self) -> Value {
        let mut definition = serde_json::to_value(&self.config).unwrap_or_default();
        // How long things may take makes it no other step.
        for (place, keys) in [("", &["drain"][..]), ("/health", &["within", "stable", "every"])] {
            if let Some(map) = definition.pointer_mut(place).and_then(Value::as_object_mut) {
                map.retain(|key, _| !keys.contains(&key.as_str()));
            }
        }
        definition
    }

    fn inputs(&self) -> Vec<std::path::PathBuf> {
        self.proxy.iter().filter_map(|proxy| proxy.template_file.clone()).collect()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        let mut targets = vec![self.engine.resource("container", &self.config.container)];
        targets.extend(self.proxy.as_ref().map(Proxy::target));
        targets
    }
}

#[async_trait]
impl Rollback for BlueGreen {
    async fn rollback(
        &self,
        cx: &Context,
        undo: &BlueGreenUndo,
        _output: Option<&BlueGreenOutput>,
    ) -> Result<(), StepError> {
        let client = self.engine.connect(cx).await?;
        let old = self.old(&client, cx, undo).await?;
        let new = self.new_one(&client, cx, undo).await?;
        if let Some(old) = &old
            && !containers::is_running(old)
        {
            // It never stopped, unless the machine or somebody else did that.
            containers::start(&client, id_of(old), &undo.old.name).await?;
            self.config.health.wait(&client, cx, id_of(old), &undo.old.name).await?;
        }
        let had_traffic = match (&undo.switch, &self.proxy) {
            (SwitchUndo::Alias(names), _) => {
                if let Some(old) = &old {
                    names.give_back(&client, id_of(old), &undo.old.name).await?;
                }
                match &new {
                    Some(new) => names.take_back(&client, new).await?,
                    None => false,
                }
            }
            (SwitchUndo::Proxy(file), Some(proxy)) => proxy.switch_back(&client, cx, file, &undo.new).await?,
            (SwitchUndo::Proxy(_), None) => return Err(another_definition()),
        };
        if let Some(new) = new {
            if had_traffic {
                self.drained(cx, &undo.new).await?;
            }
            containers::stop(&client, id_of(&new), &undo.new, containers::grace_of(&new)).await?;
            containers::remove(&client, id_of(&new), &undo.new, true).await?;
        }
        Ok(undo.image.take_back(&client, cx).await?)
    }
}

fn another_definition() -> StepError {
    StepError::permanent("the run switched by a proxy, and this step has none")
        .with_hint("resume with the pipeline that the run was started with")
}
