//! `prepare`: what is there, what would become of it, and what undoing it needs.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use bollard::Docker;
use bollard::query_parameters::ListNetworksOptionsBuilder;
use futures_util::try_join;
use upgrade_core::context::{Context, OnConflict, blocking};
use upgrade_core::error::StepError;
use upgrade_core::step::{Change, Effect, Prepared};

use super::{Compose, ComposeOutput, ComposeUndo, Replicas, ServiceOutput, ServiceUndo};
use crate::compose::containers::{Present, of_project};
use crate::compose::edit;
use crate::compose::kept_file::{self, FileUndo};
use crate::compose::layout;
use crate::compose::model::Model;
use crate::compose::program::{Compose as Program, Generation};
use crate::error::{Doing as _, unless_cancelled};
use crate::images::{self, Pull};
use crate::naming::mark;
use crate::reference::ImageReference;

pub(super) async fn prepare(step: &Compose, cx: &Context) -> Result<Prepared<ComposeUndo, ComposeOutput>, StepError> {
    let directory = &step.config.directory;
    if !directory.is_dir() {
        if cx.is_dry_run() {
            return Ok(not_there_yet(directory));
        }
        return Err(StepError::permanent(format!("there is no directory {}", directory.display()))
            .with_hint("correct `directory`, or make it in an earlier step"));
    }
    let client = step.engine.connect(cx).await?;
    let program = step.program(cx).await?;
    // Compose takes long to start: it is asked for both at once.
    let (survey, hashes) =
        try_join!(Survey::take(step, cx, &program), program.hashes(cx, step.config.project.as_deref()))?;
    let present = of_project(&client, &survey.project).await?;
    let mut services = Vec::new();
    let mut tags = BTreeMap::new();
    for name in &survey.order {
        let found: Vec<&Present> = present.iter().filter(|container| container.service == *name).collect();
        let service = &survey.after.services[name];
        let tagged =
            service.image.iter().cloned().chain(found.iter().map(|container| container.found.reference.clone()));
        for reference in tagged.filter(|text| is_tag(text)) {
            let id = images::local(&client, &reference).await?.and_then(|image| image.id);
            tags.insert(reference, id);
        }
        refuse_drift(cx, &program, name, &found, hashes.get(name), &tags)?;
        let described = if found.is_empty() {
            None
        } else {
            let all: Vec<_> = found.iter().map(|container| container.normalised()).collect();
            Some(cx.seal(&serde_json::to_vec(&all).unwrap_or_default()).await?)
        };
        services.push(ServiceUndo {
            service: name.clone(),
            image: service.image.clone().filter(|_| !service.builds || step.config.images.contains_key(name)),
            platform: service.platform.clone(),
            scale: survey.scale(name, found.len()),
            completes: service.completes,
            lives_in: !service.lives_in.is_empty(),
            after: Some(survey.after.all_before(service)),
            containers: found.iter().map(|container| container.found.clone()).collect(),
            described,
        });
    }
    let files = survey.files(cx).await?;
    if files.is_empty() && is_done(step, cx, &client, &services, &hashes).await? {
        let output = output(&program, &survey.project, &services, &present);
        return Ok(Prepared::unchanged(output, "the containers are as the project's files say"));
    }
    let networks = networks(&client, &survey.project).await?;
    let changes = changes(step, &survey, &services, &files);
    Ok(Prepared::change(ComposeUndo { project: survey.project, files, services, tags, networks }, changes))
}

/// What the files say before and after, and which services that concerns.
struct Survey {
    project: String,
    before: Model,
    after: Model,
    order: Vec<String>,
    /// The files that change, with what they are to hold.
    texts: Vec<(PathBuf, String)>,
}

impl Survey {
    async fn take(step: &Compose, cx: &Context, program: &Program) -> Result<Self, StepError> {
        let config = &step.config;
        let env_file = step.env_file();
        let environment = kept_file::read(&env_file).await?;
        let mut texts = Vec::new();
        let variables = (!config.env.is_empty())
            .then(|| edit::with_variables(environment.as_deref(), &config.env))
            .filter(|text| environment.as_deref() != Some(text));
        let before = program.model(cx, None);
        let (before, mut after) = match variables {
            Some(text) => {
                let models = try_join!(before, preview(cx, program, &text))?;
                texts.push((env_file, text));
                models
            }
            None => before.await.map(|before| (before.clone(), before))?,
        };
        for name in config.images.keys().chain(&config.services).chain(config.health.keys()) {
            if !after.services.contains_key(name) {
                return Err(StepError::permanent(format!("the project has no service `{name}`")).with_hint(
                    "correct its name, or name its profile in `profiles`: see `docker compose config --services`",
                ));
            }
        }
        if !config.images.is_empty() {
            let path = step.override_file(environment.as_deref())?;
            let found = kept_file::read(&path).await?;
            let text = edit::with_images(found.as_deref(), &config.images).map_err(|error| {
                StepError::permanent(format!("{} is not changed: {error}", path.display()))
                    .with_hint("write the service as a block: its name on one line, `image: …` on another, further in")
            })?;
            if found.as_deref() != Some(&text) {
                texts.push((path, text));
            }
            after = after.with_images(&config.images);
        }
        let chosen: BTreeSet<String> = if !config.services.is_empty() {
            config.services.iter().cloned().collect()
        } else if config.images.is_empty() && config.env.is_empty() {
            after.active(&config.profiles)
        } else {
            let active = after.active(&config.profiles);
            let differing = after.differing(&before).into_iter().filter(|name| active.contains(name));
            config.images.keys().cloned().chain(differing).collect()
        };
        let name = config.project.clone().or_else(|| before.name.clone());
        let project = name.unwrap_or_else(|| layout::project_name(&config.directory, environment.as_deref()));
        Ok(Self { project, order: after.in_order(chosen), before, after, texts })
    }

    async fn files(&self, cx: &Context) -> Result<Vec<FileUndo>, StepError> {
        let mut files = Vec::new();
        for (path, text) in &self.texts {
            files.push(FileUndo::record(cx, path, text).await?);
        }
        Ok(files)
    }

    /// As many as there are: somebody may have asked for more than the files say. Unless what the
    /// files say changes.
    fn scale(&self, name: &str, found: usize) -> usize {
        let after = self.after.services[name].scale;
        let before = self.before.services.get(name).map(|service| service.scale);
        if found > 0 && before == Some(after) { found } else { after }
    }
}

/// Asks Compose what the project means with another environment file, before that is written.
async fn preview(cx: &Context, program: &Program, text: &str) -> Result<Model, StepError> {
    let directory = std::env::temp_dir().join(format!("upgrade-compose-{}-{}", std::process::id(), mark(cx)));
    let (at, text) = (directory.clone(), text.to_owned());
    let written = blocking(move || {
        // What an earlier attempt of ours left; anything else makes the next line fail.
        let _ = std::fs::remove_dir_all(&at);
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&at)
            .and_then(|()| {
                let path = at.join("env");
                let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
                std::io::Write::write_all(&mut file, text.as_bytes())?;
                Ok(path)
            })
            .map_err(|error| {
                StepError::transient(format!("a scratch file in {} cannot be written", std::env::temp_dir().display()))
                    .with_cause(&error)
                    .with_hint("free space there, or let TMPDIR name another directory")
            })
    });
    let model = match written.await {
        Ok(path) => program.model(cx, Some(&path)).await,
        Err(error) => Err(error),
    };
    blocking(move || {
        // A scratch file that stays does no harm.
        let _ = std::fs::remove_dir_all(&directory);
        Ok(())
    })
    .await?;
    model
}

/// Tells whether a reference is a tag, which may come to name another image.
fn is_tag(text: &str) -> bool {
    !text.starts_with("sha256:") && text.parse::<ImageReference>().is_ok_and(|reference| reference.digest().is_none())
}

/// Refuses a service whose containers are not as the files say: Compose could not make them again.
///
/// Version 1 includes the image's id in its hash, so that a tag that was pulled meanwhile explains a
/// difference; what `config --hash` of version 2 prints is no promise about its containers.
fn refuse_drift(
    cx: &Context,
    program: &Program,
    name: &str,
    found: &[&Present],
    hash: Option<&String>,
    tags: &BTreeMap<String, Option<String>>,
) -> Result<(), StepError> {
    if program.generation == Generation::Two || cx.on_conflict() == OnConflict::Overwrite {
        return Ok(());
    }
    let drifted = found.iter().find(|container| {
        let moved = tags.get(&container.found.reference).is_some_and(|id| id.as_ref() != Some(&container.found.image));
        hash != Some(&container.found.hash) && !moved
    });
    match drifted {
        None => Ok(()),
        Some(container) => Err(StepError::permanent(format!(
            "container {} is not as the files of the project say: an undo could not make it again",
            container.found.name
        ))
        .with_hint(format!(
            "run `{} up --detach {name}` first, with the version of Compose that made it; or set `on_conflict: overwrite`",
            program.argv.join(" ")
        ))),
    }
}

/// Tells whether there is nothing to do.
async fn is_done(
    step: &Compose,
    cx: &Context,
    client: &Docker,
    services: &[ServiceUndo],
    hashes: &BTreeMap<String, String>,
) -> Result<bool, StepError> {
    for service in services {
        let may_have_ended = service.completes || service.was_stopped();
        let current = service.containers.len() == service.scale
            && service.containers.iter().all(|container| {
                hashes.get(&service.service) == Some(&container.hash) && (container.running || may_have_ended)
            });
        if !current {
            return Ok(false);
        }
        let Some(image) = &service.image else { continue };
        let local = images::local(client, image).await?;
        let id = local.as_ref().and_then(|image| image.id.as_deref());
        if service.containers.iter().any(|container| Some(container.image.as_str()) != id) {
            return Ok(false);
        }
        if step.config.pull == Pull::Always && is_tag(image) {
            let digests = local.and_then(|image| image.repo_digests).unwrap_or_default();
            let reference = reference(image)?;
            let credentials = step.engine.credentials(cx, reference.registry()).await?;
            let offered = unless_cancelled(cx, async {
                let answer = client.inspect_registry_image(image, credentials).await;
                Ok(answer.doing(|| format!("asking the registry for image {image}"))?)
            })
            .await?;
            let digest = offered.descriptor.digest.unwrap_or_default();
            if !digests.iter().any(|known| known.ends_with(&digest)) {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

pub(super) fn reference(image: &str) -> Result<ImageReference, StepError> {
    image.parse().map_err(|error| {
        StepError::permanent("the project's files name an image that there cannot be")
            .with_cause(&error)
            .with_hint("correct it in the project's files")
    })
}

/// Lists the networks of a project.
pub(super) async fn networks(client: &Docker, project: &str) -> Result<BTreeSet<String>, StepError> {
    let filters = HashMap::from([("label".to_owned(), vec![format!("com.docker.compose.project={project}")])]);
    let options = ListNetworksOptionsBuilder::new().filters(&filters).build();
    let all = client.list_networks(Some(options)).await.doing(|| format!("listing the networks of {project}"))?;
    Ok(all.into_iter().filter_map(|network| network.name).collect())
}

/// Says what the services are.
pub(super) fn output(program: &Program, project: &str, services: &[ServiceUndo], present: &[Present]) -> ComposeOutput {
    let of = |service: &ServiceUndo| {
        let all = service.among(present);
        let first = all.first().map(|container| &container.found);
        ServiceOutput {
            image: first.map(|found| found.reference.clone()).unwrap_or_default(),
            image_id: first.map(|found| found.image.clone()).unwrap_or_default(),
            containers: all.iter().map(|container| container.found.name.clone()).collect(),
        }
    };
    ComposeOutput {
        project: project.to_owned(),
        compose: program.version.clone(),
        services: services.iter().map(|service| (service.service.clone(), of(service))).collect(),
    }
}

fn not_there_yet(directory: &Path) -> Prepared<ComposeUndo, ComposeOutput> {
    let undo = ComposeUndo {
        project: String::new(),
        files: Vec::new(),
        services: Vec::new(),
        tags: BTreeMap::new(),
        networks: BTreeSet::new(),
    };
    let change = Change::new(Effect::Modify, format!("project in {}", directory.display()))
        .with_summary("the directory is not there yet");
    Prepared::change(undo, [change])
}

fn changes(step: &Compose, survey: &Survey, services: &[ServiceUndo], files: &[FileUndo]) -> Vec<Change> {
    let mut changes = Vec::new();
    for file in files {
        let is_environment = file.path().file_name() == step.env_file().file_name();
        let names = if is_environment {
            step.config.env.keys().cloned().collect::<Vec<_>>().join(", ")
        } else {
            let images = step.config.images.iter().map(|(service, image)| format!("{service}: {image}"));
            images.collect::<Vec<_>>().join(", ")
        };
        let summary = if is_environment { format!("sets {names}") } else { format!("names the images: {names}") };
        changes.push(Change::new(Effect::Modify, file.path().display().to_string()).with_summary(summary));
    }
    for service in services {
        let subject = format!("service {} of {}", service.service, survey.project);
        let image = survey.after.services[&service.service].image.clone().unwrap_or_else(|| "its own build".into());
        let Some(first) = service.containers.first() else {
            let summary = format!("makes {} of {image}", count(service.scale));
            changes.push(Change::new(Effect::Create, subject).with_summary(summary));
            continue;
        };
        let way = match (service.scale, step.config.replicas) {
            _ if service.was_stopped() => ", not started",
            (2.., Replicas::OneByOne) => ", one by one",
            _ => "",
        };
        let image = if first.reference == image { image } else { format!("{} -> {image}", first.reference) };
        changes.push(
            Change::new(Effect::Modify, subject)
                .with_summary(format!("{image}: {}{way}", count(service.scale)))
                .undo_loses("what its containers write outside of volumes"),
        );
    }
    changes
}

fn count(containers: usize) -> String {
    if containers == 1 { "1 container".into() } else { format!("{containers} containers") }
}
