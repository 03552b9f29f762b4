//! Kinds of objects: which the cluster has, and where it keeps them.

use std::fmt;
use std::sync::{Arc, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::KubeError;
use crate::server::ApiServer;

/// Names a kind of object as a cluster serves it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Kind {
    /// The group; empty for the core.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub group: String,
    /// The version: `v1`.
    pub version: String,
    /// The kind: `Deployment`.
    pub kind: String,
    /// Its name in addresses: `deployments`.
    pub plural: String,
    /// Tells whether its objects are in namespaces.
    pub namespaced: bool,
}

impl fmt::Display for Kind {
    /// As people write it: `deployment`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.kind.to_lowercase())
    }
}

impl Kind {
    /// Names a kind that every cluster has, without asking.
    fn known(group: &str, kind: &str, plural: &str, namespaced: bool) -> Self {
        let text = str::to_owned;
        Self { group: text(group), version: "v1".into(), kind: text(kind), plural: text(plural), namespaced }
    }

    /// Returns `v1` or `apps/v1`, as `apiVersion` spells it.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }

    /// Tells whether people call it that: `Deployment`, `deployments`.
    pub fn is_called(&self, name: &str) -> bool {
        self.kind.eq_ignore_ascii_case(name) || self.plural.eq_ignore_ascii_case(name)
    }

    /// Returns the address of its objects, in a namespace if it has any.
    pub fn path(&self, namespace: Option<&str>) -> String {
        let root = if self.group.is_empty() { "/api" } else { "/apis" };
        let version = self.api_version();
        match namespace.filter(|_| self.namespaced) {
            Some(namespace) => format!("{root}/{version}/namespaces/{namespace}/{}", self.plural),
            None => format!("{root}/{version}/{}", self.plural),
        }
    }
}

macro_rules! known {
    ($($function:ident: $group:literal, $kind:literal, $plural:literal, $namespaced:literal;)*) => {
        impl Kind {
            $(
                #[doc = concat!("Names the kind `", $kind, "`, which has had this version in every cluster since 1.19.")]
                pub fn $function() -> Self {
                    Self::known($group, $kind, $plural, $namespaced)
                }
            )*
        }
    };
}

known! {
    config_map: "", "ConfigMap", "configmaps", true;
    controller_revision: "apps", "ControllerRevision", "controllerrevisions", true;
    daemon_set: "apps", "DaemonSet", "daemonsets", true;
    deployment: "apps", "Deployment", "deployments", true;
    endpoints: "", "Endpoints", "endpoints", true;
    event: "", "Event", "events", true;
    job: "batch", "Job", "jobs", true;
    lease: "coordination.k8s.io", "Lease", "leases", true;
    namespace: "", "Namespace", "namespaces", false;
    node: "", "Node", "nodes", false;
    persistent_volume_claim: "", "PersistentVolumeClaim", "persistentvolumeclaims", true;
    pod: "", "Pod", "pods", true;
    replica_set: "apps", "ReplicaSet", "replicasets", true;
    secret: "", "Secret", "secrets", true;
    service: "", "Service", "services", true;
    stateful_set: "apps", "StatefulSet", "statefulsets", true;
}

/// Holds what a cluster serves, as far as it was asked.
#[derive(Debug, Default)]
pub(crate) struct Discovered {
    /// Groups with their versions, the preferred one first.
    groups: Option<Vec<(String, Vec<String>)>>,
    /// Kinds by group and version.
    kinds: Vec<((String, String), Vec<Kind>)>,
}

impl ApiServer {
    /// Finds a kind by what `kubectl` would take: `Deployment`, `deployments`, `deployments.apps`, with
    /// `apiVersion` if one is asked for.
    ///
    /// Where a group serves several versions, the one that it prefers; where several groups have such
    /// a kind, the core's before the others.
    ///
    /// # Errors
    /// The cluster cannot be asked. A kind that it does not have is none.
    pub async fn find_kind(&self, api_version: Option<&str>, name: &str) -> Result<Option<Kind>, KubeError> {
        let (asked_group, asked_version) = match api_version {
            None => (None, None),
            Some(api_version) => match api_version.split_once('/') {
                Some((group, version)) => (Some(group.to_owned()), Some(version.to_owned())),
                None => (Some(String::new()), Some(api_version.to_owned())),
            },
        };
        let (name, asked_group) = match (name.split_once('.'), asked_group) {
            (Some((name, group)), None) => (name, Some(group.to_owned())),
            (_, asked_group) => (name, asked_group),
        };
        let mut unanswered = None;
        for (group, versions) in self.groups().await? {
            if asked_group.as_ref().is_some_and(|asked| *asked != group) {
                continue;
            }
            for version in &versions {
                if asked_version.as_ref().is_some_and(|asked| asked != version) {
                    continue;
                }
                let kinds = match self.kinds_of(&group, version).await {
                    // An API whose own server is down; another group may have the kind.
                    Err(error) if asked_group.is_none() && error.status() == Some(503) => {
                        unanswered = Some(error);
                        continue;
                    }
                    kinds => kinds?,
                };
                if let Some(kind) = kinds.into_iter().find(|kind| kind.is_called(name)) {
                    return Ok(Some(kind));
                }
            }
        }
        unanswered.map_or(Ok(None), Err)
    }

    /// Lists the groups of the cluster with their versions, the preferred one first.
    ///
    /// # Errors
    /// The cluster cannot be asked.
    pub async fn groups(&self) -> Result<Vec<(String, Vec<String>)>, KubeError> {
        let known = self.discovered().lock().unwrap_or_else(PoisonError::into_inner).groups.clone();
        if let Some(groups) = known {
            return Ok(groups);
        }
        let answer = self.get_path("/apis", &[], || "asking the cluster for its API groups".into()).await?;
        let groups = std::iter::once((String::new(), vec!["v1".to_owned()])).chain(groups_in(&answer));
        let groups: Vec<_> = groups.collect();
        self.discovered().lock().unwrap_or_else(PoisonError::into_inner).groups = Some(groups.clone());
        Ok(groups)
    }

    /// Lists the kinds of one version of a group; none where the cluster does not serve it.
    ///
    /// # Errors
    /// The cluster cannot be asked.
    pub async fn kinds_of(&self, group: &str, version: &str) -> Result<Vec<Kind>, KubeError> {
        let key = (group.to_owned(), version.to_owned());
        let discovered: Arc<_> = self.discovered();
        {
            let known = discovered.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((_, kinds)) = known.kinds.iter().find(|(known, _)| *known == key) {
                return Ok(kinds.clone());
            }
        }
        let path = if group.is_empty() { format!("/api/{version}") } else { format!("/apis/{group}/{version}") };
        let answer = self.get_path(&path, &[], || format!("asking the cluster for the kinds of {group}/{version}"));
        let kinds = match answer.await {
            Ok(answer) => kinds_in(&answer, group, version),
            // An aggregated API whose own server is down answers 503; one that is gone, 404.
            Err(error) if error.is_missing() => Vec::new(),
            Err(error) => return Err(error),
        };
        discovered.lock().unwrap_or_else(PoisonError::into_inner).kinds.push((key, kinds.clone()));
        Ok(kinds)
    }
}

/// Reads an `APIGroupList`.
fn groups_in(answer: &Value) -> Vec<(String, Vec<String>)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let of = |group: &Value| {
        let preferred = text(&group["preferredVersion"]["version"]);
        let mut versions: Vec<_> =
            group["versions"].as_array().into_iter().flatten().map(|version| text(&version["version"])).collect();
        versions.sort_by_key(|version| *version != preferred);
        (text(&group["name"]), versions)
    };
    answer["groups"].as_array().into_iter().flatten().map(of).collect()
}

/// Reads an `APIResourceList`; what has a slash is a part of a kind, not a kind.
fn kinds_in(answer: &Value, group: &str, version: &str) -> Vec<Kind> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let resources = answer["resources"].as_array().into_iter().flatten();
    let whole = resources.filter(|resource| resource["name"].as_str().is_some_and(|name| !name.contains('/')));
    let kind = |resource: &Value| Kind {
        group: group.to_owned(),
        version: version.to_owned(),
        kind: text(&resource["kind"]),
        plural: text(&resource["name"]),
        namespaced: resource["namespaced"].as_bool().unwrap_or_default(),
    };
    whole.map(kind).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn addresses_are_those_of_the_api() {
        assert_eq!(Kind::pod().path(Some("shop")), "/api/v1/namespaces/shop/pods");
        assert_eq!(Kind::deployment().path(None), "/apis/apps/v1/deployments");
        assert_eq!(Kind::node().path(Some("shop")), "/api/v1/nodes");
        assert_eq!(Kind::deployment().api_version(), "apps/v1");
    }

    #[test]
    fn discovery_is_read() {
        let groups = json!({ "groups": [{
            "name": "batch",
            "versions": [{ "version": "v2alpha1" }, { "version": "v1" }],
            "preferredVersion": { "version": "v1" },
        }] });
        assert_eq!(groups_in(&groups), [("batch".to_owned(), vec!["v1".to_owned(), "v2alpha1".to_owned()])]);
        let kinds = json!({ "resources": [
            { "name": "jobs", "kind": "Job", "namespaced": true },
            { "name": "jobs/status", "kind": "Job", "namespaced": true },
        ] });
        assert_eq!(kinds_in(&kinds, "batch", "v1"), [Kind::job()]);
        assert!(Kind::job().is_called("job") && Kind::job().is_called("Jobs") && !Kind::job().is_called("jo"));
    }
}
