//! `host.command` as a check: a program whose exit code is the answer.

use std::collections::BTreeMap;
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

use crate::files::absolute;
use crate::process::program::{Program, Role};
use crate::steps::{SuccessCodes, argv_of};
use crate::version_text::version_in;
use upgrade_core::text_or_secret::TextOrSecret;

/// Configures the check `host.command`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CommandCheckConfig {
    /// The program and its arguments; no shell reads them. It must change nothing.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub run: Vec<String>,
    /// Lets `/bin/sh` read `script`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub shell: bool,
    /// The script, with `shell: true`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub script: Option<String>,
    /// Variables added to the environment: texts, or references to secrets.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, TextOrSecret>,
    /// The working directory; the directory of the pipeline file if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub directory: Option<PathBuf>,
    /// The exit codes that pass; any other fails.
    pub success: SuccessCodes,
}

/// Runs a program whose exit code is the answer.
#[derive(Debug)]
pub struct CommandCheck {
    config: CommandCheckConfig,
    program: Program,
}

impl CommandCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// Not exactly one of `run` and `script` is given, or `script` without `shell: true`.
    pub fn from_config(config: CommandCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let program = Program {
            argv: argv_of(&config.run, config.shell, config.script.as_deref())?,
            env: config.env.clone(),
            directory: absolute(&cx.path(config.directory.clone().unwrap_or_default())),
            role: Role::Check,
        };
        Ok(Self { config, program })
    }
}

#[async_trait]
impl Check for CommandCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let ended = self.program.run(cx).await?;
        let line = self.program.line();
        let Some(code) = ended.code else {
            return Ok(Verdict::unknown(format!("`{line}` ended with {}", ended.how()))
                .with_hint("something killed it: look for the out-of-memory killer in `dmesg`"));
        };
        let stdout = ended.stdout.trim();
        let verdict = if self.config.success.0.contains(&code) {
            Verdict::pass(format!("`{line}` ended with exit code {code}"))
        } else {
            let said = ended.detail().trim().lines().next_back().unwrap_or_default();
            Verdict::fail(format!("`{line}` ended with exit code {code}: {said}"))
                .with_hint("run it by hand and read all that it says")
        };
        let verdict = verdict.with_measurement("exit_code", f64::from(code)).with_fact("stdout", stdout);
        Ok(match version_in(stdout) {
            Some(version) => verdict.with_fact("version", version),
            None => verdict,
        })
    }

    fn kind(&self) -> &str {
        "host.command"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}
