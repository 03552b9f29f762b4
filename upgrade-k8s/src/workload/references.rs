//! ConfigMaps and Secrets that a pod template reads: found, and led to another name.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::kind::Kind;

/// Says what holds a configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Holder {
    /// A ConfigMap.
    ConfigMap,
    /// A Secret.
    Secret,
}

impl Holder {
    /// Returns the kind of its objects.
    pub fn kind(self) -> Kind {
        match self {
            Self::ConfigMap => Kind::config_map(),
            Self::Secret => Kind::secret(),
        }
    }

    /// Tells what a field of a pod template refers to, and under which key its name stands.
    fn of(field: &str) -> Option<(Self, &'static [&'static str])> {
        match field {
            "configMap" | "configMapRef" | "configMapKeyRef" => Some((Self::ConfigMap, &["name"])),
            "secretRef" | "secretKeyRef" => Some((Self::Secret, &["name"])),
            // A volume of its own says `secretName`, a projected one `name`.
            "secret" => Some((Self::Secret, &["secretName", "name"])),
            _ => None,
        }
    }
}

/// Other names for what templates read.
pub type References = BTreeMap<(Holder, String), String>;

/// Names what a template reads: by variables, by volumes, plain or projected.
pub fn read_by(template: &Value) -> BTreeSet<(Holder, String)> {
    let mut found = BTreeSet::new();
    let mut template = template.clone();
    visit(&mut template, &mut |holder, name| {
        found.insert((holder, name.clone()));
    });
    found
}

/// Leads a template to other names.
pub fn rename(template: &mut Value, names: &References) {
    visit(template, &mut |holder, name| {
        if let Some(other) = names.get(&(holder, name.clone())) {
            name.clone_from(other);
        }
    });
}

fn visit(value: &mut Value, see: &mut impl FnMut(Holder, &mut String)) {
    match value {
        Value::Object(map) => {
            for (field, value) in map {
                if let Some((holder, keys)) = Holder::of(field) {
                    for key in keys {
                        if let Some(Value::String(name)) = value.get_mut(*key) {
                            see(holder, name);
                        }
                    }
                }
                visit(value, see);
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|value| visit(value, see)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_way_of_reading_is_found_and_led_elsewhere() {
        let mut template = json!({ "spec": {
            "containers": [{ "name": "web", "envFrom": [{ "configMapRef": { "name": "a" } }, { "secretRef": { "name": "b" } }],
                "env": [{ "name": "X", "valueFrom": { "configMapKeyRef": { "name": "c", "key": "k" } } },
                    { "name": "Y", "valueFrom": { "secretKeyRef": { "name": "a", "key": "k" } } }] }],
            "volumes": [{ "name": "v", "configMap": { "name": "e" } }, { "name": "w", "secret": { "secretName": "f" } },
                { "name": "p", "projected": { "sources": [{ "configMap": { "name": "g" } }, { "secret": { "name": "h" } }] } }],
        } });
        let (map, secret) = (Holder::ConfigMap, Holder::Secret);
        let expected = [
            (map, "a"),
            (map, "c"),
            (map, "e"),
            (map, "g"),
            (secret, "a"),
            (secret, "b"),
            (secret, "f"),
            (secret, "h"),
        ];
        assert_eq!(read_by(&template), expected.map(|(holder, name)| (holder, name.to_owned())).into());
        rename(&mut template, &[((map, "a".to_owned()), "a-2".to_owned())].into());
        let now = read_by(&template);
        assert!(now.contains(&(map, "a-2".into())) && now.contains(&(secret, "a".into())) && now.len() == 8, "{now:?}");
    }
}
