//! `k8s.helm` by a real `helm`, on a real control plane.

#![cfg(test)]

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use upgrade_core::context::OnConflict;
use upgrade_core::error::{Class, StepError};
use upgrade_core::step::{Effect, Prepared, Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_k8s::steps::{HelmConfig, HelmStep, HelmUndo};

use crate::world::{Corner, golden};

/// Finds Helm where `scripts/helm` has put it.
pub(crate) fn helm() -> Option<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/helm");
    let asked = Command::new(script).env("UPGRADE_NO_INSTALL", "1").output().unwrap();
    if asked.status.success() {
        return Some(String::from_utf8(asked.stdout).unwrap().trim().into());
    }
    eprintln!("skipped: no Helm (scripts/helm fetches it)");
    None
}

/// What makes the version of a chart: what is in its templates beside a ConfigMap.
fn template(version: u32) -> &'static str {
    match version {
        1 => {
            "apiVersion: v1\nkind: ConfigMap\nmetadata: { name: old }\ndata: { OF: one }\n---\n\
             apiVersion: v1\nkind: Secret\nmetadata: { name: key }\nstringData: { KEY: {{ .Values.key | quote }} }\n"
        }
        _ => {
            "apiVersion: v1\nkind: ConfigMap\nmetadata: { name: new }\ndata: { OF: two }\n---\n\
             apiVersion: v1\nkind: Secret\nmetadata: { name: key }\nstringData: { KEY: {{ .Values.key | quote }} }\n"
        }
    }
}

/// Writes two versions of a chart below a directory: the second has another image and other settings, one
/// object more and one less. Without replicas there is nothing to wait for.
pub(crate) fn write_charts(directory: &Path) {
    for version in [1, 2] {
        let chart = directory.join(format!("chart-{version}"));
        std::fs::create_dir_all(chart.join("templates")).unwrap();
        let write = |name: &str, text: &str| std::fs::write(chart.join(name), text).unwrap();
        write(
            "Chart.yaml",
            &format!("apiVersion: v2\nname: shop\nversion: {version}.0.0\nappVersion: \"{version}\"\n"),
        );
        write("values.yaml", "replicas: 1\nkey: none\ntag: \"\"\nhook: \"\"\n");
        write("templates/beside.yaml", template(version));
        let more = if version == 2 { ", ADDED: yes-it-is" } else { "" };
        write(
            "templates/shop.yaml",
            &format!(
                "apiVersion: v1\nkind: ConfigMap\nmetadata: {{ name: shop }}\ndata: {{ MODE: v{version}{more} }}\n"
            ),
        );
        let web =
            crate::world::deployment("web", &format!("shop/web:{{{{ .Values.tag | default \"{version}\" }}}}"), 1)
                .replace("replicas: 1", "replicas: {{ .Values.replicas }}");
        write("templates/web.yaml", &format!("{{{{ if .Values.replicas }}}}{web}{{{{ end }}}}\n"));
        write(
            "templates/hook.yaml",
            "{{ if .Values.hook }}\napiVersion: batch/v1\nkind: Job\nmetadata:\n  name: before\n  annotations: \
             { helm.sh/hook: pre-upgrade, helm.sh/hook-delete-policy: before-hook-creation }\nspec:\n  backoffLimit: 0\n  \
             template:\n    spec:\n      restartPolicy: Never\n      containers: [{ name: c, image: \"shop/db:{{ .Values.hook }}\" }]\n{{ end }}\n",
        );
    }
}

/// A namespace, two charts, and a `helm` that is somebody else's.
struct Shop {
    corner: Corner,
    helm: PathBuf,
}

impl Shop {
    fn new(what: &str) -> Option<Self> {
        let (helm, corner) = (helm()?, Corner::shared(what)?);
        write_charts(&corner.directory());
        Some(Self { corner, helm })
    }

    fn chart(&self, version: u32) -> String {
        self.corner.directory().join(format!("chart-{version}")).display().to_string()
    }

    fn helm(&self, arguments: &[&str]) -> String {
        run(&self.helm, &self.corner, arguments)
    }

    fn step(&self, version: u32, more: &Value) -> HelmStep {
        let mut config = json!({ "target": "cluster", "release": "shop", "chart": self.chart(version),
            "program": self.helm, "deadline": "30s" });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let config: HelmConfig = serde_json::from_value(config).unwrap();
        HelmStep::from_config(config, &self.corner.build_context()).unwrap()
    }

    /// What the release is made of; what it keeps of itself is not part of it.
    fn objects(&self) -> String {
        observe(&self.corner)
    }

    fn last(&self) -> Value {
        let history: Value = serde_json::from_str(&self.helm(&["history", "shop", "--output", "json"])).unwrap();
        history.as_array().unwrap().last().unwrap().clone()
    }
}

/// Runs `helm` as somebody else.
pub(crate) fn run(helm: &Path, corner: &Corner, arguments: &[&str]) -> String {
    let done = Command::new(helm)
        .args(arguments)
        .args(["--namespace", &corner.namespace.name, "--kubeconfig"])
        .arg(corner.kubeconfig())
        .output()
        .unwrap();
    assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

/// Writes down what a release is made of; Helm's own records of it left out.
pub(crate) fn observe(corner: &Corner) -> String {
    let list: Value = serde_json::from_str(&corner.written("deployments,configmaps,secrets,jobs")).unwrap();
    let own = |each: &&Value| each["type"] != "helm.sh/release.v1" && each["kind"] != "Job";
    let mut kept: Vec<_> = list.as_array().unwrap().iter().filter(own).cloned().collect();
    for each in &mut kept {
        // Counted up with every change, and back again as well.
        if let Some(annotations) = each.pointer_mut("/metadata/annotations").and_then(Value::as_object_mut) {
            annotations.remove("deployment.kubernetes.io/revision");
        }
    }
    serde_json::to_string_pretty(&kept).unwrap()
}

async fn prepared(step: &HelmStep, test: &TestContext) -> HelmUndo {
    match step.prepare(&test.forward()).await.unwrap_or_else(|error| panic!("{}", said(&error))) {
        Prepared::Change { undo, .. } => undo,
        other => panic!("{other:?}"),
    }
}

fn said(error: &StepError) -> String {
    format!("{error:?}")
}

#[tokio::test]
async fn a_release_is_upgraded_and_rolled_back_exactly() {
    let Some(shop) = Shop::new("release") else { return };
    shop.helm(&["install", "shop", &shop.chart(1), "--set", "key=one", "--wait"]);
    let before = shop.objects();
    let manifest = shop.helm(&["get", "manifest", "shop"]);
    let secret = shop.corner.directory().join("secret");
    std::fs::write(&secret, "hush-hush").unwrap();
    let more = json!({ "set": { "replicas": 2 }, "secrets": { "key": { "file": secret } } });
    let (step, test) = (shop.step(2, &more), TestContext::new("shop"));
    let Prepared::Change { undo, changes } = step.prepare(&test.forward()).await.unwrap() else { panic!() };
    let told: Vec<_> = changes.iter().map(|each| (each.effect, each.subject.as_str())).collect();
    let release = format!("release {}/shop", shop.corner.namespace.name);
    assert_eq!(told[0], (Effect::Modify, &*release));
    for each in [
        (Effect::Modify, "configmap shop"),
        (Effect::Create, "configmap new"),
        (Effect::Remove, "configmap old"),
        (Effect::Modify, "secret key"),
        (Effect::Modify, "deployment.apps web"),
    ] {
        assert!(told.contains(&each), "{each:?} in {told:?}");
    }
    assert!(!format!("{changes:?}{undo:?}").contains("hush"), "{changes:?}");
    golden("k8s.helm.undo.v1.json", &undo, &[(&shop.corner.namespace.name, "NAMESPACE")]);
    assert_eq!(shop.objects(), before, "a plan changes nothing");

    let output = step.apply(&test.forward(), &undo).await.unwrap_or_else(|error| panic!("{}", said(&error)));
    assert_eq!((output.revision, &*output.chart, &*output.app_version), (2, "shop-2.0.0", "2"));
    shop.corner.await_pods("web", "shop/web:2", 2);
    assert_eq!(shop.corner.get("secret/key").text("/data/KEY"), "aHVzaC1odXNo");
    assert!(shop.last()["description"].as_str().unwrap().contains(&test.forward().marker()));
    // Called again, nothing is done.
    assert_eq!(step.apply(&test.forward(), &undo).await.unwrap(), output);
    let again = step.prepare(&TestContext::new("again").forward()).await.unwrap();
    assert!(matches!(again, Prepared::Unchanged { .. }), "{again:?}");

    step.rollback(&test.back(), &undo, Some(&output)).await.unwrap_or_else(|error| panic!("{}", said(&error)));
    assert_eq!(shop.objects(), before);
    assert_eq!(shop.helm(&["get", "manifest", "shop"]), manifest);
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(shop.last()["revision"], 3, "called again, nothing is done");
    step.settle(&test.back(), &undo).await.unwrap();
}

#[tokio::test]
async fn a_release_that_was_not_there_is_installed_and_gone_again() {
    let Some(shop) = Shop::new("install") else { return };
    let test = TestContext::new("shop");
    let error = shop.step(1, &json!({})).prepare(&test.forward()).await.unwrap_err();
    assert!(error.message().contains("there is no release") && error.hint().unwrap().contains("install: true"));
    let before = shop.objects();
    let step = shop.step(1, &json!({ "install": true }));
    let undo = prepared(&step, &test).await;
    assert_eq!(undo.found, None);
    let output = step.apply(&test.forward(), &undo).await.unwrap_or_else(|error| panic!("{}", said(&error)));
    assert_eq!((output.revision, output.found_revision), (1, None));
    step.rollback(&test.back(), &undo, Some(&output)).await.unwrap_or_else(|error| panic!("{}", said(&error)));
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(shop.objects(), before);
    assert_eq!(shop.helm(&["list", "--all", "--short"]), "");
}

/// Kills a `helm` of this step in the middle of its work, as a machine that loses power does.
async fn broken_off(shop: &Shop, step: &HelmStep, test: &TestContext, undo: &HelmUndo, back: bool, status: &str) {
    let call = async {
        let cx = if back { test.back() } else { test.forward() };
        if back { step.rollback(&cx, undo, None).await } else { step.apply(&cx, undo).await.map(drop) }
    };
    // Revisions that were recovered stay what they were in the history.
    let pending = || {
        let selector = format!("owner=helm,status={status}");
        shop.corner.namespace.kubectl(&["get", "secrets", "--selector", &selector, "--output", "name"]).lines().count()
    };
    let before = pending();
    let kill = async {
        let began = std::time::Instant::now();
        while pending() == before {
            assert!(began.elapsed().as_secs() < 30, "it never was {status}");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        // Whatever came of the objects, the record is what a crash leaves.
        for pid in marked(&test.forward().marker()) {
            Command::new("kill").args(["-9", &pid]).status().unwrap();
        }
    };
    let (ended, ()) = tokio::join!(call, kill);
    assert_eq!(ended.unwrap_err().class(), Class::Unknown);
    assert_eq!(shop.last()["status"], status);
}

/// The processes that carry a marker.
fn marked(marker: &str) -> Vec<String> {
    let entry = format!("UPGRADE_MARKER={marker}");
    let carries = |pid: &String| {
        std::fs::read(format!("/proc/{pid}/environ"))
            .is_ok_and(|all| all.split(|byte| *byte == 0).any(|each| each == entry.as_bytes()))
    };
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    all.map(|each| each.file_name().to_string_lossy().into_owned()).filter(carries).collect()
}

#[tokio::test]
async fn what_a_crash_left_pending_is_recovered_either_way() {
    let Some(shop) = Shop::new("pending") else { return };
    shop.helm(&["install", "shop", &shop.chart(1), "--set", "key=one", "--wait"]);
    let before = shop.objects();
    // Pods that take their time keep `helm` waiting.
    let (step, test) = (shop.step(2, &json!({ "set": { "key": "two", "tag": "slow" } })), TestContext::new("shop"));
    let undo = prepared(&step, &test).await;
    broken_off(&shop, &step, &test, &undo, false, "pending-upgrade").await;
    step.settle(&test.back(), &undo).await.unwrap();
    // Nobody else may start from there.
    let error = shop.step(2, &json!({})).prepare(&TestContext::new("other").forward()).await.unwrap_err();
    assert!(error.message().contains("pending-upgrade") && error.class() == Class::Transient, "{error:?}");
    step.rollback(&test.back(), &undo, None).await.unwrap_or_else(|error| panic!("{}", said(&error)));
    assert_eq!(shop.objects(), before);

    // And forward, after which nothing tells that there was a crash.
    let undo = prepared(&step, &test).await;
    broken_off(&shop, &step, &test, &undo, false, "pending-upgrade").await;
    step.settle(&test.forward(), &undo).await.unwrap();
    let output = step.apply(&test.forward(), &undo).await.unwrap_or_else(|error| panic!("{}", said(&error)));
    assert_eq!(shop.last()["status"], "deployed");
    step.rollback(&test.back(), &undo, Some(&output)).await.unwrap();
    assert_eq!(shop.objects(), before);

    // The release that never was there.
    shop.helm(&["uninstall", "shop", "--wait"]);
    let nothing = shop.objects();
    let step = shop.step(2, &json!({ "set": { "tag": "slow" }, "install": true }));
    let undo = prepared(&step, &test).await;
    broken_off(&shop, &step, &test, &undo, false, "pending-install").await;
    step.settle(&test.back(), &undo).await.unwrap();
    step.rollback(&test.back(), &undo, None).await.unwrap_or_else(|error| panic!("{}", said(&error)));
    assert_eq!(shop.objects(), nothing);
}

#[tokio::test]
async fn what_helm_itself_would_leave_behind_is_taken_back() {
    let Some(shop) = Shop::new("remains") else { return };
    shop.helm(&["install", "shop", &shop.chart(1), "--set", "key=one,tag=slow", "--wait"]);
    let before = shop.objects();
    // A hook fails before the object that the chart drops is removed: Helm 3 cannot roll that back.
    let (step, test) = (shop.step(2, &json!({ "set": { "hook": "fail" } })), TestContext::new("shop"));
    let undo = prepared(&step, &test).await;
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert!(error.detail().unwrap().contains("pre-upgrade"), "{error:?}");
    step.rollback(&test.back(), &undo, None).await.unwrap_or_else(|error| panic!("{}", said(&error)));
    assert_eq!(shop.objects(), before);
    assert_eq!(shop.last()["status"], "deployed");

    // A rollback that was broken off has forgotten what the upgrade added.
    let (step, test) = (shop.step(2, &json!({})), TestContext::new("shop"));
    let undo = prepared(&step, &test).await;
    step.apply(&test.forward(), &undo).await.unwrap_or_else(|error| panic!("{}", said(&error)));
    broken_off(&shop, &step, &test, &undo, true, "pending-rollback").await;
    // As if it had not come to these.
    shop.corner.namespace.kubectl(&["patch", "configmap", "shop", "--patch", "{\"data\":{\"ADDED\":\"yes-it-is\"}}"]);
    shop.corner.namespace.apply(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: { name: new, annotations: { meta.helm.sh/release-name: shop } }\ndata: { OF: two }\n",
    );
    step.settle(&test.back(), &undo).await.unwrap();
    step.rollback(&test.back(), &undo, None).await.unwrap_or_else(|error| panic!("{}", said(&error)));
    let only = |text: &str| text.lines().filter(|line| !line.contains("last-applied")).collect::<Vec<_>>().join("\n");
    assert_eq!(only(&shop.objects()), only(&before));
}

#[tokio::test]
async fn what_somebody_else_made_of_a_release_is_a_conflict() {
    let Some(shop) = Shop::new("foreign") else { return };
    shop.helm(&["install", "shop", &shop.chart(1), "--wait"]);
    let before = shop.objects();
    let (step, test) = (shop.step(2, &json!({})), TestContext::new("shop"));
    let undo = prepared(&step, &test).await;
    shop.helm(&["upgrade", "shop", &shop.chart(1), "--set", "key=foreign"]);
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    let conflict = error.as_conflict().unwrap();
    assert!(conflict.intended.starts_with("shop-2.0.0") && conflict.present.starts_with("revision 2"), "{conflict:?}");
    let error = step.rollback(&test.back(), &undo, None).await.unwrap_err();
    assert!(error.as_conflict().is_some(), "{error:?}");
    let insisting = TestContext::new("shop").on_conflict(OnConflict::Overwrite);
    step.rollback(&insisting.back(), &undo, None).await.unwrap();
    assert_eq!(shop.objects(), before);
    shop.helm(&["uninstall", "shop"]);
    let error = step.rollback(&insisting.back(), &undo, None).await.unwrap_err();
    assert_eq!(error.as_conflict().unwrap().present, "no release");
}

#[tokio::test]
async fn what_is_wrong_is_said_with_its_remedy() {
    let Some(corner) = Corner::shared("helmless") else { return };
    write_charts(&corner.directory());
    let config = json!({ "target": "cluster", "release": "shop", "chart": corner.directory().join("chart-1"), "program": "/nowhere/helm" });
    let step = HelmStep::from_config(serde_json::from_value(config).unwrap(), &corner.build_context()).unwrap();
    let error = step.prepare(&TestContext::new("shop").forward()).await.unwrap_err();
    assert!(error.message().starts_with("there is no helm") && error.hint().unwrap().contains("program:"), "{error:?}");

    let Some(helm) = helm() else { return };
    let shop = Shop { corner, helm };
    shop.helm(&["install", "shop", &shop.chart(1), "--wait"]);
    let (step, test) =
        (shop.step(2, &json!({ "set": { "tag": "unready" }, "deadline": "2s" })), TestContext::new("shop"));
    let undo = prepared(&step, &test).await;
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert!(error.hint().unwrap().contains("not ready"), "{error:?}");
    let other = shop.step(1, &json!({})).prepare(&TestContext::new("other").forward()).await.unwrap_err();
    assert!(other.message().contains("revision 2 failed"), "{other:?}");
    step.rollback(&test.back(), &undo, None).await.unwrap();
    // What was not ready when it was found need not become so.
    shop.helm(&["upgrade", "shop", &shop.chart(1), "--set", "tag=unready"]);
    let (step, test) = (shop.step(2, &json!({ "deadline": "20s" })), TestContext::new("shop"));
    let undo = prepared(&step, &test).await;
    assert!(!undo.found.as_ref().unwrap().was_complete);
    step.apply(&test.forward(), &undo).await.unwrap_or_else(|error| panic!("{}", said(&error)));
    step.rollback(&test.back(), &undo, None).await.unwrap_or_else(|error| panic!("{}", said(&error)));
    let missing = shop.step(3, &json!({})).prepare(&test.forward()).await.unwrap_err();
    assert!(missing.detail().unwrap().contains("chart-3"), "{missing:?}");
}
