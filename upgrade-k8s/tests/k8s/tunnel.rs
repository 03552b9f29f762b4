//! Ways into a cluster whose nodes are not reached. Ports themselves are forwarded in `kubelet/tunnel.rs`.

#![cfg(test)]

use upgrade_core::error::Class;
use upgrade_core::file::{LoadOptions, parse};
use upgrade_core::registry::{AnyTarget, BuildContext};
use upgrade_core::testkit::TestContext;
use upgrade_k8s::Tunnel;

use crate::world::{Corner, registry};

#[tokio::test]
async fn a_way_that_does_not_open_is_said_with_its_reason() {
    let Some(corner) = Corner::shared("way") else { return };
    corner.deployment("web", "shop/web:1", 1);
    corner.await_pods("web", "shop/web:1", 1);
    corner.namespace.kubectl(&["expose", "deployment/web", "--port", "80"]);
    corner.namespace.kubectl(&["create", "service", "externalname", "away", "--external-name", "example.com"]);
    let (cluster, test) = (corner.target(), TestContext::new("way"));
    for (to, class, says) in [
        ("deployment/web", Class::Transient, "forwarding port 80"),
        ("service/web", Class::Transient, "forwarding port 80"),
        ("service/api", Class::Permanent, "no service api"),
        ("pod/web-0", Class::Permanent, "no pod web-0"),
    ] {
        let error = Tunnel::open(&cluster, &test.forward(), to, 80).await.unwrap_err();
        assert!(error.class() == class && error.message().contains(says) && error.hint().is_some(), "{error:?}");
    }
    let error = Tunnel::open(&cluster, &test.forward(), "service/away", 80).await.unwrap_err();
    assert!(error.message().contains("no port 80") || error.message().contains("selects no pods"), "{error:?}");
    // As a target of another adapter finds it.
    let cx = BuildContext::new("/").with_target("cluster", AnyTarget::tunnel("k8s", corner.target()));
    let error = cx.tunnel("cluster").unwrap().open(&test.forward(), "db", 5432).await.unwrap_err();
    assert!(error.hint().unwrap().contains("kubectl get services"), "{error:?}");
}

#[test]
fn a_pipeline_file_can_name_a_cluster_as_the_way() {
    let Some(corner) = Corner::shared("named") else { return };
    let mut registry = registry();
    // What a database of another adapter asks of the target that it names.
    let target = corner.target();
    registry.target("reached", "Is reached", move |config: Reached, cx: &BuildContext| {
        cx.tunnel(&config.via)?;
        Ok(target.clone())
    });
    let document = |uses: &str| {
        format!(
            "upgrade: shop\ntargets:\n  db: {{ uses: reached, with: {{ via: cluster }} }}\n  \
             cluster: {{ uses: {uses}, with: {{ kubeconfig: \"{}\" }} }}\nsteps:\n  - id: one\n    uses: k8s.scale\n    \
             with: {{ target: cluster, workloads: [{{ workload: deployment/web, replicas: 0 }}] }}\n",
            corner.kubeconfig().display()
        )
    };
    let load = |text: &str| parse(text, "pipeline.yaml".as_ref(), "/".as_ref(), &LoadOptions::default(), &registry);
    load(&document("k8s")).unwrap_or_else(|error| panic!("{error}"));
}

#[derive(serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct Reached {
    via: String,
}
