//! `docker.container`: whether a container runs, is healthy, stays up, and is of the right image.

use std::sync::Arc;

use async_trait::async_trait;
use bollard::models::{ContainerInspectResponse, HealthStatusEnum};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::CheckError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::units::Span;
use upgrade_core::verdict::Verdict;

use super::joined;
use crate::containers::{self, is_running, state_line};
use crate::images;
use crate::reference::ImageReference;
use crate::target::Engine;

/// Configures `docker.container`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ContainerCheckConfig {
    /// The engine. Default: the one that the `docker` command would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The container.
    pub container: String,
    /// Whether it must run; false asks that it does not, or is not there.
    #[serde(default = "yes")]
    pub running: bool,
    /// Whether its health check must say *healthy*. Default: if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub healthy: Option<bool>,
    /// How often the engine may have restarted it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_restarts: Option<u64>,
    /// How long it must have been running.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_uptime: Option<Span>,
    /// The image that it must be made of: by name and tag as the engine knows them now, or by digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageReference>,
}

fn yes() -> bool {
    true
}

/// Asks how a container is.
#[derive(Debug)]
pub struct ContainerCheck {
    config: ContainerCheckConfig,
    engine: Arc<Engine>,
}

impl ContainerCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// There is no such target, or keys contradict each other.
    pub fn from_config(config: ContainerCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let engine = Engine::named(config.target.as_deref(), cx)?;
        if config.container.is_empty() {
            return Err(BuildError::new("there is no container").at("container"));
        }
        if !config.running {
            let key = [
                ("healthy", config.healthy == Some(true)),
                ("max_restarts", config.max_restarts.is_some()),
                ("min_uptime", config.min_uptime.is_some()),
            ];
            if let Some((key, _)) = key.iter().find(|(_, given)| *given) {
                return Err(BuildError::new("it is asked of a container that runs").at(*key));
            }
        }
        Ok(Self { config, engine })
    }

    fn faults(&self, container: &ContainerInspectResponse, uptime: Option<f64>) -> Vec<String> {
        let (config, mut faults) = (&self.config, Vec::new());
        if is_running(container) != config.running {
            faults.push(format!("it is {}", state_line(container)));
            return faults;
        }
        if !config.running {
            return faults;
        }
        let state = container.state.as_ref();
        if state.and_then(|state| state.paused) == Some(true) {
            faults.push("it is paused".into());
        }
        let health = state.and_then(|state| state.health.as_ref()).and_then(|health| health.status);
        let has_check = !matches!(health, None | Some(HealthStatusEnum::NONE | HealthStatusEnum::EMPTY));
        match config.healthy {
            Some(true) if !has_check => faults.push("it has no health check".into()),
            Some(false) => {}
            _ if has_check && health != Some(HealthStatusEnum::HEALTHY) => {
                faults.push(format!("it is {}", state_line(container)));
            }
            _ => {}
        }
        let restarts = container.restart_count.and_then(|count| u64::try_from(count).ok()).unwrap_or_default();
        if let Some(most) = config.max_restarts.filter(|most| restarts > *most) {
            faults.push(format!("it was restarted {restarts} times, {most} is the most"));
        }
        if let (Some(least), Some(uptime)) = (config.min_uptime, uptime)
            && uptime < least.0.as_secs_f64()
        {
            let uptime = Span::from_secs(uptime.max(0.0) as u64);
            faults.push(format!("it has been running for {uptime}, {least} is the least"));
        }
        faults
    }
}

#[async_trait]
impl Check for ContainerCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let (config, name) = (&self.config, &self.config.container);
        let client = self.engine.connect(cx).await?;
        let Some(container) = containers::inspect(&client, name).await? else {
            return Ok(if config.running {
                Verdict::fail(format!("there is no container {name}"))
                    .with_hint("start it, or correct its name (`docker ps --all`)")
            } else {
                Verdict::pass(format!("there is no container {name}"))
            });
        };
        let state = container.state.as_ref();
        let started =
            state.and_then(|state| state.started_at.as_deref()).and_then(|at| at.parse::<jiff::Timestamp>().ok());
        let uptime = started
            .filter(|_| is_running(&container))
            .map(|at| jiff::Timestamp::now().duration_since(at).as_secs_f64());
        let mut faults = self.faults(&container, uptime);
        if let Some(image) = &config.image {
            let wanted = images::local(&client, &image.to_string()).await?.and_then(|image| image.id);
            if wanted.is_none() || wanted != container.image {
                let has = container.config.as_ref().and_then(|config| config.image.as_deref()).unwrap_or_default();
                faults.push(match wanted {
                    None => format!("image {image} is not on the engine; it is of {has}"),
                    Some(_) => format!("it is of {has}, not of what {image} is now"),
                });
            }
        }
        let mut verdict = match joined(&faults) {
            Some(faults) => Verdict::fail(format!("container {name}: {faults}"))
                .with_hint(format!("look at it: `docker logs --tail 50 {name}`, `docker inspect {name}`")),
            None => Verdict::pass(format!("container {name} is {}", state_line(&container))),
        };
        if let Some(uptime) = uptime {
            verdict = verdict.with_measurement("uptime_seconds", uptime);
        }
        Ok(verdict
            .with_measurement("restarts", container.restart_count.unwrap_or_default() as f64)
            .with_fact("state", state_line(&container))
            .with_fact("id", containers::id_of(&container))
            .with_fact("image_id", container.image.as_deref().unwrap_or_default()))
    }

    fn kind(&self) -> &str {
        "docker.container"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}
