//! `docker.compose`: brings services of a Compose project to other images or variables, as one unit.
//!
//! Compose itself makes every container, forward and back, so that its own view stays whole: a plain
//! `up` afterwards finds nothing to do. The engine is asked directly only for what Compose has no
//! command for: to keep images, to put a tag back, to give a container its name back.

mod back;
mod forward;
mod record;
mod undo;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::OnceCell;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::leftovers;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::target::Target;
use upgrade_core::units::Span;

use crate::compose::containers::await_quiet;
use crate::compose::layout;
use crate::compose::program::Compose as Program;
use crate::health::Gate;
use crate::images::{self, Pull};
use crate::reference::ImageReference;
use crate::target::Engine;

pub use undo::{ComposeUndo, ServiceUndo};

/// Says how the containers of one service are replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Replicas {
    /// One after the other, each serving before the next one is stopped. Their numbers go on counting.
    #[default]
    OneByOne,
    /// All at once, as `docker compose up` does. They keep their numbers.
    Together,
}

/// Configures `docker.compose`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ComposeConfig {
    /// The engine. If absent, the one that the `docker` command would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The project's directory: where `docker compose` would be run.
    pub directory: PathBuf,
    /// The project's files, as `--file` names them, in order; the last one takes the new images. If
    /// absent, those that Compose finds by itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<PathBuf>,
    /// The project's name. If absent, the one that Compose gives it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<String>,
    /// Profiles whose services are part of the project.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub profiles: Vec<String>,
    /// The file with the variables, as `--env-file` names it. If absent, `.env` in `directory`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub env_file: Option<PathBuf>,
    /// The services that are brought up to date. If absent: those that `images` and `env` change, and
    /// without both, all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<String>,
    /// New images, by service; written to the override file, where they stay.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub images: BTreeMap<String, String>,
    /// New values of variables in the environment file.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// When images are pulled.
    #[serde(default)]
    pub pull: Pull,
    /// How the containers of a service with several are replaced.
    #[serde(default)]
    pub replicas: Replicas,
    /// When a container counts as serving, by service. One that is not named must run, and be healthy
    /// if it has a health check.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub health: BTreeMap<String, Gate>,
    /// How long a container may take to end before it is killed. If absent, what its service says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_timeout: Option<Span>,
    /// The program and its first arguments. If absent: `docker compose`, else `docker-compose`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compose: Option<Vec<String>>,
}

/// Tells later steps what the services became.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComposeOutput {
    /// The project.
    pub project: String,
    /// The version of Compose that did it.
    pub compose: String,
    /// The services, by name.
    pub services: BTreeMap<String, ServiceOutput>,
}

/// Tells what one service became.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceOutput {
    /// The image, as the files name it.
    pub image: String,
    /// Its id.
    pub image_id: String,
    /// The containers, by name.
    pub containers: Vec<String>,
}

/// Brings services of a Compose project to other images or variables.
#[derive(Debug, Clone)]
pub struct Compose {
    engine: Arc<Engine>,
    config: ComposeConfig,
    /// Asking for the version takes as long as many another command.
    program: OnceCell<Program>,
}

impl Compose {
    /// Makes the step from its configuration; relative paths start from the context's directory, and
    /// those of `files` and `env_file` from `directory`.
    ///
    /// # Errors
    /// The configuration contradicts itself.
    pub fn from_config(mut config: ComposeConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        config.directory = cx.path(&config.directory);
        let directory = config.directory.clone();
        config.files = config.files.into_iter().map(|file| directory.join(file)).collect();
        config.env_file = config.env_file.map(|file| directory.join(file));
        for (service, image) in &config.images {
            if let Err(error) = image.parse::<ImageReference>() {
                return Err(BuildError::new(error.to_string()).at(format!("images.{service}")));
            }
            if !config.services.is_empty() && !config.services.contains(service) {
                return Err(BuildError::new(format!("`{service}` is not one of `services`"))
                    .at(format!("images.{service}"))
                    .with_hint("add it to `services`, or leave `services` out"));
            }
        }
        for (name, value) in &config.env {
            let key = || format!("env.{name}");
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
            if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) || !name.chars().all(plain) {
                return Err(BuildError::new("a variable has letters, digits and `_`").at(key()));
            }
            if name.starts_with("COMPOSE_") {
                return Err(BuildError::new(format!("{name} says which project this is"))
                    .at(key())
                    .with_hint("use `project`, `files` or `profiles`"));
            }
            let special = |c: char| c.is_control() || matches!(c, '\'' | '"' | '\\' | '$' | '#' | '`');
            if value.contains(special) || value.trim() != value {
                return Err(BuildError::new("the versions of Compose read such a value in different ways")
                    .at(key())
                    .with_hint(
                        "leave out quotes, `$`, `#`, backslashes and spaces at the ends; host.config writes others",
                    ));
            }
        }
        for (service, gate) in &config.health {
            gate.validate().map_err(|error| BuildError {
                key: error.key.map(|key| key.replacen("health", &format!("health.{service}"), 1)),
                ..error
            })?;
        }
        if config.compose.as_ref().is_some_and(Vec::is_empty) {
            return Err(BuildError::new("there is no program")
                .at("compose")
                .with_hint("write `[docker, compose]`, or leave it out"));
        }
        let engine = Engine::named(config.target.as_deref(), cx)?;
        Ok(Self { engine, config, program: OnceCell::new() })
    }

    /// Finds the program, and the files that are there now.
    async fn program(&self, cx: &Context) -> Result<Program, StepError> {
        let config = &self.config;
        let find = || Program::find(cx, &self.engine, config.compose.as_deref(), &config.directory);
        let mut program = self.program.get_or_try_init(find).await?.clone();
        program.files = self.files_there();
        program.env_file = config.env_file.clone();
        program.profiles = config.profiles.clone();
        Ok(program)
    }

    /// The last file, which takes the images, need not be there before the first upgrade.
    fn files_there(&self) -> Vec<PathBuf> {
        let all = self.config.files.iter();
        all.enumerate()
            .filter(|(at, file)| *at == 0 || *at + 1 < self.config.files.len() || file.is_file())
            .map(|(_, file)| file.clone())
            .collect()
    }

    fn env_file(&self) -> PathBuf {
        self.config.env_file.clone().unwrap_or_else(|| self.config.directory.join(".env"))
    }

    fn override_file(&self, environment: Option<&str>) -> Result<PathBuf, StepError> {
        match self.config.files.last() {
            Some(last) => Ok(last.clone()),
            None => layout::override_file(&self.config.directory, environment),
        }
    }

    fn gate(&self, service: &str) -> Gate {
        self.config.health.get(service).cloned().unwrap_or_default()
    }

    fn grace(&self) -> Option<std::time::Duration> {
        self.config.stop_timeout.map(|span| span.0)
    }
}

#[async_trait]
impl Step for Compose {
    const KIND: &'static str = "docker.compose";
    type Undo = ComposeUndo;
    type Output = ComposeOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<ComposeUndo, ComposeOutput>, StepError> {
        record::prepare(self, cx).await
    }

    async fn apply(&self, cx: &Context, undo: &ComposeUndo) -> Result<ComposeOutput, StepError> {
        forward::apply(self, cx, undo).await
    }

    async fn settle(&self, cx: &Context, undo: &ComposeUndo) -> Result<(), StepError> {
        leftovers::end(cx).await?;
        let client = self.engine.connect_for(cx, std::time::Duration::from_secs(600)).await?;
        await_quiet(&client, &undo.project).await
    }

    async fn commit(&self, cx: &Context, undo: &ComposeUndo) -> Result<(), StepError> {
        for file in &undo.files {
            file.sweep(cx).await?;
        }
        let client = self.engine.connect(cx).await?;
        for image in undo.images_found() {
            images::let_go(&client, cx, image).await?;
        }
        Ok(())
    }

    fn definition(&self) -> Value {
        let mut definition = serde_json::to_value(&self.config).unwrap_or_default();
        if let Some(definition) = definition.as_object_mut() {
            definition.remove("stop_timeout");
        }
        definition
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![self.engine.resource("compose", &self.config.directory.display().to_string())]
    }
}

#[async_trait]
impl Rollback for Compose {
    async fn rollback(
        &self,
        cx: &Context,
        undo: &ComposeUndo,
        _output: Option<&ComposeOutput>,
    ) -> Result<(), StepError> {
        back::rollback(self, cx, undo).await
    }
}
