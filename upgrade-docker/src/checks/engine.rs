//! `docker.engine`: whether an engine answers, which version it is, and what space it has.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use semver::{Version, VersionReq};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::check::Check;
use upgrade_core::context::{Context, blocking};
use upgrade_core::error::{CheckError, Class, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::units::{Bytes, Share};
use upgrade_core::verdict::{Status, Verdict};

use super::joined;
use crate::error::Doing;
use crate::target::Engine;

/// Configures `docker.engine`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EngineCheckConfig {
    /// The engine. Default: the one that the `docker` command would use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The versions of the engine that pass: `">=24, <29"`. 20.10.24 counts as such.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// A version of its API that it must speak: `"1.41"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api: Option<String>,
    /// The storage drivers that pass: `[overlay2, overlayfs]`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub storage: Vec<String>,
    /// The least free space where it keeps its data; for an engine of this machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free: Option<Bytes>,
    /// The least share of that file system that is free.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_share: Option<Share>,
}

/// Asks an engine who it is.
#[derive(Debug)]
pub struct EngineCheck {
    config: EngineCheckConfig,
    engine: Arc<Engine>,
    range: Option<VersionReq>,
    api: Option<(u32, u32)>,
}

impl EngineCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// There is no such target, or a version is none.
    pub fn from_config(config: EngineCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let engine = Engine::named(config.target.as_deref(), cx)?;
        let range = config.version.as_deref().map(|text| {
            text.parse().map_err(|error| {
                BuildError::new(format!("`{}` is not a range of versions: {error}", text.escape_debug()))
                    .at("version")
                    .with_hint("write it as `\">=24, <29\"`")
            })
        });
        let api = config.api.as_deref().map(|text| {
            api_version(text).ok_or_else(|| {
                BuildError::new(format!("`{}` is not a version of the API", text.escape_debug()))
                    .at("api")
                    .with_hint("write it as a text: `\"1.41\"`")
            })
        });
        Ok(Self { range: range.transpose()?, api: api.transpose()?, config, engine })
    }
}

fn api_version(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Reads what engines call their versions: `20.10.24+dfsg1`, `28.0.1`, `24.0.7-1`.
fn engine_version(text: &str) -> Option<Version> {
    let numbers = text.split(|c: char| !c.is_ascii_digit() && c != '.').next()?;
    let mut parts = numbers.split('.').map(|part| part.parse().ok());
    Some(Version::new(parts.next()??, parts.next().flatten().unwrap_or(0), parts.next().flatten().unwrap_or(0)))
}

/// Measures the file system of a directory: bytes free, and the share that is.
async fn free_space(directory: String) -> Result<(u64, f64), StepError> {
    blocking(move || {
        let disk = rustix::fs::statvfs(Path::new(&directory)).map_err(|error| {
            StepError::unknown(format!("the file system of {directory} cannot be measured")).with_cause(&error)
        })?;
        let usable = disk.f_blocks.saturating_sub(disk.f_bfree).saturating_add(disk.f_bavail);
        let share = if usable == 0 { 0.0 } else { disk.f_bavail as f64 / usable as f64 };
        Ok((disk.f_bavail.saturating_mul(disk.f_frsize), share))
    })
    .await
}

#[async_trait]
impl Check for EngineCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let client = match self.engine.connect(cx).await {
            Ok(client) => client,
            Err(error) if error.class() == Class::Transient && !cx.cancelled().is_cancelled() => {
                let verdict = Verdict::fail(format!("the engine at {} does not answer", self.engine.host()));
                return Ok(match error.hint() {
                    Some(hint) => verdict.with_hint(hint),
                    None => verdict,
                });
            }
            Err(error) => return Err(error),
        };
        let version = client.version().await.doing(|| "asking the engine for its version".into())?;
        let info = client.info().await.doing(|| "asking the engine how it is".into())?;
        let text = version.version.unwrap_or_default();
        let newest = version.api_version.unwrap_or_default();
        let oldest = version.min_api_version.unwrap_or_else(|| newest.clone());
        let driver = info.driver.unwrap_or_default();
        let (mut faults, mut hint) = (Vec::new(), "update the engine, or point the target at another one");
        if let Some(range) = &self.range
            && !engine_version(&text).is_some_and(|version| range.matches(&version))
        {
            faults.push(format!("the engine is {text}, not {range}"));
        }
        if let Some(wanted) = self.api
            && !(api_version(&oldest) <= Some(wanted) && Some(wanted) <= api_version(&newest))
        {
            faults.push(format!("it speaks API {oldest} to {newest}, not {}.{}", wanted.0, wanted.1));
        }
        if !self.config.storage.is_empty() && !self.config.storage.contains(&driver) {
            faults.push(format!("it stores with {driver}, not {}", self.config.storage.join(" or ")));
        }
        let root = info.docker_root_dir.unwrap_or_default();
        let space = match self.engine.host().starts_with("unix://") && Path::new(&root).is_absolute() {
            true => free_space(root.clone()).await.ok(),
            false => None,
        };
        if let Some((free, share)) = space {
            let least = self.config.free.filter(|least| free < least.0).map(|least| least.to_string());
            let least = least.or(self.config.free_share.filter(|least| share < least.0).map(|least| least.to_string()));
            if let Some(least) = least {
                faults.push(format!("{root}: {} free ({:.1}%), {least} needed", Bytes(free), share * 100.0));
                hint = "free space: look at `docker system df`, then prune what is not needed";
            }
        }
        let mut verdict = match joined(&faults) {
            Some(faults) => Verdict::fail(faults).with_hint(hint),
            None => Verdict::pass(format!("Docker Engine {text}, API {oldest} to {newest}, {driver}")),
        };
        match space {
            Some((free, share)) => {
                verdict = verdict.with_measurement("free_bytes", free as f64).with_measurement("free_share", share);
            }
            None if verdict.status == Status::Pass
                && (self.config.free.is_some() || self.config.free_share.is_some()) =>
            {
                verdict.status = Status::Unknown;
                verdict.message = format!("the space of {root} cannot be measured from here");
                verdict.hint = Some("measure it on the engine's machine, or drop `free` and `free_share`".into());
            }
            None => {}
        }
        for (name, count) in [("containers_running", info.containers_running), ("images", info.images)] {
            if let Some(count) = count {
                verdict = verdict.with_measurement(name, count as f64);
            }
        }
        Ok(verdict
            .with_fact("version", text)
            .with_fact("api", newest)
            .with_fact("storage", driver)
            .with_fact("data_root", root)
            .with_fact("system", info.operating_system.unwrap_or_default()))
    }

    fn kind(&self) -> &str {
        "docker.engine"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_engines_are_read() {
        for (text, version) in
            [("20.10.24+dfsg1", "20.10.24"), ("28.0.1", "28.0.1"), ("24.0.7-1", "24.0.7"), ("19.03", "19.3.0")]
        {
            assert_eq!(engine_version(text).unwrap().to_string(), version);
        }
        assert_eq!(engine_version("dev"), None);
        assert!(api_version("1.9") < api_version("1.41") && api_version("1").is_none());
    }
}
