//! The way back: the old container, with its name, its restart policy, running as it was found.

use std::time::Duration;

use bollard::Docker;
use bollard::models::ContainerInspectResponse;
use futures_util::future::BoxFuture;
use tokio::time::sleep;
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::StepError;

use super::forward::{specification, unsealed};
use super::situation::{Situation, Stage, by_name};
use super::{Container, ContainerOutput, ContainerUndo};
use crate::containers::{self, grace_of, id_of, is_running, name_of};
use crate::error::DockerError;
use crate::images;
use crate::left_over;
use crate::naming;
use crate::specification::Changes;
use crate::target::Engine;
use crate::verbatim;

/// How often the outcome is looked at: what was on its way to the engine may have come in between.
const LOOKS: usize = 5;

/// How long what runs again is looked at.
const STAYS: Duration = Duration::from_millis(300);

impl Container {
    pub(super) async fn put_back(
        &self,
        cx: &Context,
        undo: &ContainerUndo,
        output: Option<&ContainerOutput>,
    ) -> Result<(), StepError> {
        let client = self.engine.connect(cx).await?;
        let known = output.map(|output| output.id.as_str());
        let (mut looks, mut stays) = (0, false);
        loop {
            let mut at = Situation::read(&client, cx, undo, known).await?;
            self.recognise(&client, cx, undo, &mut at).await?;
            if is_back(&at, undo) {
                if stays || !undo.found.running {
                    break;
                }
                // An engine that has just been started may yet hear of the end of an earlier run of it.
                stays = true;
                sleep(STAYS).await;
                continue;
            }
            stays = false;
            if looks == LOOKS {
                return Err(StepError::transient(format!(
                    "container {} does not stay as it is put back: it ends, or somebody else works on it",
                    undo.name
                ))
                .with_hint("find out with `docker logs` and `docker events`, then `upgrade rollback` again"));
            }
            looks += 1;
            self.once(&client, cx, undo, &at).await?;
        }
        if let Some(tag) = &undo.tag {
            tag.put_back(&client, &undo.intended.image_id).await?;
        }
        Ok(undo.release_images(&client, cx, true).await?)
    }

    /// Takes away what took its place, and gives it back.
    async fn once(&self, client: &Docker, cx: &Context, undo: &ContainerUndo, at: &Situation) -> Result<(), StepError> {
        let name = &undo.name;
        if let Some(foreign) = &at.foreign {
            if cx.on_conflict() == OnConflict::Stop {
                return Err(at.conflict(undo));
            }
            containers::remove(client, id_of(foreign), name, false).await?;
        }
        // From here on a stop that was sent may still be at work: repeated, it is awaited.
        if let (Some((Stage::Next, _)), Some(old)) = (&at.new, &at.old) {
            self.hand_over(client, cx, old).await?;
            containers::stop(client, id_of(old), name, grace_of(old)).await?;
        }
        if let Some((_, new)) = &at.new {
            self.hand_over(client, cx, new).await?;
            // Not killed: it may be writing to the volumes that the old one is to find whole.
            containers::stop(client, id_of(new), name, grace_of(new)).await?;
            // Nor left running where the engine does not see it.
            left_over::end(&self.engine, id_of(new), name).await?;
            containers::remove(client, id_of(new), name, true).await?;
        }
        let id = match &at.old {
            Some(old) => id_of(old).to_owned(),
            None => self.make_again(client, cx, undo).await?,
        };
        containers::rename(client, &id, name).await?;
        if !at.old.as_ref().is_some_and(|old| has_restart(old, undo)) {
            undo.found.restart.give(client, &id, name).await?;
        }
        if undo.found.running {
            match containers::start(client, &id, name).await {
                // Where it could only be removed, the next look finds it gone, and it is made again.
                Err(error) if error.is_left_over() => start_again(&self.engine, client, &id, name, error).await?,
                started => started?,
            }
        } else {
            let old = containers::inspect(client, &id).await?;
            if let Some(old) = old.filter(is_running) {
                containers::stop(client, &id, name, grace_of(&old)).await?;
            }
        }
        Ok(())
    }

    /// Makes the old container again from what was kept of it: somebody removed it. What it wrote to
    /// its own file system is lost.
    async fn make_again(&self, client: &Docker, cx: &Context, undo: &ContainerUndo) -> Result<String, StepError> {
        let own = naming::kept(&undo.name, cx);
        if let Some(unfinished) = by_name(client, &own).await? {
            containers::remove(client, id_of(&unfinished), &own, false).await?;
        }
        let named = images::local(client, &undo.found.image).await?.and_then(|image| image.id);
        // The name may lead elsewhere by now.
        let image =
            if named.as_deref() == Some(&undo.found.image_id) { &undo.found.image } else { &undo.found.image_id };
        let changes = Changes { image: Some(image.clone()), ..Changes::default() };
        let specification = specification(client, &unsealed(cx, undo).await?, &undo.found.image_id, &changes).await?;
        Ok(verbatim::create(client, &own, None, &specification).await?)
    }
}

/// Starts a container that the engine was killed at and refuses to start since; or removes it, unless
/// something would be lost by that.
fn start_again<'a>(
    engine: &'a Engine,
    client: &'a Docker,
    id: &'a str,
    name: &'a str,
    error: DockerError,
) -> BoxFuture<'a, Result<(), StepError>> {
    Box::pin(async move {
        if left_over::end(engine, id, name).await? {
            // The engine learns of that end in its own time.
            for pause in [100, 200, 400, 800, 1600, 3200].map(Duration::from_millis) {
                match containers::start(client, id, name).await {
                    Err(error) if error.is_left_over() => sleep(pause).await,
                    started => return Ok(started?),
                }
            }
        }
        let Some(container) = containers::inspect(client, id).await? else { return Ok(()) };
        let written = containers::written(client, &container).await?;
        if written.is_empty() {
            tracing::warn!(container = %name, "the engine does not start it any more: it is made again, as it was");
            return Ok(containers::remove(client, id, name, false).await?);
        }
        let detail =
            format!("it wrote to its own file system, so it is not made again unasked: {}", written.join(", "));
        Err(StepError::from(error).with_detail(detail))
    })
}

fn is_back(at: &Situation, undo: &ContainerUndo) -> bool {
    let Some(old) = &at.old else { return false };
    at.new.is_none() && name_of(old) == undo.name && is_running(old) == undo.found.running && has_restart(old, undo)
}

fn has_restart(container: &ContainerInspectResponse, undo: &ContainerUndo) -> bool {
    let policy = container.host_config.as_ref().and_then(|host| host.restart_policy.as_ref());
    let name = policy.and_then(|policy| policy.name).map(|name| name.to_string()).unwrap_or_default();
    // Engines spell *no* in two ways.
    name == undo.found.restart.name || (name.is_empty() && undo.found.restart.name == "no")
}
