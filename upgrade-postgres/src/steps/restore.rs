//! `postgres.restore`: what a backup holds in the place of a database, which is kept until commit.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;
use upgrade_core::units::Bytes;

use crate::backup::manifest::Scope;
use crate::backup::replace::{self, Replacement};
use crate::backup::swap::{self, Like, Names};
use crate::backup::template;
use crate::backup::tools::Tools;
use crate::program::end_leftovers;
use crate::target::Database;

/// Configures `postgres.restore`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreConfig {
    /// The database that is replaced.
    pub target: String,
    /// The directory of a backup that `postgres.backup` made.
    pub backup: PathBuf,
    /// The SHA-256 digest that its manifest must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// How many tables are restored at once. Default: as many as there are CPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jobs: Option<usize>,
    /// Gathers statistics before the database is used.
    #[serde(default = "default_analyze")]
    pub analyze: bool,
    /// A directory with room for the backup decompressed. Default: where the backup is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scratch: Option<PathBuf>,
    /// Which pg_restore is used, where it is not found by itself.
    #[serde(default)]
    pub tools: Tools,
}

fn default_analyze() -> bool {
    true
}

/// Puts back what a backup holds, in the place of the database as a whole.
///
/// # Guarantees
/// The backup is compared with its digests before anything is made, filled into a database of its
/// own, compared with what it was taken from as far as it was proven, and takes the target's place
/// in one transaction: the outage is that transaction. Owner, privileges, encoding, locale, settings,
/// comment, tablespace and limits are those of the database that was there, which is kept, closed to
/// everybody, until commit.
///
/// # Caveats
/// Every session on the database is ended. Sessions of other steps of the run as well.
///
/// Called again, or after a crash at any point, apply, rollback and commit converge.
#[derive(Debug, Clone)]
pub struct Restore {
    config: RestoreConfig,
    database: Arc<Database>,
    replacement: Replacement,
}

/// Holds what undoing a restore needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreUndo {
    /// The digest of the backup's manifest.
    pub sha256: String,
    /// What the database was like.
    pub found: Like,
}

/// Tells later steps what was restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreOutput {
    /// The database.
    pub database: String,
    /// The instant that it shows.
    pub taken: Timestamp,
    /// How many tables it holds.
    pub tables: u64,
}

impl Restore {
    /// Makes the step from its configuration; relative paths start from the context's directory.
    ///
    /// # Errors
    /// The target is not a database, or the digest is not one.
    pub fn from_config(config: RestoreConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let database = cx.target::<Database>(&config.target)?;
        let digest = |text: &str| text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if config.sha256.as_deref().is_some_and(|text| !digest(text)) {
            return Err(BuildError::new("a SHA-256 digest has 64 hexadecimal digits").at("sha256"));
        }
        if config.jobs == Some(0) {
            return Err(BuildError::new("nothing is done by no jobs").at("jobs"));
        }
        let replacement = Replacement {
            backup: cx.path(&config.backup),
            sha256: config.sha256.clone(),
            jobs: config.jobs.unwrap_or_else(replace::parallelism),
            analyze: config.analyze,
            scratch: config.scratch.as_ref().map(|path| cx.path(path)),
            tools: config.tools.clone(),
        };
        Ok(Self { config, database, replacement })
    }

    /// Expects the very backup that `prepare` looked at.
    fn bound(&self, undo: &RestoreUndo) -> Replacement {
        Replacement { sha256: Some(undo.sha256.clone()), ..self.replacement.clone() }
    }
}

#[async_trait]
impl Step for Restore {
    const KIND: &'static str = "postgres.restore";
    type Undo = RestoreUndo;
    type Output = RestoreOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<RestoreUndo, RestoreOutput>, StepError> {
        let manifest = self.replacement.manifest(cx, true).await?;
        if manifest.scope != Scope::Whole {
            return Err(StepError::permanent(
                "this backup holds only a part of a database, and a database is replaced as a whole",
            )
            .with_hint(
                "take rows back from it by hand: `zstd -d dump/*.zst`, then \
                     `pg_restore --single-transaction --data-only --table=NAME --dbname=DATABASE dump`",
            ));
        }
        let mut session = self.database.connect(cx).await?;
        session.require_writable()?;
        let fits = replace::fits(cx, &mut session, &manifest, &self.replacement.backup, &self.config.tools).await;
        let others = template::others(&mut session).await;
        session.close().await;
        fits?;
        let others = others?;
        let mut session = self.database.connect_maintenance(cx).await?;
        let names = Names::of(cx, &self.database.address(cx).await?.database_name())?;
        let found = swap::like(&mut session, names.target.as_str()).await?.ok_or_else(|| swap::gone(&names.target))?;
        session.close().await;
        let change = Change::new(Effect::Modify, format!("database {}", names.target))
            .with_summary(format!(
                "becomes what {} holds: {} tables as of {} ({}); {others} sessions are ended",
                self.replacement.backup.display(),
                manifest.tables.len(),
                manifest.taken,
                Bytes(manifest.bytes()),
            ))
            .undo_loses("what is written to the restored database");
        Ok(Prepared::change(RestoreUndo { sha256: manifest.sha256, found }, [change]))
    }

    async fn apply(&self, cx: &Context, undo: &RestoreUndo) -> Result<RestoreOutput, StepError> {
        let replacement = self.bound(undo);
        let manifest = replacement.manifest(cx, false).await?;
        replacement.forward(cx, &self.database, &undo.found).await?;
        let database = self.database.address(cx).await?.database_name();
        Ok(RestoreOutput { database, taken: manifest.taken, tables: manifest.tables.len() as u64 })
    }

    async fn settle(&self, cx: &Context, undo: &RestoreUndo) -> Result<(), StepError> {
        end_leftovers(cx).await?;
        self.database.settle(cx).await?;
        self.bound(undo).clear(cx).await
    }

    async fn commit(&self, cx: &Context, undo: &RestoreUndo) -> Result<(), StepError> {
        self.bound(undo).forget(cx, &self.database).await
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![self.database.clone()]
    }
}

#[async_trait]
impl Rollback for Restore {
    async fn rollback(
        &self,
        cx: &Context,
        undo: &RestoreUndo,
        _output: Option<&RestoreOutput>,
    ) -> Result<(), StepError> {
        self.bound(undo).back(cx, &self.database, &undo.found).await
    }
}
