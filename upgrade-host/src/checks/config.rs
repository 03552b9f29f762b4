//! `host.config` as a check: validates a configuration file.

use std::path::PathBuf;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::CheckError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::verdict::Verdict;

use crate::document::{Finding, Format, Validation, deprecations, validate};
use crate::error::blocking;
use crate::files::path_state::{PathState, observe};
use crate::steps::{check_validation, format_of, text_of};

/// Configures the check `host.config`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConfigCheckConfig {
    /// The configuration file; symbolic links are followed.
    pub path: PathBuf,
    /// How it is written; by its name if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// What must hold.
    #[serde(default)]
    pub validate: Validation,
}

/// Validates a configuration file: fails on what is missing or of another type, warns of what is
/// deprecated.
#[derive(Debug, Clone)]
pub struct ConfigCheck {
    config: ConfigCheckConfig,
    format: Format,
}

impl ConfigCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// The format is not known, or a path cannot be read.
    pub fn from_config(mut config: ConfigCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        config.path = cx.path(&config.path);
        let format = format_of(&config.path, config.format)?;
        check_validation(&config.validate)?;
        Ok(Self { config, format })
    }
}

#[async_trait]
impl Check for ConfigCheck {
    async fn check(&self, _cx: &Context) -> Result<Verdict, CheckError> {
        let path = self.config.path.clone();
        let observed = blocking(move || observe(&path.canonicalize().unwrap_or(path))).await?;
        let shown = self.config.path.display();
        if observed.state == PathState::Absent {
            return Ok(Verdict::fail(format!("{shown} is not there")).with_hint("restore the file, or correct `path`"));
        }
        let text = text_of(&self.config.path, &observed)?;
        let document = match self.format.read(&text) {
            Ok(document) => document,
            Err(error) => {
                return Ok(Verdict::fail(format!("{shown}, {error}")).with_hint("mend the file at this place"));
            }
        };
        let list = |findings: Vec<Finding>| findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
        let failures = validate(&self.config.validate, self.format, &text, &document);
        if !failures.is_empty() {
            return Ok(Verdict::fail(format!("{shown}: {}", list(failures))).with_hint("mend the file by hand"));
        }
        let warnings = deprecations(&self.config.validate, self.format, &text, &document);
        if !warnings.is_empty() {
            return Ok(Verdict::warn(format!("{shown}: {}", list(warnings))));
        }
        Ok(Verdict::pass(format!("{shown} is valid")))
    }

    fn kind(&self) -> &str {
        "host.config"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}
