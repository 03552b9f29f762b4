//! `host.config`: migrates a configuration file by rules, comments and order kept.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::sealed::SealedRef;
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;

use super::file::resolved;
use crate::document::{
    self, Finding, Format, MigrateError, Migrated, Resolved, Rule, Validation, changed_paths, deprecations, migrate,
};
use crate::error::blocking;
use crate::files::path_state::{Observed, PathState, observe};
use crate::files::swap::{self, Contents, FileUndo};
use crate::machine::MachineTarget;

/// Configures `host.config`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConfigConfig {
    /// The configuration file.
    pub path: PathBuf,
    /// How it is written; by its name if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// What is changed, one rule after the other.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<Rule>,
    /// What must hold after the rules.
    #[serde(default)]
    pub validate: Validation,
    /// Asks `validate` before the rules as well.
    #[serde(default)]
    pub validate_before: bool,
    /// Changes the file that a symbolic link leads to; a link is refused otherwise.
    #[serde(default)]
    pub follow: bool,
}

/// Holds what undoing a migration needs: that of any change of one file.
pub type ConfigUndo = FileUndo;

/// Tells later steps what a migration did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigOutput {
    /// The file.
    pub path: PathBuf,
    /// SHA-256 of its content before.
    pub sha256_before: String,
    /// SHA-256 of its content after.
    pub sha256_after: String,
    /// The paths whose value changed; empty where an earlier attempt had made the change.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changed: Vec<String>,
}

/// Migrates one configuration file by rules.
///
/// After each edit the text is read again and compared with what the rule makes of the plain
/// data: where the two differ, nothing is written. The file found is sealed until commit.
#[derive(Debug, Clone)]
pub struct Config {
    config: ConfigConfig,
    format: Format,
}

impl Config {
    /// Makes the step from its configuration; a relative path starts from the context's directory.
    ///
    /// # Errors
    /// The format is not known, a rule's paths cannot be followed, or there is nothing to do.
    pub fn from_config(mut config: ConfigConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        config.path = cx.path(&config.path);
        let format = format_of(&config.path, config.format)?;
        for (at, rule) in config.rules.iter().enumerate() {
            check_rule(rule, format).map_err(|error| error.at(format!("rules.{at}")))?;
        }
        check_validation(&config.validate)?;
        let validates = config.validate.required.len() + config.validate.types.len() + config.validate.deprecated.len();
        if config.rules.is_empty() && validates == 0 {
            return Err(BuildError::new("the step has neither rules nor a validation").with_hint("give it `rules`"));
        }
        Ok(Self { config, format })
    }

    async fn migrated(&self, cx: &Context, text: String, path: &Path) -> Result<Migrated, StepError> {
        let mut rules = Vec::new();
        for rule in &self.config.rules {
            rules.push(match rule {
                Rule::Set(assignment) => Resolved::Set(&assignment.path, assignment.value.resolve(cx).await?),
                Rule::Default(assignment) => Resolved::Default(&assignment.path, assignment.value.resolve(cx).await?),
                Rule::Rename { path, to } => Resolved::Rename(path, to),
                Rule::Move { from, to } => Resolved::Move(from, to),
                Rule::Remove { path } => Resolved::Remove(path),
                Rule::Retype { path, to } => Resolved::Retype(path, *to),
            });
        }
        if self.config.validate_before {
            let before = self.format.read(&text).map_err(|error| not_migrated(path, &error.into()))?;
            refuse(
                path,
                "before the migration",
                &document::validate(&self.config.validate, self.format, &text, &before),
            )?;
        }
        let migrated = migrate(self.format, &text, &rules).map_err(|error| not_migrated(path, &error))?;
        let findings = document::validate(&self.config.validate, self.format, &migrated.text, &migrated.after);
        refuse(path, "after the migration", &findings)?;
        Ok(migrated)
    }
}

pub(crate) fn format_of(path: &Path, format: Option<Format>) -> Result<Format, BuildError> {
    format.or_else(|| Format::of(path)).ok_or_else(|| {
        BuildError::new("the name of the file does not tell its format")
            .at("format")
            .with_hint("give `format`: json, yaml, toml or env")
    })
}

pub(crate) fn check_validation(validation: &Validation) -> Result<(), BuildError> {
    validation.typed().map(|_| ()).map_err(|error| BuildError::new(error.to_string()).at("validate.types"))
}

fn check_rule(rule: &Rule, format: Format) -> Result<(), BuildError> {
    let wrong = |message: &str, hint: &str| Err(BuildError::new(message).with_hint(hint));
    match rule {
        Rule::Rename { path, to } => {
            if !matches!(path.segments().last(), Some(document::Segment::Key(_))) {
                return wrong("only a key can be renamed", "let the path end in a key");
            }
            if to.is_empty() {
                return wrong("the new name is empty", "give `to` the key's new name");
            }
        }
        Rule::Move { from, to } if from.has_wildcard() || to.has_wildcard() => {
            return wrong("`move` has one place and one destination", "move each item by its index");
        }
        _ => {}
    }
    let target = match rule {
        Rule::Set(assignment) | Rule::Default(assignment) => &assignment.path,
        Rule::Move { to, .. } => to,
        Rule::Rename { path, .. } | Rule::Remove { path } | Rule::Retype { path, .. } => path,
    };
    if format == Format::Env && target.segments().len() > 1 {
        return wrong("a .env file has only keys", "name the key alone; quote it if it holds a `.`: \"a.b\"");
    }
    Ok(())
}

/// Takes the text out of what was observed.
pub(crate) fn text_of(path: &Path, observed: &Observed) -> Result<String, StepError> {
    let shown = path.display();
    match (&observed.state, &observed.contents) {
        (PathState::Absent, _) => Err(StepError::permanent(format!("{shown} is not there"))
            .with_hint("correct `path`, or write the file with host.file in an earlier step")),
        (PathState::Symlink { .. }, _) => Err(StepError::permanent(format!("{shown} is a symbolic link"))
            .with_hint("set `follow: true` to change the file that it leads to")),
        (PathState::File { .. }, None) => {
            Err(StepError::permanent(format!("{shown} is too large for a configuration file"))
                .with_hint("host.config edits files up to 16 MiB; correct `path`"))
        }
        (PathState::File { .. }, Some(contents)) => String::from_utf8(contents.clone()).map_err(|error| {
            let line = contents.iter().take(error.utf8_error().valid_up_to()).filter(|b| **b == b'\n').count() + 1;
            StepError::permanent(format!("{shown}, line {line}: this is not UTF-8"))
                .with_hint("convert the file to UTF-8 (`iconv`), then run again")
        }),
    }
}

pub(crate) fn not_migrated(path: &Path, error: &MigrateError) -> StepError {
    let hint = match error {
        MigrateError::Malformed(_) => {
            "mend the file by hand at this place, then run again; nothing was changed".to_owned()
        }
        MigrateError::Rule(rule) => rule.hint.clone(),
        MigrateError::Editor { .. } => {
            "nothing was changed; make this change by hand, or write the whole file with host.file".to_owned()
        }
    };
    StepError::permanent(format!("{}, {error}", path.display())).with_hint(hint)
}

fn refuse(path: &Path, when: &str, findings: &[Finding]) -> Result<(), StepError> {
    if findings.is_empty() {
        return Ok(());
    }
    let listed: Vec<_> = findings.iter().map(ToString::to_string).collect();
    Err(StepError::permanent(format!("{} is not valid {when}: {}", path.display(), listed.join("; ")))
        .with_hint("add a rule that sets what is missing, or mend the file by hand; nothing was changed"))
}

#[async_trait]
impl Step for Config {
    const KIND: &'static str = "host.config";
    type Undo = ConfigUndo;
    type Output = ConfigOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<ConfigUndo, ConfigOutput>, StepError> {
        let (path, follow) = (self.config.path.clone(), self.config.follow);
        let (path, observed) = blocking(move || {
            let path = resolved(&path, follow)?;
            let observed = observe(&path)?;
            Ok((path, observed))
        })
        .await?;
        if cx.is_dry_run() && observed.state == PathState::Absent {
            // A plan must not fail because the step that writes the file has not run.
            let change = Change::new(Effect::Modify, path.display().to_string())
                .with_summary("not there yet: what changes is known when an earlier step has written it");
            let undo = FileUndo::record(cx, path, &observed, PathState::Absent, Vec::new()).await?;
            return Ok(Prepared::change(undo, [change]));
        }
        let text = text_of(&path, &observed)?;
        let migrated = self.migrated(cx, text.clone(), &path).await?;
        let digests = (SealedRef::of(text.as_bytes()), SealedRef::of(migrated.text.as_bytes()));
        let warnings = deprecations(&self.config.validate, self.format, &migrated.text, &migrated.after);
        let warnings: Vec<_> = warnings.iter().map(|warning| format!("warning: {warning}")).collect();
        if migrated.before == migrated.after {
            let reason = [vec!["every rule is satisfied".to_owned()], warnings].concat().join("; ");
            let output = ConfigOutput {
                path,
                sha256_before: digests.0.sha256.clone(),
                sha256_after: digests.0.sha256,
                changed: Vec::new(),
            };
            return Ok(Prepared::unchanged(output, reason));
        }
        let PathState::File { mode, user, group, .. } = observed.state else {
            return Err(StepError::permanent("only a file can be migrated").with_hint("correct `path`"));
        };
        let (sha256, length) = (digests.1.sha256, digests.1.length);
        let intended = PathState::File { sha256, length, mode, user, group };
        let changed = changed_paths(&migrated.before, &migrated.after);
        let count = format!("{} value{} changed", changed.len(), if changed.len() == 1 { "" } else { "s" });
        let change = Change::new(Effect::Modify, path.display().to_string())
            .with_summary([vec![count], warnings].concat().join("; "))
            .with_diff(document::diff(&migrated.before, &migrated.after, &migrated.renamed, &self.config.rules));
        let undo = FileUndo::record(cx, path, &observed, intended, Vec::new()).await?;
        Ok(Prepared::change(undo, [change]))
    }

    async fn apply(&self, cx: &Context, undo: &ConfigUndo) -> Result<ConfigOutput, StepError> {
        let found = match &undo.kept {
            Some(swap::Kept::Sealed(reference)) => cx.unseal(reference).await?,
            _ => Vec::new(),
        };
        // From the content found, not from the one present: after a crash, or with
        // `on_conflict: overwrite`, the present one is not what the rules were meant for.
        let text = String::from_utf8(found).map_err(|_| {
            StepError::permanent("the sealed content is not UTF-8").with_hint("roll back and run again")
        })?;
        let migrated = self.migrated(cx, text, &undo.path).await?;
        let changed = changed_paths(&migrated.before, &migrated.after);
        swap::apply(cx, undo, async |_: &Observed| Ok(Contents::Bytes(migrated.text.into_bytes()))).await?;
        Ok(ConfigOutput {
            path: undo.path.clone(),
            sha256_before: undo.found.sha256().unwrap_or_default().to_owned(),
            sha256_after: undo.intended.sha256().unwrap_or_default().to_owned(),
            changed,
        })
    }

    async fn settle(&self, cx: &Context, undo: &ConfigUndo) -> Result<(), StepError> {
        swap::settle(cx, undo).await
    }

    async fn commit(&self, _cx: &Context, undo: &ConfigUndo) -> Result<(), StepError> {
        swap::commit(undo).await
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![MachineTarget::path(&self.config.path)]
    }
}

#[async_trait]
impl Rollback for Config {
    async fn rollback(&self, cx: &Context, undo: &ConfigUndo, _output: Option<&ConfigOutput>) -> Result<(), StepError> {
        swap::rollback(cx, undo).await
    }
}
