//! Named volumes: read and written through the engine's archive API, never by a path of the
//! machine that the engine runs on, which may be another one.

pub(crate) mod archive;
pub(crate) mod consumers;
pub(crate) mod contents;
pub(crate) mod helper;
pub(crate) mod members;
pub(crate) mod storage;

use bollard::Docker;
use bollard::models::Volume;
use bollard::query_parameters::RemoveVolumeOptionsBuilder;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::registry::BuildError;

use crate::error::{DockerError, Doing, found};
use crate::naming::{MARKER, mark};

/// Looks a volume up.
pub(crate) async fn inspect(client: &Docker, name: &str) -> Result<Option<Volume>, DockerError> {
    found(client.inspect_volume(name).await.doing(|| format!("looking at volume {name}")))
}

/// Removes a volume. One that does not exist is left alone.
pub(crate) async fn remove(client: &Docker, name: &str) -> Result<(), DockerError> {
    let options = RemoveVolumeOptionsBuilder::new().force(false).build();
    let removed = client.remove_volume(name, Some(options)).await;
    found(removed.doing(|| format!("removing volume {name}"))).map(|_| ())
}

/// Removes a volume that is the step's own; one of somebody else's under that name stays.
pub(crate) async fn remove_own(client: &Docker, cx: &Context, name: &str) -> Result<(), StepError> {
    match inspect(client, name).await? {
        Some(volume) if volume.labels.get(MARKER) == Some(&cx.marker()) => Ok(remove(client, name).await?),
        Some(_) => Err(StepError::permanent(format!("volume {name} is there and is not this run's"))
            .with_hint("look at it with `docker volume inspect` and remove or copy it away")),
        None => Ok(()),
    }
}

/// Names what a step makes beside a volume: `data.copy-0123456789ab`.
pub(crate) fn beside(volume: &str, what: &str, cx: &Context) -> String {
    format!("{volume}.{what}-{}", mark(cx))
}

/// Refuses what is not the name of a volume: a path would be a directory of the engine's machine.
pub(crate) fn check_name(name: &str) -> Result<(), BuildError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    if name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric()) && name.bytes().all(plain) {
        return Ok(());
    }
    Err(BuildError::new(format!("`{name}` is not the name of a volume"))
        .at("volume")
        .with_hint("`docker volume ls` lists them; for a directory of this machine there is `host.backup`"))
}
