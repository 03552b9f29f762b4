//! What the tests share: a cluster, the kinds of this crate on it, and a namespace that is one test's own.

#![cfg(test)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;
use upgrade_core::registry::{AnyTarget, BuildContext, Registry};
use upgrade_k8s::{Cluster, ClusterConfig, Object};
use upgrade_testbed::kubernetes::{self, Namespace};

pub(crate) fn registry() -> Registry {
    let mut registry = Registry::new();
    upgrade_k8s::register(&mut registry);
    registry
}

/// Gives the cluster of a kubeconfig as a target.
pub(crate) fn target(kubeconfig: &Path, namespace: &str) -> Cluster {
    let config = ClusterConfig {
        kubeconfig: Some(kubeconfig.to_owned()),
        namespace: Some(namespace.to_owned()),
        ..ClusterConfig::default()
    };
    Cluster::from_config(config, &BuildContext::new("/")).unwrap()
}

/// Gives the context in which kinds are made, the cluster known as `cluster`.
pub(crate) fn build_context(kubeconfig: &Path, namespace: &str) -> BuildContext {
    BuildContext::new("/").with_target("cluster", AnyTarget::new("k8s", target(kubeconfig, namespace)))
}

/// Compares with a golden file; `UPDATE_GOLDEN=1` writes it.
pub(crate) fn golden(name: &str, undo: &impl serde::Serialize, replace: &[(&str, &str)]) -> Value {
    let mut text = serde_json::to_string_pretty(undo).unwrap() + "\n";
    for (from, to) in replace {
        text = text.replace(from, to);
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    assert_eq!(text, std::fs::read_to_string(&path).unwrap(), "{}", path.display());
    serde_json::from_str(&text).unwrap()
}

/// A namespace of a test's own.
pub(crate) struct Corner {
    pub(crate) namespace: Namespace,
}

impl Corner {
    /// Takes a namespace of the shared cluster; `None` where there is none.
    pub(crate) fn shared(what: &str) -> Option<Self> {
        kubernetes::shared().map(|cluster| Self { namespace: cluster.namespace(what) })
    }

    /// A directory of the corner's own.
    pub(crate) fn directory(&self) -> PathBuf {
        let path = std::env::temp_dir().join(format!("upgrade-k8s-{}", self.namespace.name));
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    pub(crate) fn kubeconfig(&self) -> &Path {
        self.namespace.cluster().kubeconfig()
    }

    pub(crate) fn build_context(&self) -> BuildContext {
        build_context(self.kubeconfig(), &self.namespace.name)
    }

    pub(crate) fn target(&self) -> Cluster {
        target(self.kubeconfig(), &self.namespace.name)
    }

    /// Reads an object.
    pub(crate) fn get(&self, name: &str) -> Object {
        Object(serde_json::from_str(&self.namespace.kubectl(&["get", name, "--output", "json"])).unwrap())
    }

    /// What one would write down of all objects of some kinds, but for what the server sets.
    pub(crate) fn written(&self, kinds: &str) -> String {
        let list: Value = serde_json::from_str(&self.namespace.kubectl(&["get", kinds, "--output", "json"])).unwrap();
        let items = list["items"].as_array().cloned().unwrap_or_default();
        // What every namespace has, under names that nobody chose.
        let given = |item: &Object| {
            item.name() == "kube-root-ca.crt" || item.text("/type") == "kubernetes.io/service-account-token"
        };
        let own = items.into_iter().map(Object).filter(|item| !given(item));
        let written: Vec<_> = own.map(|item| item.as_written().0).collect();
        serde_json::to_string_pretty(&written).unwrap().replace(&self.namespace.name, "NAMESPACE")
    }

    /// A Deployment `web` with one container of that name, and a Service before it.
    pub(crate) fn deployment(&self, name: &str, image: &str, replicas: u32) {
        self.namespace.apply(&deployment(name, image, replicas));
    }

    /// Waits until an app has a pod, which is not ready.
    pub(crate) fn await_none_ready(&self, app: &str) {
        let format = "jsonpath={.items[*].status.containerStatuses[0].state}";
        let began = Instant::now();
        while self
            .namespace
            .kubectl(&["get", "pods", "--selector", &format!("app={app}"), "--output", format])
            .is_empty()
        {
            assert!(began.elapsed() < Duration::from_secs(60), "{app} has no pod");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until the pods of an app are all ready, of one image, and no other pod of it is there.
    pub(crate) fn await_pods(&self, app: &str, image: &str, count: usize) {
        let format = "jsonpath={range .items[*]}{.spec.containers[0].image} \
                      {.status.conditions[?(@.type=='Ready')].status}{'\\n'}{end}";
        let arguments = ["get", "pods", "--selector", &format!("app={app}"), "--output", format];
        let wanted = vec![format!("{image} True"); count];
        let began = Instant::now();
        loop {
            let found = self.namespace.kubectl(&arguments);
            let found: Vec<_> = found.lines().map(str::to_owned).collect();
            if found == wanted {
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "{app}: {found:?}, wanted {wanted:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Corner {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(self.directory());
    }
}

/// The manifest of a Deployment with one container.
pub(crate) fn deployment(name: &str, image: &str, replicas: u32) -> String {
    format!(
        r#"
apiVersion: apps/v1
kind: Deployment
metadata: {{ name: {name}, labels: {{ app: {name} }} }}
spec:
  replicas: {replicas}
  selector: {{ matchLabels: {{ app: {name} }} }}
  template:
    metadata: {{ labels: {{ app: {name} }} }}
    spec:
      terminationGracePeriodSeconds: 0
      containers: [{{ name: web, image: "{image}", env: [{{ name: MODE, value: old }}] }}]
"#
    )
}

/// The manifest of a StatefulSet or a DaemonSet with one container.
pub(crate) fn set(kind: &str, name: &str, image: &str, more: &str) -> String {
    format!(
        r#"
apiVersion: apps/v1
kind: {kind}
metadata: {{ name: {name}, labels: {{ app: {name} }} }}
spec:
  selector: {{ matchLabels: {{ app: {name} }} }}
  {more}
  template:
    metadata: {{ labels: {{ app: {name} }} }}
    spec:
      terminationGracePeriodSeconds: 0
      containers: [{{ name: web, image: "{image}" }}]
"#
    )
}
