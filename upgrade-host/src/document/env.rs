//! Reads and edits `.env` files: one `KEY=value` a line, comments and order kept.

use serde_json::{Map, Value};

use super::path::Segment;
use super::rules::Edit;
use super::text::Malformed;

/// One line that assigns, split where its parts end.
struct Line<'a> {
    /// What comes before the key: blanks, `export`.
    before: &'a str,
    key: &'a str,
    value: String,
    /// What comes behind the value: blanks, a comment.
    after: &'a str,
}

fn parse_line(line: &str) -> Result<Option<Line<'_>>, &'static str> {
    let trimmed = line.trim_start();
    if trimmed.is_empty() || trimmed.starts_with('#') {
        return Ok(None);
    }
    let start = line.len() - trimmed.len();
    let key_at = trimmed.strip_prefix("export ").map_or(start, |rest| line.len() - rest.trim_start().len());
    let rest = line.get(key_at..).unwrap_or_default();
    let (key, value) = rest.split_once('=').ok_or("a line is `KEY=value`, a comment or empty")?;
    let key = key.trim_end();
    if key.is_empty() || !key.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c)) {
        return Err("a key is made of letters, digits and `_`");
    }
    let (value, after) = parse_value(value)?;
    Ok(Some(Line { before: line.get(..key_at).unwrap_or_default(), key, value, after }))
}

fn parse_value(text: &str) -> Result<(String, &str), &'static str> {
    let value = text.trim_start();
    if let Some(quoted) = value.strip_prefix('\'') {
        let (value, after) = quoted.split_once('\'').ok_or("a quote is not closed on its line")?;
        return tail(after).map(|after| (value.to_owned(), after));
    }
    if let Some(quoted) = value.strip_prefix('"') {
        let mut content = String::new();
        let mut characters = quoted.char_indices();
        while let Some((at, character)) = characters.next() {
            match character {
                '"' => return tail(quoted.get(at + 1..).unwrap_or_default()).map(|after| (content, after)),
                '\\' => match characters.next().map(|(_, escaped)| escaped) {
                    Some('n') => content.push('\n'),
                    Some('r') => content.push('\r'),
                    Some('t') => content.push('\t'),
                    Some(other) => content.push(other),
                    None => break,
                },
                other => content.push(other),
            }
        }
        return Err("a quote is not closed on its line");
    }
    // Only a `#` behind a blank begins a comment: passwords hold the others.
    let end = value.find(" #").or_else(|| value.find("\t#")).unwrap_or(value.len());
    let end = if value.starts_with('#') && value.len() < text.len() { 0 } else { end };
    let plain = value.get(..end).unwrap_or_default().trim_end();
    Ok((plain.to_owned(), value.get(plain.len()..).unwrap_or_default()))
}

fn tail(after: &str) -> Result<&str, &'static str> {
    let rest = after.trim();
    if rest.is_empty() || rest.starts_with('#') { Ok(after) } else { Err("text stands behind the closing quote") }
}

/// Reads a file as an object of texts. Of a key given twice the last one counts.
pub(crate) fn read(text: &str) -> Result<Value, Malformed> {
    let mut object = Map::new();
    for (number, line) in text.lines().enumerate() {
        match parse_line(line) {
            Ok(Some(line)) => {
                object.insert(line.key.to_owned(), Value::String(line.value));
            }
            Ok(None) => {}
            Err(reason) => return Err(Malformed { line: number + 1, column: 1, reason: reason.to_owned() }),
        }
    }
    Ok(Value::Object(object))
}

fn written(value: &Value) -> Result<String, String> {
    let Value::String(text) = value else { return Err("a .env file holds only texts".to_owned()) };
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:@,+%".contains(c);
    if text.chars().all(plain) {
        return Ok(text.clone());
    }
    // Single quotes keep `$` and `\` from every reader; what they cannot hold is escaped.
    if !text.contains(['\'', '\n', '\r']) {
        return Ok(format!("'{text}'"));
    }
    let mut quoted = String::from("\"");
    for character in text.chars() {
        match character {
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '"' | '\\' | '$' | '`' => quoted.extend(['\\', character]),
            other => quoted.push(other),
        }
    }
    quoted.push('"');
    Ok(quoted)
}

/// Makes an edit, and leaves every other byte as it is.
pub(crate) fn edit(text: &str, edit: &Edit) -> Result<String, String> {
    let (key, new) = match edit {
        Edit::Replace { place, value } => (only_key(place)?, Some(written(value)?)),
        Edit::Remove { place } => (only_key(place)?, None),
        Edit::Rename { key, to, .. } => (key.as_str(), Some(to.clone())),
        Edit::Insert { key, value, .. } => {
            let end = if text.contains("\r\n") { "\r\n" } else { "\n" };
            let break_before = if text.is_empty() || text.ends_with('\n') { "" } else { end };
            return Ok(format!("{text}{break_before}{key}={}{end}", written(value)?));
        }
    };
    let mut edited = String::with_capacity(text.len());
    for whole in text.split_inclusive('\n') {
        let line = whole.trim_end_matches(['\n', '\r']);
        let end = whole.get(line.len()..).unwrap_or_default();
        match (parse_line(line), &new) {
            (Ok(Some(parsed)), new) if parsed.key == key => match (edit, new) {
                (Edit::Rename { .. }, Some(to)) => {
                    let behind = line.get(parsed.before.len() + key.len()..).unwrap_or_default();
                    edited.extend([parsed.before, to, behind, end]);
                }
                (_, Some(value)) => edited.extend([parsed.before, key, "=", value, parsed.after, end]),
                (_, None) => {}
            },
            _ => edited.push_str(whole),
        }
    }
    Ok(edited)
}

fn only_key(place: &[Segment]) -> Result<&str, String> {
    match place {
        [Segment::Key(key)] => Ok(key),
        _ => Err("a .env file has only keys, no objects and arrays".to_owned()),
    }
}
