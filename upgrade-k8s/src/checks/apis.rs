//! `k8s.apis`: whether manifests and objects are of APIs that the next version has removed.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::CheckError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::verdict::Verdict;

use super::joined;
use crate::kind::Kind;
use crate::manifest::Manifest;
use crate::object::Object;
use crate::removed_apis::{REMOVED, Removed};
use crate::server::ApiServer;
use crate::target::{Cluster, check_name};

/// How many findings a message names.
const NAMED: usize = 8;
/// Those that are upgraded together with the cluster.
const CLUSTERS_OWN: [&str; 5] =
    ["cloud-controller-manager", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet"];
const APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Configures `k8s.apis`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ApisCheckConfig {
    /// The cluster. Default: the one that `kubectl` would use. Without `objects` and with `to`, none is asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The version of Kubernetes that is upgraded to: `"1.25"`. Default: the next minor version of the cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// Files of manifests, and directories of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub manifests: Vec<PathBuf>,
    /// Whether the objects of the cluster are asked who wrote them.
    #[serde(default = "yes")]
    pub objects: bool,
    /// The namespace whose objects are asked; objects without one are asked too. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
}

fn yes() -> bool {
    true
}

/// Looks for APIs that are removed.
#[derive(Debug)]
pub struct ApisCheck {
    config: ApisCheckConfig,
    manifests: Vec<PathBuf>,
    to: Option<u64>,
    cluster: Option<Arc<Cluster>>,
}

impl ApisCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// There is no such target, `to` is no version, or there is nothing to look at.
    pub fn from_config(config: ApisCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        if !config.objects && config.manifests.is_empty() {
            return Err(BuildError::new("there is nothing to look at")
                .at("manifests")
                .with_hint("name the files that are applied: `manifests: [deploy/]`, or leave `objects` as it is"));
        }
        if let Some(namespace) = config.namespace.as_deref().filter(|namespace| *namespace != "*") {
            check_name(namespace, "namespace")?;
        }
        let wrong = |text: &str| {
            BuildError::new(format!("`{}` is no version of Kubernetes", text.escape_debug()))
                .at("to")
                .with_hint("write its first two numbers: `to: \"1.25\"`, in quotes, or 1.30 is read as 1.3")
        };
        let to = config.to.as_deref().map(|text| minor(text).ok_or_else(|| wrong(text))).transpose()?;
        let is_asked = config.objects || to.is_none() || config.target.is_some();
        let cluster = if is_asked { Some(Cluster::named(config.target.as_deref(), cx)?) } else { None };
        let manifests = config.manifests.iter().map(|path| cx.path(path)).collect();
        Ok(Self { config, manifests, to, cluster })
    }

    /// Finds the objects that somebody writes in a version that is removed.
    async fn objects(&self, server: &ApiServer, removed: &[&'static Removed]) -> Result<Vec<String>, CheckError> {
        let namespace = self.config.namespace.as_deref().filter(|namespace| *namespace != "*");
        // One list a kind, whatever the number of its old versions.
        let mut kinds: BTreeMap<Kind, Vec<&Removed>> = BTreeMap::new();
        for each in removed.iter().filter(|each| each.is_kept()) {
            // What can be listed in the new version is: asking for the old one would itself count as its use.
            let new = match each.instead {
                Some((instead, _)) => server.find_kind(Some(instead), each.plural).await?,
                None => None,
            };
            let kind = match new {
                Some(kind) => Some(kind),
                None => server.find_kind(Some(each.api_version), each.plural).await?,
            };
            if let Some(kind) = kind {
                kinds.entry(kind).or_default().push(each);
            }
        }
        let mut found = Vec::new();
        for (kind, removed) in kinds {
            for object in server.list(&kind, namespace, "", "").await?.0 {
                found.extend(removed.iter().filter_map(|each| {
                    let by = writer(&object, each)?;
                    let name = match object.namespace() {
                        "" => object.name().to_owned(),
                        namespace => format!("{namespace}/{}", object.name()),
                    };
                    Some(format!("{kind} {name} ({by}): {}", each.line()))
                }));
            }
        }
        Ok(found)
    }

    /// Asks which removed APIs were requested since the API server was started, where this user may know.
    async fn requested(&self, server: &ApiServer, to: u64) -> Result<Option<Vec<String>>, CheckError> {
        let Ok(text) = server.get_text("/metrics", &[], || "asking the API server for its metrics".into()).await else {
            return Ok(None);
        };
        let mut requested = Vec::new();
        for used in requests_in(&text).into_iter().filter(|used| used.minor <= to) {
            let known = REMOVED.iter().find(|each| each.api_version == used.api_version && each.plural == used.plural);
            // Where the new version is not served yet, the cluster's own programs use the old one.
            let is_avoidable = match known.and_then(|known| known.instead) {
                Some((instead, _)) => server.find_kind(Some(instead), &used.plural).await?.is_some(),
                None => true,
            };
            if is_avoidable {
                requested.push(format!("{} {} (gone in 1.{})", used.api_version, used.plural, used.minor));
            }
        }
        requested.sort();
        requested.dedup();
        Ok(Some(requested))
    }
}

/// Reads the minor version of `1.25`, `v1.25.3` or `1.25.3-gke.1`.
fn minor(text: &str) -> Option<u64> {
    let rest = text.trim().trim_start_matches('v').strip_prefix("1.")?;
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let minor = rest[..end].parse().ok()?;
    matches!(rest[end..].chars().next(), None | Some('.' | '-' | '+')).then_some(minor)
}

/// Tells who writes an object in a version that is removed.
fn writer(object: &Object, removed: &Removed) -> Option<String> {
    if removed.instead.is_none() {
        return Some("kept in the cluster".into());
    }
    let applied: Option<Value> = object.annotation(APPLIED).and_then(|text| serde_json::from_str(text).ok());
    if applied.as_ref().is_some_and(|applied| applied["apiVersion"] == removed.api_version) {
        return Some("applied by kubectl".into());
    }
    // A manager that has gone over to the new version may keep old entries: its latest one counts.
    let mut latest: BTreeMap<&str, (&str, &str)> = BTreeMap::new();
    for entry in object.list("/metadata/managedFields") {
        let text = |key: &str| entry[key].as_str().unwrap_or_default();
        let (manager, entry) = (text("manager"), (text("time"), text("apiVersion")));
        let is_newer = |known: &(&str, &str)| known.0 < entry.0 || known.0 == entry.0 && known.1 == removed.api_version;
        if latest.get(manager).is_none_or(is_newer) {
            latest.insert(manager, entry);
        }
    }
    let by_kubectl = |manager: &str| applied.is_some() && manager.starts_with("kubectl");
    let is_old = |(manager, (_, version)): &(&&str, &(&str, &str))| {
        *version == removed.api_version && !CLUSTERS_OWN.contains(*manager) && !by_kubectl(manager)
    };
    latest.iter().find(is_old).map(|(manager, _)| format!("written by {manager}"))
}

/// An API that was requested and goes.
#[derive(Debug, PartialEq)]
struct Requested {
    api_version: String,
    plural: String,
    minor: u64,
}

/// Reads the gauge that API servers keep of this since 1.19.
fn requests_in(metrics: &str) -> Vec<Requested> {
    let lines = metrics.lines().filter_map(|line| line.strip_prefix("apiserver_requested_deprecated_apis{"));
    let read = |line: &str| {
        let (labels, value) = line.split_once('}')?;
        let label = |name: &str| {
            labels
                .split(',')
                .find_map(|pair| pair.split_once('=').filter(|(key, _)| *key == name))
                .map(|(_, value)| value.trim_matches('"'))
        };
        let (group, version) = (label("group")?, label("version")?);
        let api_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
        // What is only deprecated names no release.
        let minor = minor(label("removed_release")?)?;
        (value.trim() != "0").then(|| Requested {
            api_version,
            plural: label("resource").unwrap_or_default().to_owned(),
            minor,
        })
    };
    lines.filter_map(read).collect()
}

fn some(found: &[String]) -> Option<String> {
    let more = found.len().saturating_sub(NAMED);
    let said = joined(&found[..found.len().min(NAMED)])?;
    Some(if more > 0 { format!("{said}; and {more} more") } else { said })
}

#[async_trait]
impl Check for ApisCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let server = match &self.cluster {
            Some(cluster) => Some(cluster.connect(cx).await?),
            None => None,
        };
        let to = match (self.to, &server) {
            (Some(to), _) => to,
            (None, Some(server)) => {
                let told = server.get_path("/version", &[], || "asking the cluster for its version".into()).await?;
                let version = told["gitVersion"].as_str().unwrap_or_default();
                1 + minor(version).ok_or_else(|| {
                    CheckError::unknown(format!("the cluster calls its version `{version}`"))
                        .with_hint("say which version it is upgraded to: `to: \"1.25\"`")
                })?
            }
            (None, None) => unreachable!("without `to`, the cluster is asked"),
        };
        let removed: Vec<_> = REMOVED.iter().filter(|each| each.minor <= to).collect();
        let read = Manifest::read(&self.manifests)?;
        let in_files: Vec<_> = read
            .iter()
            .filter_map(|manifest| {
                let object = &manifest.object;
                let each = Removed::find(object.text("/apiVersion"), object.text("/kind"))?;
                (each.minor <= to).then(|| format!("{} ({}): {}", manifest.origin, object.name(), each.line()))
            })
            .collect();
        let (mut kept, mut requested) = (Vec::new(), None);
        if let Some(server) = server.as_ref().filter(|_| self.config.objects) {
            kept = self.objects(server, &removed).await?;
            requested = self.requested(server, to).await?;
        }
        let faults: Vec<_> = in_files.iter().chain(&kept).cloned().collect();
        let used = requested.as_deref().and_then(some);
        let verdict = match (some(&faults), used) {
            (Some(faults), _) => Verdict::fail(faults).with_hint(
                "write the new apiVersion where these come from, and apply them before the cluster is upgraded",
            ),
            (None, Some(used)) => Verdict::warn(format!("requested since the API server was started: {used}"))
                .with_hint("the audit log names who asks: its entries have the annotation k8s.io/deprecated"),
            (None, None) => Verdict::pass(format!("nothing is of an API that is gone in 1.{to}")),
        };
        let metrics = match (&requested, self.config.objects) {
            (Some(_), _) => "read",
            (None, true) => "not readable by this user",
            (None, false) => "not asked",
        };
        Ok(verdict
            .with_measurement("manifests", in_files.len() as f64)
            .with_measurement("objects", kept.len() as f64)
            .with_measurement("requested", requested.map_or(0.0, |requested| requested.len() as f64))
            .with_fact("to", format!("1.{to}"))
            .with_fact("metrics", metrics))
    }

    fn kind(&self) -> &str {
        "k8s.apis"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn minor_versions_are_read() {
        for (text, found) in [("1.25", Some(25)), ("v1.29.3-gke.1", Some(29)), ("1.20.2+k3s1", Some(20))] {
            assert_eq!(minor(text), found, "{text}");
        }
        for bad in ["", "2.0", "1", "1.x", "1.25x", "25"] {
            assert_eq!(minor(bad), None, "{bad}");
        }
    }

    #[test]
    fn who_has_gone_over_to_the_new_version_is_not_named() {
        let ingress = Removed::find("extensions/v1beta1", "Ingress").unwrap();
        let of = |annotations: Value, fields: Value| {
            writer(&Object(json!({ "metadata": { "annotations": annotations, "managedFields": fields } })), ingress)
        };
        let entry = |manager: &str, version: &str, time: &str| json!({ "manager": manager, "apiVersion": version, "time": time });
        let old = "extensions/v1beta1";
        assert_eq!(of(json!({}), json!([entry("helm", old, "1")])), Some("written by helm".into()));
        assert_eq!(of(json!({}), json!([entry("helm", old, "1"), entry("helm", "networking.k8s.io/v1", "2")])), None);
        assert_eq!(of(json!({}), json!([entry("helm", old, "2"), entry("helm", "networking.k8s.io/v1", "2")])), None);
        assert_eq!(of(json!({}), json!([entry("kube-controller-manager", old, "1")])), None);
        let applied = |version: &str| json!({ APPLIED: format!("{{\"apiVersion\":\"{version}\"}}") });
        assert_eq!(of(applied(old), json!([])), Some("applied by kubectl".into()));
        assert_eq!(of(applied("networking.k8s.io/v1"), json!([entry("kubectl-client-side-apply", old, "1")])), None);
    }

    #[test]
    fn metrics_are_read() {
        let text = "# HELP apiserver_requested_deprecated_apis [ALPHA] Gauge\n\
            apiserver_requested_deprecated_apis{group=\"extensions\",removed_release=\"1.22\",resource=\"ingresses\",subresource=\"\",version=\"v1beta1\"} 1\n\
            apiserver_requested_deprecated_apis{group=\"\",removed_release=\"\",resource=\"componentstatuses\",subresource=\"\",version=\"v1\"} 1\n";
        let one = Requested { api_version: "extensions/v1beta1".into(), plural: "ingresses".into(), minor: 22 };
        assert_eq!(requests_in(text), [one]);
    }
}
