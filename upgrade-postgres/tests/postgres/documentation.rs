//! The pages of the kinds: there is one for each, its examples load, and it names every key.

#![cfg(test)]

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use upgrade_core::file::schema;
use upgrade_core::registry::Registry;

fn registry() -> Registry {
    let mut registry = Registry::new();
    upgrade_postgres::register(&mut registry);
    registry
}

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs")
}

/// Names the page of every kind, with the schema's name for what may stand there.
fn pages(registry: &Registry) -> Vec<(&'static str, String, &'static str)> {
    let steps = registry.step_kinds().map(|(kind, _)| ("steps", kind.to_owned(), "StepItem"));
    let checks = registry.check_kinds().map(|(kind, _)| ("checks", kind.to_owned(), "CheckItem"));
    steps.chain(checks).collect()
}

fn read(folder: &str, kind: &str) -> String {
    let path = docs().join(folder).join(format!("{kind}.md"));
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Collects the configurations of a kind in a document, wherever `uses:` names it.
fn configurations(document: &Value, kind: &str, found: &mut Vec<Value>) {
    match document {
        Value::Object(map) => {
            if map.get("uses").and_then(Value::as_str) == Some(kind) {
                found.push(map.get("with").cloned().unwrap_or_else(|| serde_json::json!({})));
            }
            map.values().for_each(|value| configurations(value, kind, found));
        }
        Value::Array(items) => items.iter().for_each(|item| configurations(item, kind, found)),
        _ => {}
    }
}

/// Collects the keys that a schema allows at its top, whatever it refers to.
fn keys(root: &Value, schema: &Value, found: &mut Vec<String>) {
    if let Some(name) = schema["$ref"].as_str().and_then(|path| path.strip_prefix("#/$defs/")) {
        keys(root, &root["$defs"][name], found);
    }
    for choice in ["anyOf", "oneOf", "allOf"] {
        schema[choice].as_array().into_iter().flatten().for_each(|schema| keys(root, schema, found));
    }
    found.extend(schema["properties"].as_object().into_iter().flatten().map(|(key, _)| key.clone()));
}

#[test]
fn every_kind_has_a_page_whose_examples_load() {
    let registry = registry();
    // What the examples take for granted: a target of that name.
    let cx = crate::world::build_context("postgres://app@localhost/orders");
    for (folder, kind, _) in pages(&registry) {
        let page = read(folder, &kind);
        let mut found = Vec::new();
        for example in page.split("```yaml\n").skip(1) {
            let example = example.split("```").next().unwrap();
            let example: Value = yaml_serde::from_str(example).unwrap_or_else(|e| panic!("{folder}/{kind}: {e}"));
            configurations(&example, &kind, &mut found);
        }
        assert!(!found.is_empty(), "{folder}/{kind}.md has no example");
        for mut with in found {
            if kind == "host.release" && with.get("version").is_none() {
                // Its pipeline names the version that it leads to.
                with["version"] = "1.1.0".into();
            }
            let made = match folder {
                "steps" => registry.make_step(&kind, with.clone(), &cx).map(drop),
                _ => registry.make_check(&kind, with.clone(), &cx).map(drop),
            };
            made.unwrap_or_else(|error| panic!("{folder}/{kind}.md: {error}: {with}"));
        }
    }
}

#[test]
fn every_page_names_every_key() {
    let registry = registry();
    let root = schema(&registry);
    let mut missing = Vec::new();
    for (folder, kind, item) in pages(&registry) {
        let page = read(folder, &kind);
        let cases = root["$defs"][item]["allOf"].as_array().unwrap();
        let case = cases.iter().find(|case| case["if"]["properties"]["uses"]["const"] == kind.as_str()).unwrap();
        let mut named = Vec::new();
        keys(&root, &case["then"]["properties"]["with"], &mut named);
        assert!(!named.is_empty(), "{folder}/{kind} has no keys");
        missing.extend(
            named.iter().filter(|key| !page.contains(&format!("`{key}`"))).map(|key| format!("{folder}/{kind}: {key}")),
        );
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn the_list_of_kinds_and_the_readme_are_complete() {
    let registry = registry();
    let list = fs::read_to_string(docs().join("steps/README.md")).unwrap();
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    for (folder, kind, _) in pages(&registry) {
        let link = if folder == "steps" { format!("({kind}.md)") } else { format!("(../checks/{kind}.md)") };
        assert!(list.contains(&link), "the list of kinds does not lead to {folder}/{kind}");
        assert!(
            readme.contains(&format!("(../docs/{folder}/{kind}.md)")),
            "the readme does not lead to {folder}/{kind}"
        );
    }
    for (kind, _) in registry.target_kinds() {
        assert!(list.contains(kind) && readme.contains(kind), "{kind}");
    }
}

#[test]
fn every_kind_says_what_it_does_in_the_same_way() {
    let registry = registry();
    for (kind, about) in registry.step_kinds().chain(registry.check_kinds()).chain(registry.target_kinds()) {
        let verb = about.split([' ', ',']).next().unwrap();
        assert!(verb.ends_with('s') && verb.starts_with(char::is_uppercase), "{kind}: {about}");
        assert!(!about.ends_with('.') && about.len() < 100, "{kind}: {about}");
    }
}
