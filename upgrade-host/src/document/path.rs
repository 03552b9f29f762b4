//! Paths into a document: `server.listen`, `a.b[0].c`, `"a.b".c`, `models[*].timeout`.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::Value;

/// One part of a path in a document: a key, an index, or every item.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Segment {
    /// The value of a key.
    Key(String),
    /// The item of an array at an index, from zero.
    Index(usize),
    /// Every item of an array: `[*]`.
    Every,
}

/// Leads to places in a document.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ConfigPath(Vec<Segment>);

/// Says why a text is not a path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a path: {reason}; paths look like server.listen, models[0].name, models[*].name, \"a.b\".c")]
pub struct PathError {
    text: String,
    reason: &'static str,
}

impl ConfigPath {
    /// Reads a path.
    ///
    /// # Errors
    /// The text is not one.
    pub fn parse(text: &str) -> Result<Self, PathError> {
        let wrong = |reason| PathError { text: text.to_owned(), reason };
        let mut segments = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            if let Some(inner) = rest.strip_prefix('[') {
                let (index, after) = inner.split_once(']').ok_or_else(|| wrong("`[` is not closed"))?;
                segments.push(match index {
                    "*" => Segment::Every,
                    index => Segment::Index(index.parse().map_err(|_| wrong("an index is a number or `*`"))?),
                });
                rest = after;
                if !(rest.is_empty() || rest.starts_with(['[', '.'])) {
                    return Err(wrong("after `]` comes `.` or `[`"));
                }
                continue;
            }
            if !segments.is_empty() {
                rest = rest.strip_prefix('.').ok_or_else(|| wrong("keys are separated by `.`"))?;
            }
            let (key, after) = match rest.strip_prefix('"') {
                Some(quoted) => unquote(quoted).ok_or_else(|| wrong("a quote is not closed"))?,
                None => {
                    let end = rest.find(['.', '[']).unwrap_or(rest.len());
                    let (key, after) = rest.split_at(end);
                    if key.is_empty() || key.contains(['"', ']']) {
                        return Err(wrong("a key is empty or needs quotes"));
                    }
                    (key.to_owned(), after)
                }
            };
            segments.push(Segment::Key(key));
            rest = after;
        }
        if segments.is_empty() { Err(wrong("it is empty")) } else { Ok(Self(segments)) }
    }

    /// Makes a path of parts.
    pub(crate) fn of(segments: Vec<Segment>) -> Self {
        Self(segments)
    }

    /// Returns the parts.
    pub fn segments(&self) -> &[Segment] {
        &self.0
    }

    /// Tells whether the path may lead to several places.
    pub fn has_wildcard(&self) -> bool {
        self.0.contains(&Segment::Every)
    }

    /// Lists the places that exist, up to the last part, which need not: the parents' paths.
    pub(crate) fn places(&self, document: &Value) -> Vec<ConfigPath> {
        let mut places = vec![Vec::new()];
        for segment in &self.0 {
            if *segment != Segment::Every {
                places.iter_mut().for_each(|place| place.push(segment.clone()));
                continue;
            }
            places = places
                .into_iter()
                .flat_map(|place| {
                    let items = look(document, &place).and_then(Value::as_array).map_or(0, Vec::len);
                    (0..items).map(move |index| [place.clone(), vec![Segment::Index(index)]].concat())
                })
                .collect();
        }
        places.into_iter().map(ConfigPath).collect()
    }

    /// Returns what stands there. The path has no wildcard.
    pub(crate) fn get<'a>(&self, document: &'a Value) -> Option<&'a Value> {
        look(document, &self.0)
    }
}

fn unquote(quoted: &str) -> Option<(String, &str)> {
    let mut key = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((key, quoted.get(at + 1..)?)),
            '\\' => key.push(characters.next()?.1),
            other => key.push(other),
        }
    }
    None
}

/// Returns what stands at a place.
pub(crate) fn look<'a>(document: &'a Value, place: &[Segment]) -> Option<&'a Value> {
    place.iter().try_fold(document, |value, segment| match segment {
        Segment::Key(key) => value.as_object()?.get(key),
        Segment::Index(index) => value.as_array()?.get(*index),
        Segment::Every => None,
    })
}

/// Returns what stands at a place, to change it.
pub(crate) fn look_mut<'a>(document: &'a mut Value, place: &[Segment]) -> Option<&'a mut Value> {
    place.iter().try_fold(document, |value, segment| match segment {
        Segment::Key(key) => value.as_object_mut()?.get_mut(key),
        Segment::Index(index) => value.as_array_mut()?.get_mut(*index),
        Segment::Every => None,
    })
}

impl fmt::Display for ConfigPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, segment) in self.0.iter().enumerate() {
            match segment {
                Segment::Key(key) => {
                    if at > 0 {
                        f.write_str(".")?;
                    }
                    if key.is_empty() || key.contains(['.', '[', ']', '"', '\\']) {
                        write!(f, "\"{}\"", key.replace('\\', "\\\\").replace('"', "\\\""))?;
                    } else {
                        f.write_str(key)?;
                    }
                }
                Segment::Index(index) => write!(f, "[{index}]")?,
                Segment::Every => f.write_str("[*]")?,
            }
        }
        Ok(())
    }
}

impl Serialize for ConfigPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ConfigPath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

impl JsonSchema for ConfigPath {
    fn schema_name() -> Cow<'static, str> {
        "ConfigPath".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "minLength": 1,
            "description": "A path in the document: server.listen, models[0].name, models[*].name, \"a.b\".c"
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_is_written_the_same() {
        for text in ["a", "a.b[0].c", "a.\"b.c\"", "models[*].timeout", "[0].x", "\"a\\\"b\"[1][2]", "\"\""] {
            assert_eq!(ConfigPath::parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_not_a_path_is_refused() {
        for text in ["", ".", "a.", "a..b", "a[", "a[x]", "a[0]b", "\"a", "a\"b\""] {
            assert!(ConfigPath::parse(text).is_err(), "{text}");
        }
    }
}
