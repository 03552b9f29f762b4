//! `postgres.migrations`: asks whether files and history agree, and whether anything is pending.

use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::CheckError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::verdict::Verdict;

use crate::identifier::TableName;
use crate::migrations::{Layout, MigrationVersion, Pending, Terms, Tool};
use crate::steps::migrate::Source;
use crate::target::Database;

/// Configures `postgres.migrations`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrationsCheckConfig {
    /// The database.
    pub target: String,
    /// The directory of the migrations.
    pub directory: std::path::PathBuf,
    /// How its files are named. Default: told from the names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<Layout>,
    /// The version that the database is to have. Default: the newest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<MigrationVersion>,
    /// The table of the history. Default: the one of the layout's tool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history_table: Option<TableName>,
    /// Counts the history of another tool as well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adopt: Option<Tool>,
    /// Whether anything may be pending. Default: `forbid`.
    #[serde(default)]
    pub pending: PendingPolicy,
    /// Puts up with pending migrations that are older than the newest one applied.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub out_of_order: bool,
    /// Puts up with migrations that were applied and whose files are gone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ignore_missing: bool,
}

/// Says whether something may be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PendingPolicy {
    /// It may: before the step that applies them.
    Allow,
    /// It may not: after it.
    #[default]
    Forbid,
}

/// Asks whether files and history agree, and whether anything is pending.
#[derive(Debug, Clone)]
pub struct MigrationsCheck {
    config: MigrationsCheckConfig,
    source: Source,
    database: Arc<Database>,
}

impl MigrationsCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// The target is not a database.
    pub fn from_config(config: MigrationsCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let database = cx.target::<Database>(&config.target)?;
        let source = Source {
            directory: cx.path(&config.directory),
            layout: config.layout,
            history_table: config.history_table.clone(),
            adopt: config.adopt,
            terms: Terms {
                to: config.to.clone(),
                out_of_order: config.out_of_order,
                ignore_missing: config.ignore_missing,
            },
        };
        Ok(Self { config, source, database })
    }
}

#[async_trait]
impl Check for MigrationsCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let directory = self.source.directory().await?;
        let mut session = self.database.connect_aside(cx).await?;
        let canceller = session.canceller();
        let survey = canceller.cancels(cx, self.source.survey(directory, session.connection())).await;
        session.close().await;
        let survey = survey?;
        let (pending, drift) = survey.compare(&self.source.terms)?;
        let (count, first) = match &pending {
            Pending::Up(migrations) => (migrations.len(), migrations.first().map(|first| first.up.file.clone())),
            Pending::Down(versions) => {
                (versions.len(), versions.first().map(|first| format!("version {first}, newer")))
            }
        };
        let verdict = match (drift.first(), first) {
            (Some(first), _) => {
                let more = if drift.len() > 1 { format!("; and {} more", drift.len() - 1) } else { String::new() };
                Verdict::fail(format!("{first}{more}")).with_hint(first.hint())
            }
            (None, Some(first)) if self.config.pending == PendingPolicy::Forbid => {
                Verdict::fail(format!("{count} migrations are pending, the first {first}"))
                    .with_hint("apply them with a step `postgres.migrate`, or set `pending: allow` before it")
            }
            (None, Some(first)) => Verdict::pass(format!("{count} migrations are pending, the first {first}")),
            (None, None) => Verdict::pass("files and history agree, and nothing is pending"),
        };
        let newest = survey.applied.keys().next_back().map(ToString::to_string).unwrap_or_default();
        Ok(verdict
            .with_measurement("applied", survey.applied.len() as f64)
            .with_measurement("pending", count as f64)
            .with_measurement("drift", drift.len() as f64)
            .with_fact("newest", newest))
    }

    fn kind(&self) -> &str {
        "postgres.migrations"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}
