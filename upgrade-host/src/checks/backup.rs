//! `host.backup` as a check: there is a backup, it is recent, and it can be read.

use std::fs;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::{CheckError, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::units::Span;
use upgrade_core::verdict::Verdict;

use crate::archive::ArchiveError;
use crate::archive::manifest::RawPath;
use crate::archive::pack::BackupManifest;
use crate::archive::prove;
use crate::error::blocking;
use crate::files::absolute;
use crate::steps::BACKUP_SUFFIX;

/// Configures the check `host.backup`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BackupCheckConfig {
    /// A backup, or a directory whose newest backup is looked at.
    pub path: PathBuf,
    /// How old it may be; of any age if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_age: Option<Span>,
    /// Paths that it must hold.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub holds: Vec<PathBuf>,
}

/// Asks whether a backup that `host.backup` made is there, recent, and reads back whole.
///
/// Every byte of it is read and every digest compared; one that does not prove itself fails.
#[derive(Debug, Clone)]
pub struct BackupCheck {
    config: BackupCheckConfig,
    path: PathBuf,
    holds: Vec<PathBuf>,
}

impl BackupCheck {
    /// Makes the check from its configuration; relative paths start from the context's directory.
    ///
    /// # Errors
    /// None at present.
    pub fn from_config(config: BackupCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let path = cx.path(&config.path);
        let holds = config.holds.iter().map(|path| absolute(&cx.path(path))).collect();
        Ok(Self { config, path, holds })
    }

    fn ask(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let none = || {
            Verdict::fail(format!("there is no backup at {}", self.path.display()))
                .with_hint("make one with a `host.backup` step, or correct `path`")
        };
        let Some(path) = newest(&self.path)? else { return Ok(none()) };
        let proven = match prove::prove(&path, cx) {
            Ok(proven) => proven,
            Err(ArchiveError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => return Ok(none()),
            Err(error @ (ArchiveError::Io { .. } | ArchiveError::Cancelled)) => return Err(error.into()),
            Err(error) => {
                return Ok(Verdict::fail(format!("the backup does not prove itself: {error}"))
                    .with_hint("make a new one before anything is changed; look at the medium it was on"));
            }
        };
        let age = age(&path, &proven.manifest)?;
        let verdict = self.judge(&path, &proven.manifest, age);
        let bytes = fs::metadata(&path).map_err(ArchiveError::io("read", &path))?.len();
        Ok(verdict
            .with_measurement("age_seconds", age)
            .with_measurement("packed_bytes", bytes as f64)
            .with_measurement("bytes", proven.manifest.tree.bytes() as f64)
            .with_measurement("files", proven.manifest.tree.files() as f64)
            .with_fact("path", path.display().to_string())
            .with_fact("sha256", proven.sha256))
    }

    fn judge(&self, path: &Path, manifest: &BackupManifest, age: f64) -> Verdict {
        let shown = Span::from_secs(age.max(0.0) as u64);
        if age < -60.0 {
            return Verdict::unknown(format!("{} was made in the future", path.display()))
                .with_hint("correct the clock of this machine");
        }
        if let Some(most) = self.config.max_age.filter(|most| age > most.0.as_secs_f64()) {
            return Verdict::fail(format!("the newest backup, {}, is {shown} old, more than {most}", path.display()))
                .with_hint("make a new one, or allow more with `max_age`");
        }
        let held = |wanted: &Path| {
            let wanted = RawPath::of(wanted.strip_prefix("/").unwrap_or(wanted));
            manifest.tree.entries.iter().any(|entry| entry.path == wanted)
        };
        match self.holds.iter().find(|wanted| !held(wanted)) {
            Some(missing) => Verdict::fail(format!("{} does not hold {}", path.display(), missing.display()))
                .with_hint("add it to the `paths` of the backup"),
            None => Verdict::pass(format!("{} is {shown} old and reads back whole", path.display())),
        }
    }
}

/// Returns the file itself, or the newest backup in the directory.
fn newest(path: &Path) -> Result<Option<PathBuf>, CheckError> {
    if !path.is_dir() {
        return Ok(path.exists().then(|| path.to_path_buf()));
    }
    let mut newest = None;
    for entry in fs::read_dir(path).map_err(ArchiveError::io("list", path))? {
        let entry = entry.map_err(ArchiveError::io("list", path))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.ends_with(BACKUP_SUFFIX) || name.starts_with('.') {
            continue;
        }
        let modified = entry.metadata().and_then(|m| m.modified()).map_err(ArchiveError::io("read", &entry.path()))?;
        newest = newest.max(Some((modified, entry.path())));
    }
    Ok(newest.map(|(_, path)| path))
}

fn age(path: &Path, manifest: &BackupManifest) -> Result<f64, CheckError> {
    let created: jiff::Timestamp = manifest.created.parse().map_err(|error: jiff::Error| {
        StepError::permanent(format!("{} does not say when it was made", path.display()))
            .with_cause(&error)
            .with_hint("make a new one")
    })?;
    Ok(jiff::Timestamp::now().duration_since(created).as_secs_f64())
}

#[async_trait]
impl Check for BackupCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let (check, context) = (self.clone(), cx.clone());
        blocking(move || check.ask(&context)).await
    }

    fn kind(&self) -> &str {
        "host.backup"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}
