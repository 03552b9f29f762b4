//! The way forward: made beside, swapped, started, watched.

use bollard::Docker;
use bollard::models::ContainerCreateBody;
use bollard::query_parameters::CreateContainerOptionsBuilder;
use serde_json::Value;
use std::time::Duration;
use tokio::time::{Instant, sleep};
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::StepError;

use super::plan::inherited;
use super::situation::{Situation, Stage, aside, by_name};
use super::{Container, ContainerOutput, ContainerUndo, Restart};
use crate::containers::{self, grace_of, id_of, is_running, name_of};
use crate::error::{DockerError, Doing, not_cancelled};
use crate::handover;
use crate::images::{self, Pull};
use crate::left_over;
use crate::naming;
use crate::reference::ImageReference;
use crate::specification::{Changes, Sources, Specification, config_of, specify};
use crate::verbatim;

/// How long a request that a dead process has sent may take to reach the engine's work.
const ON_ITS_WAY: Duration = Duration::from_millis(50);

impl Container {
    pub(super) async fn replace(&self, cx: &Context, undo: &ContainerUndo) -> Result<ContainerOutput, StepError> {
        match Box::pin(self.try_to_replace(cx, undo)).await? {
            Some(output) => Ok(output),
            None => Box::pin(self.try_to_replace(cx, undo)).await?.ok_or_else(|| {
                StepError::transient(format!("the engine cannot start container {}", undo.name))
                    .with_hint("it may be killed again and again: look at its log, then `upgrade resume`")
            }),
        }
    }

    /// Returns nothing if the next container was removed, and must be made anew.
    async fn try_to_replace(&self, cx: &Context, undo: &ContainerUndo) -> Result<Option<ContainerOutput>, StepError> {
        let name = &undo.name;
        let client = self.engine.connect(cx).await?;
        let mut at = Situation::read(&client, cx, undo, None).await?;
        self.recognise(&client, cx, undo, &mut at).await?;
        let astray = match &at.old {
            // With neither there, somebody took the container away.
            None => at.new.is_none(),
            Some(old) => name_of(old) != name && !name_of(old).starts_with(&format!("{}-", naming::kept(name, cx))),
        };
        if at.foreign.is_some() || astray {
            if cx.on_conflict() == OnConflict::Stop {
                return Err(at.conflict(undo));
            }
            if let Some(foreign) = at.foreign.take() {
                containers::remove(&client, id_of(&foreign), name, false).await?;
            }
        }

        let new = match at.new.take() {
            Some((Stage::Next | Stage::InPlace, new)) => id_of(&new).to_owned(),
            unfinished => {
                if let Some((_, unfinished)) = unfinished {
                    containers::remove(&client, id_of(&unfinished), name, true).await?;
                }
                self.make(cx, &client, undo).await?
            }
        };
        if let Some(old) = &at.old {
            if undo.found.running {
                not_cancelled(cx)?;
                // First: an engine that starts anew would start neither the old one nor anybody who goes on.
                self.hand_over(&client, cx, old).await?;
                // An engine or a machine that starts anew must not start it beside the new one.
                if undo.found.restart != Restart::never() {
                    Restart::never().give(&client, id_of(old), name).await?;
                }
                cx.progress(2, 4, format!("stopping container {name}"));
                containers::stop(&client, id_of(old), name, grace_of(old)).await?;
            }
            containers::rename(&client, id_of(old), &aside(name, cx, &new)).await?;
        }
        containers::rename(&client, &new, name).await?;
        if undo.found.running {
            cx.progress(3, 4, format!("starting container {name}"));
            match containers::start(&client, &new, name).await {
                Err(error) if error.is_left_over() => {
                    left_over::end(&self.engine, &new, name).await?;
                    containers::remove(&client, &new, name, true).await?;
                    return Ok(None);
                }
                started => started.map_err(|error| not_started(error, name))?,
            }
            self.config.health.wait(&client, cx, &new, name).await?;
        }
        Ok(Some(ContainerOutput {
            id: new,
            image: undo.intended.image.clone(),
            image_id: undo.intended.image_id.clone(),
        }))
    }

    /// Makes the next container beside the old one, complete; returns its id.
    async fn make(&self, cx: &Context, client: &Docker, undo: &ContainerUndo) -> Result<String, StepError> {
        let name = &undo.name;
        not_cancelled(cx)?;
        handover::clear(client, name).await?;
        self.have_image(cx, client, undo).await?;
        for image in undo.images() {
            images::keep(client, cx, image).await?;
        }
        if let Some(tag) = &undo.tag {
            tag.give(client, &undo.intended.image_id).await?;
        }
        let changes = self.config.changes(cx, &undo.intended.image).await?;
        let found = unsealed(cx, undo).await?;
        let specification = specification(client, &found, &undo.intended.image_id, &changes).await?;
        let incoming = naming::incoming(name, cx);
        cx.progress(1, 4, format!("creating the next container {name}"));
        let id = verbatim::create(client, &incoming, self.config.platform.as_deref(), &specification).await?;
        let made = containers::inspect(client, &id).await?.and_then(|made| made.image);
        if made.as_deref() != Some(&undo.intended.image_id) {
            containers::remove(client, &id, &incoming, true).await?;
            return Err(StepError::permanent(format!(
                "image {} is another one by now: somebody moved its tag on the engine",
                undo.intended.image
            ))
            .with_hint("run again, or name the image by its digest"));
        }
        containers::rename(client, &id, &naming::next(name, cx)).await?;
        Ok(id)
    }

    /// Obtains the image again if somebody pruned it since it was planned.
    async fn have_image(&self, cx: &Context, client: &Docker, undo: &ContainerUndo) -> Result<(), StepError> {
        if images::local(client, &undo.intended.image_id).await?.is_some() {
            return Ok(());
        }
        let gone =
            |what: &str| StepError::permanent(format!("image {} {what}", undo.intended.image)).with_hint("run again");
        let reference: ImageReference =
            undo.intended.image.parse().map_err(|_| gone("was removed since it was looked at"))?;
        let platform = self.config.platform.as_deref();
        let image = images::obtain_aside(&self.engine, client, cx, &reference, platform, Pull::Always).await?;
        if images::id_of(&image)? == undo.intended.image_id { Ok(()) } else { Err(gone("is another one by now")) }
    }

    /// Awaits what a dead process may have asked the engine for.
    ///
    /// A stop, a start or a rename that goes on is repeated by whoever takes over. A creation cannot
    /// be repeated: a container might appear when nobody looks any more. Its name is the way to know:
    /// the engine reserves it first, so who gets it is alone.
    pub(super) async fn wait_out(&self, cx: &Context, undo: &ContainerUndo) -> Result<(), StepError> {
        sleep(ON_ITS_WAY).await;
        let client = self.engine.connect(cx).await?;
        let at = Situation::read(&client, cx, undo, None).await?;
        if at.new.is_some() || at.old.is_none() {
            return Ok(());
        }
        let incoming = naming::incoming(&undo.name, cx);
        let until = Instant::now() + client.timeout();
        loop {
            let placeholder = ContainerCreateBody {
                image: Some(undo.found.image_id.clone()),
                cmd: Some(vec!["-".into()]),
                ..ContainerCreateBody::default()
            };
            let options = CreateContainerOptionsBuilder::new().name(&incoming).build();
            let created = client.create_container(Some(options), placeholder).await;
            match created.doing(|| format!("reserving the name {incoming}")) {
                Ok(created) => return Ok(containers::remove(&client, &created.id, &incoming, true).await?),
                // Its image is gone, and so is what would need it.
                Err(error) if error.is_missing() => return Ok(()),
                Err(error) if error.is_in_conflict() && Instant::now() < until => {
                    if by_name(&client, &incoming).await?.is_some() {
                        return Ok(());
                    }
                }
                Err(error) => return Err(error.into()),
            }
            sleep(ON_ITS_WAY).await;
        }
    }

    /// Removes the old container, and lets the images go.
    pub(super) async fn forget(&self, cx: &Context, undo: &ContainerUndo) -> Result<(), StepError> {
        let client = self.engine.connect(cx).await?;
        let old = containers::inspect(&client, &undo.found.id).await?;
        // One that somebody gave its name back is in use again.
        if let Some(old) = old.filter(|old| name_of(old) != undo.name && !is_running(old)) {
            containers::remove(&client, id_of(&old), name_of(&old), false).await?;
        }
        Ok(undo.release_images(&client, cx, false).await?)
    }
}

/// Returns what `prepare` sealed of the container.
pub(super) async fn unsealed(cx: &Context, undo: &ContainerUndo) -> Result<Value, StepError> {
    serde_json::from_slice(&cx.unseal(&undo.found.inspect).await?)
        .map_err(|error| StepError::permanent("what was kept of the container cannot be read").with_cause(&error))
}

/// Describes a container of one image like one that is there of another, but for some changes.
pub(super) async fn specification(
    client: &Docker,
    container: &Value,
    image_id: &str,
    changes: &Changes,
) -> Result<Specification, StepError> {
    let config = async |id: &str| -> Result<Value, StepError> {
        let image = images::local(client, id).await?;
        image.map(|image| config_of(&image)).ok_or_else(|| {
            let name = container["Config"]["Image"].as_str().unwrap_or_default();
            StepError::permanent(format!("image {id} is gone"))
                .with_hint(format!("pull it again: `docker pull {name}`"))
        })
    };
    let old_image = config(container["Image"].as_str().unwrap_or_default()).await?;
    let new_image = config(image_id).await?;
    let inherited = inherited(client, container).await?;
    let sources = Sources { container, old_image: &old_image, new_image: &new_image, inherited: &inherited };
    Ok(specify(sources, changes))
}

/// Gives the remedy that the engine's words alone do not.
fn not_started(error: DockerError, name: &str) -> StepError {
    let error = StepError::from(error);
    match error.hint() {
        Some(_) => error,
        None => error.with_hint(format!(
            "the program or a setting does not fit the image: compare `docker inspect {name}` with the image's notes"
        )),
    }
}
