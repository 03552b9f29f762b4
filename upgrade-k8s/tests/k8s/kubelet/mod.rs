//! What only a real node can show: commands in containers, logs, forwarded ports.
//!
//! Campaigns, run by hand as root on a machine with cgroups of version 1 and containerd, which they change and
//! put back: `scripts/kubernetes --kubelet`, then
//! `cargo nextest run -p upgrade-k8s --all-features --run-ignored only -E 'test(campaign_on_a_real_kubelet)'`.

#![cfg(test)]

mod exec;
mod logs;
mod tunnel;

use upgrade_testbed::kubernetes;

use crate::world::Corner;

/// The manifest of a Deployment of one container that can be entered, with a directory that outlives it.
fn deployment(name: &str, image: &str, replicas: u32) -> String {
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
      containers: [{{ name: web, image: "upgrade.test/{image}", volumeMounts: [{{ name: data, mountPath: /data }}] }}]
      volumes: [{{ name: data, emptyDir: {{}} }}]
"#
    )
}

/// A namespace with a Deployment `web` of busybox.
fn corner(what: &str) -> Corner {
    let corner = Corner { namespace: kubernetes::kubelet().namespace(what) };
    corner.namespace.apply(&deployment("web", "busybox:1", 1));
    corner.await_pods("web", "upgrade.test/busybox:1", 1);
    corner
}

/// Runs a shell command in the Deployment `web`.
fn inside(corner: &Corner, script: &str) -> String {
    corner.namespace.kubectl(&["exec", "deployment/web", "--", "sh", "-c", script])
}
