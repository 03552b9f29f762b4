//! `host.cpu`: how busy the processors are over a window of time.

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sysinfo::System;
use tokio::time::sleep;
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::CheckError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::units::{Share, Span};
use upgrade_core::verdict::Verdict;

/// Configures `host.cpu`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CpuCheckConfig {
    /// The largest share of the processors' time that may be in use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_busy: Option<Share>,
    /// How long is measured; at least 200 ms.
    pub window: Span,
}

impl Default for CpuCheckConfig {
    fn default() -> Self {
        Self { max_busy: None, window: Span::from_secs(1) }
    }
}

/// Measures the share of all processors' time that is in use.
#[derive(Debug)]
pub struct CpuCheck {
    config: CpuCheckConfig,
}

impl CpuCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// The window is too short for the kernel's clock.
    pub fn from_config(config: CpuCheckConfig, _cx: &BuildContext) -> Result<Self, BuildError> {
        if config.window.0 < sysinfo::MINIMUM_CPU_UPDATE_INTERVAL {
            return Err(BuildError::new("the window is too short to measure").at("window").with_hint("200ms at least"));
        }
        Ok(Self { config })
    }
}

#[async_trait]
impl Check for CpuCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let mut system = System::new()
            .map_err(|error| CheckError::permanent("this system's processors cannot be measured").with_cause(&error))?;
        system.refresh_cpu_usage();
        tokio::select! {
            () = cx.cancelled().cancelled() => return Err(CheckError::unknown("the check was cancelled")),
            () = sleep(self.config.window.0) => {}
        }
        system.refresh_cpu_usage();
        if system.cpus().is_empty() {
            return Err(CheckError::permanent("this system does not say how busy its processors are")
                .with_hint("mount /proc for the process that runs the upgrade"));
        }
        let busy = f64::from(system.global_cpu_usage()) / 100.0;
        let seen = format!("processors {:.1}% busy over {}", busy * 100.0, self.config.window);
        let verdict = match self.config.max_busy {
            Some(most) if busy > most.0 => Verdict::fail(format!("{seen}, at most {most} allowed"))
                .with_hint("see what runs: `top -o %CPU`; upgrade when the machine has less to do"),
            _ => Verdict::pass(seen),
        };
        Ok(verdict.with_measurement("busy_share", busy))
    }

    fn kind(&self) -> &str {
        "host.cpu"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}
