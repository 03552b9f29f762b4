//! `postgres.backup_fresh`: there is a backup of the database, it is recent, and it is whole.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::check::Check;
use upgrade_core::context::{Context, blocking};
use upgrade_core::error::{CheckError, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::units::Span;
use upgrade_core::verdict::Verdict;

use crate::backup::manifest::{FILE, Manifest, ManifestError, Prove, Source};
use crate::backup::{contents, storage};
use crate::target::Database;

/// Configures the check `postgres.backup_fresh`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BackupFreshCheckConfig {
    /// The database that it must be of.
    pub target: String,
    /// A backup, or a directory whose newest backup of the database is looked at.
    pub path: PathBuf,
    /// How old it may be.
    pub max_age: Span,
    /// What is read of it.
    #[serde(default)]
    pub verify: Verify,
    /// How it must have been proven when it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proven: Option<Prove>,
}

/// Says how much of a backup is read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Verify {
    /// Every file, which is compared with its digest.
    #[default]
    Digests,
    /// The manifest alone.
    None,
}

/// Asks whether a backup that `postgres.backup` made of the database is there, recent and whole.
#[derive(Debug, Clone)]
pub struct BackupFreshCheck {
    config: BackupFreshCheckConfig,
    path: PathBuf,
    database: Arc<Database>,
}

impl BackupFreshCheck {
    /// Makes the check from its configuration; a relative path starts from the context's directory.
    ///
    /// # Errors
    /// The target is not a database.
    pub fn from_config(config: BackupFreshCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let database = cx.target::<Database>(&config.target)?;
        let path = cx.path(&config.path);
        Ok(Self { config, path, database })
    }

    fn ask(&self, cx: &Context, of: &Source) -> Result<Verdict, CheckError> {
        let Some((path, read)) = newest(&self.path, of)? else {
            return Ok(Verdict::fail(format!("there is no backup of {} in {}", of.database, self.path.display()))
                .with_hint("make one with a `postgres.backup` step, or correct `path`"));
        };
        let damaged = |error: &ManifestError| {
            Verdict::fail(format!("the backup does not prove itself: {error}"))
                .with_hint("make a new one before anything is changed; look at the medium it was on")
                .with_fact("path", path.display().to_string())
        };
        let whole = read.and_then(|manifest| match self.config.verify {
            Verify::Digests => manifest.verify(&path, cx).map(|()| manifest),
            Verify::None => Ok(manifest),
        });
        let manifest = match whole {
            Ok(manifest) => manifest,
            Err(error @ (ManifestError::Io { .. } | ManifestError::Cancelled)) => return Err(error.into()),
            Err(error) => return Ok(damaged(&error)),
        };
        let age = Timestamp::now().duration_since(manifest.taken).as_secs_f64();
        Ok(self
            .judge(&path, &manifest, of, age)
            .with_measurement("age_seconds", age)
            .with_measurement("bytes", manifest.bytes() as f64)
            .with_measurement("tables", manifest.tables.len() as f64)
            .with_fact("path", path.display().to_string())
            .with_fact("sha256", manifest.sha256))
    }

    fn judge(&self, path: &Path, manifest: &Manifest, of: &Source, age: f64) -> Verdict {
        let shown = Span::from_secs(age.max(0.0) as u64);
        if manifest.source.system != of.system || manifest.source.database != of.database {
            return Verdict::fail(format!(
                "{} is of database {} of another server or name, not of {}",
                path.display(),
                manifest.source.database,
                of.database
            ))
            .with_hint("correct `path`, or make a backup of this database");
        }
        if age < -60.0 {
            return Verdict::unknown(format!("{} was made in the future", path.display()))
                .with_hint("correct the clock of this machine");
        }
        if age > self.config.max_age.0.as_secs_f64() {
            return Verdict::fail(format!(
                "the newest backup, {}, is {shown} old, more than {}",
                path.display(),
                self.config.max_age
            ))
            .with_hint("make a new one, or allow more with `max_age`");
        }
        if self.config.proven.is_some_and(|asked| manifest.proven < asked) {
            return Verdict::fail(format!("{} was not proven by a restore", path.display()))
                .with_hint("make one with `prove: restore`");
        }
        Verdict::pass(format!("{} is {shown} old and whole", path.display()))
    }
}

type Read = Result<Manifest, ManifestError>;

/// Returns the backup itself, or the newest one of the database in the directory. One whose manifest
/// is damaged, and which is newer than that, counts: nobody knows what it is of.
fn newest(path: &Path, of: &Source) -> Result<Option<(PathBuf, Read)>, CheckError> {
    if path.join(FILE).exists() {
        return Ok(Some((path.to_owned(), Manifest::read(path))));
    }
    let failed = |error: &std::io::Error| -> StepError {
        storage::failed(format!("{} cannot be listed", path.display()), error)
    };
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|error| failed(&error))?,
    };
    let mut newest: Option<(Timestamp, PathBuf, Read)> = None;
    for entry in entries {
        let entry = entry.map_err(|error| failed(&error))?;
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        let backup = entry.path();
        let (at, read) = match Manifest::read(&backup) {
            Ok(manifest) if manifest.source.system != of.system || manifest.source.database != of.database => continue,
            Ok(manifest) => (manifest.taken, Ok(manifest)),
            Err(ManifestError::Missing(_)) => continue,
            Err(error) => {
                let modified = fs::metadata(backup.join(FILE)).and_then(|metadata| metadata.modified());
                let at = modified.ok().and_then(|at| Timestamp::try_from(at).ok());
                (at.unwrap_or(Timestamp::MAX), Err(error))
            }
        };
        if newest.as_ref().is_none_or(|(newest, _, _)| at > *newest) {
            newest = Some((at, backup, read));
        }
    }
    Ok(newest.map(|(_, path, read)| (path, read)))
}

#[async_trait]
impl Check for BackupFreshCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let mut session = self.database.connect(cx).await?;
        let source = contents::source(session.connection()).await?;
        session.close().await;
        let (check, context) = (self.clone(), cx.clone());
        blocking(move || check.ask(&context, &source)).await
    }

    fn kind(&self) -> &str {
        "postgres.backup_fresh"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}
