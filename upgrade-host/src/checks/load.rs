//! `host.load`: how many processes wait for each processor.

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sysinfo::System;
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::CheckError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::verdict::Verdict;

/// Configures `host.load`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LoadCheckConfig {
    /// The largest load of the last minute for each processor: 1.0 keeps all of them busy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_per_core: Option<f64>,
}

/// Reads the system's load averages.
#[derive(Debug)]
pub struct LoadCheck {
    config: LoadCheckConfig,
}

impl LoadCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// The limit is not a positive number.
    pub fn from_config(config: LoadCheckConfig, _cx: &BuildContext) -> Result<Self, BuildError> {
        if config.max_per_core.is_some_and(|most| !most.is_finite() || most <= 0.0) {
            return Err(BuildError::new("the limit must be above 0").at("max_per_core"));
        }
        Ok(Self { config })
    }
}

#[async_trait]
impl Check for LoadCheck {
    async fn check(&self, _cx: &Context) -> Result<Verdict, CheckError> {
        let cores = std::thread::available_parallelism().map_err(|error| {
            CheckError::permanent("this system does not say how many processors it has").with_cause(&error)
        })?;
        let average = System::load_average().map_err(|error| {
            CheckError::permanent("this system does not say its load")
                .with_cause(&error)
                .with_hint("mount /proc for the process that runs the upgrade")
        })?;
        let per_core = average.one / cores.get() as f64;
        let seen = format!("load {:.2} on {cores} processors", average.one);
        let verdict = match self.config.max_per_core {
            Some(most) if per_core > most => {
                Verdict::fail(format!("{seen}: {per_core:.2} each, at most {most} allowed"))
                    .with_hint("see what runs and what waits for the disk: `top`, `vmstat 1`")
            }
            _ => Verdict::pass(seen),
        };
        Ok(verdict
            .with_measurement("load1", average.one)
            .with_measurement("load5", average.five)
            .with_measurement("load15", average.fifteen)
            .with_measurement("load1_per_core", per_core))
    }

    fn kind(&self) -> &str {
        "host.load"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}
