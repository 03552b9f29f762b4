//! Holds the pages of an adapter's kinds to what its registry says.

use std::fs;
use std::path::{Path, PathBuf};

use semver::Version;
use serde_json::Value;

use crate::file::schema;
use crate::registry::{BuildContext, Registry};

/// Knows where the pages of an adapter's kinds are: `docs/steps/KIND.md`, `docs/checks/KIND.md`,
/// the list `docs/steps/README.md`, and the adapter's own `README.md`.
///
/// Every method panics with what is wrong, as an assertion of a test does.
pub struct Pages {
    registry: Registry,
    cx: BuildContext,
    docs: PathBuf,
    readme: PathBuf,
}

impl Pages {
    /// Takes the kinds that an adapter registers, the context in which the examples of the pages are
    /// made, and the adapter's directory (`env!("CARGO_MANIFEST_DIR")`), beside which `docs` stands.
    pub fn new(register: fn(&mut Registry), mut cx: BuildContext, adapter: impl AsRef<Path>) -> Self {
        let mut registry = Registry::new();
        register(&mut registry);
        // Where an example takes the version that its pipeline would name.
        cx.to.get_or_insert(Version::new(1, 1, 0));
        let cx = cx.with_checks(&registry);
        let adapter = adapter.as_ref();
        Self { registry, cx, docs: adapter.join("../docs"), readme: adapter.join("README.md") }
    }

    /// Checks that every kind has a page whose examples load.
    ///
    /// # Panics
    /// A page is missing, has no example, or has one that does not load.
    pub fn have_examples_that_load(&self) {
        for (folder, kind, _) in self.all() {
            let page = self.read(folder, &kind);
            let mut found = Vec::new();
            for example in page.split("```yaml\n").skip(1) {
                let example = example.split("```").next().unwrap_or_default();
                // As a pipeline file is read: `off` is a text.
                let options = serde_saphyr::options! { strict_booleans: true };
                let example: Value = serde_saphyr::from_str_with_options(example, options)
                    .unwrap_or_else(|error| panic!("{folder}/{kind}: {error}"));
                configurations(&example, &kind, &mut found);
            }
            assert!(!found.is_empty(), "{folder}/{kind}.md has no example");
            for with in found {
                let made = match folder {
                    "steps" => self.registry.make_step(&kind, with.clone(), &self.cx).map(drop),
                    _ => self.registry.make_check(&kind, with.clone(), &self.cx).map(drop),
                };
                made.unwrap_or_else(|error| panic!("{folder}/{kind}.md: {error}: {with}"));
            }
        }
    }

    /// Checks that every page names every key of its kind.
    ///
    /// # Panics
    /// One does not.
    pub fn name_every_key(&self) {
        let root = schema(&self.registry);
        let mut missing = Vec::new();
        for (folder, kind, item) in self.all() {
            let page = self.read(folder, &kind);
            let cases = root["$defs"][item]["allOf"].as_array().into_iter().flatten();
            let case = cases.into_iter().find(|case| case["if"]["properties"]["uses"]["const"] == kind.as_str());
            let mut named = Vec::new();
            keys(&root, case.map_or(&Value::Null, |case| &case["then"]["properties"]["with"]), &mut named);
            assert!(!named.is_empty(), "{folder}/{kind} has no keys");
            let unnamed = named.iter().filter(|key| !page.contains(&format!("`{key}`")));
            missing.extend(unnamed.map(|key| format!("{folder}/{kind}: {key}")));
        }
        assert!(missing.is_empty(), "{missing:#?}");
    }

    /// Checks that the list of kinds and the adapter's readme lead to every page.
    ///
    /// # Panics
    /// One does not.
    pub fn are_all_listed(&self) {
        let read = |path: &Path| fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let (list, readme) = (read(&self.docs.join("steps/README.md")), read(&self.readme));
        for (folder, kind, _) in self.all() {
            let link = if folder == "steps" { format!("({kind}.md)") } else { format!("(../checks/{kind}.md)") };
            assert!(list.contains(&link), "the list of kinds does not lead to {folder}/{kind}");
            let link = format!("(../docs/{folder}/{kind}.md)");
            assert!(readme.contains(&link), "the readme does not lead to {folder}/{kind}");
        }
        for (kind, _) in self.registry.target_kinds() {
            assert!(list.contains(kind) && readme.contains(kind), "{kind}");
        }
    }

    /// Checks that every kind says in one short line, beginning with a verb, what it does.
    ///
    /// # Panics
    /// One does not.
    pub fn have_a_line_each(&self) {
        let all = self.registry.step_kinds().chain(self.registry.check_kinds()).chain(self.registry.target_kinds());
        for (kind, about) in all {
            let verb = about.split([' ', ',']).next().unwrap_or_default();
            assert!(verb.ends_with('s') && verb.starts_with(char::is_uppercase), "{kind}: {about}");
            assert!(!about.ends_with('.') && about.len() < 100, "{kind}: {about}");
        }
    }

    /// Lists the kinds: folder, kind, and the schema's name for what may stand there.
    fn all(&self) -> Vec<(&'static str, String, &'static str)> {
        let steps = self.registry.step_kinds().map(|(kind, _)| ("steps", kind.to_owned(), "StepItem"));
        let checks = self.registry.check_kinds().map(|(kind, _)| ("checks", kind.to_owned(), "CheckItem"));
        steps.chain(checks).collect()
    }

    fn read(&self, folder: &str, kind: &str) -> String {
        let path = self.docs.join(folder).join(format!("{kind}.md"));
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }
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
