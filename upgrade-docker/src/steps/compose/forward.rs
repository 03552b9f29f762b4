//! `apply`: images first, then the files, then one service after the other.

use std::collections::{BTreeMap, BTreeSet};

use bollard::Docker;
use futures_util::future::try_join_all;
use futures_util::join;
use tokio::time::{Instant, sleep};
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};

use super::record::{output, reference};
use super::undo::waves;
use super::{Compose, ComposeOutput, ComposeUndo, Replicas, ServiceUndo};
use crate::compose::containers::{FoundContainer, Present, of_project, of_service};
use crate::compose::kept_file::At;
use crate::compose::program::{Compose as Program, Generation, Start};
use crate::containers::{self, state_line};
use crate::error::{not_cancelled, unless_cancelled};
use crate::images;

/// How many lines of its log a job that failed is quoted with.
const QUOTED: usize = 20;
/// How many services are named in one line.
const NAMED: usize = 4;

pub(super) async fn apply(step: &Compose, cx: &Context, undo: &ComposeUndo) -> Result<ComposeOutput, StepError> {
    let client = step.engine.connect(cx).await?;
    let mut untouched = true;
    for file in &undo.files {
        untouched &= file.state(cx).await? == At::Found;
    }
    if untouched && cx.attempt() == 1 && !cx.is_interrupted() {
        refuse_changes(cx, undo, &of_project(&client, &undo.project).await?)?;
    }
    let mut intended = BTreeMap::new();
    for service in &undo.services {
        if let Some(image) = &service.image {
            let platform = service.platform.as_deref();
            let image =
                images::obtain(&step.engine, &client, cx, &reference(image)?, platform, step.config.pull).await?;
            intended.insert(service.service.as_str(), images::id_of(&image)?);
        }
    }
    not_cancelled(cx)?;
    for image in undo.images_found() {
        images::keep(&client, cx, image).await?;
    }
    for file in &undo.files {
        not_cancelled(cx)?;
        file.apply(cx).await?;
    }
    let program = step.program(cx).await?;
    let newcomers = newcomers(cx, &client, &program, undo).await?;
    if !newcomers.is_empty() {
        refuse_strangers(undo, &newcomers, &program.hashes(cx, Some(&undo.project)).await?)?;
    }
    let roll = Roll { step, cx, client: &client, program: &program, undo };
    let waves = async {
        let mut done = 0;
        for wave in waves(&undo.services) {
            cx.progress(done as u64, undo.services.len() as u64, named(&wave));
            roll.wave(&wave).await?;
            done += wave.len();
        }
        Ok::<_, StepError>(())
    };
    // What the files say is final now, and Compose takes long to tell. Except of a service that lives in
    // another one's container: its hash changes with that one's id.
    let hashes = if undo.services.iter().any(|service| service.lives_in) {
        waves.await?;
        program.hashes(cx, Some(&undo.project)).await?
    } else {
        let (waved, hashes) = join!(waves, program.hashes(cx, Some(&undo.project)));
        waved.and(hashes)?
    };
    let present = of_project(&client, &undo.project).await?;
    roll.verify(&intended, &hashes, &present)?;
    Ok(output(&program, &undo.project, &undo.services, &present))
}

/// Names services, or the first of many.
fn named(services: &[&ServiceUndo]) -> String {
    let names: Vec<_> = services.iter().take(NAMED).map(|service| service.service.as_str()).collect();
    match (&names[..], services.len().saturating_sub(NAMED)) {
        ([name], 0) => format!("service {name}"),
        (_, 0) => format!("services {}", names.join(", ")),
        (_, more) => format!("services {} and {more} more", names.join(", ")),
    }
}

/// Says which services an error is about.
fn about(error: StepError, services: &[&ServiceUndo]) -> StepError {
    let mut first = true;
    let whose = named(services);
    error.map_text(|text| if std::mem::take(&mut first) { format!("{whose}: {text}") } else { text.to_owned() })
}

/// Refuses a project whose containers are not those that were found: somebody was there in between.
fn refuse_changes(cx: &Context, undo: &ComposeUndo, present: &[Present]) -> Result<(), StepError> {
    if cx.on_conflict() == OnConflict::Overwrite {
        return Ok(());
    }
    for service in &undo.services {
        let now: Vec<_> = service.among(present).into_iter().map(|container| &container.found).collect();
        let ids = |all: &[&FoundContainer]| all.iter().map(|found| found.id.clone()).collect::<BTreeSet<_>>();
        let before: Vec<_> = service.containers.iter().collect();
        if ids(&now) != ids(&before) {
            return Err(conflict(undo, service, &before, "as the files say", &now));
        }
    }
    Ok(())
}

fn conflict(
    undo: &ComposeUndo,
    service: &ServiceUndo,
    found: &[&FoundContainer],
    intended: &str,
    present: &[&FoundContainer],
) -> StepError {
    let list = |all: &[&FoundContainer]| {
        let names: Vec<_> = all.iter().map(|one| format!("{} ({:.12})", one.name, one.id)).collect();
        if names.is_empty() { "no container".to_owned() } else { names.join(", ") }
    };
    StepError::conflict(Conflict {
        subject: format!("service {} of project {}", service.service, undo.project),
        found: list(found),
        intended: intended.to_owned(),
        present: list(present),
    })
}

/// Lists the containers that are neither those found nor made of the same files: ours, if they are as
/// the files say, or else somebody's. Version 1 alone tells reliably, by its hash, what the files say.
pub(super) async fn newcomers<'a>(
    cx: &Context,
    client: &Docker,
    program: &Program,
    undo: &'a ComposeUndo,
) -> Result<Vec<(&'a ServiceUndo, FoundContainer)>, StepError> {
    if program.generation == Generation::Two || cx.on_conflict() == OnConflict::Overwrite {
        return Ok(Vec::new());
    }
    let present = of_project(client, &undo.project).await?;
    // The hash of a service that lives in another one's container changes with that one's id.
    let services = undo.services.iter().filter(|service| !service.lives_in);
    Ok(services
        .flat_map(|service| {
            service.among(&present).into_iter().map(move |container| (service, container.found.clone()))
        })
        .filter(|(service, found)| !service.was(&found.id))
        .filter(|(service, found)| !service.containers.iter().any(|before| before.hash == found.hash))
        .collect())
}

/// Refuses containers that are not as the files say, or said.
pub(super) fn refuse_strangers(
    undo: &ComposeUndo,
    newcomers: &[(&ServiceUndo, FoundContainer)],
    hashes: &BTreeMap<String, String>,
) -> Result<(), StepError> {
    match newcomers.iter().find(|(service, found)| hashes.get(&service.service) != Some(&found.hash)) {
        None => Ok(()),
        Some((service, found)) => {
            let before: Vec<_> = service.containers.iter().collect();
            Err(conflict(undo, service, &before, "as the files say", &[found]))
        }
    }
}

/// Makes right what a replacement that was cut off left: both versions give the old container another
/// name before they make the new one.
pub(super) async fn tidy(client: &Docker, cx: &Context, project: &str, service: &ServiceUndo) -> Result<(), StepError> {
    tidy_among(client, cx, service, &of_service(client, project, &service.service).await?).await
}

/// The same, where the project's containers have been listed.
async fn tidy_among(
    client: &Docker,
    cx: &Context,
    service: &ServiceUndo,
    present: &[Present],
) -> Result<(), StepError> {
    let here = service.among(present);
    for found in &service.containers {
        let Some(old) = here.iter().find(|container| container.id() == found.id) else { continue };
        for other in here.iter().filter(|other| other.found.number == found.number && !service.was(other.id())) {
            not_cancelled(cx)?;
            remove(client, other).await?;
        }
        if old.found.name != found.name {
            not_cancelled(cx)?;
            containers::rename(client, &found.id, &found.name).await?;
        }
    }
    for new in here.iter().filter(|container| !service.was(container.id())) {
        let gone = |found: &&FoundContainer| !here.iter().any(|container| container.id() == found.id);
        let before = service.containers.iter().filter(gone).find(|found| found.number == new.found.number);
        if let Some(found) = before.filter(|found| new.found.name.ends_with(&format!("_{}", found.name))) {
            not_cancelled(cx)?;
            containers::rename(client, new.id(), &found.name).await?;
        }
    }
    Ok(())
}

/// Ends a container and removes it; its volumes stay.
pub(super) async fn remove(client: &Docker, container: &Present) -> Result<(), StepError> {
    containers::stop(client, container.id(), &container.found.name, container.grace).await?;
    containers::remove(client, container.id(), &container.found.name, false).await?;
    Ok(())
}

pub(super) struct Roll<'a> {
    pub(super) step: &'a Compose,
    pub(super) cx: &'a Context,
    pub(super) client: &'a Docker,
    pub(super) program: &'a Program,
    pub(super) undo: &'a ComposeUndo,
}

impl Roll<'_> {
    /// Brings services that do not wait for each other to what the files say: Compose is asked once for
    /// all of them, as far as they are to be treated the same.
    async fn wave(&self, services: &[&ServiceUndo]) -> Result<(), StepError> {
        let present = of_project(self.client, &self.undo.project).await?;
        let (mut stopped, mut renewed, mut others) = (Vec::new(), Vec::new(), Vec::new());
        for service in services.iter().copied() {
            let this = |error| about(error, &[service]);
            tidy_among(self.client, self.cx, service, &present).await.map_err(this)?;
            if service.was_stopped() && !service.completes {
                stopped.push(service);
                continue;
            }
            let several = service.scale > 1 && service.containers.len() > 1;
            let carried = service.containers.iter().any(|container| container.anonymous_volumes);
            let one_by_one = several && !carried && self.step.config.replicas == Replicas::OneByOne;
            if one_by_one && self.differs(service).await.map_err(this)? {
                self.one_by_one(service).await.map_err(this)?;
            }
            if self.is_orphaned(service).await.map_err(this)? { renewed.push(service) } else { others.push(service) }
        }
        for (group, start) in [(&stopped, Start::Stopped), (&renewed, Start::Renew), (&others, Start::Recreate)] {
            let scales: Vec<_> = group.iter().map(|service| (service.service.as_str(), service.scale)).collect();
            self.up(&scales, start).await.map_err(|error| about(error, group))?;
        }
        let present = of_project(self.client, &self.undo.project).await?;
        let started = renewed.into_iter().chain(others);
        try_join_all(
            started.map(async |service| self.serve(service, &present).await.map_err(|error| about(error, &[service]))),
        )
        .await
        .map(drop)
    }

    /// Tells whether a service lives in a container that was replaced: version 1 does not see that as
    /// something to do.
    pub(super) async fn is_orphaned(&self, service: &ServiceUndo) -> Result<bool, StepError> {
        if !service.lives_in {
            return Ok(false);
        }
        let present = of_project(self.client, &self.undo.project).await?;
        Ok(service.among(&present).iter().any(|container| container.is_orphan(&present)))
    }

    /// Lets Compose bring services, each with its number of containers, to what the files say.
    pub(super) async fn up(&self, services: &[(&str, usize)], start: Start) -> Result<(), StepError> {
        if services.is_empty() {
            return Ok(());
        }
        self.program.up(self.cx, &self.undo.project, services, start, self.step.grace()).await
    }

    async fn present(&self, service: &ServiceUndo) -> Result<Vec<Present>, StepError> {
        of_service(self.client, &self.undo.project, &service.service).await
    }

    /// Tells whether Compose would replace anything; version 2 is only asked by doing it.
    async fn differs(&self, service: &ServiceUndo) -> Result<bool, StepError> {
        if self.program.generation == Generation::Two {
            return Ok(true);
        }
        let hashes = self.program.hashes(self.cx, Some(&self.undo.project)).await?;
        let hash = hashes.get(&service.service);
        Ok(self.present(service).await?.iter().any(|container| Some(&container.found.hash) != hash))
    }

    /// Replaces the container with the highest number first: so what is left of the old ones are always
    /// the lowest numbers, and an undo in the middle gets every number right.
    async fn one_by_one(&self, service: &ServiceUndo) -> Result<(), StepError> {
        let many = service.containers.len();
        let mut old: Vec<&FoundContainer> = service.containers.iter().collect();
        old.sort_by_key(|found| std::cmp::Reverse(found.number));
        if self.present(service).await?.len() < many {
            self.up(&[(&service.service, many)], Start::Missing).await?;
            self.serving(service).await?;
        }
        for found in old {
            let present = self.present(service).await?;
            let Some(container) = present.iter().find(|container| container.id() == found.id) else { continue };
            not_cancelled(self.cx)?;
            remove(self.client, container).await?;
            self.up(&[(&service.service, many)], Start::Missing).await?;
            self.serving(service).await?;
        }
        Ok(())
    }

    /// Waits until every new container of a service serves; of a job, until it has ended well.
    pub(super) async fn serving(&self, service: &ServiceUndo) -> Result<(), StepError> {
        self.serve(service, &self.present(service).await?).await
    }

    /// The same, where the project's containers have been listed.
    async fn serve(&self, service: &ServiceUndo, present: &[Present]) -> Result<(), StepError> {
        let gate = self.step.gate(&service.service);
        let new = service.among(present).into_iter().filter(|container| !service.was(container.id()));
        try_join_all(new.map(async |container| {
            let name = &container.found.name;
            if service.completes {
                self.completed(container).await
            } else {
                gate.wait(self.client, self.cx, container.id(), name).await.map(drop)
            }
        }))
        .await
        .map(drop)
    }

    async fn completed(&self, container: &Present) -> Result<(), StepError> {
        let name = &container.found.name;
        let gate = self.step.config.health.get(&container.service);
        let began = Instant::now();
        loop {
            let Some(now) = containers::inspect(self.client, container.id()).await? else {
                return Err(StepError::permanent(format!("container {name} is gone before it ended"))
                    .with_hint("find out who removes containers here (`docker events`), then run again"));
            };
            if gate.is_some_and(|gate| began.elapsed() > gate.within.0) || !containers::is_running(&now) {
                let code = now.state.as_ref().and_then(|state| state.exit_code);
                if !containers::is_running(&now) && code == Some(0) {
                    return Ok(());
                }
                let lines = containers::last_lines(self.client, self.cx, container.id(), QUOTED).await;
                return Err(StepError::permanent(format!("job {name} did not end well: {}", state_line(&now)))
                    .with_detail(lines.join("\n"))
                    .with_hint("read the lines of its log in the report; mend the job, then run again"));
            }
            unless_cancelled(self.cx, async {
                sleep(std::time::Duration::from_millis(100)).await;
                Ok(())
            })
            .await?;
        }
    }

    /// Tells whether Compose would find anything left to do.
    fn verify(
        &self,
        intended: &BTreeMap<&str, String>,
        hashes: &BTreeMap<String, String>,
        present: &[Present],
    ) -> Result<(), StepError> {
        for service in &self.undo.services {
            let here = service.among(present);
            let image = intended.get(service.service.as_str());
            let right = |container: &&Present| {
                image.is_none_or(|id| *id == container.found.image)
                    && (self.program.generation == Generation::Two
                        || hashes.get(&service.service) == Some(&container.found.hash))
            };
            if here.len() != service.scale || !here.iter().all(right) {
                return Err(StepError::unknown(format!(
                    "service {} is not as the files say, though Compose has just made it so",
                    service.service
                ))
                .with_hint("somebody else may run Compose on this project: see `docker compose ps`, then try again"));
            }
        }
        Ok(())
    }
}
