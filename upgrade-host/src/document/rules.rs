//! What each rule means, on plain data: no file, no format, no secret storage.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value};

use super::path::{ConfigPath, Segment, look, look_mut};
use super::value::ConfigValue;

/// One change that a migration makes to a document.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Rule {
    /// Gives a place a value, whatever it has.
    Set(Assignment),
    /// Gives a place a value where it has none.
    Default(Assignment),
    /// Gives a key another name, where it stands.
    Rename {
        /// The key.
        path: ConfigPath,
        /// Its new name, not a path.
        to: String,
    },
    /// Moves a value to another place.
    Move {
        /// Where it stands.
        from: ConfigPath,
        /// Where it goes.
        to: ConfigPath,
    },
    /// Takes a place away.
    Remove {
        /// The place.
        path: ConfigPath,
    },
    /// Turns a value into one of another type.
    Retype {
        /// The place.
        path: ConfigPath,
        /// The type.
        to: Scalar,
    },
}

/// A place and its value.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Assignment {
    /// The place.
    pub path: ConfigPath,
    /// The value, or a reference to a secret: `{ env: NAME }`, `{ file: PATH }`.
    pub value: ConfigValue,
}

/// A type that `retype` makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scalar {
    /// A whole number.
    Integer,
    /// A number with a fraction.
    Float,
    /// `true` or `false`.
    Boolean,
    /// A text.
    String,
}

/// A rule whose secret is resolved. Not `Debug`.
pub(crate) enum Resolved<'a> {
    Set(&'a ConfigPath, Value),
    Default(&'a ConfigPath, Value),
    Rename(&'a ConfigPath, &'a str),
    Move(&'a ConfigPath, &'a ConfigPath),
    Remove(&'a ConfigPath),
    Retype(&'a ConfigPath, Scalar),
}

/// One change at one place: what an editor of a format carries out. Not `Debug`: values may be secret.
#[derive(Clone)]
pub(crate) enum Edit {
    /// Replaces the value of a place that exists.
    Replace { place: Vec<Segment>, value: Value },
    /// Adds a key to an object that exists.
    Insert { parent: Vec<Segment>, key: String, value: Value },
    /// Gives a key of an object another name.
    Rename { parent: Vec<Segment>, key: String, to: String },
    /// Removes a place that exists.
    Remove { place: Vec<Segment> },
}

/// Says why a rule cannot be carried out; shows paths and types, never values.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct RuleError {
    pub(crate) path: ConfigPath,
    pub(crate) reason: String,
    pub(crate) hint: String,
}

fn wrong(path: &ConfigPath, reason: impl Into<String>, hint: impl Into<String>) -> RuleError {
    RuleError { path: path.clone(), reason: reason.into(), hint: hint.into() }
}

/// Lists the edits that a rule asks for, on the document as it is; none if it is satisfied.
pub(crate) fn edits(document: &Value, rule: &Resolved<'_>) -> Result<Vec<Edit>, RuleError> {
    let mut edits = Vec::new();
    match rule {
        Resolved::Set(path, value) => {
            for place in path.places(document) {
                if place.get(document) != Some(value) {
                    edits.push(assign(document, &place, value.clone())?);
                }
            }
        }
        Resolved::Default(path, value) => {
            for place in path.places(document) {
                if place.get(document).is_none() {
                    edits.push(assign(document, &place, value.clone())?);
                }
            }
        }
        Resolved::Rename(path, to) => {
            for place in path.places(document) {
                if let Some((Segment::Key(key), parent)) = place.segments().split_last()
                    && place.get(document).is_some()
                    && key != to
                {
                    let taken = look(document, parent).and_then(Value::as_object).is_some_and(|o| o.contains_key(*to));
                    if taken {
                        return Err(both(&place, to));
                    }
                    edits.push(Edit::Rename { parent: parent.to_vec(), key: key.clone(), to: (*to).to_owned() });
                }
            }
        }
        Resolved::Move(from, to) => {
            if let Some(value) = from.get(document).filter(|_| from != to) {
                if to.get(document).is_some() {
                    return Err(both(from, &to.to_string()));
                }
                let mut without = document.clone();
                let remove = Edit::Remove { place: from.segments().to_vec() };
                apply(&mut without, &remove);
                edits.push(remove);
                edits.push(assign(&without, to, value.clone())?);
            }
        }
        Resolved::Remove(path) => {
            // From the last item on, so that those before it keep their index.
            for place in path.places(document).into_iter().rev() {
                if place.get(document).is_some() {
                    edits.push(Edit::Remove { place: place.segments().to_vec() });
                }
            }
        }
        Resolved::Retype(path, to) => {
            for place in path.places(document) {
                if let Some(value) = place.get(document) {
                    let retyped = retype(value, *to).map_err(|reason| {
                        wrong(&place, reason, "correct the value by hand, or `set` it with a rule before this one")
                    })?;
                    if retyped != *value {
                        edits.push(Edit::Replace { place: place.segments().to_vec(), value: retyped });
                    }
                }
            }
        }
    }
    Ok(edits)
}

fn both(path: &ConfigPath, to: &str) -> RuleError {
    wrong(path, format!("both it and {to} are there"), "remove the one that is not valid any more, then run again")
}

fn assign(document: &Value, path: &ConfigPath, value: Value) -> Result<Edit, RuleError> {
    let place = path.segments();
    if look(document, place).is_some() {
        return Ok(Edit::Replace { place: place.to_vec(), value });
    }
    let existing =
        (0..place.len()).rev().find(|length| place.get(..*length).is_some_and(|p| look(document, p).is_some()));
    let (parent, missing) = place.split_at(existing.unwrap_or(0));
    let mut value = value;
    for segment in missing.iter().skip(1).rev() {
        let Segment::Key(key) = segment else {
            return Err(wrong(path, "an array on the way is not there", "set the array as a whole"));
        };
        value = Value::Object(Map::from_iter([(key.clone(), value)]));
    }
    match (missing.first(), look(document, parent)) {
        (Some(Segment::Key(key)), Some(Value::Object(_))) => {
            Ok(Edit::Insert { parent: parent.to_vec(), key: key.clone(), value })
        }
        // `server:` with nothing behind it is how YAML writes an empty object.
        (Some(Segment::Key(key)), Some(Value::Null)) if !parent.is_empty() => {
            Ok(Edit::Replace { place: parent.to_vec(), value: Value::Object(Map::from_iter([(key.clone(), value)])) })
        }
        (Some(Segment::Index(index)), Some(Value::Array(items))) => Err(wrong(
            path,
            format!("the array has {} items, none at index {index}", items.len()),
            "name an item that exists, or set the array as a whole",
        )),
        (_, found) => Err(wrong(
            path,
            format!("{} stands on the way", found.map_or("nothing", type_name)),
            "correct the path, or remove what stands in its way with a rule before this one",
        )),
    }
}

/// Makes an edit on plain data: what the edited text must mean.
pub(crate) fn apply(document: &mut Value, edit: &Edit) {
    match edit {
        Edit::Replace { place, value } => {
            if let Some(target) = look_mut(document, place) {
                *target = value.clone();
            }
        }
        Edit::Insert { parent, key, value } => {
            if let Some(Value::Object(object)) = look_mut(document, parent) {
                object.insert(key.clone(), value.clone());
            }
        }
        Edit::Rename { parent, key, to } => {
            if let Some(Value::Object(object)) = look_mut(document, parent) {
                *object = std::mem::take(object)
                    .into_iter()
                    .map(|(name, value)| if name == *key { (to.clone(), value) } else { (name, value) })
                    .collect();
            }
        }
        Edit::Remove { place } => {
            let Some((last, parent)) = place.split_last() else { return };
            match (look_mut(document, parent), last) {
                (Some(Value::Object(object)), Segment::Key(key)) => {
                    object.shift_remove(key);
                }
                (Some(Value::Array(items)), Segment::Index(index)) if *index < items.len() => {
                    items.remove(*index);
                }
                _ => {}
            }
        }
    }
}

fn retype(value: &Value, to: Scalar) -> Result<Value, String> {
    let text = match value {
        Value::String(text) => text.trim().to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => number.to_string(),
        other => return Err(format!("{} cannot be turned into another type", type_name(other))),
    };
    let made = match to {
        Scalar::String => match value {
            Value::String(_) => return Ok(value.clone()),
            _ => Some(Value::String(text)),
        },
        Scalar::Integer => whole(&text).map(Value::from),
        Scalar::Float => match value {
            Value::Number(number) if number.is_f64() => return Ok(value.clone()),
            _ => text.parse::<f64>().ok().and_then(Number::from_f64).map(Value::Number),
        },
        Scalar::Boolean => match text.to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" | "1" => Some(Value::Bool(true)),
            "false" | "no" | "off" | "0" => Some(Value::Bool(false)),
            _ => None,
        },
    };
    made.ok_or_else(|| format!("{} that is there does not read as {}", type_name(value), scalar_name(to)))
}

fn whole(text: &str) -> Option<i64> {
    text.parse().ok().or_else(|| {
        let number: f64 = text.parse().ok()?;
        // Beyond 2^53 a float does not say which whole number it means.
        #[expect(clippy::cast_possible_truncation, reason = "whole and within 2^53")]
        (number.fract() == 0.0 && number.abs() < 9_007_199_254_740_992.0).then_some(number as i64)
    })
}

fn scalar_name(scalar: Scalar) -> &'static str {
    match scalar {
        Scalar::Integer => "an integer",
        Scalar::Float => "a float",
        Scalar::Boolean => "a boolean",
        Scalar::String => "a string",
    }
}

/// Names the type of a value.
pub(crate) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(number) if number.is_f64() => "a float",
        Value::Number(_) => "an integer",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
