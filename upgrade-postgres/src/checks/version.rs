//! `postgres.version`: asks for the version of the server.

use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use semver::{Version, VersionReq};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::CheckError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::verdict::Verdict;

use crate::error::Doing;
use crate::target::Database;

/// Configures `postgres.version`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VersionCheckConfig {
    /// The database.
    pub target: String,
    /// The versions that pass: `">=15, <19"`. 15.18 counts as 15.18.0.
    pub version: String,
}

/// Asks for the version of the server.
#[derive(Debug)]
pub struct VersionCheck {
    config: VersionCheckConfig,
    database: Arc<Database>,
    range: VersionReq,
}

impl VersionCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// The target is not a database, or the range is none.
    pub fn from_config(config: VersionCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let database = cx.target::<Database>(&config.target)?;
        let range = config.version.parse().map_err(|error| {
            BuildError::new(format!("`{}` is not a range of versions: {error}", config.version))
                .at("version")
                .with_hint("write it as `\">=15, <19\"` or `\"~16.4\"`")
        })?;
        Ok(Self { config, database, range })
    }
}

/// Spells the server's own number as a semantic version: before 10, two parts were the major one.
fn version_of(number: i32) -> Version {
    let part = |of: i32| u64::try_from(of).unwrap_or_default();
    if number >= 100_000 {
        Version::new(part(number / 10_000), part(number % 10_000), 0)
    } else {
        Version::new(part(number / 10_000), part(number / 100 % 100), part(number % 100))
    }
}

#[async_trait]
impl Check for VersionCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let mut session = self.database.connect(cx).await?;
        let number = session.facts().version;
        let standby = session.facts().in_recovery;
        let full: String = sqlx::query_scalar("select version()")
            .fetch_one(session.connection())
            .await
            .doing(|| "reading the server's version".into())?;
        session.close().await;
        let version = version_of(number);
        let verdict = if self.range.matches(&version) {
            Verdict::pass(format!("the server is PostgreSQL {version}"))
        } else {
            Verdict::fail(format!("the server is PostgreSQL {version}, not {}", self.config.version))
                .with_hint("upgrade the server, point the target's `url` at another one, or change `version`")
        };
        Ok(verdict
            .with_measurement("major", f64::from(number / 10_000))
            .with_measurement("version_number", f64::from(number))
            .with_fact("version", version.to_string())
            .with_fact("server", full)
            .with_fact("role", if standby { "standby" } else { "primary" }))
    }

    fn kind(&self) -> &str {
        "postgres.version"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_servers_number_becomes_a_semantic_version() {
        for (number, version) in [(150_018, "15.18.0"), (180_000, "18.0.0"), (90_624, "9.6.24"), (100_023, "10.23.0")] {
            assert_eq!(version_of(number).to_string(), version);
        }
    }
}
