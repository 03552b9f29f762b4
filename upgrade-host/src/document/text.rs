//! Formats of configuration files, and the one way in which a text is edited.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::path::{ConfigPath, Segment};
use super::rules::{self, Edit, Resolved, RuleError};
use super::{env, json, toml, yaml};

/// Says how a configuration file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// JSON, with or without comments.
    Json,
    /// YAML.
    Yaml,
    /// TOML.
    Toml,
    /// `KEY=value` lines.
    Env,
}

/// Says where a text does not read as its format; quotes nothing of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {reason}")]
pub struct Malformed {
    /// The line, from one.
    pub line: usize,
    /// The column, from one.
    pub column: usize,
    /// What is wrong.
    pub reason: String,
}

/// Says why a document cannot be migrated; shows paths and places, never values.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MigrateError {
    /// The document does not read as its format.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// A rule cannot be carried out.
    #[error(transparent)]
    Rule(#[from] RuleError),
    /// The editor of the format cannot make the change without touching something else.
    #[error("{path}: this change cannot be made in place: {reason}")]
    Editor {
        /// The place.
        path: ConfigPath,
        /// What went wrong.
        reason: String,
    },
}

/// Carries a migrated document. Not `Debug`: it may hold secrets.
pub(crate) struct Migrated {
    pub(crate) text: String,
    pub(crate) before: Value,
    pub(crate) after: Value,
    /// What was renamed, new path and old one.
    pub(crate) renamed: Vec<(ConfigPath, ConfigPath)>,
}

impl Format {
    /// Tells the format by the name of a file: its extension, or `.env` and what begins with it.
    pub fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        if name == ".env" || name.starts_with(".env.") {
            return Some(Format::Env);
        }
        match path.extension()?.to_str()? {
            "json" | "jsonc" => Some(Format::Json),
            "yaml" | "yml" => Some(Format::Yaml),
            "toml" => Some(Format::Toml),
            "env" => Some(Format::Env),
            _ => None,
        }
    }

    /// Reads a text as plain data.
    pub(crate) fn read(self, text: &str) -> Result<Value, Malformed> {
        match self {
            Format::Json => json::read(text),
            Format::Yaml => yaml::read(text),
            Format::Toml => toml::read(text),
            Format::Env => env::read(text),
        }
    }

    fn edit(self, text: &str, edit: &Edit, expected: &Value) -> Result<String, String> {
        match self {
            Format::Json => json::edit(text, edit),
            Format::Yaml => yaml::edit(text, edit, expected),
            Format::Toml => toml::edit(text, edit),
            Format::Env => env::edit(text, edit),
        }
    }

    /// Turns a value into what this format can hold.
    fn hold(self, value: Value) -> Value {
        match (self, value) {
            (Format::Env, Value::Bool(value)) => Value::String(value.to_string()),
            (Format::Env, Value::Number(number)) => Value::String(number.to_string()),
            (_, value) => value,
        }
    }
}

/// Carries rules out on a text, one edit after the other.
///
/// After each, the text is read again and must mean what the rule makes of the plain data: an
/// editor that would change anything else is caught here, and nothing is written.
pub(crate) fn migrate(format: Format, text: &str, rules: &[Resolved<'_>]) -> Result<Migrated, MigrateError> {
    let before = format.read(text)?;
    let mut after = before.clone();
    let mut text = text.to_owned();
    let mut renamed = Vec::new();
    for rule in rules {
        let rule = match rule {
            Resolved::Set(path, value) => Resolved::Set(path, format.hold(value.clone())),
            Resolved::Default(path, value) => Resolved::Default(path, format.hold(value.clone())),
            Resolved::Rename(path, to) => Resolved::Rename(path, to),
            Resolved::Move(from, to) => Resolved::Move(from, to),
            Resolved::Remove(path) => Resolved::Remove(path),
            Resolved::Retype(path, to) => Resolved::Retype(path, *to),
        };
        if let Resolved::Move(from, to) = &rule
            && from.get(&after).is_some()
        {
            renamed.push(((*to).clone(), (*from).clone()));
        }
        let moved = match (format, &rule) {
            (Format::Toml, Resolved::Move(from, to)) => {
                toml::comment(&text, from.segments()).map(|comment| (to.segments(), comment))
            }
            _ => None,
        };
        for edit in rules::edits(&after, &rule)? {
            let edit = match edit {
                Edit::Replace { place, value } => Edit::Replace { place, value: format.hold(value) },
                other => other,
            };
            let mut expected = after.clone();
            rules::apply(&mut expected, &edit);
            if expected == after {
                continue;
            }
            let failed = |reason: String| MigrateError::Editor { path: place_of(&edit), reason };
            let edited = format.edit(&text, &edit, &expected).map_err(failed)?;
            let read = format.read(&edited).map_err(|malformed| failed(malformed.to_string()))?;
            if read != expected {
                return Err(failed("the edited text would not mean what the rule says".to_owned()));
            }
            if let Edit::Rename { parent, key, to } = &edit {
                let path = |key: &String| ConfigPath::of([parent.clone(), vec![Segment::Key(key.clone())]].concat());
                renamed.push((path(to), path(key)));
            }
            (after, text) = (expected, edited);
        }
        // Where a comment cannot stand, the value goes without it.
        if let Some(commented) = moved.and_then(|(to, comment)| toml::with_comment(&text, to, &comment))
            && format.read(&commented).is_ok_and(|read| read == after)
        {
            text = commented;
        }
    }
    Ok(Migrated { text, before, after, renamed })
}

fn place_of(edit: &Edit) -> ConfigPath {
    match edit {
        Edit::Replace { place, .. } | Edit::Remove { place } => ConfigPath::of(place.clone()),
        Edit::Insert { parent, key, .. } | Edit::Rename { parent, key, .. } => {
            ConfigPath::of([parent.clone(), vec![Segment::Key(key.clone())]].concat())
        }
    }
}

/// Tells line and column, from one, of a byte in a text.
pub(crate) fn position(text: &str, at: usize) -> (usize, usize) {
    let before = text.get(..at.min(text.len())).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    (line, before.rsplit('\n').next().unwrap_or_default().chars().count() + 1)
}
