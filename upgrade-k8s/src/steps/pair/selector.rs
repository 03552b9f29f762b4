//! Which side a Service leads to: pure functions on its selector.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::object::Object;

/// The label by which the pods of one template of a Deployment are told from those of another
/// (<https://kubernetes.io/docs/concepts/workloads/controllers/deployment/#pod-template-hash-label>).
pub(in crate::steps) const HASH: &str = "pod-template-hash";

/// The labels that a Service follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::steps) struct Selector(pub(in crate::steps) BTreeMap<String, String>);

impl Selector {
    /// Reads a Service's; empty where it has none.
    pub(in crate::steps) fn of(service: &Object) -> Self {
        let labels = service.at("/spec/selector").as_object();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Self(labels.into_iter().flatten().map(|(label, value)| (label.clone(), text(value))).collect())
    }

    /// Pins it to one template.
    pub(in crate::steps) fn pinned(&self, hash: &str) -> Self {
        let mut labels = self.0.clone();
        labels.insert(HASH.into(), hash.into());
        Self(labels)
    }

    /// Takes the pin away.
    pub(in crate::steps) fn bare(&self) -> Self {
        let mut labels = self.0.clone();
        labels.remove(HASH);
        Self(labels)
    }

    /// Tells whether pods with these labels are followed.
    pub(in crate::steps) fn follows(&self, labels: &Value) -> bool {
        !self.0.is_empty() && self.0.iter().all(|(label, value)| labels[label] == *value)
    }

    /// Writes it as the API has it.
    pub(in crate::steps) fn value(&self) -> Value {
        json!(self.0)
    }

    /// Writes it as `kubectl` takes it.
    pub(in crate::steps) fn text(&self) -> String {
        let each: Vec<_> = self.0.iter().map(|(label, value)| format!("{label}={value}")).collect();
        each.join(",")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_leads_to_one_side_and_comes_off_again() {
        let service = Object(json!({ "spec": { "selector": { "app": "web" } } }));
        let found = Selector::of(&service);
        let (blue, green) = (json!({ "app": "web", HASH: "a" }), json!({ "app": "web", HASH: "b" }));
        assert!(found.follows(&blue) && found.follows(&green));
        let pinned = found.pinned("a");
        assert!(pinned.follows(&blue) && !pinned.follows(&green));
        assert_eq!(pinned.bare(), found);
        assert_eq!(pinned.text(), "app=web,pod-template-hash=a");
        assert!(!Selector::of(&Object(json!({}))).follows(&blue), "what selects nothing follows nobody");
    }
}
