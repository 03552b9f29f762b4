//! `host.config` on documents and rules that nobody would write.

#![cfg(test)]

use proptest::prelude::*;
use serde_json::{Value, json};
use upgrade_core::registry::BuildContext;
use upgrade_host::steps::Config;

use super::migrate;

fn key() -> impl Strategy<Value = String> {
    prop_oneof![6 => "[a-d]", 1 => "[a-c]\\.[a-b]", 1 => Just("yes".to_owned()), 1 => "[a-z \"'#:-]{1,4}"]
}

fn scalar() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<bool>().prop_map(Value::from),
        (-5_i64..5000).prop_map(Value::from),
        (-8_i32..8).prop_map(|n| Value::from(f64::from(n) + 0.5)),
        "[ -~é]{0,8}".prop_map(Value::from),
        prop_oneof!["true", "12", "- x", "a: b", "# c", "", "null", "1e3", "x\ny"].prop_map(Value::from),
    ]
}

fn document() -> impl Strategy<Value = Value> {
    let value = scalar().prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(key(), inner, 0..4).prop_map(Value::from_iter),
        ]
    });
    prop::collection::btree_map(key(), value, 0..5).prop_map(Value::from_iter)
}

fn path() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        4 => key().prop_map(|key| format!(".{}", Value::from(key))),
        1 => (0_usize..3).prop_map(|at| format!("[{at}]")),
        1 => Just("[*]".to_owned())
    ];
    (key(), prop::collection::vec(part, 0..3))
        .prop_map(|(key, parts)| format!("{}{}", Value::from(key), parts.concat()))
}

fn rule() -> impl Strategy<Value = Value> {
    prop_oneof![
        (path(), document()).prop_map(|(path, value)| json!({ "set": { "path": path, "value": value } })),
        (path(), scalar()).prop_map(|(path, value)| json!({ "set": { "path": path, "value": value } })),
        (path(), scalar()).prop_map(|(path, value)| json!({ "default": { "path": path, "value": value } })),
        (path(), key()).prop_map(|(path, to)| json!({ "rename": { "path": path, "to": to } })),
        (path(), path()).prop_map(|(from, to)| json!({ "move": { "from": from, "to": to } })),
        path().prop_map(|path| json!({ "remove": { "path": path } })),
        (path(), prop_oneof!["integer", "float", "boolean", "string"])
            .prop_map(|(path, to)| json!({ "retype": { "path": path, "to": to } })),
    ]
}

/// Writes a document with comments between its lines, where the format has them.
fn written(format: &str, document: &Value) -> Option<String> {
    Some(match format {
        "c.json" => serde_json::to_string_pretty(document).unwrap().replace("{\n", "{ // note\n"),
        "c.yaml" => format!("# note\n{}# end\n", yaml_serde::to_string(document).ok()?),
        "c.toml" => {
            let mut text = String::from("# note\n");
            for (key, value) in document.as_object()? {
                text.push_str(&format!("{} = {} # of it\n", Value::from(key.as_str()), inline(value)));
            }
            text
        }
        _ => {
            let mut text = String::from("# note\n");
            for (key, value) in document.as_object()? {
                if key.chars().all(|c| c.is_ascii_alphanumeric()) && !value.is_object() && !value.is_array() {
                    let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                    if value.chars().all(|c| c.is_ascii_alphanumeric()) {
                        text.push_str(&format!("{key}={value} # of it\n"));
                    }
                }
            }
            text
        }
    })
}

fn inline(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("[{}]", items.iter().map(inline).collect::<Vec<_>>().join(", ")),
        Value::Object(map) => {
            let entries = map.iter().map(|(key, value)| format!("{} = {}", Value::from(key.as_str()), inline(value)));
            format!("{{ {} }}", entries.collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// That the edited text means what the rules make of the plain data is asked by the step
    /// itself, edit by edit. Here: it never panics, never half-writes, comes back byte for
    /// byte, and an editor gives up only seldom.
    #[test]
    fn rules_on_documents(document in document(), rules in prop::collection::vec(rule(), 1..4)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        for format in ["c.json", "c.yaml", "c.toml", ".env"] {
            let Some(text) = written(format, &document) else { continue };
            let parses = |rule: &Value| serde_json::from_value::<upgrade_host::document::Rule>(rule.clone()).is_ok();
            let usable: Vec<_> = rules.iter().filter(|rule| parses(rule)).cloned().collect();
            let config = json!({ "path": format, "rules": usable });
            if Config::from_config(serde_json::from_value(config).unwrap(), &BuildContext::default()).is_err() {
                continue;
            }
            let migrated = runtime.block_on(migrate(format, &text, &Value::from(usable)));
            if let Ok(migrated) = &migrated
                && format != "c.json"
            {
                prop_assert!(migrated.contains("# note"), "a comment is lost: {migrated}");
            }
            if let Err(error) = &migrated
                && std::env::var_os("SHOW_REFUSED").is_some()
                && error.contains("in place")
            {
                eprintln!("REFUSED {format}: {error}\n{text}\n{rules:?}");
            }
        }
    }
}
