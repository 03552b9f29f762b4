//! `postgres.lint`: finds statements of migrations that are dangerous under traffic.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::check::Check;
use upgrade_core::context::{Context, blocking};
use upgrade_core::error::{CheckError, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::verdict::{Status, Verdict};

use crate::lint::{Allowance, Finding, LintSettings, Severity, lint};
use crate::target::Database;

/// Configures `postgres.lint`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LintCheckConfig {
    /// The database whose version counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The version, in place of that of a database: `15`, `16.4`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// A directory of scripts, whatever its layout; scripts that undo are left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<PathBuf>,
    /// Scripts, one by one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<PathBuf>,
    /// Leaves out the scripts of the directory up to and with this version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// How much a rule counts, in place of its default.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub severity: BTreeMap<String, Severity>,
    /// Findings that are known and accepted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<Allowance>,
}

/// Finds statements of migrations that are dangerous under traffic.
#[derive(Debug)]
pub struct LintCheck {
    config: LintCheckConfig,
    database: Option<Arc<Database>>,
    settings: LintSettings,
    directory: Option<PathBuf>,
    files: Vec<PathBuf>,
    after: Option<Vec<u128>>,
}

impl LintCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// Neither scripts nor a version are named, a rule is unknown, or an exception has no reason.
    pub fn from_config(config: LintCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let database = config.target.as_deref().map(|name| cx.target::<Database>(name)).transpose()?;
        if config.directory.is_none() && config.files.is_empty() {
            return Err(BuildError::new("no scripts are named")
                .at("directory")
                .with_hint("give `directory` or `files`"));
        }
        if database.is_none() && config.version.is_none() {
            return Err(BuildError::new("the rules depend on the server's version")
                .at("version")
                .with_hint("name the `target`, or its `version`"));
        }
        let settings = LintSettings {
            version: config.version.clone(),
            severity: config.severity.clone(),
            allow: config.allow.clone(),
        };
        settings.validate()?;
        let after = match &config.after {
            None => None,
            Some(text) => match version_of(Path::new(&format!("{text}_.sql"))) {
                version if version.is_empty() => {
                    return Err(BuildError::new(format!("`{text}` is not the version of a script")).at("after"));
                }
                version => Some(version),
            },
        };
        let directory = config.directory.as_ref().map(|path| cx.path(path));
        let files = config.files.iter().map(|path| cx.path(path)).collect();
        Ok(Self { config, database, settings, directory, files, after })
    }

    async fn version(&self, cx: &Context) -> Result<Option<String>, StepError> {
        let Some(database) = self.database.as_ref().filter(|_| self.settings.version.is_none()) else {
            return Ok(self.settings.version.clone());
        };
        let session = database.connect(cx).await?;
        let version = session.facts().version;
        session.close().await;
        Ok(Some(format!("{}.{}", version / 10_000, version % 10_000)))
    }
}

/// Reads the version at the start of a script's name, or of its directory's: `V1_2__name.sql`,
/// `0042_name.up.sql`, `2026-01-02-120000_name/up.sql`.
fn version_of(path: &Path) -> Vec<u128> {
    let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let own = name(path);
    let own = match own.as_str() {
        "up.sql" => path.parent().map(name).unwrap_or_default(),
        _ => own,
    };
    let version = match own.strip_prefix('V') {
        Some(rest) => rest.split("__").next(),
        None => own.split('_').next(),
    };
    let version = version.unwrap_or_default();
    let end = version.find(|c: char| !c.is_ascii_digit() && !matches!(c, '.' | '_' | '-')).unwrap_or(version.len());
    version[..end].split(['.', '_', '-']).filter_map(|part| part.parse().ok()).collect()
}

fn undoes(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let flyway = name.strip_prefix('U').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    name == "down.sql" || name.ends_with(".down.sql") || flyway
}

/// Lists the scripts below a directory, in the order of their versions.
fn scripts_below(directory: &Path, after: Option<&[u128]>) -> std::io::Result<Vec<PathBuf>> {
    let mut open = vec![directory.to_owned()];
    let mut found = Vec::new();
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(directory)? {
            let path = entry?.path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|end| end == "sql") && !undoes(&path) {
                found.push((version_of(&path), path));
            }
        }
    }
    found.retain(|(version, _)| after.is_none_or(|after| version.as_slice() > after));
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

fn read(path: &Path) -> Result<String, StepError> {
    std::fs::read_to_string(path).map_err(|error| {
        StepError::permanent(format!("{} cannot be read", path.display()))
            .with_cause(&error)
            .with_hint("correct `files` or `directory`; a script is text in UTF-8")
    })
}

fn verdict(scripts: usize, findings: &[Finding]) -> Verdict {
    let of = |severity| findings.iter().filter(move |f| f.severity == severity && f.allowed.is_none());
    let (errors, warnings) = (of(Severity::Error).count(), of(Severity::Warn).count());
    let allowed = findings.iter().filter(|finding| finding.allowed.is_some()).count();
    let status = match (errors, warnings) {
        (0, 0) => Status::Pass,
        (0, _) => Status::Warn,
        _ => Status::Fail,
    };
    let worst: Vec<_> = of(Severity::Error).chain(of(Severity::Warn)).collect();
    let mut message = format!("{scripts} scripts: {errors} errors, {warnings} warnings, {allowed} accepted");
    for finding in worst.iter().take(5) {
        message.push_str(&format!("; {finding}"));
    }
    if worst.len() > 5 {
        message.push_str(&format!("; and {} more", worst.len() - 5));
    }
    let figure = |count: usize| u32::try_from(count).map_or(f64::MAX, f64::from);
    let mut verdict = Verdict::new(status, message)
        .with_measurement("errors", figure(errors))
        .with_measurement("warnings", figure(warnings))
        .with_measurement("accepted", figure(allowed))
        .with_measurement("scripts", figure(scripts));
    if let Some(first) = worst.first() {
        let help = first.help.clone().unwrap_or_else(|| "look at the statement".to_owned());
        verdict = verdict.with_hint(format!("{help}; or accept it under `allow`, with the reason"));
    }
    for finding in findings {
        let at = format!("{}:{} {}", finding.file.display(), finding.line, finding.rule);
        let what = match (&finding.allowed, &finding.help) {
            (Some(reason), _) => format!("accepted: {reason}"),
            (None, Some(help)) => format!("{}: {} ({help})", finding.severity, finding.message),
            (None, None) => format!("{}: {}", finding.severity, finding.message),
        };
        // Two findings of a rule in one line are two facts.
        let at = (1..).map(|n| if n == 1 { at.clone() } else { format!("{at} ({n})") });
        let at = at.into_iter().find(|at| !verdict.facts.contains_key(at)).unwrap_or_default();
        verdict = verdict.with_fact(at, what);
    }
    verdict
}

#[async_trait]
impl Check for LintCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let settings = LintSettings { version: self.version(cx).await?, ..self.settings.clone() };
        let (directory, files, after) = (self.directory.clone(), self.files.clone(), self.after.clone());
        blocking(move || {
            let mut paths: Vec<_> = files.into_iter().map(|path| (path.clone(), path)).collect();
            if let Some(directory) = &directory {
                let below = scripts_below(directory, after.as_deref()).map_err(|error| {
                    StepError::permanent(format!("{} cannot be read", directory.display()))
                        .with_cause(&error)
                        .with_hint("correct `directory`: relative paths start from the pipeline file's")
                })?;
                // Shown without what all have in common.
                paths.extend(
                    below.into_iter().map(|path| (path.strip_prefix(directory).unwrap_or(&path).to_owned(), path)),
                );
            }
            if paths.is_empty() && after.is_none() {
                return Ok(Verdict::unknown("there are no scripts").with_hint("correct `directory`"));
            }
            let mut scripts = Vec::new();
            for (shown, path) in paths {
                scripts.push((shown, read(&path)?));
            }
            Ok(verdict(scripts.len(), &lint(&scripts, &settings)))
        })
        .await
    }

    fn kind(&self) -> &str {
        "postgres.lint"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_in_every_layout() {
        for (path, version) in [
            ("0042_name.up.sql", vec![42]),
            ("20260102120000_2fa.sql", vec![20_260_102_120_000]),
            ("V1.2__name.sql", vec![1, 2]),
            ("V10_3__name.sql", vec![10, 3]),
            ("2026-01-02-120000_name/up.sql", vec![2026, 1, 2, 120_000]),
            ("schema.sql", vec![]),
        ] {
            assert_eq!(version_of(Path::new(path)), version, "{path}");
        }
        assert!(version_of(Path::new("V10__a.sql")) > version_of(Path::new("V9__b.sql")));
    }

    #[test]
    fn scripts_that_undo_are_known_by_their_names() {
        for path in ["1_a.down.sql", "1_a/down.sql", "U1__a.sql"] {
            assert!(undoes(Path::new(path)), "{path}");
        }
        for path in ["1_a.up.sql", "1_a.sql", "Users.sql", "up.sql"] {
            assert!(!undoes(Path::new(path)), "{path}");
        }
    }
}
