//! `docker.run`: runs a command in a container of its own, and another one to undo it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;
use bollard::Docker;
use bollard::query_parameters::InspectNetworkOptions;
use schemars::JsonSchema;
use secrecy::ExposeSecret;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::AnyStep;
use upgrade_core::context::{Context, Direction};
use upgrade_core::error::StepError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Change, Effect, Prepared, Step};
use upgrade_core::target::Target;
use upgrade_core::text_or_secret::TextOrSecret;
use upgrade_core::undoable::{OptionalRollback, Undoable};

use crate::error::{Doing, found};
use crate::images::{self, Pull};
use crate::mounts::MountSpec;
use crate::oneoff::{OneOff, Spec, Standing, is_mode};
use crate::reference::ImageReference;
use crate::target::Engine;

/// Configures `docker.run`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// The engine. Default: the one that the `docker` command would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The image.
    pub image: ImageReference,
    /// The platform, where the engine emulates others: `linux/arm64`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// When the image is pulled.
    #[serde(default)]
    pub pull: Pull,
    /// The command and its arguments. Default: the image's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// What the command is given to. Default: the image's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// Variables of its environment: texts, or references to secrets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, TextOrSecret>,
    /// The networks that it is connected to. Default: the engine's own bridge.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<String>,
    /// Volumes and directories within it: `VOLUME:PATH`, `/DIRECTORY:PATH:ro`. They must exist.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<MountSpec>,
    /// The user that it runs as. Default: the image's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The working directory. Default: the image's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    /// The exit codes that mean success.
    #[serde(default = "zero")]
    pub success: BTreeSet<i64>,
    /// The container that undoes it. Must cope with a command that did all, part or nothing, and
    /// with being run twice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undo: Option<UndoConfig>,
    /// States that the command changes nothing, so that there is nothing to undo.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub no_effect: bool,
    /// A command that exits with 0, in such a container, once the work is done: then it is not run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unless: Vec<String>,
}

/// Configures the container that undoes another one; all else is as in that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct UndoConfig {
    /// The command and its arguments.
    pub command: Vec<String>,
    /// What the command is given to. Default: as in the step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// The image. Default: the step's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageReference>,
}

fn zero() -> BTreeSet<i64> {
    BTreeSet::from([0])
}

/// Runs a command in a container of its own: what cannot be undone, or [`UndoableRun`].
///
/// The container is the record of its own run: found again after a crash, awaited, and never
/// started a second time. It is removed at commit.
#[derive(Debug, Clone)]
pub struct Run {
    config: RunConfig,
    engine: Arc<Engine>,
}

/// Holds a [`Run`] that can be undone: by another container, or because it changes nothing.
pub type UndoableRun = Undoable<Run>;

/// Holds what undoing a command needs, whatever the tags lead to by then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunUndo {
    /// The id of the image that runs.
    pub image_id: String,
    /// What undoes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undo: Option<UndoCommand>,
}

/// Names the command that undoes another one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UndoCommand {
    /// The id of the image.
    pub image_id: String,
    /// The command.
    pub command: Vec<String>,
    /// What it is given to; empty for the image's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
}

/// Tells how the command ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunOutput {
    /// The exit code; absent if the command did not have to run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i64>,
    /// What it printed, trimmed, at most the last 64 KiB, secrets masked.
    pub stdout: String,
    /// The end of what it printed as errors, likewise.
    pub stderr: String,
    /// The id of the image.
    pub image_id: String,
}

impl Run {
    /// Makes the step from its configuration, without regard to whether it can be undone.
    ///
    /// # Errors
    /// There is no such target, or keys contradict each other.
    pub fn from_config(config: RunConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let engine = Engine::named(config.target.as_deref(), cx)?;
        if config.no_effect && config.undo.is_some() {
            return Err(BuildError::new("a command without effect has nothing to undo")
                .at("no_effect")
                .with_hint("drop `no_effect`, or drop `undo`"));
        }
        if config.undo.as_ref().is_some_and(|undo| undo.command.is_empty()) {
            return Err(BuildError::new("there is no command")
                .at("undo.command")
                .with_hint("write `command: [program, argument]`"));
        }
        if config.success.is_empty() {
            return Err(BuildError::new("no exit code means success").at("success").with_hint("drop `success` for 0"));
        }
        if config.networks.len() > 1 && config.networks.iter().any(|network| is_mode(network)) {
            return Err(BuildError::new("`none`, `host` and `bridge` stand alone")
                .at("networks")
                .with_hint("name networks of your own (`docker network ls`), or one of these by itself"));
        }
        if let Some(name) = config.env.keys().find(|name| name.is_empty() || name.contains(['=', '\0'])) {
            return Err(BuildError::new(format!("`{}` is not the name of a variable", name.escape_debug())).at("env"));
        }
        Ok(Self { config, engine })
    }

    /// Makes the step from its configuration: reversible with `undo` or `no_effect`, irreversible
    /// without either.
    ///
    /// # Errors
    /// As [`Run::from_config`].
    pub fn any_from_config(config: RunConfig, cx: &BuildContext) -> Result<AnyStep, BuildError> {
        Self::from_config(config, cx).map(AnyStep::optionally_reversible)
    }

    async fn spec(
        &self,
        cx: &Context,
        image: &str,
        entrypoint: &[String],
        command: &[String],
    ) -> Result<Spec, StepError> {
        let mut env = Vec::new();
        for (name, value) in &self.config.env {
            env.push(format!("{name}={}", value.resolve(cx).await?.expose_secret()));
        }
        Ok(Spec {
            image: image.to_owned(),
            command: command.to_vec(),
            entrypoint: entrypoint.to_vec(),
            env,
            networks: self.config.networks.clone(),
            volumes: self.config.volumes.clone(),
            user: self.config.user.clone(),
            directory: self.config.directory.clone(),
        })
    }

    /// Obtains an image; in a dry run, only looks whether it is there.
    async fn image(&self, client: &Docker, cx: &Context, image: &ImageReference) -> Result<Option<String>, StepError> {
        if cx.is_dry_run() {
            return images::local(client, &image.to_string()).await?.as_ref().map(images::id_of).transpose();
        }
        let platform = self.config.platform.as_deref();
        let image = images::obtain(&self.engine, client, cx, image, platform, self.config.pull).await?;
        images::id_of(&image).map(Some)
    }

    /// Refuses what the engine would make itself, or find missing only when the command is started.
    async fn require_surroundings(&self, client: &Docker) -> Result<(), StepError> {
        for network in self.config.networks.iter().filter(|network| !is_mode(network)) {
            let answer = client.inspect_network(network, None::<InspectNetworkOptions>).await;
            if found(answer.doing(|| format!("looking at network {network}")))?.is_none() {
                return Err(StepError::permanent(format!("there is no network {network}"))
                    .with_hint("make it, or correct `networks` (`docker network ls`)"));
            }
        }
        for volume in self.config.volumes.iter().filter_map(MountSpec::volume) {
            let answer = client.inspect_volume(volume).await;
            if found(answer.doing(|| format!("looking at volume {volume}")))?.is_none() {
                return Err(StepError::permanent(format!("there is no volume {volume}"))
                    .with_hint("make it (`docker volume create`), or correct `volumes` (`docker volume ls`)"));
            }
        }
        Ok(())
    }

    /// Asks `unless`, in a container that is removed at once.
    async fn already(&self, client: &Docker, cx: &Context, image: &str) -> Result<bool, StepError> {
        if self.config.unless.is_empty() {
            return Ok(false);
        }
        let asked = OneOff::new(client, cx, "unless", "`unless`");
        // An answer from before a crash is an old one.
        asked.remove().await?;
        let spec = self.spec(cx, image, &self.config.entrypoint, &self.config.unless).await?;
        let ended = asked.run(&spec).await;
        asked.remove().await?;
        Ok(ended?.code == 0)
    }

    fn line(&self) -> String {
        line(&self.config.image.to_string(), &self.config.entrypoint, &self.config.command)
    }
}

fn line(image: &str, entrypoint: &[String], command: &[String]) -> String {
    std::iter::once(image).chain(entrypoint.iter().chain(command).map(String::as_str)).collect::<Vec<_>>().join(" ")
}

fn command_of<'a>(client: &'a Docker, cx: &'a Context) -> OneOff<'a> {
    OneOff::new(client, cx, "run", "the command")
}

fn undo_of<'a>(client: &'a Docker, cx: &'a Context) -> OneOff<'a> {
    OneOff::new(client, cx, "undo", "the undo")
}

async fn let_go(client: &Docker, cx: &Context, undo: &RunUndo) -> Result<(), StepError> {
    for image in ids(undo) {
        images::let_go(client, cx, image).await?;
    }
    Ok(())
}

fn ids(undo: &RunUndo) -> BTreeSet<&str> {
    std::iter::once(&*undo.image_id).chain(undo.undo.as_ref().map(|undo| &*undo.image_id)).collect()
}

#[async_trait]
impl Step for Run {
    const KIND: &'static str = "docker.run";
    type Undo = RunUndo;
    type Output = RunOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<RunUndo, RunOutput>, StepError> {
        let config = &self.config;
        let client = self.engine.connect(cx).await?;
        let image = self.image(&client, cx, &config.image).await?;
        if !cx.is_dry_run() {
            self.require_surroundings(&client).await?;
        }
        if let Some(image_id) = &image {
            match self.already(&client, cx, image_id).await {
                Ok(true) => {
                    let output = RunOutput {
                        exit_code: None,
                        stdout: String::new(),
                        stderr: String::new(),
                        image_id: image_id.clone(),
                    };
                    return Ok(Prepared::unchanged(output, "`unless` says so"));
                }
                Ok(false) => {}
                // What it asks may not be there before the steps that the plan has not run.
                Err(_) if cx.is_dry_run() => {}
                Err(error) => return Err(error),
            }
        }
        let undo = match &config.undo {
            None => None,
            Some(undo) => Some(UndoCommand {
                image_id: match &undo.image {
                    Some(image) => self.image(&client, cx, image).await?,
                    None => image.clone(),
                }
                .unwrap_or_default(),
                command: undo.command.clone(),
                entrypoint: undo.entrypoint.clone().unwrap_or_else(|| config.entrypoint.clone()),
            }),
        };
        let change = Change::new(Effect::Run, self.line());
        let change = match &config.undo {
            Some(undo) => change.with_summary(format!("undone by `{}`", undo.command.join(" "))),
            None if config.no_effect => change.with_summary("changes nothing"),
            None => change,
        };
        Ok(Prepared::change(RunUndo { image_id: image.unwrap_or_default(), undo }, [change]))
    }

    async fn apply(&self, cx: &Context, undo: &RunUndo) -> Result<RunOutput, StepError> {
        let client = self.engine.connect(cx).await?;
        for image in ids(undo) {
            images::keep(&client, cx, image).await?;
        }
        let config = &self.config;
        let spec = self.spec(cx, &undo.image_id, &config.entrypoint, &config.command).await?;
        let command = command_of(&client, cx);
        let ended = command.run(&spec).await?;
        if !config.success.contains(&ended.code) {
            command.remove().await?;
            return Err(ended.failure(&self.line()));
        }
        Ok(RunOutput {
            exit_code: Some(ended.code),
            stdout: ended.printed.stdout,
            stderr: ended.printed.stderr,
            image_id: undo.image_id.clone(),
        })
    }

    async fn settle(&self, cx: &Context, _undo: &RunUndo) -> Result<(), StepError> {
        let client = self.engine.connect(cx).await?;
        OneOff::new(&client, cx, "unless", "`unless`").remove().await?;
        // Forward, the command goes on to its end, which `apply` awaits: ended, it had to run again.
        if cx.direction() == Direction::Back {
            command_of(&client, cx).end().await?;
        }
        Ok(())
    }

    async fn commit(&self, cx: &Context, undo: &RunUndo) -> Result<(), StepError> {
        let client = self.engine.connect(cx).await?;
        command_of(&client, cx).remove().await?;
        let_go(&client, cx, undo).await
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        let written = self.config.volumes.iter().filter(|volume| !volume.is_read_only());
        let volumes = written.filter_map(MountSpec::volume).map(|volume| self.engine.resource("volume", volume));
        // Two migrations of one application at a time are never meant.
        std::iter::once(self.engine.resource("run of", &self.config.image.name())).chain(volumes).collect()
    }
}

#[async_trait]
impl OptionalRollback for Run {
    fn irreversible_because(&self) -> Option<&'static str> {
        (self.config.undo.is_none() && !self.config.no_effect).then_some("no `undo` container is given")
    }

    async fn rollback(&self, cx: &Context, undo: &RunUndo, _: Option<&RunOutput>) -> Result<(), StepError> {
        let client = self.engine.connect(cx).await?;
        let (command, undoing) = (command_of(&client, cx), undo_of(&client, cx));
        let never_ran = matches!(command.standing().await?, Standing::NeverRan(_));
        // Gone before the undo begins: a start under way finds nothing that it could start.
        command.end().await?;
        command.remove().await?;
        if let Some(with) = undo.undo.as_ref().filter(|_| !never_ran) {
            let spec = self.spec(cx, &with.image_id, &with.entrypoint, &with.command).await?;
            let ended = undoing.run(&spec).await?;
            if ended.code != 0 {
                undoing.remove().await?;
                return Err(ended.failure(&line(&with.image_id, &with.entrypoint, &with.command)));
            }
        }
        let_go(&client, cx, undo).await?;
        // The last: as long as it stands, a call that is repeated does not undo twice.
        undoing.remove().await
    }
}
