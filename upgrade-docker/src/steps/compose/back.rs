//! `rollback`: the files, then the tags, then each service that changed, made again by Compose.

use std::collections::BTreeMap;
use std::time::Duration;

use bollard::query_parameters::TagImageOptionsBuilder;
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use super::forward::{Roll, newcomers, refuse_strangers, remove, tidy};
use super::record::networks;
use super::undo::waves;
use super::{Compose, ComposeUndo, ServiceUndo};
use crate::compose::containers::{FoundContainer, Present, differing, of_service};
use crate::compose::kept_file::At;
use crate::compose::program::Start;
use crate::containers;
use crate::error::{Doing as _, found, not_cancelled};
use crate::images;
use crate::reference::ImageReference;

pub(super) async fn rollback(step: &Compose, cx: &Context, undo: &ComposeUndo) -> Result<(), StepError> {
    let client = step.engine.connect_for(cx, Duration::from_secs(600)).await?;
    let mut written = true;
    for file in &undo.files {
        written &= file.state(cx).await? == At::Intended;
    }
    let program = step.program(cx).await?;
    let newcomers = newcomers(cx, &client, &program, undo).await?;
    if !newcomers.is_empty() {
        // What the files said cannot be asked any more once they are put back. Where they were never
        // written, none of these containers is ours.
        let hashes = match cx.last_checkpoint::<Intended>()? {
            Some(intended) => intended.hashes,
            None if written => program.hashes(cx, Some(&undo.project)).await?,
            None => BTreeMap::new(),
        };
        refuse_strangers(undo, &newcomers, &hashes)?;
        cx.checkpoint(&Intended { hashes }).await?;
    }
    for file in &undo.files {
        not_cancelled(cx)?;
        file.put_back(cx).await?;
    }
    // The last one of `files` may be gone by now.
    let program = step.program(cx).await?;
    let back = Back { roll: Roll { step, cx, client: &client, program: &program, undo } };
    for wave in waves(&undo.services) {
        back.wave(&wave).await?;
    }
    for (reference, id) in &undo.tags {
        if let Some(id) = id {
            back.tag(reference, id).await?;
        }
    }
    back.networks().await?;
    for image in undo.images_found() {
        images::let_go(&client, cx, image).await?;
    }
    Ok(())
}

/// Holds the hashes that containers made by `apply` carry, by service.
#[derive(Serialize, Deserialize)]
struct Intended {
    hashes: BTreeMap<String, String>,
}

struct Back<'a> {
    roll: Roll<'a>,
}

/// Names containers of a service that are gone, and says how Compose is to make them again.
struct Gone<'a> {
    service: &'a ServiceUndo,
    start: Start,
    containers: Vec<&'a FoundContainer>,
}

impl Gone<'_> {
    /// Tells whether the others need a tag to name another image.
    fn contradict(&self, other: &Self) -> bool {
        let differ = |a: &FoundContainer, b: &FoundContainer| a.reference == b.reference && a.image != b.image;
        self.containers.iter().any(|one| other.containers.iter().any(|another| differ(one, another)))
    }
}

impl Back<'_> {
    /// Puts back services that do not wait for each other: Compose is asked once for all of them, as far as
    /// they are to be treated the same.
    async fn wave(&self, services: &[&ServiceUndo]) -> Result<(), StepError> {
        let mut gone: Vec<Gone<'_>> = Vec::new();
        for service in services.iter().copied() {
            let Some(these) = self.cleared(service).await? else { continue };
            // A tag that named one image for one service and another one for the next cannot serve both.
            if gone.iter().any(|others| others.contradict(&these)) {
                self.make_again(&std::mem::take(&mut gone)).await?;
            }
            gone.push(these);
        }
        self.make_again(&gone).await?;
        let mut renewed = Vec::new();
        for service in services.iter().copied().filter(|service| !service.containers.is_empty()) {
            if self.roll.is_orphaned(service).await? {
                renewed.push((service.service.as_str(), service.containers.len()));
            }
        }
        self.roll.up(&renewed, Start::Renew).await?;
        let mut all = Vec::new();
        for service in services.iter().copied().filter(|service| !service.containers.is_empty()) {
            all.push((service, self.as_they_ran(service).await?));
        }
        let again = all.iter().filter(|(service, made)| !made.is_empty() && !service.was_stopped());
        join_all(again.map(async |(service, _)| {
            // An undo is judged by the checks after it; what served badly before serves badly again.
            if let Err(error) = self.roll.serving(service).await
                && !self.roll.cx.cancelled().is_cancelled()
            {
                tracing::warn!(service = service.service, %error, "a service that was put back does not serve");
            }
        }))
        .await;
        for (service, made) in &all {
            self.same_as_found(service, made).await?;
        }
        Ok(())
    }

    /// Takes away what must not be there when Compose makes the old containers again, and says how it is to
    /// make them; nothing, where it has nothing to make.
    async fn cleared<'s>(&self, service: &'s ServiceUndo) -> Result<Option<Gone<'s>>, StepError> {
        let Roll { cx, client, undo, .. } = self.roll;
        tidy(client, cx, &undo.project, service).await?;
        let present = of_service(client, &undo.project, &service.service).await?;
        let here = service.among(&present);
        let new: Vec<&Present> = here.iter().copied().filter(|container| !service.was(container.id())).collect();
        let missing: Vec<&FoundContainer> =
            service.containers.iter().filter(|found| !here.iter().any(|one| one.id() == found.id)).collect();
        // Version 1 replaces all containers of a service or none: one that was found and is still there
        // must not be touched. What stands in their places holds volumes without a name, if there are.
        let numbers = |all: &mut dyn Iterator<Item = u32>| {
            let mut all: Vec<u32> = all.collect();
            all.sort_unstable();
            all
        };
        let in_place =
            numbers(&mut new.iter().map(|one| one.found.number)) == numbers(&mut missing.iter().map(|one| one.number));
        let carried = service.containers.iter().any(|found| found.anonymous_volumes);
        let all_gone = missing.len() == service.containers.len();
        let replace = !missing.is_empty() && ((in_place && all_gone) || (carried && !new.is_empty()));
        if !replace {
            for container in new {
                not_cancelled(cx)?;
                remove(client, container).await?;
            }
        }
        let start = match (service.was_stopped(), replace) {
            (true, _) => Start::Stopped,
            (false, true) => Start::Recreate,
            (false, false) => Start::Missing,
        };
        Ok((!missing.is_empty()).then_some(Gone { service, start, containers: missing }))
    }

    /// Lets Compose make the containers again that are gone, of the images that they had.
    async fn make_again(&self, gone: &[Gone<'_>]) -> Result<(), StepError> {
        let Roll { cx, client, undo, .. } = self.roll;
        for found in gone.iter().flat_map(|gone| &gone.containers) {
            self.tag(&found.reference, &found.image).await?;
        }
        for start in [Start::Stopped, Start::Recreate, Start::Missing] {
            let alike = gone.iter().filter(|gone| gone.start == start).map(|gone| gone.service);
            let scales: Vec<_> = alike.map(|service| (service.service.as_str(), service.containers.len())).collect();
            self.roll.up(&scales, start).await?;
        }
        for gone in gone {
            tidy(client, cx, &undo.project, gone.service).await?;
        }
        Ok(())
    }

    /// Starts what ran and stops what did not; returns the containers that are not those found, each
    /// with its place among these.
    async fn as_they_ran(&self, service: &ServiceUndo) -> Result<Vec<(usize, Present)>, StepError> {
        let Roll { cx, client, undo, .. } = self.roll;
        let present = of_service(client, &undo.project, &service.service).await?;
        let mut new: Vec<&Present> =
            service.among(&present).into_iter().filter(|container| !service.was(container.id())).collect();
        let mut made = Vec::new();
        for (at, found) in service.containers.iter().enumerate() {
            let same = present.iter().find(|container| container.id() == found.id);
            let now = match same {
                Some(container) => container,
                None if new.is_empty() => continue,
                None => {
                    let place = new.iter().position(|one| one.found.number == found.number).unwrap_or(0);
                    let container = new.remove(place);
                    made.push((at, container.clone()));
                    container
                }
            };
            not_cancelled(cx)?;
            if found.running && !now.found.running {
                containers::start(client, now.id(), &found.name).await?;
            } else if !found.running && now.found.running {
                containers::stop(client, now.id(), &found.name, now.grace).await?;
            }
        }
        Ok(made)
    }

    /// Compares what was made again with what was found: environment, networks, volumes, all the rest.
    async fn same_as_found(&self, service: &ServiceUndo, made: &[(usize, Present)]) -> Result<(), StepError> {
        let (Some(described), false) = (&service.described, made.is_empty()) else { return Ok(()) };
        let before: Vec<Value> = serde_json::from_slice(&self.roll.cx.unseal(described).await?)
            .map_err(|error| StepError::permanent("what was found of a container cannot be read").with_cause(&error))?;
        let present = of_service(self.roll.client, &self.roll.undo.project, &service.service).await?;
        for (at, container) in made {
            let Some(now) = present.iter().find(|now| now.id() == container.id()) else { continue };
            let parts = differing(before.get(*at).unwrap_or(&Value::Null), &now.normalised());
            if !parts.is_empty() {
                return Err(StepError::permanent(format!(
                    "container {} was made again, and differs from the one found in: {}",
                    now.found.name,
                    parts.join(", ")
                ))
                .with_hint("the project's files were changed meanwhile: put them back and resolve with --retry, or resolve with --skip"));
            }
        }
        Ok(())
    }

    /// Lets a tag name an image again. One that does is left alone.
    async fn tag(&self, reference: &str, id: &str) -> Result<(), StepError> {
        let Roll { cx, client, .. } = self.roll;
        if reference.starts_with("sha256:") {
            return Ok(());
        }
        let Ok(name) = reference.parse::<ImageReference>() else { return Ok(()) };
        let (None, Some(tag)) = (name.digest(), name.tag()) else { return Ok(()) };
        let now = images::local(client, reference).await?.and_then(|image| image.id);
        if now.as_deref() == Some(id) {
            return Ok(());
        }
        not_cancelled(cx)?;
        let options = TagImageOptionsBuilder::new().repo(&name.name()).tag(tag).build();
        let tagged = client.tag_image(id, Some(options)).await;
        Ok(tagged.doing(|| format!("letting {reference} name image {id} again"))?)
    }

    /// Removes the networks that Compose made for services that were not there before.
    async fn networks(&self) -> Result<(), StepError> {
        let Roll { cx, client, undo, .. } = self.roll;
        for name in networks(client, &undo.project).await?.difference(&undo.networks) {
            not_cancelled(cx)?;
            let removed = client.remove_network(name).await.doing(|| format!("removing network {name}"));
            found(removed)?;
        }
        Ok(())
    }
}
