//! `host.service`: starts, stops or restarts a service and waits until that is so.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::leftovers;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;
use upgrade_core::units::Span;

use crate::files::absolute;
use crate::machine::MachineTarget;
use crate::process::service_control::{Activity, ServiceControl, Verb};
use upgrade_core::text_or_secret::TextOrSecret;

/// Says what is done to the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Starts it; undone by stopping it.
    Start,
    /// Stops it; undone by starting it.
    Stop,
    /// Restarts it; undone by restarting it, or by stopping it if it was stopped.
    Restart,
    /// Does nothing on the way forward; restarts the service when the run is rolled back. Put it
    /// before the changes that a `restart` behind them makes the service see.
    RestartOnUndo,
}

/// Configures `host.service`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ServiceConfig {
    /// What is done to it.
    pub action: Action,
    /// The systemd unit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// How systemctl is called, for a unit: `[systemctl, --user]`.
    #[serde(default = "systemctl")]
    pub systemctl: Vec<String>,
    /// Without a unit, the command that starts the service and returns.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub start: Vec<String>,
    /// Without a unit, the command that stops the service.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// Without a unit, the command that exits with 0 while the service is active.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub status: Vec<String>,
    /// How long the service may take to become active or inactive.
    #[serde(default = "wait")]
    pub wait: Span,
    /// Variables added to the environment of the commands: texts, or references to secrets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, TextOrSecret>,
    /// The working directory; the directory of the pipeline file if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<PathBuf>,
    /// Without a unit, where what `start` and the service print is appended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<PathBuf>,
}

fn systemctl() -> Vec<String> {
    vec!["systemctl".to_owned()]
}

fn wait() -> Span {
    Span::from_secs(30)
}

/// Starts, stops or restarts a service.
#[derive(Debug, Clone)]
pub struct Service {
    config: ServiceConfig,
    control: ServiceControl,
}

/// Holds whether the service was active.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceUndo {
    /// Whether the service was active before the step.
    pub was_active: bool,
}

/// Tells whether the service is active now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceOutput {
    /// Whether the service is active after the step.
    pub active: bool,
}

impl ServiceConfig {
    /// Describes what is done to a systemd unit.
    pub fn unit(action: Action, unit: impl Into<String>) -> Self {
        Self {
            action,
            unit: Some(unit.into()),
            systemctl: systemctl(),
            start: Vec::new(),
            stop: Vec::new(),
            status: Vec::new(),
            wait: wait(),
            env: BTreeMap::new(),
            directory: None,
            log: None,
        }
    }

    /// Describes what is done to a service that has commands of its own.
    pub fn commands(action: Action, start: Vec<String>, stop: Vec<String>, status: Vec<String>) -> Self {
        Self { unit: None, start, stop, status, ..Self::unit(action, "") }
    }
}

impl Service {
    /// Makes the step from its configuration.
    ///
    /// # Errors
    /// Neither a unit nor all of `start`, `stop` and `status` are given, or both.
    pub fn from_config(config: ServiceConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let commands = [("start", &config.start), ("stop", &config.stop), ("status", &config.status)];
        if let Some(unit) = &config.unit {
            if let Some((key, _)) = commands.iter().find(|(_, argv)| !argv.is_empty()) {
                return Err(BuildError::new(format!("`unit` and `{key}` exclude each other")).at(*key));
            }
            if unit.is_empty() || unit.starts_with('-') {
                return Err(BuildError::new(format!("`{unit}` is not the name of a unit")).at("unit"));
            }
            if config.systemctl.is_empty() {
                return Err(BuildError::new("there is no program").at("systemctl"));
            }
            if config.log.is_some() {
                return Err(BuildError::new("what a unit prints is in systemd's journal")
                    .at("log")
                    .with_hint("drop `log`; read it with `journalctl -u UNIT`"));
            }
        } else if let Some((key, _)) = commands.iter().find(|(_, argv)| argv.is_empty()) {
            return Err(BuildError::new(format!("there is no `{key}` command"))
                .at(*key)
                .with_hint("name a systemd `unit`, or give `start`, `stop` and `status`"));
        }
        let control = ServiceControl {
            unit: config.unit.clone(),
            systemctl: config.systemctl.clone(),
            start: config.start.clone(),
            stop: config.stop.clone(),
            status: config.status.clone(),
            wait: config.wait.0,
            env: config.env.clone(),
            directory: absolute(&cx.path(config.directory.clone().unwrap_or_default())),
            log: config.log.as_ref().map(|log| absolute(&cx.path(log))),
        };
        Ok(Self { config, control })
    }

    fn change(&self, was_active: bool) -> Change {
        let now = if was_active { "active" } else { "inactive" };
        let summary = match self.config.action {
            Action::Start => "start; undone by stopping it".to_owned(),
            Action::Stop => "stop; undone by starting it".to_owned(),
            Action::Restart => format!("restart (it is {now}); its undo restarts before earlier steps are undone"),
            Action::RestartOnUndo => format!("nothing (it is {now}); its undo restarts after later steps are undone"),
        };
        Change::new(Effect::Run, format!("service {}", self.control.name())).with_summary(summary)
    }
}

#[async_trait]
impl Step for Service {
    const KIND: &'static str = "host.service";
    type Undo = ServiceUndo;
    type Output = ServiceOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<ServiceUndo, ServiceOutput>, StepError> {
        let was_active = match self.control.settled_activity(cx).await {
            Ok(activity) => activity == Activity::Active,
            // The commands may come with a step that the plan has not run.
            Err(error) if cx.is_dry_run() => {
                let change = self.change(false).with_summary(format!("{error}; asked again before the step"));
                return Ok(Prepared::change(ServiceUndo { was_active: false }, [change]));
            }
            Err(error) => return Err(error),
        };
        // A plan asks before the step that stops the service for this one has run.
        let later = if cx.is_dry_run() { " now; asked again before the step" } else { "" };
        match (self.config.action, was_active) {
            (Action::Start, true) => {
                Ok(Prepared::unchanged(ServiceOutput { active: true }, format!("it is active{later}")))
            }
            (Action::Stop, false) => {
                Ok(Prepared::unchanged(ServiceOutput { active: false }, format!("it is inactive{later}")))
            }
            _ => Ok(Prepared::change(ServiceUndo { was_active }, [self.change(was_active)])),
        }
    }

    async fn apply(&self, cx: &Context, undo: &ServiceUndo) -> Result<ServiceOutput, StepError> {
        let active = match self.config.action {
            Action::Start => self.control.bring(cx, Verb::Start).await.map(|()| true)?,
            Action::Stop => self.control.bring(cx, Verb::Stop).await.map(|()| false)?,
            Action::Restart => self.control.bring(cx, Verb::Restart).await.map(|()| true)?,
            Action::RestartOnUndo => undo.was_active,
        };
        Ok(ServiceOutput { active })
    }

    async fn settle(&self, cx: &Context, _undo: &ServiceUndo) -> Result<(), StepError> {
        leftovers::end(cx).await
    }

    fn definition(&self) -> Value {
        // How long is waited makes no other step of it.
        let mut definition = serde_json::to_value(&self.config).unwrap_or_default();
        if let Some(fields) = definition.as_object_mut() {
            fields.remove("wait");
        }
        definition
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![MachineTarget::service(&self.control.name())]
    }
}

#[async_trait]
impl Rollback for Service {
    async fn rollback(
        &self,
        cx: &Context,
        undo: &ServiceUndo,
        _output: Option<&ServiceOutput>,
    ) -> Result<(), StepError> {
        let restarts = matches!(self.config.action, Action::Restart | Action::RestartOnUndo);
        let verb = match undo.was_active {
            true if restarts => Verb::Restart,
            true => Verb::Start,
            false => Verb::Stop,
        };
        self.control.bring(cx, verb).await
    }
}
