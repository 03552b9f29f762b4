//! One JSON Schema of a whole pipeline file, for editors.

use std::collections::BTreeMap;

use schemars::{Schema, SchemaGenerator};
use serde_json::{Map, Value, json};

use super::document::Document;
use crate::registry::{Kind, Registry};

/// Describes a pipeline file, with the configuration of every kind that is registered, as JSON
/// Schema of draft 2020-12.
///
/// Wherever a value may stand, so may a text with `${…}`; what such a text becomes is not checked.
pub fn schema(registry: &Registry) -> Value {
    let mut generator = SchemaGenerator::default();
    let root = generator.root_schema_for::<Document>().to_value();
    let steps = kinds(&registry.steps, &mut generator);
    let checks = kinds(&registry.checks, &mut generator);
    let targets = kinds(&registry.targets, &mut generator);

    let mut root = root;
    let mut definitions = generator.take_definitions(true);
    if let Some(Value::Object(own)) = root.as_object_mut().and_then(|root| root.remove("$defs")) {
        definitions.extend(own);
    }
    for (item, kinds) in [
        ("StepItem", &steps),
        ("CheckItem", &checks),
        ("GuardItem", &checks),
        ("PresentItem", &checks),
        ("RequiresItem", &checks),
        ("TargetItem", &targets),
    ] {
        // A choice of nothing is no schema; a file that names such a kind is refused when it is read.
        if let Some(definition) = definitions.get_mut(item).filter(|_| !kinds.is_empty()) {
            let names: Vec<Value> =
                kinds.iter().map(|(name, about, _)| json!({ "const": name, "description": about })).collect();
            definition["properties"]["uses"] = json!({ "description": "The kind.", "oneOf": names });
            definition["allOf"] = kinds
                .iter()
                .map(|(name, _, with)| {
                    json!({
                        "if": { "properties": { "uses": { "const": name } }, "required": ["uses"] },
                        "then": { "properties": { "with": with } },
                    })
                })
                .collect();
        }
    }
    for definition in definitions.values_mut() {
        admit_references(definition);
    }
    admit_references(&mut root);
    definitions.insert(
        "Reference".into(),
        json!({ "type": "string", "pattern": r"\$\{", "description": "A text with a reference: `${name}`." }),
    );
    if let Some(root) = root.as_object_mut() {
        root.insert("$defs".into(), Value::Object(definitions));
    }
    root
}

type Described = Vec<(String, String, Value)>;

fn kinds<T>(kinds: &BTreeMap<String, Kind<T>>, generator: &mut SchemaGenerator) -> Described {
    let describe = |(name, kind): (&String, &Kind<T>)| {
        let schema: Schema = (kind.schema)(generator);
        (name.clone(), kind.about.clone(), schema.to_value())
    };
    kinds.iter().map(describe).collect()
}

/// Lets a text with `${…}` stand wherever a schema wants something else.
fn admit_references(schema: &mut Value) {
    let Value::Object(object) = schema else { return };
    for key in ["properties", "patternProperties"] {
        if let Some(Value::Object(properties)) = object.get_mut(key) {
            properties
                .iter_mut()
                .filter(|(name, _)| !matches!(name.as_str(), "uses" | "id"))
                .for_each(|(_, s)| admit(s));
        }
    }
    for key in ["items", "additionalProperties"] {
        if let Some(inner @ Value::Object(_)) = object.get_mut(key) {
            admit(inner);
        }
    }
    for key in ["prefixItems", "anyOf", "oneOf", "allOf"] {
        if let Some(Value::Array(inner)) = object.get_mut(key) {
            inner.iter_mut().for_each(admit_references);
        }
    }
    if let Some(then) = object.get_mut("then") {
        admit_references(then);
    }
}

fn admit(schema: &mut Value) {
    admit_references(schema);
    let Value::Object(object) = schema else { return };
    let any_text = object.get("type") == Some(&json!("string"))
        && !["pattern", "enum", "const", "format"].iter().any(|key| object.contains_key(*key));
    let anything = object.keys().all(|key| matches!(key.as_str(), "description" | "default" | "title"));
    if any_text || anything {
        return;
    }
    // Editors look for these where the property stands.
    let mut outer = Map::new();
    for key in ["description", "default", "title"] {
        outer.extend(object.remove(key).map(|value| (key.to_owned(), value)));
    }
    outer.insert("anyOf".into(), json!([std::mem::take(object), { "$ref": "#/$defs/Reference" }]));
    *object = outer;
}
