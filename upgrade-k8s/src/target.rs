//! A cluster as the target of an upgrade: where it is, who asks, and what of it is changed.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use kube::Client;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::OnceCell;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::names::LockName;
use upgrade_core::registry::{BuildContext, BuildError, Registry};
use upgrade_core::target::{Claims, Target};
use upgrade_core::units::Span;

use crate::claims::NamespaceClaims;
use crate::connection::Endpoint;
use crate::error::KubeError;
use crate::kind::{Discovered, Kind};
use crate::object::ObjectName;
use crate::server::ApiServer;

/// Configures the target kind `k8s`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClusterConfig {
    /// The kubeconfig. If absent, the one that `kubectl` would use: the files of `KUBECONFIG`, or
    /// `~/.kube/config`; in a pod that has neither, its service account.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig. Default: its current one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<String>,
    /// The namespace of what names none. Default: the context's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// How long the API server may take to answer one request. Default 30 s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Span>,
    /// Whether a Lease in the namespace keeps out runs from machines that share no journal with this one.
    /// Default true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<bool>,
}

pub(crate) fn register(registry: &mut Registry) {
    registry.tunnel("k8s", "Names a Kubernetes cluster, and a namespace of it", Cluster::from_config);
}

/// Names a Kubernetes cluster and connects to it.
///
/// # Guarantees
/// Nothing is sent before [`Cluster::connect`]. One connection serves all calls of a process.
#[derive(Clone)]
pub struct Cluster {
    endpoint: Endpoint,
    namespace: String,
    timeout: Duration,
    lease: bool,
    client: Arc<OnceCell<Client>>,
    discovered: Arc<Mutex<Discovered>>,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster")
            .field("server", &self.endpoint.server)
            .field("namespace", &self.namespace)
            .finish_non_exhaustive()
    }
}

impl Cluster {
    /// Makes the target from its configuration.
    ///
    /// # Errors
    /// There is no kubeconfig, it cannot be read, or it has no such context.
    pub fn from_config(config: ClusterConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let kubeconfig = config.kubeconfig.map(|path| cx.path(path));
        let endpoint = Endpoint::find(kubeconfig.as_deref(), config.context.as_deref())?;
        let namespace = config.namespace.unwrap_or_else(|| endpoint.namespace.clone());
        check_name(&namespace, "namespace")?;
        let timeout = config.timeout.map_or(Duration::from_secs(30), |span| span.0);
        let lease = config.lease.unwrap_or(true);
        Ok(Self { endpoint, namespace, timeout, lease, client: Arc::default(), discovered: Arc::default() })
    }

    /// Returns the target that a step or check names, or the cluster that `kubectl` would use.
    ///
    /// # Errors
    /// There is no such target.
    pub fn named(target: Option<&str>, cx: &BuildContext) -> Result<Arc<Self>, BuildError> {
        match target {
            Some(name) => cx.target::<Self>(name),
            None => Self::from_config(ClusterConfig::default(), cx).map(Arc::new),
        }
    }

    /// Returns where the API server is.
    pub fn server(&self) -> &str {
        &self.endpoint.server
    }

    /// Returns the namespace of what names none.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Connects for the step or check that is called.
    ///
    /// # Errors
    /// The credentials cannot be used. Whether the server is there, the first request tells.
    pub async fn connect(&self, cx: &Context) -> Result<ApiServer, StepError> {
        let client = self.client.get_or_try_init(|| self.endpoint.client()).await?;
        Ok(ApiServer::new(client.clone(), cx, self.timeout, self.discovered.clone()))
    }

    /// Names one object as what a step changes, so that runs on different objects of one cluster do not
    /// wait for each other.
    pub fn resource(&self, name: &ObjectName) -> Arc<dyn Target> {
        let kind = format!("{}.{}", name.kind.plural, name.kind.group);
        self.part(&kind, &bare(name))
    }

    /// Names a part of the cluster as what a step changes, where it is more than one object.
    pub fn part(&self, kind: &str, name: &str) -> Arc<dyn Target> {
        let lock = self.lock_of(&format!(" {kind} {name}"));
        Arc::new(Resource { cluster: self.clone(), lock })
    }
}

impl Cluster {
    /// Returns the address of the API server as it stands in the names of locks.
    pub(crate) fn escaped_server(&self) -> String {
        self.endpoint.server.escape_debug().to_string()
    }

    /// Writes a kubeconfig by which another program reaches this cluster as this user; it holds credentials.
    pub(crate) fn kubeconfig(&self) -> Value {
        self.endpoint.kubeconfig()
    }

    fn lock_of(&self, part: &str) -> LockName {
        let resource = format!("{}{}", self.escaped_server(), part.escape_debug());
        LockName::new("k8s", &resource).expect("an escaped text is printable")
    }

    fn claimed_by_lease(&self) -> Option<Arc<dyn Claims>> {
        self.lease.then(|| Arc::new(NamespaceClaims { cluster: self.clone() }) as Arc<dyn Claims>)
    }
}

fn bare(name: &ObjectName) -> String {
    match &name.namespace {
        Some(namespace) => format!("{namespace}/{}", name.name),
        None => name.name.clone(),
    }
}

/// Refuses a name that no object can have: it would lead to another address.
///
/// The rule is that of path segments, which all names obey
/// (<https://kubernetes.io/docs/concepts/overview/working-with-objects/names/#path-segment-names>).
pub(crate) fn check_name(name: &str, key: &str) -> Result<(), BuildError> {
    let bad = |c: char| c == '/' || c == '%' || c == '?' || c == '#' || c.is_whitespace() || c.is_control();
    if name.is_empty() || name == "." || name == ".." || name.len() > 253 || name.chars().any(bad) {
        return Err(BuildError::new(format!("`{name}` cannot be the name of an object"))
            .at(key)
            .with_hint("lower-case letters, digits, `-` and `.`: `web`"));
    }
    Ok(())
}

#[async_trait]
impl Target for Cluster {
    fn lock(&self) -> LockName {
        // Upgrades of other namespaces are others' own.
        self.lock_of(&format!(" namespace {}", self.namespace))
    }

    fn claims(&self) -> Option<Arc<dyn Claims>> {
        self.claimed_by_lease()
    }

    /// The uid of `kube-system`, which a cluster keeps for life; where this user may not read it, that of
    /// the namespace that is worked in, which a Role in it can allow.
    async fn identity(&self, cx: &Context) -> Result<String, StepError> {
        let server = self.connect(cx).await?;
        let uid = async |namespace: &str| {
            let name = ObjectName { kind: Kind::namespace(), namespace: None, name: namespace.to_owned() };
            Ok::<_, KubeError>(server.get(&name).await?.map(|object| object.uid().to_owned()))
        };
        match uid("kube-system").await {
            Ok(Some(uid)) => return Ok(format!("cluster {uid}")),
            Ok(None) => {}
            Err(error) if error.status() == Some(403) => {}
            Err(error) => return Err(error.into()),
        }
        match uid(&self.namespace).await {
            Ok(Some(uid)) => Ok(format!("namespace {uid}")),
            Ok(None) => Err(StepError::permanent(format!("there is no namespace {}", self.namespace))
                .with_hint("correct `namespace` of the target, or create it: `kubectl create namespace`")),
            Err(error) if error.status() == Some(403) => Err(StepError::from(error).with_hint(format!(
                "a Role that lets this user `get` the namespace {} is enough to tell this cluster from another",
                self.namespace
            ))),
            Err(error) => Err(error.into()),
        }
    }
}

/// A thing of a cluster.
struct Resource {
    cluster: Cluster,
    lock: LockName,
}

#[async_trait]
impl Target for Resource {
    fn lock(&self) -> LockName {
        self.lock.clone()
    }

    async fn identity(&self, cx: &Context) -> Result<String, StepError> {
        self.cluster.identity(cx).await
    }

    fn claims(&self) -> Option<Arc<dyn Claims>> {
        self.cluster.claimed_by_lease()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for bad in ["", "..", "a/b", "a?b", "a b", "a%2fb"] {
            assert_eq!(check_name(bad, "name").unwrap_err().key.as_deref(), Some("name"), "{bad}");
        }
        check_name("system:node-1.example", "name").unwrap();
    }
}
