//! What an upgrade of a release would change, object by object, for a person to read.

use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::step::{Change, Effect};

use crate::difference::differences;
use crate::manifest::Manifest;

/// Compares two manifests of a release; values of Secrets are not shown.
pub(super) fn changes(cx: &Context, before: &str, after: &str) -> Result<Vec<Change>, StepError> {
    let (before, after) = (Manifest::parse(before, "the present manifest")?, Manifest::parse(after, "the chart")?);
    let mut changes = Vec::new();
    for each in &after {
        let subject = called(each);
        let Some(was) = before.iter().find(|was| called(was) == subject) else {
            changes.push(Change::new(Effect::Create, subject));
            continue;
        };
        let is_secret = each.object.text("/kind") == "Secret";
        let lines = differences(&was.object.0, &each.object.0, is_secret);
        if !lines.is_empty() {
            changes.push(Change::new(Effect::Modify, subject).with_summary(cx.mask(&lines.join("; "))));
        }
    }
    let is_gone = |was: &&Manifest| !after.iter().any(|each| called(each) == called(was));
    changes.extend(before.iter().filter(is_gone).map(|was| {
        let change = Change::new(Effect::Remove, called(was));
        match was.object.text("/kind") {
            "PersistentVolumeClaim" => change.undo_loses("what is on its volume"),
            _ => change,
        }
    }));
    Ok(changes)
}

/// Names an object as a manifest does, its group told, the version of it not.
pub(super) fn called(manifest: &Manifest) -> String {
    let object = &manifest.object;
    let group = object.text("/apiVersion").rsplit_once('/').map_or("", |(group, _)| group);
    let kind = object.text("/kind").to_lowercase();
    let kind = if group.is_empty() { kind } else { format!("{kind}.{group}") };
    match object.namespace() {
        "" => format!("{kind} {}", object.name()),
        namespace => format!("{kind} {namespace}/{}", object.name()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use upgrade_core::testkit::TestContext;

    #[test]
    fn a_plan_tells_objects_that_come_change_and_go_and_no_secret() {
        let before = "---\n# Source: shop/a.yaml\napiVersion: v1\nkind: ConfigMap\nmetadata: { name: a }\ndata: { MODE: old }\n---\n\
                      apiVersion: v1\nkind: Secret\nmetadata: { name: s }\nstringData: { KEY: one }\n---\n\
                      apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: { name: files }\n";
        let after = "---\napiVersion: v1\nkind: ConfigMap\nmetadata: { name: a }\ndata: { MODE: new }\n---\n\
                     apiVersion: v1\nkind: Secret\nmetadata: { name: s }\nstringData: { KEY: two }\n---\n\
                     apiVersion: apps/v1\nkind: Deployment\nmetadata: { name: web, namespace: shop }\n";
        let told = changes(&TestContext::new("shop").forward(), before, after).unwrap();
        let told: Vec<_> = told
            .iter()
            .map(|each| (each.effect, &*each.subject, each.summary.as_deref(), each.undo_loses.is_some()))
            .collect();
        assert_eq!(
            told,
            [
                (Effect::Modify, "configmap a", Some("data.MODE: old -> new"), false),
                (Effect::Modify, "secret s", Some("stringData.KEY: changed"), false),
                (Effect::Create, "deployment.apps shop/web", None, false),
                (Effect::Remove, "persistentvolumeclaim files", None, true),
            ]
        );
    }
}
