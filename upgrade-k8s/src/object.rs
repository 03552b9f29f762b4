//! Objects of a cluster in its own words, so that nothing is lost that this crate does not know.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::kind::Kind;
use crate::naming::MARKER;

/// Names one object of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ObjectName {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace, if its kind has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
}

impl ObjectName {
    /// Names an object of a kind that has namespaces.
    pub fn new(kind: Kind, namespace: &str, name: &str) -> Self {
        let namespace = kind.namespaced.then(|| namespace.to_owned());
        Self { kind, namespace, name: name.to_owned() }
    }

    /// Returns the object's address.
    pub fn path(&self) -> String {
        format!("{}/{}", self.kind.path(self.namespace.as_deref()), self.name)
    }
}

impl fmt::Display for ObjectName {
    /// As in `deployment shop/web`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{} {namespace}/{}", self.kind, self.name),
            None => write!(f, "{} {}", self.kind, self.name),
        }
    }
}

/// Holds an object as the cluster gave it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Object(pub Value);

impl Object {
    /// Returns what a JSON pointer leads to; null where there is nothing.
    pub fn at(&self, pointer: &str) -> &Value {
        self.0.pointer(pointer).unwrap_or(&Value::Null)
    }

    /// Returns a text, empty where there is none.
    pub fn text(&self, pointer: &str) -> &str {
        self.at(pointer).as_str().unwrap_or_default()
    }

    /// Returns a number, zero where there is none, as the API leaves zeros out.
    pub fn number(&self, pointer: &str) -> i64 {
        self.at(pointer).as_i64().unwrap_or_default()
    }

    /// Returns the members of a list, none where there is no list.
    pub fn list(&self, pointer: &str) -> impl Iterator<Item = &Value> {
        self.at(pointer).as_array().into_iter().flatten()
    }

    /// Returns the object's name.
    pub fn name(&self) -> &str {
        self.text("/metadata/name")
    }

    /// Returns the object's namespace; empty where its kind has none.
    pub fn namespace(&self) -> &str {
        self.text("/metadata/namespace")
    }

    /// Returns what tells the object from another of the same name.
    pub fn uid(&self) -> &str {
        self.text("/metadata/uid")
    }

    /// Returns what changes with every write to the object.
    pub fn resource_version(&self) -> &str {
        self.text("/metadata/resourceVersion")
    }

    /// Returns an annotation.
    pub fn annotation(&self, name: &str) -> Option<&str> {
        self.at("/metadata/annotations").get(name)?.as_str()
    }

    /// Returns a label.
    pub fn label(&self, name: &str) -> Option<&str> {
        self.at("/metadata/labels").get(name)?.as_str()
    }

    /// Tells whether the object is being deleted.
    pub fn is_going(&self) -> bool {
        !self.at("/metadata/deletionTimestamp").is_null()
    }

    /// Tells whether the object is owned by the one with this uid.
    pub fn is_owned_by(&self, uid: &str) -> bool {
        self.list("/metadata/ownerReferences").any(|owner| owner["uid"] == uid)
    }

    /// Returns the object as somebody would write it down: without what the server sets.
    ///
    /// The fields are those that the API conventions call populated by the system
    /// (<https://github.com/kubernetes/community/blob/master/contributors/devel/sig-architecture/api-conventions.md>),
    /// the status, what a Service, a claim or a Pod was given by controllers, and the annotations by which
    /// `kubectl`, the controllers and this crate keep their own books.
    #[must_use]
    pub fn as_written(&self) -> Self {
        let mut object = self.0.clone();
        let kind = self.text("/kind").to_owned();
        // One that somebody wrote down is told from one that a controller chose by this alone.
        let is_bound_by_controller = self.annotation("pv.kubernetes.io/bound-by-controller").is_some();
        if let Some(whole) = object.as_object_mut() {
            whole.remove("status");
        }
        if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            for field in [
                "creationTimestamp",
                "deletionGracePeriodSeconds",
                "deletionTimestamp",
                "generation",
                "managedFields",
                "resourceVersion",
                "selfLink",
                "uid",
            ] {
                metadata.remove(field);
            }
            remove_each(
                metadata,
                "annotations",
                &[
                    "deployment.kubernetes.io/revision",
                    "deprecated.daemonset.template.generation",
                    "kubectl.kubernetes.io/last-applied-configuration",
                    MARKER,
                    "pv.kubernetes.io/bind-completed",
                    "pv.kubernetes.io/bound-by-controller",
                    "volume.beta.kubernetes.io/storage-provisioner",
                    "volume.kubernetes.io/selected-node",
                    "volume.kubernetes.io/storage-provisioner",
                    "volume.kubernetes.io/storage-resizer",
                ],
            );
        }
        if let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) {
            match kind.as_str() {
                "Service" => {
                    // A headless one says so itself.
                    if spec.get("clusterIP").and_then(Value::as_str) != Some("None") {
                        spec.remove("clusterIP");
                        spec.remove("clusterIPs");
                    }
                    spec.remove("healthCheckNodePort");
                }
                "PersistentVolumeClaim" if is_bound_by_controller => {
                    spec.remove("volumeName");
                }
                "Pod" => {
                    spec.remove("nodeName");
                }
                _ => {}
            }
        }
        if kind == "ServiceAccount"
            && let Some(whole) = object.as_object_mut()
        {
            remove_own_tokens(whole, self.name());
        }
        Self(object)
    }

    /// Returns the digest of a part of the object, by which it is told from a changed one.
    pub fn digest_of(&self, pointer: &str) -> String {
        digest(self.at(pointer))
    }
}

fn remove_each(metadata: &mut Map<String, Value>, key: &str, names: &[&str]) {
    if let Some(entries) = metadata.get_mut(key).and_then(Value::as_object_mut) {
        for name in names {
            entries.remove(*name);
        }
        if entries.is_empty() {
            metadata.remove(key);
        }
    }
}

/// Takes out of a service account the tokens that clusters before 1.24 make for it.
fn remove_own_tokens(account: &mut Map<String, Value>, name: &str) {
    let own = format!("{name}-token-");
    if let Some(secrets) = account.get_mut("secrets").and_then(Value::as_array_mut) {
        secrets.retain(|secret| !secret["name"].as_str().unwrap_or_default().starts_with(&own));
        if secrets.is_empty() {
            account.remove("secrets");
        }
    }
}

/// Returns a value with its keys in order.
pub(crate) fn canonical(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut sorted: Vec<_> = map.iter().collect();
            sorted.sort_by_key(|(key, _)| *key);
            sorted.into_iter().map(|(key, value)| (key.clone(), canonical(value))).collect()
        }
        Value::Array(values) => values.iter().map(canonical).collect(),
        other => other.clone(),
    }
}

/// Returns the digest of a value, whatever the order of its keys: `sha256:…`.
pub fn digest(value: &Value) -> String {
    let digits: String =
        Sha256::digest(canonical(value).to_string()).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{digits}")
}

/// Makes a JSON Patch that changes parts of an object as it was read, and is refused with a conflict
/// where somebody has written to it since.
pub fn patch(object: &Object, parts: impl IntoIterator<Item = (String, Option<Value>)>) -> Value {
    let mut operations = vec![
        json!({ "op": "replace", "path": "/metadata/resourceVersion", "value": object.resource_version() }),
        // A name that leads to another object by now would have a resource version of its own, and yet.
        json!({ "op": "test", "path": "/metadata/uid", "value": object.uid() }),
    ];
    for (path, value) in parts {
        let there = object.0.pointer(&path).is_some();
        match value {
            Some(value) if there => operations.push(json!({ "op": "replace", "path": path, "value": value })),
            Some(value) => operations.push(json!({ "op": "add", "path": path, "value": value })),
            None if there => operations.push(json!({ "op": "remove", "path": path })),
            None => {}
        }
    }
    Value::Array(operations)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service() -> Object {
        Object(json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {
                "name": "web", "namespace": "shop", "uid": "u", "resourceVersion": "7", "generation": 2,
                "creationTimestamp": "2026-01-01T00:00:00Z", "managedFields": [],
                "annotations": { "kubectl.kubernetes.io/last-applied-configuration": "{}" },
                "labels": { "app": "web" },
            },
            "spec": { "clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"], "selector": { "app": "web" } },
            "status": { "loadBalancer": {} },
        }))
    }

    #[test]
    fn what_the_server_sets_is_left_out() {
        let written = service().as_written();
        let expected = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": { "name": "web", "namespace": "shop", "labels": { "app": "web" } },
            "spec": { "selector": { "app": "web" } },
        });
        assert_eq!(written.0, expected);
        let headless = json!({ "kind": "Service", "spec": { "clusterIP": "None", "clusterIPs": ["None"] } });
        assert_eq!(Object(headless.clone()).as_written().0, headless);
    }

    #[test]
    fn what_somebody_chose_is_told_from_what_a_controller_did() {
        let claim = |annotations: Value| {
            let spec = json!({ "volumeName": "disk-1" });
            let object =
                json!({ "kind": "PersistentVolumeClaim", "metadata": { "annotations": annotations }, "spec": spec });
            Object(object).as_written()
        };
        let chosen = claim(json!({ "pv.kubernetes.io/bind-completed": "yes" }));
        assert_eq!(chosen.text("/spec/volumeName"), "disk-1");
        let bound = claim(json!({ "pv.kubernetes.io/bound-by-controller": "yes" }));
        assert_eq!(bound.0, json!({ "kind": "PersistentVolumeClaim", "metadata": {}, "spec": {} }));
        let account = |secrets: Value| {
            Object(json!({ "kind": "ServiceAccount", "metadata": { "name": "web" }, "secrets": secrets })).as_written()
        };
        assert_eq!(account(json!([{ "name": "web-token-abcde" }])).at("/secrets"), &Value::Null);
        assert_eq!(
            account(json!([{ "name": "web-token-x" }, { "name": "mine" }])).at("/secrets"),
            &json!([{ "name": "mine" }])
        );
    }

    #[test]
    fn the_order_of_keys_does_not_matter_to_a_digest() {
        let (a, b) = (json!({ "x": 1, "y": [{ "a": 1, "b": 2 }] }), json!({ "y": [{ "b": 2, "a": 1 }], "x": 1 }));
        assert_eq!(digest(&a), digest(&b));
        assert_ne!(digest(&a), digest(&json!({ "x": 1, "y": [{ "a": 2, "b": 2 }] })));
    }

    #[test]
    fn a_patch_adds_replaces_and_removes_what_there_is() {
        let parts = [
            ("/spec/selector".to_owned(), Some(json!({ "app": "green" }))),
            ("/spec/type".to_owned(), Some(json!("ClusterIP"))),
            ("/metadata/labels/app".to_owned(), None),
            ("/metadata/labels/none".to_owned(), None),
        ];
        let patch = patch(&service(), parts);
        let operations: Vec<_> = patch.as_array().unwrap().iter().map(|each| each["op"].as_str().unwrap()).collect();
        assert_eq!(operations, ["replace", "test", "replace", "add", "remove"]);
    }
}
