//! A way to what only the cluster's network knows: a database behind a Service.
//!
//! Connections to a port of this machine's loopback are carried through the API server to a pod, one
//! request for each. The pod is looked for anew with each connection, so that a replaced one is followed.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::Portforwarder;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::tunnel::Passage;

use crate::error::KubeError;
use crate::inside::answer_of;
use crate::kind::Kind;
use crate::object::{Object, ObjectName};
use crate::server::ApiServer;
use crate::target::{Cluster, check_name};
use crate::which::{Which, is_ready};

/// How long a port that nobody listens at may take to say so; what takes longer shows as a lost connection.
const TRIED: Duration = Duration::from_secs(1);
/// How long a connection to a pod may take to come about.
const REACHED: Duration = Duration::from_secs(30);

/// Holds a way to a port in the cluster open; dropped, it is closed, and all connections with it.
///
/// # Guarantees
/// It listens on loopback only. Each connection is carried by itself to a pod that is ready when it begins,
/// the same one as before as long as that is ready.
///
/// # Assumptions
/// This user has the verbs `get` and `create` on `pods/portforward`, and may read pods and what selects them.
///
/// # Caveats
/// A connection ends with the pod that it leads to. When either side has sent all, the connection ends: the
/// cluster's protocol cannot close one direction alone.
#[derive(Debug)]
pub struct Tunnel {
    address: SocketAddr,
    accepting: JoinHandle<()>,
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Tunnel {
    /// Opens a way to a port of what is named as `kubectl port-forward` names it: `service/db`,
    /// `statefulset/db`, `deployment/web`, `pod/db-0`, in the target's namespace.
    ///
    /// Of a Service the port is its own; of anything else, that of the pods.
    ///
    /// # Errors
    /// There is no such thing or no such port, no pod of it is ready, nobody listens there, or the cluster
    /// cannot be asked.
    pub async fn open(cluster: &Cluster, cx: &Context, to: &str, port: u16) -> Result<Self, StepError> {
        let which = parse(to)?;
        let server = cluster.connect(cx).await?;
        let Some(end) = End::find(&server, cluster.namespace(), which.clone(), port).await? else {
            return Err(which.missing(cluster.namespace()));
        };
        Self::to(server, end).await
    }

    /// Returns where on this machine it begins.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    async fn to(server: ApiServer, end: End) -> Result<Self, StepError> {
        end.probe(&server).await?;
        let listening = TcpListener::bind(("127.0.0.1", 0)).await;
        let listening = listening.and_then(|listener| listener.local_addr().map(|address| (listener, address)));
        let (listener, address) = listening.map_err(|error| {
            StepError::transient("no port of this machine can be listened on")
                .with_cause(&error)
                .with_hint("too many may be in use: `ss -tan | wc -l`")
        })?;
        Ok(Self { address, accepting: tokio::spawn(accept(listener, server, Arc::new(end))) })
    }
}

fn parse(to: &str) -> Result<Which, StepError> {
    let wrong = || {
        StepError::permanent(format!("`{to}` names nothing that ports are forwarded to"))
            .with_hint("write service/NAME, deployment/NAME, statefulset/NAME or pod/NAME")
    };
    let (kind, name) = to.split_once('/').ok_or_else(wrong)?;
    check_name(name, "name").map_err(|_| wrong())?;
    match kind.to_ascii_lowercase().as_str() {
        "pod" | "pods" | "po" => Ok(Which::Pod(name.to_owned())),
        "service" | "services" | "svc" => Ok(Which::Service(name.to_owned())),
        _ => to.parse().map(Which::Workload).map_err(|_| wrong()),
    }
}

/// What a host name of the cluster's network may mean, with its namespace, the likeliest first.
fn meanings(host: &str, namespace: &str) -> Vec<(String, Which)> {
    let host = host.trim_end_matches('.');
    // Whatever the cluster calls its domain, it stands behind `svc`.
    let (host, is_whole) = match host.split_once(".svc") {
        Some((name, rest)) if rest.is_empty() || rest.starts_with('.') => (name, true),
        _ => (host, false),
    };
    let parts: Vec<_> = host.split('.').map(str::to_owned).collect();
    match &*parts {
        [name] => {
            vec![(namespace.to_owned(), Which::Service(name.clone())), (namespace.to_owned(), Which::Pod(name.clone()))]
        }
        [name, other] => {
            let mut meanings = vec![(other.clone(), Which::Service(name.clone()))];
            // A pod of a StatefulSet, by its headless Service.
            if !is_whole {
                meanings.push((namespace.to_owned(), Which::Pod(name.clone())));
            }
            meanings
        }
        [pod, _, other] => vec![(other.clone(), Which::Pod(pod.clone()))],
        _ => Vec::new(),
    }
}

/// Where connections end.
#[derive(Debug)]
struct End {
    namespace: String,
    which: Which,
    port: Port,
    /// The last pod that was led to, and its port.
    last: Mutex<Option<(String, u16)>>,
}

/// A port as it is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Port {
    Number(u16),
    /// One that each pod may have elsewhere.
    Name(String),
}

impl End {
    /// Finds out which port of the pods is meant; none where there is no such thing.
    async fn find(server: &ApiServer, namespace: &str, which: Which, port: u16) -> Result<Option<Self>, StepError> {
        let port = match &which {
            Which::Service(name) => {
                let name = ObjectName::new(Kind::service(), namespace, name);
                let Some(service) = server.get(&name).await? else { return Ok(None) };
                target_port(&name, &service, port)?
            }
            _ => Port::Number(port),
        };
        let end = Self { namespace: namespace.to_owned(), which, port, last: Mutex::default() };
        Ok(end.which.find(server, namespace).await?.map(|_| end))
    }

    /// Chooses a pod: the last one if it is still ready, or the first that is.
    async fn choose(&self, server: &ApiServer) -> Result<(String, u16), StepError> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let meant = match self.which.find(server, &self.namespace).await {
            Ok(Some(meant)) => meant,
            Ok(None) => return Err(self.which.missing(&self.namespace)),
            // Who opened the way may have been cancelled, and be tidying up through it.
            Err(error) => return last.ok_or(error),
        };
        let ready = || meant.pods.iter().filter(|pod| is_ready(pod));
        let same = last.and_then(|last| ready().find(|pod| pod.name() == last.0));
        let Some(pod) = same.or_else(|| ready().next()) else {
            return Err(self.which.none_ready(&self.namespace, meant.pods.len()));
        };
        let chosen = (pod.name().to_owned(), self.port.of(pod)?);
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(chosen.clone());
        Ok(chosen)
    }

    async fn connect(&self, server: &ApiServer) -> Result<(Portforwarder, String, u16), StepError> {
        let (pod, port) = self.choose(server).await?;
        let doing = || format!("forwarding port {port} of pod {}/{pod}", self.namespace);
        let pods: Api<Pod> = Api::namespaced(server.client().clone(), &self.namespace);
        let connected = timeout(REACHED, pods.portforward(&pod, &[port])).await;
        let connected = connected.map_err(|_| {
            StepError::transient(format!("{} failed: no answer within {} s", doing(), REACHED.as_secs()))
                .with_hint("`kubectl port-forward` tries it; `kubectl get nodes` tells whether its node is there")
        })?;
        match connected {
            Ok(forwarder) => Ok((forwarder, pod, port)),
            Err(error) => Err(refused(answer_of(error, doing()))),
        }
    }

    /// Tries whether somebody listens: said now, it is not a connection that a database is blamed for losing.
    async fn probe(&self, server: &ApiServer) -> Result<(), StepError> {
        let (mut forwarder, pod, port) = self.connect(server).await?;
        let (mut stream, error) = (forwarder.take_stream(port), forwarder.take_error(port));
        let ended = async {
            let said = match error {
                Some(error) => error.await,
                None => None,
            };
            match (said, &mut stream) {
                (Some(said), _) => said,
                // Without a word: it ends only where nobody is there.
                (None, Some(stream)) => {
                    let mut byte = [0];
                    match stream.read(&mut byte).await {
                        Ok(0) | Err(_) => "the connection was closed at once".to_owned(),
                        Ok(_) => std::future::pending().await,
                    }
                }
                (None, None) => std::future::pending().await,
            }
        };
        let Ok(said) = timeout(TRIED, ended).await else { return Ok(()) };
        Err(StepError::transient(format!("port {port} of pod {}/{pod} is not reached", self.namespace))
            .with_detail(said)
            .with_hint("check that it listens there, on all addresses of the pod or on its loopback"))
    }
}

impl Port {
    fn of(&self, pod: &Object) -> Result<u16, StepError> {
        let name = match self {
            Self::Number(number) => return Ok(*number),
            Self::Name(name) => name,
        };
        let containers = pod.list("/spec/containers");
        let mut ports = containers.flat_map(|each| each["ports"].as_array().into_iter().flatten());
        let named = ports.find(|port| port["name"] == **name).and_then(|port| number_of(&port["containerPort"]));
        named.ok_or_else(|| {
            StepError::permanent(format!("pod {} has no port {name}", pod.name()))
                .with_hint("correct `targetPort` of the Service, or the name of the container's port")
        })
    }
}

fn number_of(value: &Value) -> Option<u16> {
    value.as_u64().and_then(|number| u16::try_from(number).ok())
}

/// Reads which port of its pods a Service leads to.
fn target_port(name: &ObjectName, service: &Object, port: u16) -> Result<Port, StepError> {
    let found = service.list("/spec/ports").find(|each| each["port"] == port);
    let Some(found) = found else {
        let ports: Vec<_> = service.list("/spec/ports").map(|each| each["port"].to_string()).collect();
        return Err(StepError::permanent(format!("{name} has no port {port}"))
            .with_hint(format!("it has: {}", ports.join(", "))));
    };
    match &found["targetPort"] {
        Value::String(target) => Ok(Port::Name(target.clone())),
        target => Ok(Port::Number(number_of(target).unwrap_or(port))),
    }
}

fn refused(error: KubeError) -> StepError {
    match error {
        KubeError::Refused { doing, answer } => match (answer.status, answer.reason.as_str()) {
            (403, _) => StepError::from(KubeError::Refused { doing, answer })
                .with_hint("give the user this right: the verbs `get` and `create` on `pods/portforward`"),
            (404, "NotFound") => StepError::from(KubeError::Refused { doing, answer }),
            (404 | 500..=599, _) => {
                StepError::transient(format!("{doing} failed: {} {}", answer.status, answer.message))
                    .with_hint("the API server does not reach the kubelet of the pod's node: `kubectl get nodes`")
            }
            _ => KubeError::Refused { doing, answer }.into(),
        },
        lost => lost.into(),
    }
}

async fn accept(listener: TcpListener, server: ApiServer, end: Arc<End>) {
    // Dropped with this task, and all connections with it.
    let mut carried = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((near, _)) => { carried.spawn(carry(near, server.clone(), end.clone())); }
                // Too many open files, say: it passes.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            },
            Some(_) = carried.join_next() => {}
        }
    }
}

async fn carry(mut near: TcpStream, server: ApiServer, end: Arc<End>) {
    let (mut forwarder, pod, port) = match end.connect(&server).await {
        Ok(connected) => connected,
        Err(error) => return tracing::warn!(%error, "no connection into the cluster"),
    };
    let (stream, error) = (forwarder.take_stream(port), forwarder.take_error(port));
    let Some(mut far) = stream else { return };
    let _ = near.set_nodelay(true);
    // Either end closes it; what went wrong is told beside it.
    let _ = copy_bidirectional(&mut near, &mut far).await;
    let said = match error {
        Some(error) => timeout(Duration::from_millis(10), error).await.ok().flatten(),
        None => None,
    };
    if let Some(said) = said {
        tracing::warn!(pod, port, said, "a connection into the cluster ended early");
    }
    forwarder.abort();
}

/// # Guarantees
/// A host is a Service as the cluster's own names have it (`db`, `db.shop`, `db.shop.svc`, with the cluster's
/// domain or without), or a pod (`db-0`, `db-0.db`, `db-0.db.shop.svc`); without a namespace, the target's is
/// meant.
///
/// # Caveats
/// As [`Tunnel`].
#[async_trait]
impl upgrade_core::tunnel::Tunnel for Cluster {
    async fn open(&self, cx: &Context, host: &str, port: u16) -> Result<Passage, StepError> {
        let server = self.connect(cx).await?;
        for (namespace, which) in meanings(host, self.namespace()) {
            if let Some(end) = End::find(&server, &namespace, which, port).await? {
                let tunnel = Tunnel::to(server, end).await?;
                return Ok(Passage::new(tunnel.address(), tunnel));
            }
        }
        Err(StepError::permanent(format!("there is no Service and no pod {host} in the cluster"))
            .with_hint("name a Service: `db`, or `db.NAMESPACE`; `kubectl get services` lists them"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn hosts_are_named_as_the_cluster_names_them() {
        let read = |host: &str| -> Vec<String> {
            let each = meanings(host, "shop").into_iter().map(|(namespace, which)| format!("{namespace}: {which}"));
            each.collect()
        };
        assert_eq!(read("db"), ["shop: service db", "shop: pod db"]);
        assert_eq!(read("db.data"), ["data: service db", "shop: pod db"]);
        for whole in ["db.data.svc", "db.data.svc.cluster.local", "db.data.svc.example.com."] {
            assert_eq!(read(whole), ["data: service db"], "{whole}");
        }
        assert_eq!(read("db-0.db.data.svc.cluster.local"), ["data: pod db-0"]);
        assert_eq!(read("a.b.c.d"), [""; 0]);
    }

    #[test]
    fn ends_are_named_as_kubectl_does() {
        assert_eq!(parse("svc/db").unwrap(), Which::Service("db".into()));
        assert_eq!(parse("pod/db-0").unwrap(), Which::Pod("db-0".into()));
        assert_eq!(parse("sts/db").unwrap().to_string(), "statefulset/db");
        for bad in ["db", "node/a", "service/", "service/a/b"] {
            assert!(parse(bad).unwrap_err().hint().unwrap().contains("service/NAME"), "{bad}");
        }
    }

    #[test]
    fn a_service_says_which_port_of_its_pods() {
        let service = Object(json!({ "spec": { "ports": [
            { "port": 5432 }, { "port": 80, "targetPort": 8080 }, { "port": 81, "targetPort": "web" } ] } }));
        let name = ObjectName::new(Kind::service(), "shop", "db");
        let port = |port| target_port(&name, &service, port);
        assert_eq!(port(5432).unwrap(), Port::Number(5432));
        assert_eq!(port(80).unwrap(), Port::Number(8080));
        assert_eq!(port(81).unwrap(), Port::Name("web".into()));
        assert!(port(90).unwrap_err().hint().unwrap().contains("5432, 80, 81"));
        let pod = Object(json!({ "metadata": { "name": "web-0" }, "spec": { "containers": [
            { "name": "a" }, { "name": "b", "ports": [{ "name": "web", "containerPort": 8080 }] } ] } }));
        assert_eq!(port(81).unwrap().of(&pod).unwrap(), 8080);
        assert!(Port::Name("db".into()).of(&pod).is_err());
    }
}
