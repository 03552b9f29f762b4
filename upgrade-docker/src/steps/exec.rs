//! `docker.exec`: runs a command inside a running container, and another one to undo it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;
use bollard::Docker;
use bollard::models::ContainerInspectResponse;
use schemars::JsonSchema;
use secrecy::ExposeSecret;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::AnyStep;
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Change, Effect, Prepared, Step};
use upgrade_core::target::Target;
use upgrade_core::text_or_secret::TextOrSecret;
use upgrade_core::undoable::{OptionalRollback, Undoable};

use crate::containers::{self, id_of, is_running, state_line};
use crate::inside::{Inside, Program, is_local};
use crate::target::Engine;

/// Configures `docker.exec`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecConfig {
    /// The engine. Default: the one that the `docker` command would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The container, which must run.
    pub container: String,
    /// The program and its arguments; no shell reads them.
    pub command: Vec<String>,
    /// Variables added to its environment: texts, or references to secrets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, TextOrSecret>,
    /// The user that it runs as. Default: the container's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The working directory. Default: the container's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    /// The exit codes that mean success.
    #[serde(default = "zero")]
    pub success: BTreeSet<i64>,
    /// The program and its arguments that undo it, in the same container. Must cope with a command
    /// that did all, part or nothing, and with being run twice.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub undo: Vec<String>,
    /// States that the command changes nothing, so that there is nothing to undo.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub no_effect: bool,
    /// A command that exits with 0, in the container, once the work is done: then it is not run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unless: Vec<String>,
}

fn zero() -> BTreeSet<i64> {
    BTreeSet::from([0])
}

/// Runs a command inside a running container: what cannot be undone, or [`UndoableExec`].
///
/// The command carries the step's marker in its environment, so that one that a crash left running
/// is found and ended before the step goes on.
#[derive(Debug, Clone)]
pub struct Exec {
    config: ExecConfig,
    engine: Arc<Engine>,
}

/// Holds an [`Exec`] that can be undone: by another command, or because it changes nothing.
pub type UndoableExec = Undoable<Exec>;

/// Holds what undoing a command needs, whatever the pipeline says by then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecUndo {
    /// The id of the container.
    pub container_id: String,
    /// The command that undoes it; none if it cannot be undone, or has no effect.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub undo: Vec<String>,
}

/// Tells how the command ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecOutput {
    /// The exit code; absent if the command did not have to run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i64>,
    /// What it printed, trimmed, at most the last 64 KiB, secrets masked.
    pub stdout: String,
    /// The end of what it printed as errors, likewise.
    pub stderr: String,
}

impl ExecOutput {
    fn not_run() -> Self {
        Self { exit_code: None, stdout: String::new(), stderr: String::new() }
    }
}

impl Exec {
    /// Makes the step from its configuration, without regard to whether it can be undone.
    ///
    /// # Errors
    /// There is no such target, or keys contradict each other.
    pub fn from_config(config: ExecConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let engine = Engine::named(config.target.as_deref(), cx)?;
        if config.container.is_empty() {
            return Err(BuildError::new("there is no container").at("container"));
        }
        if config.command.is_empty() {
            return Err(BuildError::new("there is no command")
                .at("command")
                .with_hint("write `command: [program, argument]`"));
        }
        for (key, argv) in [("command", &config.command), ("undo", &config.undo), ("unless", &config.unless)] {
            if argv.first().is_some_and(String::is_empty) {
                return Err(BuildError::new("the program has no name").at(key));
            }
        }
        if config.no_effect && !config.undo.is_empty() {
            return Err(BuildError::new("a command without effect has nothing to undo")
                .at("no_effect")
                .with_hint("drop `no_effect`, or drop `undo`"));
        }
        if config.success.is_empty() {
            return Err(BuildError::new("no exit code means success").at("success").with_hint("drop `success` for 0"));
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
    /// As [`Exec::from_config`].
    pub fn any_from_config(config: ExecConfig, cx: &BuildContext) -> Result<AnyStep, BuildError> {
        Self::from_config(config, cx).map(AnyStep::optionally_reversible)
    }

    async fn program(&self, cx: &Context, argv: &[String]) -> Result<Program, StepError> {
        let mut env = Vec::new();
        for (name, value) in &self.config.env {
            env.push(format!("{name}={}", value.resolve(cx).await?.expose_secret()));
        }
        Ok(Program {
            argv: argv.to_vec(),
            env,
            user: self.config.user.clone(),
            directory: self.config.directory.clone(),
        })
    }

    /// Returns the container, which must be there and run.
    async fn container(&self, client: &Docker) -> Result<ContainerInspectResponse, StepError> {
        let name = &self.config.container;
        let Some(container) = containers::inspect(client, name).await? else {
            return Err(StepError::permanent(format!("there is no container {name}"))
                .with_hint("start it, or correct its name (`docker ps --all`)"));
        };
        if !is_running(&container) {
            return Err(StepError::permanent(format!(
                "container {name} does not run: it is {}",
                state_line(&container)
            ))
            .with_hint(format!("start it (`docker start {name}`); `docker.run` needs no container that runs")));
        }
        Ok(container)
    }

    /// Returns the container if it is the one that was found.
    async fn same_container(&self, client: &Docker, cx: &Context, undo: &ExecUndo) -> Result<String, StepError> {
        let container = self.container(client).await?;
        let id = id_of(&container);
        if id == undo.container_id || cx.on_conflict() == OnConflict::Overwrite {
            return Ok(id.to_owned());
        }
        let short = |id: &str| id.chars().take(12).collect::<String>();
        Err(StepError::conflict(Conflict {
            subject: format!("container {}", self.config.container),
            found: short(&undo.container_id),
            intended: short(&undo.container_id),
            present: short(id),
        }))
    }

    fn inside<'a>(&self, client: &'a Docker, cx: &'a Context, id: &'a str) -> Inside<'a> {
        Inside { client, cx, id, local: is_local(&self.engine) }
    }

    async fn already(&self, client: &Docker, cx: &Context, id: &str) -> Result<bool, StepError> {
        if self.config.unless.is_empty() {
            return Ok(false);
        }
        let program = self.program(cx, &self.config.unless).await?;
        Ok(self.inside(client, cx, id).run(&program).await?.code == 0)
    }
}

#[async_trait]
impl Step for Exec {
    const KIND: &'static str = "docker.exec";
    type Undo = ExecUndo;
    type Output = ExecOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<ExecUndo, ExecOutput>, StepError> {
        let config = &self.config;
        let client = self.engine.connect(cx).await?;
        let container_id = match self.container(&client).await {
            Ok(container) => id_of(&container).to_owned(),
            // An earlier step may start it.
            Err(_) if cx.is_dry_run() => String::new(),
            Err(error) => return Err(error),
        };
        if !container_id.is_empty() {
            match self.already(&client, cx, &container_id).await {
                Ok(true) => return Ok(Prepared::unchanged(ExecOutput::not_run(), "`unless` says so")),
                Ok(false) => {}
                Err(_) if cx.is_dry_run() => {}
                Err(error) => return Err(error),
            }
        }
        let change = Change::new(Effect::Run, format!("{}: {}", config.container, config.command.join(" ")));
        let change = match config.undo.is_empty() {
            false => change.with_summary(format!("undone by `{}`", config.undo.join(" "))),
            true if config.no_effect => change.with_summary("changes nothing"),
            true => change,
        };
        Ok(Prepared::change(ExecUndo { container_id, undo: config.undo.clone() }, [change]))
    }

    async fn apply(&self, cx: &Context, undo: &ExecUndo) -> Result<ExecOutput, StepError> {
        let client = self.engine.connect(cx).await?;
        let id = self.same_container(&client, cx, undo).await?;
        // An earlier call may have finished without anybody seeing its end.
        if self.already(&client, cx, &id).await? {
            return Ok(ExecOutput::not_run());
        }
        let program = self.program(cx, &self.config.command).await?;
        let ended = self.inside(&client, cx, &id).run(&program).await?;
        if !self.config.success.contains(&ended.code) {
            return Err(ended.failure(&self.config.command.join(" ")));
        }
        Ok(ExecOutput { exit_code: Some(ended.code), stdout: ended.printed.stdout, stderr: ended.printed.stderr })
    }

    async fn settle(&self, cx: &Context, undo: &ExecUndo) -> Result<(), StepError> {
        let client = self.engine.connect(cx).await?;
        let programs = [&self.config.command, &undo.undo, &self.config.unless];
        self.inside(&client, cx, &undo.container_id).end(&programs).await?;
        // One that took its place, where that is not in the way.
        match containers::inspect(&client, &self.config.container).await? {
            Some(other) if id_of(&other) != undo.container_id => {
                self.inside(&client, cx, id_of(&other)).end(&programs).await
            }
            _ => Ok(()),
        }
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![self.engine.resource("container", &self.config.container)]
    }
}

#[async_trait]
impl OptionalRollback for Exec {
    fn irreversible_because(&self) -> Option<&'static str> {
        (self.config.undo.is_empty() && !self.config.no_effect).then_some("no `undo` command is given")
    }

    async fn rollback(&self, cx: &Context, undo: &ExecUndo, _: Option<&ExecOutput>) -> Result<(), StepError> {
        if undo.undo.is_empty() {
            return Ok(());
        }
        let client = self.engine.connect(cx).await?;
        let id = self.same_container(&client, cx, undo).await?;
        let program = self.program(cx, &undo.undo).await?;
        let ended = self.inside(&client, cx, &id).run(&program).await?;
        if ended.code == 0 { Ok(()) } else { Err(ended.failure(&undo.undo.join(" "))) }
    }
}
