//! Reads and edits YAML, comments and order kept.
//!
//! The text is read twice, by two readers: one tells where things stand, the other what they
//! mean. What follows an alias, or an anchor that others follow, means more than its place: such
//! an edit changes more than was asked, is noticed when the text is read again, and refused.

use serde_json::{Map, Number, Value};
use yamlpath::{Component, Document, Feature, Route};

use super::path::{Segment, look};
use super::rules::Edit;
use super::text::{Malformed, position};

/// Reads a document; an empty one is an empty object.
pub(crate) fn read(text: &str) -> Result<Value, Malformed> {
    let value: yaml_serde::Value = yaml_serde::from_str(text).map_err(|error| {
        let (line, column) = error.location().map_or((1, 1), |place| (place.line(), place.column()));
        Malformed { line, column, reason: "this is not YAML".to_owned() }
    })?;
    match plain(value) {
        Some(Value::Null) => Ok(Value::Object(Map::new())),
        Some(value) => Ok(value),
        None => Err(Malformed { line: 1, column: 1, reason: "a key is not a text, or is given twice".to_owned() }),
    }
}

fn plain(value: yaml_serde::Value) -> Option<Value> {
    use yaml_serde::Value as Yaml;
    let marked = |mark: String, value: Value| Value::Object(Map::from_iter([(mark, value)]));
    Some(match value {
        Yaml::Null => Value::Null,
        Yaml::Bool(value) => Value::Bool(value),
        Yaml::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64().and_then(Number::from_f64)) {
            (Some(number), ..) => number.into(),
            (None, Some(number), _) => number.into(),
            (None, None, Some(number)) => Value::Number(number),
            (None, None, None) => marked("$yaml_float".to_owned(), Value::String(number.to_string())),
        },
        Yaml::String(text) => Value::String(text),
        Yaml::Sequence(items) => Value::Array(items.into_iter().map(plain).collect::<Option<_>>()?),
        Yaml::Mapping(mapping) => {
            let mut map = Map::new();
            for (key, value) in mapping {
                let key = match plain(key)? {
                    Value::String(key) => key,
                    Value::Number(key) => key.to_string(),
                    Value::Bool(key) => key.to_string(),
                    _ => return None,
                };
                if map.insert(key, plain(value)?).is_some() {
                    return None;
                }
            }
            Value::Object(map)
        }
        Yaml::Tagged(tagged) => marked(format!("$yaml_tag {}", tagged.tag), plain(tagged.value)?),
    })
}

/// Makes an edit, and leaves the text around it as it is. `expected` is what is to be meant.
pub(crate) fn edit(text: &str, edit: &Edit, expected: &Value) -> Result<String, String> {
    let editor = Editor { text, document: Document::new(text).map_err(|_| "the text cannot be edited".to_owned())? };
    let edited = match edit {
        Edit::Replace { place, value } => editor.replace(place, value),
        Edit::Insert { parent, key, value } => editor.insert(parent, key, value),
        Edit::Rename { parent, key, to } => editor.rename(parent, key, to),
        Edit::Remove { place } => editor.remove(place, expected),
    };
    edited.ok_or_else(|| "the place was not found in the text".to_owned())
}

struct Editor<'a> {
    text: &'a str,
    document: Document,
}

impl Editor<'_> {
    fn exact(&self, place: &[Segment]) -> Option<Feature<'_>> {
        if place.is_empty() {
            return self.document.top_feature().ok();
        }
        self.document.query_exact(&route(place)).ok().flatten()
    }

    fn newline(&self) -> &'static str {
        if self.text.contains("\r\n") { "\r\n" } else { "\n" }
    }

    fn with(&self, start: usize, end: usize, new: &str) -> Option<String> {
        Some(format!("{}{new}{}", self.text.get(..start)?, self.text.get(end..)?))
    }

    /// Returns where something stands, without the line ends and comments that a block carries
    /// along: those belong to what follows.
    fn span(&self, feature: &Feature<'_>) -> Option<(usize, usize)> {
        let (start, end) = feature.location.byte_span;
        let mut text = self.text.get(start..end)?.trim_end();
        if !text.starts_with(['|', '>']) {
            while let Some((before, line)) = text.rsplit_once('\n')
                && line.trim_start().starts_with('#')
            {
                text = before.trim_end();
            }
        }
        Some((start, start + text.len()))
    }

    /// Returns where a key with its value, or an item, stands.
    fn entry(&self, place: &[Segment]) -> Option<(usize, usize)> {
        let exact = self.exact(place).and_then(|feature| self.span(&feature));
        if !matches!(place.last()?, Segment::Key(_)) {
            return exact;
        }
        let (start, key_end) = self.document.query_key_only(&route(place)).ok()?.location.byte_span;
        let end = match exact {
            Some((_, end)) => end,
            None => key_end + self.text.get(key_end..)?.find(':')? + 1,
        };
        Some((start, end))
    }

    fn line_start(&self, at: usize) -> usize {
        self.text.get(..at).and_then(|before| before.rfind('\n')).map_or(0, |newline| newline + 1)
    }

    /// Returns the end of a line, before its line end.
    fn line_end(&self, at: usize) -> usize {
        let rest = self.text.get(at..).unwrap_or_default();
        let line = rest.split('\n').next().unwrap_or_default();
        at + line.trim_end_matches('\r').len()
    }

    fn next_line(&self, at: usize) -> usize {
        self.text.get(at..).and_then(|rest| rest.find('\n')).map_or(self.text.len(), |newline| at + newline + 1)
    }

    fn replace(&self, place: &[Segment], value: &Value) -> Option<String> {
        let key = match place.last()? {
            Segment::Key(_) => Some(self.document.query_key_only(&route(place)).ok()?.location.byte_span),
            _ => None,
        };
        let Some(feature) = self.exact(place) else {
            // `key:` with nothing behind it.
            let (key_start, key_end) = key?;
            let colon = key_end + self.text.get(key_end..)?.find(':')? + 1;
            let indent = key_start - self.line_start(key_start);
            return self.with(colon, colon, &block(value, indent, self.newline()));
        };
        let (start, end) = self.span(&feature)?;
        let between = key.and_then(|(_, key_end)| Some((key_end, self.text.get(key_end..start)?)));
        match between {
            // A block on lines of its own gives way to a value behind the colon.
            Some((key_end, between)) if between.trim() == ":" => {
                self.with(key_end, end, &format!(": {}", inline(value)))
            }
            _ => self.with(start, end, &inline(value)),
        }
    }

    fn insert(&self, parent: &[Segment], key: &str, value: &Value) -> Option<String> {
        let newline = self.newline();
        let Some(feature) = self.exact(parent) else {
            if !parent.is_empty() {
                return None;
            }
            let glue = if self.text.is_empty() || self.text.ends_with('\n') { "" } else { newline };
            return Some(format!("{}{glue}{}:{}{newline}", self.text, scalar(key), block(value, 0, newline)));
        };
        let (start, end) = self.span(&feature)?;
        // Not asked of the reader: it gives up on a block that has an anchor.
        if self.text.get(start..end)?.starts_with('{') {
            let inner = self.text.get(start..end)?.strip_suffix('}')?;
            let filled = inner.trim_end();
            let at = start + filled.len();
            let comma = if filled.ends_with('{') || filled.ends_with(',') { "" } else { "," };
            let blank = if filled.ends_with('{') { "" } else { " " };
            return self.with(at, at, &format!("{comma}{blank}{}: {}", scalar(key), inline(value)));
        }
        let indent = start - self.line_start(start);
        let at = self.line_end(end);
        let entry = format!("{newline}{}{}:{}", " ".repeat(indent), scalar(key), block(value, indent, newline));
        self.with(at, at, &entry)
    }

    fn rename(&self, parent: &[Segment], key: &str, to: &str) -> Option<String> {
        let place = [parent, &[Segment::Key(key.to_owned())]].concat();
        let feature = self.document.query_key_only(&route(&place)).ok()?;
        let (start, end) = self.span(&feature)?;
        self.with(start, end, &scalar(to))
    }

    fn remove(&self, place: &[Segment], expected: &Value) -> Option<String> {
        let (last, parent) = place.split_last()?;
        let left = look(expected, parent)?;
        let emptied = left.as_object().is_some_and(Map::is_empty) || left.as_array().is_some_and(Vec::is_empty);
        if emptied && !parent.is_empty() {
            return self.replace(parent, left);
        }
        let (start, end) = self.entry(place)?;
        let holder = self.exact(parent)?;
        let (holder_start, _) = self.span(&holder)?;
        if self.text.get(holder_start..)?.starts_with(['{', '[']) {
            let behind = self.text.get(end..)?;
            if let Some(rest) = behind.trim_start().strip_prefix(',') {
                return self.with(start, self.text.len() - rest.trim_start_matches(' ').len(), "");
            }
            let before = self.text.get(..start)?.trim_end();
            return self.with(before.strip_suffix(',').unwrap_or(before).len(), end, "");
        }
        let line = self.line_start(start);
        let prefix = self.text.get(line..start)?;
        let whole = match last {
            Segment::Index(_) => prefix.trim() == "-",
            _ => prefix.trim().is_empty(),
        };
        let next = self.next_line(end);
        if whole {
            return self.with(line, next, "");
        }
        // The first key of an item stands behind its dash: the next one takes its place.
        let following = self.text.get(next..)?;
        self.with(start, next + (following.len() - following.trim_start_matches(' ').len()), "")
    }
}

fn route(place: &[Segment]) -> Route<'_> {
    let components = place.iter().filter_map(|segment| match segment {
        Segment::Key(key) => Some(Component::from(key.as_str())),
        Segment::Index(index) => Some(Component::from(*index)),
        Segment::Every => None,
    });
    Route::from(components.collect::<Vec<_>>())
}

/// Writes a value behind `key:`, on lines of its own where it has parts.
fn block(value: &Value, indent: usize, newline: &str) -> String {
    let inner = indent + 2;
    match value {
        Value::Object(map) if !map.is_empty() => map
            .iter()
            .map(|(key, value)| {
                format!("{newline}{}{}:{}", " ".repeat(inner), scalar(key), block(value, inner, newline))
            })
            .collect(),
        Value::Array(items) if !items.is_empty() => {
            items.iter().map(|item| format!("{newline}{}- {}", " ".repeat(inner), inline(item))).collect()
        }
        other => format!(" {}", inline(other)),
    }
}

/// Writes a value on one line.
fn inline(value: &Value) -> String {
    match value {
        Value::String(text) => scalar(text),
        Value::Array(items) => format!("[{}]", items.iter().map(inline).collect::<Vec<_>>().join(", ")),
        Value::Object(map) if map.is_empty() => "{}".to_owned(),
        Value::Object(map) => {
            let entries: Vec<_> =
                map.iter().map(|(key, value)| format!("{}: {}", scalar(key), inline(value))).collect();
            format!("{{ {} }}", entries.join(", "))
        }
        other => other.to_string(),
    }
}

/// Writes a text without quotes only where no reader, old or new, takes it for something else.
fn scalar(text: &str) -> String {
    let word = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/' || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "_./-".contains(c));
    let reserved = ["true", "false", "null", "yes", "no", "on", "off", "y", "n"];
    if word && !reserved.iter().any(|name| text.eq_ignore_ascii_case(name)) {
        return text.to_owned();
    }
    Value::String(text.to_owned()).to_string()
}

/// Tells where a key stands, line and column from one.
pub(crate) fn locate(text: &str, place: &[Segment]) -> Option<(usize, usize)> {
    let document = Document::new(text).ok()?;
    let feature = document.query_pretty(&route(place)).ok()?;
    Some(position(text, feature.location.byte_span.0))
}
