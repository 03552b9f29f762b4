//! What binds a run to its pipeline: the shape, its digest, and how two shapes differ.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{CheckNode, Pipeline};
use crate::entry::Definition;
use crate::error::StepError;
use crate::sealed::sha256_hex;

impl Pipeline {
    /// Describes the pipeline as far as a run is bound to it, and reads the files it names.
    ///
    /// Timeouts, retries and secret values are left out: they may change under a run.
    ///
    /// # Errors
    /// A file that a step names cannot be read.
    pub fn define(&self) -> Result<Definition, StepError> {
        let mut shape = self.structure();
        shape["files"] = self.files()?.into();
        let document = match &self.source.base_document {
            // Built in Rust: what one environment lays over another is not known apart, its name is.
            Value::Null => {
                let mut document = shape.clone();
                document["environment"] = Value::Null;
                document["files"] = Value::Null;
                document
            }
            document => document.clone(),
        };
        let mut base = json!({ "document": document, "to": self.to });
        // By content alone: where a file lies may differ from one environment to the next.
        let mut files: Vec<_> = shape["files"].as_object().into_iter().flat_map(Map::values).cloned().collect();
        files.sort_by_key(Value::to_string);
        base["files"] = files.into();
        Ok(Definition {
            fingerprint: digest(&shape),
            base_fingerprint: digest(&base),
            shape,
            document: self.source.document.clone(),
            base_dir: self.source.base_dir.clone(),
            variables: self.source.variables.clone(),
        })
    }

    /// Digests the files that the steps name.
    fn files(&self) -> Result<Map<String, Value>, StepError> {
        let mut files = Map::new();
        for node in self.steps.values() {
            if let super::StepSource::Ready(step) = &node.source {
                for input in step.erased().inputs() {
                    let relative = input.strip_prefix(&self.source.base_dir).unwrap_or(&input);
                    files.insert(relative.display().to_string(), Value::String(file_digest(&input)?));
                }
            }
        }
        Ok(files)
    }

    /// Describes graph, kinds and configuration: what must be the same even where the files that
    /// the steps name are no longer needed.
    pub(crate) fn structure(&self) -> Value {
        let mut steps = Map::new();
        for id in self.graph.order() {
            let Some(node) = self.step(id) else { continue };
            steps.insert(
                id.to_string(),
                json!({
                    "kind": node.kind(),
                    "needs": self.graph.needs(id).collect::<Vec<_>>(),
                    "with": node.definition(),
                    "irreversible": node.irreversible_reason(),
                    "when": node.when.as_ref().map(|when| &when.text),
                    "before": checks(&node.before),
                    "after": checks(&node.after),
                }),
            );
        }
        let guards: Map<String, Value> = self
            .guards
            .iter()
            .map(|guard| {
                let watched = json!({
                    "check": check(&guard.check),
                    "action": guard.action,
                    "from": guard.from,
                    "until": guard.until,
                    "pause_during": guard.pause_during,
                });
                (guard.check.id.to_string(), watched)
            })
            .collect();
        json!({
            "upgrade": self.name,
            "environment": self.environment,
            "from": self.from.as_ref().map(ToString::to_string),
            "to": self.to,
            "checks": checks(&self.checks),
            "steps": steps,
            "guards": guards,
            "verify": checks(&self.verify),
            "rollback_verify": self.rollback_verify.as_deref().map(checks),
            "commit": self.commit,
        })
    }
}

fn check(node: &CheckNode) -> Value {
    json!({ "kind": node.check.kind(), "with": node.check.definition(), "limits": node.policy.limits })
}

fn checks(nodes: &[CheckNode]) -> Value {
    nodes.iter().map(|node| (node.id.to_string(), check(node))).collect::<Map<_, _>>().into()
}

/// Digests a file, or a directory as the sorted list of its files and their digests.
fn file_digest(path: &Path) -> Result<String, StepError> {
    use std::io::Read;

    use sha2::{Digest, Sha256};

    let unreadable = |error: &std::io::Error| {
        StepError::permanent(format!("{} cannot be read", path.display()))
            .with_cause(error)
            .with_hint("the pipeline names this file: put it there, or correct the name")
    };
    let mut hash = Sha256::new();
    if path.is_dir() {
        let mut entries: Vec<_> =
            std::fs::read_dir(path).and_then(Iterator::collect::<Result<Vec<_>, _>>).map_err(|e| unreadable(&e))?;
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            hash.update(entry.file_name().as_encoded_bytes());
            // A link is what it says, not where it leads: it may lead out, or in a circle.
            if entry.path().is_symlink() {
                let target = std::fs::read_link(entry.path()).map_err(|e| unreadable(&e))?;
                hash.update(target.as_os_str().as_encoded_bytes());
            } else {
                hash.update(file_digest(&entry.path())?);
            }
        }
    } else {
        let mut file = std::fs::File::open(path).map_err(|e| unreadable(&e))?;
        let mut buffer = vec![0; 64 * 1024];
        loop {
            match file.read(&mut buffer).map_err(|e| unreadable(&e))? {
                0 => break,
                n => hash.update(&buffer[..n]),
            }
        }
    }
    Ok(crate::sealed::hex(&hash.finalize()))
}

/// Digests a value in a spelling that does not depend on the order of keys.
pub fn digest(value: &Value) -> String {
    let mut text = String::new();
    spell(value, &mut text);
    sha256_hex(text.as_bytes())
}

fn spell(value: &Value, text: &mut String) {
    match value {
        Value::Object(map) => {
            let mut keys: Vec<_> = map.keys().collect();
            keys.sort();
            text.push('{');
            for key in keys {
                text.push_str(&Value::String(key.clone()).to_string());
                text.push(':');
                spell(&map[key], text);
                text.push(',');
            }
            text.push('}');
        }
        Value::Array(items) => {
            text.push('[');
            for item in items {
                spell(item, text);
                text.push(',');
            }
            text.push(']');
        }
        plain => text.push_str(&plain.to_string()),
    }
}

/// Lists how two shapes differ, a line for each path.
pub fn difference(old: &Value, new: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    compare("", old, new, &mut lines);
    lines
}

fn compare(path: &str, old: &Value, new: &Value, lines: &mut Vec<String>) {
    match (old, new) {
        (Value::Object(a), Value::Object(b)) => {
            for (key, value) in a {
                compare(&format!("{path}/{key}"), value, b.get(key).unwrap_or(&Value::Null), lines);
            }
            for (key, value) in b.iter().filter(|(key, _)| !a.contains_key(*key)) {
                compare(&format!("{path}/{key}"), &Value::Null, value, lines);
            }
        }
        (a, b) if a == b => {}
        (Value::Null, b) => lines.push(format!("+ {path}: {b}")),
        (a, Value::Null) => lines.push(format!("- {path}: {a}")),
        (a, b) => lines.push(format!("~ {path}: {a} → {b}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_does_not_depend_on_the_order_of_keys() {
        let a: Value = serde_json::from_str(r#"{"a":1,"b":{"x":[1,2],"y":"z"}}"#).unwrap();
        let b: Value = serde_json::from_str(r#"{"b":{"y":"z","x":[1,2]},"a":1}"#).unwrap();
        assert_eq!(digest(&a), digest(&b));
        assert_ne!(digest(&a), digest(&json!({"a":1,"b":{"x":[2,1],"y":"z"}})));
    }

    #[test]
    fn the_difference_names_every_path() {
        let lines = difference(&json!({"a":1,"b":{"c":2}}), &json!({"a":1,"b":{"c":3},"d":4}));
        assert_eq!(lines, ["~ /b/c: 2 → 3", "+ /d: 4"]);
    }
}
