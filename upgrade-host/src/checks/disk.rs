//! `host.disk`: how much space a file system has left.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::CheckError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::units::{Bytes, Share};
use upgrade_core::verdict::Verdict;

use crate::files::absolute;

/// Configures `host.disk`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskCheckConfig {
    /// A path on the file system; the nearest directory above it that exists is measured.
    pub path: PathBuf,
    /// The least free space.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free: Option<Bytes>,
    /// The least share of the file system that is free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free_share: Option<Share>,
    /// The least number of files that can still be made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inodes: Option<u64>,
}

/// Measures the space that is left for unprivileged users.
#[derive(Debug)]
pub struct DiskCheck {
    config: DiskCheckConfig,
    path: PathBuf,
}

impl DiskCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// None at present.
    pub fn from_config(config: DiskCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let path = absolute(&cx.path(&config.path));
        Ok(Self { config, path })
    }
}

fn measure(path: &Path) -> rustix::io::Result<rustix::fs::StatVfs> {
    let mut path = path;
    loop {
        match rustix::fs::statvfs(path) {
            // What will be written may not be there yet.
            Err(rustix::io::Errno::NOENT) if path.parent().is_some() => path = path.parent().unwrap_or(path),
            measured => return measured,
        }
    }
}

#[async_trait]
impl Check for DiskCheck {
    async fn check(&self, _cx: &Context) -> Result<Verdict, CheckError> {
        let (path, shown) = (self.path.clone(), self.config.path.display());
        // A network file system that hangs must hang a thread of its own.
        let measured = tokio::task::spawn_blocking(move || measure(&path)).await;
        let measured = measured.map_err(|error| CheckError::unknown("the measurement was lost").with_cause(&error))?;
        let disk = measured.map_err(|error| {
            CheckError::permanent(format!("the file system of {shown} cannot be measured"))
                .with_cause(&error)
                .with_hint("check that the path can be reached by the account that runs the upgrade")
        })?;
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        // Of what unprivileged users may use: the reserve of root does not count as used by them.
        let usable = disk.f_blocks.saturating_sub(disk.f_bfree).saturating_add(disk.f_bavail);
        let share = if usable == 0 { 0.0 } else { disk.f_bavail as f64 / usable as f64 };
        let mut faults = Vec::new();
        if let Some(least) = self.config.free.filter(|least| free < least.0) {
            faults.push(format!("{} free, {least} needed", Bytes(free)));
        }
        if let Some(least) = self.config.free_share.filter(|least| share < least.0) {
            faults.push(format!("{:.1}% free, {least} needed", share * 100.0));
        }
        // Some file systems make inodes as they need them, and say that they have none.
        let counts_inodes = disk.f_files > 0;
        if let Some(least) = self.config.inodes.filter(|least| counts_inodes && disk.f_favail < *least) {
            faults.push(format!("{} inodes free, {least} needed", disk.f_favail));
        }
        let mut verdict = if faults.is_empty() {
            Verdict::pass(format!("{shown}: {} free", Bytes(free)))
        } else {
            Verdict::fail(format!("{shown}: {}", faults.join("; ")))
                .with_hint("free space: old releases and backups, logs, package caches (`du -xh --max-depth=1`)")
        };
        if counts_inodes {
            verdict = verdict.with_measurement("free_inodes", disk.f_favail as f64);
        }
        Ok(verdict.with_measurement("free_bytes", free as f64).with_measurement("free_share", share))
    }

    fn kind(&self) -> &str {
        "host.disk"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}
