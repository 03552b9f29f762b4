//! Ports forwarded to containers that run.

#![cfg(test)]

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use upgrade_core::registry::{AnyTarget, BuildContext};
use upgrade_core::testkit::TestContext;
use upgrade_k8s::Tunnel;
use upgrade_testbed::postgres::{self, Version};

use super::corner;
use crate::world::Corner;

/// A StatefulSet whose pods answer with their name and whatever they are sent, and a Service before it.
const ECHO: &str = r#"
apiVersion: v1
kind: Service
metadata: { name: echo }
spec: { selector: { app: echo }, ports: [{ port: 7, targetPort: echo }] }
---
apiVersion: apps/v1
kind: StatefulSet
metadata: { name: echo }
spec:
  serviceName: echo
  replicas: 2
  podManagementPolicy: Parallel
  selector: { matchLabels: { app: echo } }
  template:
    metadata: { labels: { app: echo } }
    spec:
      terminationGracePeriodSeconds: 0
      containers:
        - name: echo
          image: "upgrade.test/busybox:1"
          command: [sh, -c, "exec nc -ll -p 7007 -e sh -c 'hostname; exec cat'"]
          ports: [{ name: echo, containerPort: 7007 }]
          readinessProbe: { tcpSocket: { port: 7007 }, periodSeconds: 1 }
"#;

fn echo(what: &str) -> Corner {
    let corner = corner(what);
    corner.namespace.apply(ECHO);
    corner.await_pods("echo", "upgrade.test/busybox:1", 2);
    corner
}

/// Who answers, after it has echoed much.
async fn who_answers(address: std::net::SocketAddr) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut name = Vec::new();
    loop {
        match stream.read_u8().await.unwrap() {
            b'\n' => break,
            byte => name.push(byte),
        }
    }
    let sent: Vec<u8> = (0..1_000_000_u32).map(|number| (number % 251) as u8).collect();
    let (mut from, mut to) = stream.split();
    let mut came = vec![0; sent.len()];
    let (wrote, read) = tokio::join!(to.write_all(&sent), from.read_exact(&mut came));
    wrote.unwrap();
    read.unwrap();
    assert!(came == sent, "what came back is not what was sent");
    String::from_utf8(name).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a real kubelet: see kubelet/mod.rs"]
async fn campaign_on_a_real_kubelet_a_port_leads_to_a_pod_and_to_the_one_that_takes_its_place() {
    let corner = echo("tunnel");
    let (cluster, test) = (corner.target(), TestContext::new("tunnel"));
    let cx = test.forward();
    let by_pod = Tunnel::open(&cluster, &cx, "pod/echo-1", 7007).await.unwrap();
    assert_eq!(who_answers(by_pod.address()).await, "echo-1");
    let tunnel = Tunnel::open(&cluster, &cx, "service/echo", 7).await.unwrap();
    // Several at once.
    let all = (0..5).map(|_| tokio::spawn(who_answers(tunnel.address())));
    for each in all.collect::<Vec<_>>() {
        assert_eq!(each.await.unwrap(), "echo-0");
    }
    // The first one cannot come back.
    corner.namespace.kubectl(&["cordon", "node"]);
    corner.namespace.kubectl(&["delete", "pod", "echo-0", "--wait"]);
    assert_eq!(who_answers(tunnel.address()).await, "echo-1");
    corner.namespace.kubectl(&["uncordon", "node"]);
    // Whoever was cancelled may tidy up through it.
    test.cancellation().cancel();
    assert_eq!(who_answers(tunnel.address()).await, "echo-1");
    let address = tunnel.address();
    let mut open = TcpStream::connect(address).await.unwrap();
    assert_eq!(open.read_u8().await.unwrap(), b'e');
    drop(tunnel);
    let rest = tokio::time::timeout(Duration::from_secs(10), open.read_to_end(&mut Vec::new())).await;
    assert!(rest.is_ok(), "a connection outlives its tunnel");
    assert!(TcpStream::connect(address).await.is_err(), "a port outlives its tunnel");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a real kubelet: see kubelet/mod.rs"]
async fn campaign_on_a_real_kubelet_what_leads_nowhere_is_said() {
    let corner = echo("nowhere");
    let (cluster, test) = (corner.target(), TestContext::new("nowhere"));
    for (to, port, says, hint) in [
        ("service/ohce", 7, "no service ohce", "kubectl get"),
        ("service/echo", 8, "no port 8", "it has: 7"),
        ("statefulset/echo", 7, "is not reached", "listens"),
        ("deployment/web", 80, "is not reached", "listens"),
        ("echo", 7, "names nothing", "service/NAME"),
    ] {
        let error = Tunnel::open(&cluster, &test.forward(), to, port).await.unwrap_err();
        assert!(error.message().contains(says) && error.hint().unwrap().contains(hint), "{error:?}");
    }
}

/// A real server, which runs on the node and is reached through a pod in the node's network.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a real kubelet: see kubelet/mod.rs"]
async fn campaign_on_a_real_kubelet_a_database_is_reached_by_a_target_that_names_the_cluster() {
    let server = postgres::own(Version::V15, &[]).expect("a server");
    let database = server.database();
    let corner = corner("database");
    corner.namespace.apply(&format!(
        r#"
apiVersion: v1
kind: Service
metadata: {{ name: db }}
spec: {{ selector: {{ app: db }}, ports: [{{ port: 5432, targetPort: {} }}] }}
---
apiVersion: v1
kind: Pod
metadata: {{ name: db-0, labels: {{ app: db }} }}
spec:
  hostNetwork: true
  terminationGracePeriodSeconds: 0
  containers: [{{ name: db, image: "upgrade.test/busybox:1" }}]
"#,
        database.port()
    ));
    corner.await_pods("db", "upgrade.test/busybox:1", 1);
    let cx = BuildContext::new("/").with_target("cluster", AnyTarget::tunnel("k8s", corner.target()));
    // What a target `via: cluster` does with the host and port of its URL.
    let via = cx.tunnel("cluster").unwrap();
    let test = TestContext::new("via");
    let name = &corner.namespace.name;
    for host in ["db".to_owned(), format!("db.{name}"), format!("db.{name}.svc.cluster.local")] {
        let passage = via.open(&test.forward(), &host, 5432).await.unwrap();
        let mut stream = TcpStream::connect(passage.address()).await.unwrap();
        // The request for TLS of PostgreSQL's protocol, which nobody else answers with one letter.
        stream.write_all(&[0, 0, 0, 8, 4, 210, 22, 47]).await.unwrap();
        let answer = stream.read_u8().await.unwrap();
        assert!(matches!(answer, b'S' | b'N'), "{answer}");
    }
    let error = via.open(&test.forward(), "nobody", 5432).await.unwrap_err();
    assert!(error.message().contains("no Service and no pod nobody"), "{error:?}");
}
