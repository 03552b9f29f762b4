//! Which objects of a cluster a backup is about: those of some kinds, but for what the cluster makes itself.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use upgrade_core::error::StepError;
use upgrade_core::registry::BuildError;

use crate::kind::Kind;
use crate::object::{Object, ObjectName};
use crate::server::ApiServer;

/// Says which objects are meant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Selection {
    /// Kinds, as `kubectl` would take them.
    pub(crate) kinds: Vec<String>,
    /// A label selector; empty where all are meant.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) selector: String,
    /// Objects that are not meant: `configmap/shop`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) exclude: Vec<String>,
}

/// Holds the objects that are there.
#[derive(Debug, Default)]
pub(crate) struct Selected {
    /// Those that are meant, by kind as asked for, then by name.
    pub(crate) objects: Vec<(ObjectName, Object)>,
    /// Those that are not, by the reason.
    pub(crate) left_out: BTreeMap<&'static str, Vec<ObjectName>>,
}

impl Selection {
    /// Finds out what the cluster calls the kinds.
    ///
    /// # Errors
    /// The cluster does not have one, or cannot be asked.
    pub(crate) async fn kinds(&self, server: &ApiServer) -> Result<Vec<Kind>, StepError> {
        let mut all = Vec::new();
        for asked in &self.kinds {
            let (version, name) = spelled(asked);
            let Some(kind) = server.find_kind(version, &name).await? else {
                return Err(StepError::permanent(format!("the cluster has no kind {asked}"))
                    .with_hint("correct `kinds`: `kubectl api-resources` lists those it has"));
            };
            if !all.contains(&kind) {
                all.push(kind);
            }
        }
        Ok(all)
    }

    /// Reads the objects.
    ///
    /// # Errors
    /// As [`Selection::kinds`], and as [`ApiServer`] says.
    pub(crate) async fn objects(&self, server: &ApiServer, namespace: &str) -> Result<Selected, StepError> {
        let mut selected = Selected::default();
        for kind in self.kinds(server).await? {
            let (mut objects, _) = server.list(&kind, Some(namespace), &self.selector, "").await?;
            objects.sort_by(|a, b| (a.namespace(), a.name()).cmp(&(b.namespace(), b.name())));
            for object in objects {
                let name = ObjectName::new(kind.clone(), namespace, object.name());
                let reason = if is_excluded(&self.exclude, &name) { Some("excluded") } else { not_written(&object) };
                match reason {
                    Some(reason) => selected.left_out.entry(reason).or_default().push(name),
                    None => selected.objects.push((name, object)),
                }
            }
        }
        Ok(selected)
    }
}

/// Takes apart what people write for a kind: `v1/Secret`, `apps/v1/Deployment`, `apps/deployments`,
/// `deployments.apps`, `deployment`.
fn spelled(asked: &str) -> (Option<&str>, String) {
    match asked.rsplit_once('/') {
        None => (None, asked.to_owned()),
        Some((group, name)) if group.contains('/') || group == "v1" => (Some(group), name.to_owned()),
        Some((group, name)) => (None, format!("{name}.{group}")),
    }
}

/// Tells whether these words mean Secrets, as far as can be told without a cluster.
pub(crate) fn means_secrets(asked: &str) -> bool {
    let (version, name) = spelled(asked);
    version.is_none_or(|version| version == "v1") && Kind::secret().is_called(name.trim_end_matches('.'))
}

/// Refuses what does not name an object.
pub(crate) fn check_exclude(exclude: &[String]) -> Result<(), BuildError> {
    for (at, each) in exclude.iter().enumerate() {
        if !each.split_once('/').is_some_and(|(kind, name)| !kind.is_empty() && !name.is_empty()) {
            return Err(BuildError::new(format!("`{each}` names no object"))
                .at(format!("exclude.{at}"))
                .with_hint("write its kind and its name: `configmap/shop`"));
        }
    }
    Ok(())
}

/// Tells whether an object is among those named `configmap/shop`.
pub(crate) fn is_excluded(exclude: &[String], object: &ObjectName) -> bool {
    let is_meant = |each: &String| {
        let (kind, name) = each.split_once('/').unwrap_or_default();
        let (kind, group) = kind.split_once('.').map_or((kind, None), |(kind, group)| (kind, Some(group)));
        name == object.name && object.kind.is_called(kind) && group.is_none_or(|group| group == object.kind.group)
    };
    exclude.iter().any(is_meant)
}

/// Says why an object is nobody's own work: it comes back by itself, or goes in a moment.
fn not_written(object: &Object) -> Option<&'static str> {
    let is_given = match object.text("/kind") {
        "ConfigMap" => matches!(object.name(), "kube-root-ca.crt" | "openshift-service-ca.crt"),
        "Secret" => object.text("/type") == "kubernetes.io/service-account-token",
        "Service" => object.label("component") == Some("apiserver") && object.name() == "kubernetes",
        _ => false,
    };
    if is_given {
        Some("made by the cluster itself")
    } else if object.list("/metadata/ownerReferences").any(|owner| owner["controller"] == true) {
        Some("owned by a controller")
    } else if object.is_going() {
        Some("being deleted")
    } else {
        None
    }
}

/// Returns what of an object a backup holds: what somebody wrote, without who owns it and who must be asked
/// before it goes, which mean other objects than those that are there when it is restored.
pub(crate) fn own(object: &Object) -> Object {
    let mut own = object.as_written();
    if let Some(metadata) = own.0.get_mut("metadata").and_then(serde_json::Value::as_object_mut) {
        metadata.remove("ownerReferences");
        metadata.remove("finalizers");
    }
    own
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn kinds_are_spelled_in_every_way_people_know() {
        for (asked, version, name) in [
            ("ConfigMap", None, "ConfigMap"),
            ("v1/Secret", Some("v1"), "Secret"),
            ("apps/v1/Deployment", Some("apps/v1"), "Deployment"),
            ("apps/deployments", None, "deployments.apps"),
            ("deployments.apps", None, "deployments.apps"),
        ] {
            assert_eq!(spelled(asked), (version, name.to_owned()), "{asked}");
        }
        assert!(["Secret", "secrets", "v1/secret"].iter().all(|asked| means_secrets(asked)));
        assert!(!["ConfigMap", "example.com/v1/Secret"].iter().any(|asked| means_secrets(asked)));
    }

    #[test]
    fn what_comes_back_by_itself_is_left_out() {
        let object = |kind: &str, name: &str, more: serde_json::Value| {
            let mut object = json!({ "kind": kind, "metadata": { "name": name } });
            object["metadata"]
                .as_object_mut()
                .unwrap()
                .extend(more["metadata"].as_object().cloned().unwrap_or_default());
            object["type"] = more["type"].clone();
            Object(object)
        };
        for (object, reason) in [
            (object("ConfigMap", "kube-root-ca.crt", json!({})), Some("made by the cluster itself")),
            (object("ConfigMap", "shop", json!({})), None),
            (
                object("Secret", "t", json!({ "type": "kubernetes.io/service-account-token" })),
                Some("made by the cluster itself"),
            ),
            (object("Secret", "t", json!({ "type": "Opaque" })), None),
            (
                object("ReplicaSet", "r", json!({ "metadata": { "ownerReferences": [{ "controller": true }] } })),
                Some("owned by a controller"),
            ),
            (object("ConfigMap", "c", json!({ "metadata": { "ownerReferences": [{ "kind": "Shop" }] } })), None),
        ] {
            assert_eq!(not_written(&object), reason, "{object:?}");
        }
    }

    #[test]
    fn objects_are_excluded_by_kind_and_name() {
        let exclude = ["configmap/shop".to_owned(), "deployments.apps/web".to_owned()];
        check_exclude(&exclude).unwrap();
        assert!(is_excluded(&exclude, &ObjectName::new(Kind::config_map(), "x", "shop")));
        assert!(is_excluded(&exclude, &ObjectName::new(Kind::deployment(), "x", "web")));
        assert!(!is_excluded(&exclude, &ObjectName::new(Kind::secret(), "x", "shop")));
        assert_eq!(check_exclude(&["shop".to_owned()]).unwrap_err().key.as_deref(), Some("exclude.0"));
    }
}
