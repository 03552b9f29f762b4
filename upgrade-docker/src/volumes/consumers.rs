//! The containers that use a volume, kept from writing to it for a while.

use std::collections::{BTreeSet, HashMap};

use bollard::Docker;
use bollard::models::{ContainerInspectResponse, ContainerSummary};
use bollard::query_parameters::ListContainersOptionsBuilder;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use crate::containers;
use crate::error::{Doing, found, not_cancelled};
use crate::naming::MARKER;

/// Says what becomes of the running containers that use a volume, while it is worked on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Consumers {
    /// They go on.
    Leave,
    /// They are frozen, and go on where they were.
    Pause,
    /// They are stopped, and started again.
    Stop,
}

/// Names a container that uses a volume and ran when the step was prepared.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Consumer {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
}

async fn list(client: &Docker, volume: &str) -> Result<Vec<ContainerSummary>, StepError> {
    let filters = HashMap::from([("volume".to_owned(), vec![volume.to_owned()])]);
    let options = ListContainersOptionsBuilder::new().all(true).filters(&filters).build();
    let listed = client.list_containers(Some(options)).await;
    let mut listed = listed.doing(|| format!("looking for the containers that use volume {volume}"))?;
    let helper = |container: &ContainerSummary| container.labels.as_ref().is_some_and(|all| all.contains_key(MARKER));
    listed.retain(|container| !helper(container));
    listed.sort_by(|a, b| a.names.cmp(&b.names));
    Ok(listed)
}

/// Returns the image of a container that uses a volume, if there is one.
pub(crate) async fn image(client: &Docker, volume: &str) -> Result<Option<String>, StepError> {
    Ok(list(client, volume).await?.into_iter().find_map(|container| container.image_id))
}

/// Lists the containers that use a volume, run, and are not paused.
pub(crate) async fn running(client: &Docker, volume: &str) -> Result<Vec<Consumer>, StepError> {
    let mut running = Vec::new();
    for container in list(client, volume).await? {
        let id = container.id.unwrap_or_default();
        let Some(inspected) = containers::inspect(client, &id).await? else { continue };
        if containers::is_running(&inspected) && !is_paused(&inspected) {
            running.push(Consumer { name: containers::name_of(&inspected).to_owned(), id });
        }
    }
    Ok(running)
}

/// Lists them for a step that is to be prepared, and refuses what would not come back.
pub(crate) async fn prepare(client: &Docker, mode: Consumers, volume: &str) -> Result<Vec<Consumer>, StepError> {
    if mode == Consumers::Leave {
        return Ok(Vec::new());
    }
    let running = running(client, volume).await?;
    for consumer in running.iter().filter(|_| mode == Consumers::Stop) {
        let inspected = containers::inspect(client, &consumer.id).await?;
        if inspected.and_then(|found| found.host_config?.auto_remove) == Some(true) {
            return Err(StepError::permanent(format!("container {} is removed when it stops (`--rm`)", consumer.name))
                .with_hint("pause it instead (`consumers: pause`), or run it without --rm"));
        }
    }
    Ok(running)
}

fn is_paused(container: &ContainerInspectResponse) -> bool {
    container.state.as_ref().and_then(|state| state.paused).unwrap_or(false)
}

/// Keeps everything that runs on a volume from writing to it; returns who is to come back.
///
/// `known` are those that the undo record names. Others that began to use the volume since are
/// made durable before anything happens to them.
pub(crate) async fn quiet(
    client: &Docker,
    cx: &Context,
    mode: Consumers,
    volume: &str,
    known: &[Consumer],
) -> Result<Vec<Consumer>, StepError> {
    let mut all = returning(cx, known)?;
    if mode == Consumers::Leave {
        return Ok(Vec::new());
    }
    let running = running(client, volume).await?;
    if running.iter().any(|consumer| !all.contains(consumer)) {
        all.extend(running.iter().cloned());
        cx.checkpoint(&all).await?;
    }
    for consumer in &running {
        not_cancelled(cx)?;
        cx.progress(0, None, format!("letting container {} wait", consumer.name));
        match mode {
            Consumers::Pause => pause(client, consumer).await?,
            _ => stop(client, consumer).await?,
        }
    }
    Ok(all.into_iter().collect())
}

/// Names all that are to come back: those of the undo record, and those that a cut-off call noted.
fn returning(cx: &Context, known: &[Consumer]) -> Result<BTreeSet<Consumer>, StepError> {
    let noted = cx.last_checkpoint::<BTreeSet<Consumer>>()?;
    Ok(noted.unwrap_or_default().into_iter().chain(known.iter().cloned()).collect())
}

/// Lets the consumers go on. One that is gone by now is left out.
///
/// With `again`, a stop may still be under way that a crash cut off: it is awaited, or it would end
/// what was just started.
pub(crate) async fn bring_back(
    client: &Docker,
    cx: &Context,
    mode: Consumers,
    known: &[Consumer],
    again: bool,
) -> Result<(), StepError> {
    if mode == Consumers::Leave {
        return Ok(());
    }
    for consumer in returning(cx, known)? {
        let Some(there) = containers::inspect(client, &consumer.id).await? else {
            tracing::warn!(container = consumer.name, "it used the volume, and is gone");
            continue;
        };
        match mode {
            Consumers::Pause if is_paused(&there) => {
                let doing = || format!("letting container {} go on", consumer.name);
                found(client.unpause_container(&consumer.id).await.doing(doing))?;
            }
            Consumers::Stop => {
                if again {
                    stop(client, &consumer).await?;
                }
                containers::start(client, &consumer.id, &consumer.name).await?;
            }
            _ => {}
        }
    }
    Ok(())
}

async fn stop(client: &Docker, consumer: &Consumer) -> Result<(), StepError> {
    let Some(there) = containers::inspect(client, &consumer.id).await? else { return Ok(()) };
    Ok(containers::stop(client, &consumer.id, &consumer.name, containers::grace_of(&there)).await?)
}

async fn pause(client: &Docker, consumer: &Consumer) -> Result<(), StepError> {
    let paused = client.pause_container(&consumer.id).await.doing(|| format!("pausing container {}", consumer.name));
    match found(paused) {
        // Paused by now, or ended by itself: it does not write.
        Err(error) if error.is_in_conflict() => Ok(()),
        other => Ok(other.map(|_| ())?),
    }
}
