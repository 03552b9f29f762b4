//! Which pods are meant: by name, by their workload, by their Service, or by labels.

use std::fmt;
use std::sync::Arc;

use upgrade_core::error::StepError;
use upgrade_core::registry::BuildError;
use upgrade_core::target::Target;

use crate::error::KubeError;
use crate::kind::Kind;
use crate::object::{Object, ObjectName};
use crate::pods::selector;
use crate::server::ApiServer;
use crate::target::{Cluster, check_name};
use crate::workload::{WorkloadName, members};

/// Names a pod, or several of which any does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Which {
    Pod(String),
    Workload(WorkloadName),
    Service(String),
    Selector(String),
}

/// The pods that there are.
#[derive(Debug, Default)]
pub(crate) struct Meant {
    /// The uid of what they belong to; none where nothing says that they belong together.
    pub(crate) owner: Option<String>,
    /// By name.
    pub(crate) pods: Vec<Object>,
}

impl Which {
    /// Reads the keys of a configuration, of which exactly one is given.
    pub(crate) fn one_of(
        pod: Option<&str>,
        workload: Option<&WorkloadName>,
        labels: Option<&str>,
    ) -> Result<Self, BuildError> {
        match (pod, workload, labels) {
            (Some(pod), None, None) => {
                check_name(pod, "pod")?;
                Ok(Self::Pod(pod.to_owned()))
            }
            (None, Some(workload), None) => Ok(Self::Workload(workload.clone())),
            (None, None, Some(labels)) if !labels.trim().is_empty() => Ok(Self::Selector(labels.to_owned())),
            (None, None, Some(_)) => {
                Err(BuildError::new("a selector without labels means all pods").at("selector").with_hint("`app=web`"))
            }
            (None, None, None) => Err(BuildError::new("there is no pod")
                .at("workload")
                .with_hint("name one of `pod: NAME`, `workload: deployment/NAME` and `selector: \"app=web\"`")),
            _ => Err(BuildError::new("`pod`, `workload` and `selector` exclude each other")
                .at(if pod.is_some() { "pod" } else { "selector" })
                .with_hint("keep one of them")),
        }
    }

    /// Lists the pods; none where what they belong to does not exist.
    pub(crate) async fn find(&self, server: &ApiServer, namespace: &str) -> Result<Option<Meant>, StepError> {
        let mut meant = match self {
            Self::Pod(name) => {
                let Some(pod) = server.get(&self.object(namespace, Kind::pod(), name)).await? else { return Ok(None) };
                // The next one of its StatefulSet is the same to whoever names it.
                let controller = pod.list("/metadata/ownerReferences").find(|owner| owner["controller"] == true);
                let controller = controller.and_then(|owner| owner["uid"].as_str());
                Meant { owner: Some(controller.unwrap_or(pod.uid()).to_owned()), pods: vec![pod] }
            }
            Self::Workload(workload) => {
                let name = self.object(namespace, workload.kind.kind(), &workload.name);
                let Some(object) = server.get(&name).await? else { return Ok(None) };
                let pods = members::pods_of(server, workload.kind, &object).await?;
                Meant { owner: Some(object.uid().to_owned()), pods }
            }
            Self::Service(name) => {
                let name = self.object(namespace, Kind::service(), name);
                let Some(service) = server.get(&name).await? else { return Ok(None) };
                let Some(labels) = selector(service.at("/spec/selector"), &serde_json::Value::Null) else {
                    return Err(StepError::permanent(format!("{name} selects no pods"))
                        .with_hint("name the pods' workload, or the pod"));
                };
                Meant { owner: None, pods: list(server, namespace, &labels).await? }
            }
            Self::Selector(labels) => Meant { owner: None, pods: list(server, namespace, labels).await? },
        };
        meant.pods.sort_by(|a, b| a.name().cmp(b.name()));
        Ok(Some(meant))
    }

    /// Says that what is named does not exist.
    pub(crate) fn missing(&self, namespace: &str) -> StepError {
        StepError::permanent(format!("there is no {self} in namespace {namespace}"))
            .with_hint("correct its name, or its namespace: `kubectl get all`")
    }

    /// Says that no pod is to be had now.
    pub(crate) fn none_ready(&self, namespace: &str, found: usize) -> StepError {
        let message = format!("no pod of {self} is ready in namespace {namespace} ({found} found)");
        StepError::transient(message)
            .with_hint("`kubectl get pods` tells how they are; wait for them with k8s.workload")
    }

    /// Names what is worked in, so that two runs do not work in it at the same time.
    pub(crate) fn lock(&self, cluster: &Cluster, namespace: &str) -> Arc<dyn Target> {
        match self {
            Self::Pod(name) => cluster.resource(&self.object(namespace, Kind::pod(), name)),
            Self::Workload(name) => cluster.resource(&self.object(namespace, name.kind.kind(), &name.name)),
            Self::Service(name) => cluster.resource(&self.object(namespace, Kind::service(), name)),
            Self::Selector(labels) => cluster.part("pods", &format!("{namespace}/{labels}")),
        }
    }

    fn object(&self, namespace: &str, kind: Kind, name: &str) -> ObjectName {
        ObjectName::new(kind, namespace, name)
    }
}

impl fmt::Display for Which {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(name) => write!(f, "pod {name}"),
            Self::Workload(name) => name.fmt(f),
            Self::Service(name) => write!(f, "service {name}"),
            Self::Selector(labels) => write!(f, "pods {labels}"),
        }
    }
}

async fn list(server: &ApiServer, namespace: &str, labels: &str) -> Result<Vec<Object>, KubeError> {
    Ok(server.list(&Kind::pod(), Some(namespace), labels, "").await?.0)
}

/// Tells whether a pod takes what is sent to it.
pub(crate) fn is_ready(pod: &Object) -> bool {
    !pod.is_going() && pod.list("/status/conditions").any(|each| each["type"] == "Ready" && each["status"] == "True")
}

/// Tells whether a container of a pod runs.
pub(crate) fn runs(pod: &Object, container: &str) -> bool {
    let mut each = pod.list("/status/containerStatuses");
    each.any(|each| each["name"] == container && each["state"].get("running").is_some())
}

/// Names the container that is meant: the one that is asked for, the one that the pod names for it, or the
/// only one.
pub(crate) fn container_of(pod: &Object, asked: Option<&str>) -> Result<String, StepError> {
    let names: Vec<_> = pod.list("/spec/containers").filter_map(|each| each["name"].as_str()).collect();
    let list = names.join(", ");
    // As `kubectl exec` reads it.
    let wanted = asked.or_else(|| pod.annotation("kubectl.kubernetes.io/default-container"));
    match (wanted, &*names) {
        (Some(wanted), names) if names.contains(&wanted) => Ok(wanted.to_owned()),
        (Some(wanted), _) => Err(StepError::permanent(format!("pod {} has no container {wanted}", pod.name()))
            .with_hint(format!("correct `container`; there are: {list}"))),
        (None, [one]) => Ok((*one).to_owned()),
        (None, _) => Err(StepError::permanent(format!("pod {} has several containers", pod.name()))
            .with_hint(format!("name one as `container`: {list}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn exactly_one_way_of_naming_pods_is_taken() {
        let workload = "deploy/web".parse().unwrap();
        assert_eq!(Which::one_of(None, Some(&workload), None).unwrap().to_string(), "deployment/web");
        assert_eq!(Which::one_of(Some("web-0"), None, None).unwrap().to_string(), "pod web-0");
        assert_eq!(Which::one_of(None, None, Some("app=web")).unwrap().to_string(), "pods app=web");
        for (pod, workload, labels, key) in [
            (None, None, None, "workload"),
            (Some("a"), Some(&workload), None, "pod"),
            (None, Some(&workload), Some("a=b"), "selector"),
            (None, None, Some(" "), "selector"),
            (Some("a/b"), None, None, "pod"),
        ] {
            assert_eq!(Which::one_of(pod, workload, labels).unwrap_err().key.as_deref(), Some(key));
        }
    }

    #[test]
    fn a_container_is_named_by_whoever_asks_or_by_the_pod() {
        let pod = |annotations: serde_json::Value, names: &[&str]| {
            let containers: Vec<_> = names.iter().map(|name| json!({ "name": name })).collect();
            Object(json!({ "metadata": { "name": "web-0", "annotations": annotations },
                "spec": { "containers": containers } }))
        };
        let both = pod(json!({}), &["web", "proxy"]);
        assert_eq!(container_of(&pod(json!({}), &["web"]), None).unwrap(), "web");
        assert_eq!(container_of(&both, Some("proxy")).unwrap(), "proxy");
        assert!(container_of(&both, None).unwrap_err().hint().unwrap().contains("web, proxy"));
        assert!(container_of(&both, Some("db")).unwrap_err().message().contains("no container db"));
        let named = pod(json!({ "kubectl.kubernetes.io/default-container": "web" }), &["web", "proxy"]);
        assert_eq!(container_of(&named, None).unwrap(), "web");
    }
}
