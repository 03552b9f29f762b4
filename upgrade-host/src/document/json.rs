//! Reads and edits JSON, comments and order kept.

use jsonc_parser::ParseOptions;
use jsonc_parser::cst::{CstInputValue, CstNode, CstRootNode};
use serde_json::{Map, Value};

use super::path::Segment;
use super::rules::Edit;
use super::text::Malformed;

fn parse(text: &str) -> Result<CstRootNode, Malformed> {
    let options = ParseOptions {
        allow_comments: true,
        allow_trailing_commas: true,
        allow_loose_object_property_names: false,
        allow_missing_commas: false,
        allow_single_quoted_strings: false,
        allow_hexadecimal_numbers: false,
        allow_unary_plus_numbers: false,
        allow_bare_decimal_point_numbers: false,
        allow_non_finite_numbers: false,
        allow_extended_string_escapes: false,
    };
    CstRootNode::parse(text, &options).map_err(|error| Malformed {
        line: error.line_display(),
        column: error.column_display(),
        // Some kinds quote what they met.
        reason: "this is not JSON".to_owned(),
    })
}

/// Reads a document; an empty one is an empty object.
pub(crate) fn read(text: &str) -> Result<Value, Malformed> {
    let unreadable = || Malformed { line: 1, column: 1, reason: "a value cannot be read".to_owned() };
    match parse(text)?.value() {
        None => Ok(Value::Object(Map::new())),
        Some(node) => value_of(&node).ok_or_else(unreadable),
    }
}

fn value_of(node: &CstNode) -> Option<Value> {
    if let Some(object) = node.as_object() {
        let mut map = Map::new();
        for property in object.properties() {
            // A key given twice means different things to different readers.
            if map.insert(property.decoded_name()?, value_of(&property.value()?)?).is_some() {
                return None;
            }
        }
        return Some(Value::Object(map));
    }
    if let Some(array) = node.as_array() {
        return array.elements().iter().map(value_of).collect::<Option<Vec<_>>>().map(Value::Array);
    }
    if let Some(text) = node.as_string_lit() {
        return text.decoded_value().ok().map(Value::String);
    }
    // Numbers, booleans and null are written as serde_json reads them.
    serde_json::from_str(node.to_string().trim()).ok()
}

fn input(value: &Value) -> CstInputValue {
    match value {
        Value::Null => CstInputValue::Null,
        Value::Bool(value) => CstInputValue::Bool(*value),
        Value::Number(number) => CstInputValue::Number(number.to_string()),
        Value::String(text) => CstInputValue::String(text.clone()),
        Value::Array(items) => CstInputValue::Array(items.iter().map(input).collect()),
        Value::Object(map) => {
            CstInputValue::Object(map.iter().map(|(key, value)| (key.clone(), input(value))).collect())
        }
    }
}

fn find(root: &CstRootNode, place: &[Segment]) -> Option<CstNode> {
    place.iter().try_fold(root.value()?, |node, segment| match segment {
        Segment::Key(key) => node.as_object()?.get(key)?.value(),
        Segment::Index(index) => node.as_array()?.elements().into_iter().nth(*index),
        Segment::Every => None,
    })
}

/// Makes an edit, and leaves the text around it as it is.
pub(crate) fn edit(text: &str, edit: &Edit) -> Result<String, String> {
    let root = parse(text).map_err(|malformed| malformed.reason)?;
    make(&root, edit).ok_or_else(|| "the place was not found in the text".to_owned())?;
    Ok(root.to_string())
}

fn make(root: &CstRootNode, edit: &Edit) -> Option<()> {
    match edit {
        Edit::Replace { place, value } => match place.split_last()? {
            (Segment::Key(key), parent) => find(root, parent)?.as_object()?.get(key)?.set_value(input(value)),
            (_, _) => replace_item(&find(root, place)?, input(value))?,
        },
        Edit::Insert { parent, key, value } => {
            let object =
                if parent.is_empty() { root.object_value_or_create()? } else { find(root, parent)?.as_object()? };
            object.append(key, input(value));
        }
        Edit::Rename { parent, key, to } => {
            let name = find(root, parent)?.as_object()?.get(key)?.name()?;
            name.as_string_lit()?.set_raw_value(Value::String(to.clone()).to_string());
        }
        Edit::Remove { place } => match place.split_last()? {
            (Segment::Key(key), parent) => find(root, parent)?.as_object()?.get(key)?.remove(),
            (_, _) => find(root, place)?.remove(),
        },
    }
    Some(())
}

fn replace_item(node: &CstNode, value: CstInputValue) -> Option<()> {
    if let Some(node) = node.as_object() {
        node.replace_with(value);
    } else if let Some(node) = node.as_array() {
        node.replace_with(value);
    } else if let Some(node) = node.as_string_lit() {
        node.replace_with(value);
    } else if let Some(node) = node.as_number_lit() {
        node.replace_with(value);
    } else if let Some(node) = node.as_boolean_lit() {
        node.replace_with(value);
    } else {
        node.as_null_keyword()?.replace_with(value);
    }
    Some(())
}
