//! `host.memory`: how much memory is available.

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sysinfo::System;
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::CheckError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::units::{Bytes, Share};
use upgrade_core::verdict::Verdict;

/// Configures `host.memory`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryCheckConfig {
    /// The least memory that is available without swapping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available: Option<Bytes>,
    /// The least share of all memory that is available.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available_share: Option<Share>,
}

/// Measures the memory that is available: the machine's, or what the control group allows if
/// that is less.
#[derive(Debug)]
pub struct MemoryCheck {
    config: MemoryCheckConfig,
}

impl MemoryCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// None at present.
    pub fn from_config(config: MemoryCheckConfig, _cx: &BuildContext) -> Result<Self, BuildError> {
        Ok(Self { config })
    }
}

fn measure() -> Result<(u64, u64), sysinfo::Error> {
    let mut system = System::new()?;
    system.refresh_memory();
    let (total, available) = (system.total_memory(), system.available_memory());
    Ok(match system.cgroup_limits() {
        Some(limits) => (total.min(limits.total_memory), available.min(limits.free_memory)),
        None => (total, available),
    })
}

#[async_trait]
impl Check for MemoryCheck {
    async fn check(&self, _cx: &Context) -> Result<Verdict, CheckError> {
        let measured = tokio::task::spawn_blocking(measure).await;
        let measured = measured.map_err(|error| CheckError::unknown("the measurement was lost").with_cause(&error))?;
        let (total, available) = measured.map_err(|error| {
            CheckError::permanent("this system does not say how much memory it has")
                .with_cause(&error)
                .with_hint("mount /proc for the process that runs the upgrade")
        })?;
        let share = available as f64 / total as f64;
        let mut faults = Vec::new();
        if let Some(least) = self.config.available.filter(|least| available < least.0) {
            faults.push(format!("{} available, {least} needed", Bytes(available)));
        }
        if let Some(least) = self.config.available_share.filter(|least| share < least.0) {
            faults.push(format!("{:.1}% available, {least} needed", share * 100.0));
        }
        let verdict = if faults.is_empty() {
            Verdict::pass(format!("{} of memory available", Bytes(available)))
        } else {
            Verdict::fail(format!("memory: {}", faults.join("; ")))
                .with_hint("see what takes it: `ps aux --sort=-rss | head`")
        };
        Ok(verdict.with_measurement("available_bytes", available as f64).with_measurement("available_share", share))
    }

    fn kind(&self) -> &str {
        "host.memory"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}
