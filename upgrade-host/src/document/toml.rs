//! Reads and edits TOML, comments and order kept.

use serde_json::{Map, Number, Value};
use toml_edit::{DocumentMut, InlineTable, Item, Key, Table, TableLike, Value as TomlValue};

use super::path::Segment;
use super::rules::Edit;
use super::text::{Malformed, position};

/// Marks a date or time, which plain data has no type for: a text would lose what it is.
const DATETIME: &str = "$toml_datetime";
/// Marks a float that plain data has no number for.
const FLOAT: &str = "$toml_float";

fn parse(text: &str) -> Result<DocumentMut, Malformed> {
    text.parse().map_err(|error: toml_edit::TomlError| {
        let (line, column) = position(text, error.span().map_or(0, |span| span.start));
        Malformed { line, column, reason: "this is not TOML".to_owned() }
    })
}

/// Reads a document.
pub(crate) fn read(text: &str) -> Result<Value, Malformed> {
    let document = parse(text)?;
    Ok(table_value(document.as_table()))
}

fn table_value(table: &dyn TableLike) -> Value {
    Value::Object(table.iter().filter_map(|(key, item)| Some((key.to_owned(), item_value(item)?))).collect())
}

fn item_value(item: &Item) -> Option<Value> {
    match item {
        Item::None => None,
        Item::Value(value) => Some(plain(value)),
        Item::Table(table) => Some(table_value(table)),
        Item::ArrayOfTables(tables) => Some(Value::Array(tables.iter().map(|table| table_value(table)).collect())),
    }
}

fn plain(value: &TomlValue) -> Value {
    let marked = |mark: &str, text: String| Value::Object(Map::from_iter([(mark.to_owned(), Value::String(text))]));
    match value {
        TomlValue::String(text) => Value::String(text.value().clone()),
        TomlValue::Integer(number) => Value::from(*number.value()),
        TomlValue::Float(number) => {
            Number::from_f64(*number.value()).map_or_else(|| marked(FLOAT, number.value().to_string()), Value::Number)
        }
        TomlValue::Boolean(value) => Value::Bool(*value.value()),
        TomlValue::Datetime(datetime) => marked(DATETIME, datetime.value().to_string()),
        TomlValue::Array(items) => Value::Array(items.iter().map(plain).collect()),
        TomlValue::InlineTable(table) => table_value(table),
    }
}

fn toml_value(value: &Value) -> Result<TomlValue, String> {
    Ok(match value {
        Value::Null => return Err("TOML has no null: use `remove`".to_owned()),
        Value::Bool(value) => (*value).into(),
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(number), _) => number.into(),
            (None, Some(float)) if number.is_f64() => float.into(),
            _ => return Err("the number is too large for TOML".to_owned()),
        },
        Value::String(text) => text.as_str().into(),
        Value::Array(items) => {
            TomlValue::Array(items.iter().map(toml_value).collect::<Result<Vec<_>, _>>()?.into_iter().collect())
        }
        Value::Object(map) => match map.iter().next() {
            Some((key, Value::String(text))) if map.len() == 1 && key == DATETIME => {
                text.parse::<toml_edit::Datetime>().map_err(|_| "a date cannot be read".to_owned())?.into()
            }
            Some((key, Value::String(text))) if map.len() == 1 && key == FLOAT => {
                text.parse::<f64>().map_err(|_| "a float cannot be read".to_owned())?.into()
            }
            _ => {
                let mut table = InlineTable::new();
                for (key, value) in map {
                    table.insert(key.as_str(), toml_value(value)?);
                }
                TomlValue::InlineTable(table)
            }
        },
    })
}

/// Writes an object as a table of its own, as people do; what is in an array stays in line.
fn toml_item(value: &Value) -> Result<Item, String> {
    match value {
        Value::Object(map) if !map.contains_key(DATETIME) && !map.contains_key(FLOAT) => {
            let mut table = Table::new();
            for (key, value) in map {
                table.insert(key, toml_item(value)?);
            }
            // A table that only holds tables needs no header.
            table.set_implicit(!map.is_empty() && map.values().all(Value::is_object));
            Ok(Item::Table(table))
        }
        other => toml_value(other).map(Item::Value),
    }
}

/// Leads to what holds the last part of a place.
enum Holder<'a> {
    Table(&'a mut dyn TableLike),
    Array(&'a mut toml_edit::Array),
    Tables(&'a mut toml_edit::ArrayOfTables),
}

fn holder<'a>(document: &'a mut DocumentMut, place: &[Segment]) -> Option<Holder<'a>> {
    place.iter().try_fold(Holder::Table(document.as_table_mut()), |holder, segment| match (holder, segment) {
        (Holder::Table(table), Segment::Key(key)) => match table.get_mut(key)? {
            Item::Table(table) => Some(Holder::Table(table)),
            Item::ArrayOfTables(tables) => Some(Holder::Tables(tables)),
            Item::Value(value) => value_holder(value),
            Item::None => None,
        },
        (Holder::Array(array), Segment::Index(index)) => value_holder(array.get_mut(*index)?),
        (Holder::Tables(tables), Segment::Index(index)) => Some(Holder::Table(tables.get_mut(*index)?)),
        _ => None,
    })
}

fn value_holder(value: &mut TomlValue) -> Option<Holder<'_>> {
    match value {
        TomlValue::InlineTable(table) => Some(Holder::Table(table)),
        TomlValue::Array(array) => Some(Holder::Array(array)),
        _ => None,
    }
}

/// Takes the line of a key out of the text. The editor of TOML would take the comments above it
/// along, a file's heading with its first key.
fn without_line(text: &str, place: &[Segment]) -> Option<String> {
    let document = toml_edit::Document::parse(text).ok()?;
    let (last, parent) = place.split_last()?;
    let Segment::Key(key) = last else { return None };
    let holder = parent.iter().try_fold(document.as_item(), |item, segment| match (item, segment) {
        (Item::Table(table), Segment::Key(key)) => table.get(key),
        _ => None,
    })?;
    let (key, Item::Value(value)) = holder.as_table()?.get_key_value(key)? else { return None };
    let (start, end) = (key.span()?.start, value.span()?.end);
    let line = text.get(..start)?.rfind('\n').map_or(0, |newline| newline + 1);
    let next = text.get(end..)?.find('\n').map_or(text.len(), |newline| end + newline + 1);
    let alone = text.get(line..start)?.trim().is_empty();
    alone.then(|| Some(format!("{}{}", text.get(..line)?, text.get(next..)?)))?
}

/// Makes an edit, and leaves the text around it as it is.
pub(crate) fn edit(text: &str, edit: &Edit) -> Result<String, String> {
    if let Edit::Remove { place } = edit
        && let Some(edited) = without_line(text, place)
    {
        return Ok(edited);
    }
    let mut document = parse(text).map_err(|malformed| malformed.reason)?;
    let lost = || "the place was not found in the text".to_owned();
    match edit {
        Edit::Replace { place, value } => {
            let (last, parent) = place.split_last().ok_or_else(lost)?;
            match (holder(&mut document, parent).ok_or_else(lost)?, last) {
                (Holder::Table(table), Segment::Key(key)) => {
                    let item = table.get_mut(key).ok_or_else(lost)?;
                    match item {
                        Item::Value(old) => replace(old, toml_value(value)?),
                        other => *other = toml_item(value)?,
                    }
                }
                (Holder::Array(array), Segment::Index(index)) => {
                    replace(array.get_mut(*index).ok_or_else(lost)?, toml_value(value)?);
                }
                _ => return Err("an item of an array of tables cannot be replaced as a whole".to_owned()),
            }
        }
        Edit::Insert { parent, key, value } => {
            let Holder::Table(table) = holder(&mut document, parent).ok_or_else(lost)? else { return Err(lost()) };
            // `as_inline` is not to be asked of a trait object: an inline table takes values only.
            let item = toml_item(value)?;
            match table.entry_format(&Key::new(key)) {
                toml_edit::Entry::Vacant(entry) => entry.insert(item),
                toml_edit::Entry::Occupied(_) => return Err(lost()),
            };
        }
        Edit::Rename { parent, key, to } => {
            let Holder::Table(table) = holder(&mut document, parent).ok_or_else(lost)? else { return Err(lost()) };
            rename(table, key, to);
        }
        Edit::Remove { place } => {
            let (last, parent) = place.split_last().ok_or_else(lost)?;
            match (holder(&mut document, parent).ok_or_else(lost)?, last) {
                (Holder::Table(table), Segment::Key(key)) => drop(table.remove(key)),
                (Holder::Array(array), Segment::Index(index)) => drop(array.remove(*index)),
                (Holder::Tables(tables), Segment::Index(index)) => drop(tables.remove(*index)),
                _ => return Err(lost()),
            }
        }
    }
    Ok(document.to_string())
}

/// Returns the comment behind a value, on its line.
pub(crate) fn comment(text: &str, place: &[Segment]) -> Option<String> {
    let mut document = parse(text).ok()?;
    let comment = value_at(&mut document, place)?.decor().suffix()?.as_str()?.to_owned();
    comment.trim_start().starts_with('#').then_some(comment)
}

/// Writes a comment behind a value, if the value has a line of its own.
pub(crate) fn with_comment(text: &str, place: &[Segment], comment: &str) -> Option<String> {
    let mut document = parse(text).ok()?;
    value_at(&mut document, place)?.decor_mut().set_suffix(comment);
    Some(document.to_string())
}

fn value_at<'a>(document: &'a mut DocumentMut, place: &[Segment]) -> Option<&'a mut TomlValue> {
    let (Segment::Key(last), parent) = place.split_last()? else { return None };
    match holder(document, parent)? {
        Holder::Table(table) => table.get_mut(last)?.as_value_mut(),
        _ => None,
    }
}

fn replace(old: &mut TomlValue, mut new: TomlValue) {
    *new.decor_mut() = old.decor().clone();
    *old = new;
}

fn rename(table: &mut dyn TableLike, key: &str, to: &str) {
    let keys: Vec<String> = table.iter().map(|(key, _)| key.to_owned()).collect();
    // What stands behind the key is taken out and put back, so that the order stays.
    for name in keys.iter().skip_while(|name| *name != key) {
        let Some(mut old) = table.key(name).cloned() else { continue };
        let Some(item) = table.remove(name) else { continue };
        if name == key {
            old = Key::new(to).with_leaf_decor(old.leaf_decor().clone()).with_dotted_decor(old.dotted_decor().clone());
        }
        if let toml_edit::Entry::Vacant(entry) = table.entry_format(&old) {
            entry.insert(item);
        }
    }
}
