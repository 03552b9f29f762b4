//! The checks on a real control plane.

#![cfg(test)]

mod access;
mod apis;
mod budget;
mod capacity;
mod cluster;
mod pods;
mod workload;

use std::path::Path;

use serde_json::{Value, json};
use upgrade_core::error::CheckError;
use upgrade_core::registry::BuildError;
use upgrade_core::testkit::TestContext;
use upgrade_core::verdict::{Status, Verdict};

use crate::world::{Corner, build_context, registry};

/// Asks as the user of a kubeconfig.
pub(crate) async fn answer(
    kubeconfig: &Path,
    namespace: &str,
    kind: &str,
    with: &Value,
) -> Result<Verdict, CheckError> {
    let mut all = json!({ "target": "cluster" });
    all.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
    let check = registry().make_check(kind, all, &build_context(kubeconfig, namespace));
    check.unwrap_or_else(|error| panic!("{error}")).check(&TestContext::new("check").forward()).await
}

pub(crate) async fn ask(corner: &Corner, kind: &str, with: &Value) -> Verdict {
    let answer = answer(corner.kubeconfig(), &corner.namespace.name, kind, with).await;
    answer.unwrap_or_else(|error| panic!("{error:?}"))
}

/// Asks for several things, each with the status and a part of the message that it must get.
pub(crate) async fn table(corner: &Corner, kind: &str, rows: &[(Value, Status, &str)]) {
    for (with, status, message) in rows {
        let verdict = ask(corner, kind, with).await;
        assert_eq!(verdict.status, *status, "{with}: {verdict:?}");
        assert!(verdict.message.contains(message), "{with}: {verdict:?}");
        assert!(verdict.status == Status::Pass || verdict.hint.is_some(), "{with}: {verdict:?}");
    }
}

/// Expects of configurations that each is refused at a key.
pub(crate) fn wrong(kind: &str, rows: &[(Value, &str)]) {
    let directory = tempfile::tempdir().unwrap();
    let kubeconfig = directory.path().join("config");
    let text = "clusters: [{ name: c, cluster: { server: \"https://127.0.0.1:1\" } }]\n\
                contexts: [{ name: x, context: { cluster: c } }]\ncurrent-context: x\n";
    std::fs::write(&kubeconfig, text).unwrap();
    for (with, key) in rows {
        let mut all = json!({ "target": "cluster" });
        all.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
        let error: BuildError =
            registry().make_check(kind, all, &build_context(&kubeconfig, "shop")).map(drop).unwrap_err();
        assert_eq!(error.key.as_deref(), Some(*key), "{with}: {error}");
    }
}
