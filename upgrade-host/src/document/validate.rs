//! What a document must and should not hold.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::path::{ConfigPath, Segment};
use super::rules::type_name;
use super::text::{Format, position};
use super::yaml;

/// Says what a document must hold, of which types, and what it should not hold any more.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Validation {
    /// Places that must have a value other than null; with `[*]`, in every item.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub required: Vec<ConfigPath>,
    /// Types by path; a place that is not there is not judged.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub types: BTreeMap<String, Type>,
    /// Places that are warned about where they are there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deprecated: Vec<Deprecated>,
}

/// A type that a value may be asked to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Type {
    /// A whole number.
    Integer,
    /// A number with a fraction.
    Float,
    /// A number of either kind.
    Number,
    /// `true` or `false`.
    Boolean,
    /// A text.
    String,
    /// A list.
    Array,
    /// A set of keys and values.
    Object,
}

/// A place that should not be there any more, alone or with a message.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Deprecated {
    /// The place.
    Path(ConfigPath),
    /// The place, and what to do about it.
    Explained {
        /// The place.
        path: ConfigPath,
        /// What to do about it.
        message: String,
    },
}

/// One thing that a document lacks or should not have; shows paths and types, never values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) path: ConfigPath,
    pub(crate) reason: String,
    pub(crate) line: Option<usize>,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.path, self.reason)?;
        self.line.map_or(Ok(()), |line| write!(f, " (line {line})"))
    }
}

impl Validation {
    /// Reads the paths of `types`.
    pub(crate) fn typed(&self) -> Result<Vec<(ConfigPath, Type)>, super::PathError> {
        self.types.iter().map(|(path, of)| Ok((ConfigPath::parse(path)?, *of))).collect()
    }
}

/// Lists what is missing or of another type.
pub(crate) fn validate(validation: &Validation, format: Format, text: &str, document: &Value) -> Vec<Finding> {
    let mut findings = Vec::new();
    for path in &validation.required {
        for place in path.places(document) {
            if place.get(document).is_none_or(Value::is_null) {
                findings.push(finding(format, text, place, "required, and not there".to_owned()));
            }
        }
    }
    for (path, of) in validation.typed().unwrap_or_default() {
        for place in path.places(document) {
            if let Some(value) = place.get(document)
                && !is_of(value, of, format)
            {
                let reason = format!("it is {}, and must be of type {}", type_name(value), name(of));
                findings.push(finding(format, text, place, reason));
            }
        }
    }
    findings
}

/// Lists what should not be there any more.
pub(crate) fn deprecations(validation: &Validation, format: Format, text: &str, document: &Value) -> Vec<Finding> {
    let mut findings = Vec::new();
    for deprecated in &validation.deprecated {
        let (path, message) = match deprecated {
            Deprecated::Path(path) => (path, "deprecated".to_owned()),
            Deprecated::Explained { path, message } => (path, format!("deprecated: {message}")),
        };
        for place in path.places(document) {
            if place.get(document).is_some() {
                findings.push(finding(format, text, place, message.clone()));
            }
        }
    }
    findings
}

fn finding(format: Format, text: &str, path: ConfigPath, reason: String) -> Finding {
    let line = line_of(format, text, path.segments());
    Finding { path, reason, line }
}

fn is_of(value: &Value, of: Type, format: Format) -> bool {
    if let (Format::Env, Value::String(text)) = (format, value) {
        // Everything in a .env file is a text: it is asked what the text reads as.
        return match of {
            Type::Integer => text.parse::<i64>().is_ok(),
            Type::Float | Type::Number => text.parse::<f64>().is_ok_and(f64::is_finite),
            Type::Boolean => matches!(text.as_str(), "true" | "false"),
            Type::String => true,
            Type::Array | Type::Object => false,
        };
    }
    match of {
        Type::Integer => value.is_i64() || value.is_u64(),
        Type::Float => value.is_f64(),
        Type::Number => value.is_number(),
        Type::Boolean => value.is_boolean(),
        Type::String => value.is_string(),
        Type::Array => value.is_array(),
        Type::Object => value.is_object(),
    }
}

fn name(of: Type) -> &'static str {
    match of {
        Type::Integer => "integer",
        Type::Float => "float",
        Type::Number => "number",
        Type::Boolean => "boolean",
        Type::String => "string",
        Type::Array => "array",
        Type::Object => "object",
    }
}

/// Tells the line of a place, or of the nearest place above it that the text has.
fn line_of(format: Format, text: &str, place: &[Segment]) -> Option<usize> {
    (1..=place.len()).rev().filter_map(|length| place.get(..length)).find_map(|place| match format {
        Format::Yaml => yaml::locate(text, place).map(|(line, _)| line),
        _ => {
            let Segment::Key(key) = place.last()? else { return None };
            only_occurrence(text, key).map(|at| position(text, at).0)
        }
    })
}

/// Finds a key that stands only once in the text: of several nobody knows which one is meant.
fn only_occurrence(text: &str, key: &str) -> Option<usize> {
    let word = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
    let mut found = text.match_indices(key).filter(|(at, _)| {
        let before = text.get(..*at).and_then(|before| before.chars().next_back());
        let after = text.get(at + key.len()..).and_then(|after| after.chars().next());
        !before.is_some_and(word) && !after.is_some_and(word)
    });
    match (found.next(), found.next()) {
        (Some((at, _)), None) => Some(at),
        _ => None,
    }
}
