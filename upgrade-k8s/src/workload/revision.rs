//! Templates that a workload had before, as its controller keeps them.
//!
//! A Deployment keeps a ReplicaSet a template, numbered by an annotation; a StatefulSet and a DaemonSet keep
//! ControllerRevisions, whose data is a patch that replaces the template
//! (<https://kubernetes.io/docs/concepts/workloads/controllers/deployment/#rolling-back-to-a-previous-revision>).

use serde_json::Value;
use upgrade_core::error::StepError;

use super::{WorkloadKind, WorkloadName};
use crate::kind::Kind;
use crate::object::Object;
use crate::server::ApiServer;

const NUMBER: &str = "deployment.kubernetes.io/revision";
const HASH: &str = "pod-template-hash";

/// Returns the template of a revision.
///
/// # Errors
/// The workload keeps no such revision: those that it keeps are named; and as [`ApiServer`] says.
pub(crate) async fn template(
    server: &ApiServer,
    workload: &WorkloadName,
    object: &Object,
    revision: u64,
) -> Result<Value, StepError> {
    let kind = match workload.kind {
        WorkloadKind::Deployment | WorkloadKind::ReplicaSet => Kind::replica_set(),
        WorkloadKind::StatefulSet | WorkloadKind::DaemonSet => Kind::controller_revision(),
    };
    let (kept, _) = server.list(&kind, Some(object.namespace()), "", "").await?;
    let mut kept: Vec<_> = kept
        .iter()
        .filter(|each| each.is_owned_by(object.uid()))
        .filter_map(|each| read(workload.kind, each))
        .collect();
    kept.sort_by_key(|(number, _)| *number);
    match kept.iter().find(|(number, _)| *number == revision) {
        Some((_, template)) => Ok(template.clone()),
        None => {
            let numbers: Vec<_> = kept.iter().map(|(number, _)| number.to_string()).collect();
            Err(StepError::permanent(format!(
                "{workload} keeps no revision {revision}; it keeps: {}",
                numbers.join(", ")
            ))
            .with_hint(format!(
                "`kubectl rollout history {workload}` tells what each is; or say what you want: `images`"
            )))
        }
    }
}

/// Reads the number and the template of what a controller keeps.
fn read(kind: WorkloadKind, kept: &Object) -> Option<(u64, Value)> {
    match kind {
        WorkloadKind::Deployment | WorkloadKind::ReplicaSet => {
            let number = kept.annotation(NUMBER)?.parse().ok()?;
            let mut template = kept.at("/spec/template").clone();
            template.pointer_mut("/metadata/labels")?.as_object_mut()?.remove(HASH);
            Some((number, template))
        }
        WorkloadKind::StatefulSet | WorkloadKind::DaemonSet => {
            let number = kept.at("/revision").as_u64()?;
            let mut template = kept.at("/data/spec/template").clone();
            template.as_object_mut()?.remove("$patch");
            Some((number, template))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_controllers_add_is_not_part_of_a_template() {
        let set = Object(json!({
            "metadata": { "annotations": { NUMBER: "3" } },
            "spec": { "template": { "metadata": { "labels": { "app": "web", HASH: "abc" } }, "spec": { "x": 1 } } },
        }));
        let template = json!({ "metadata": { "labels": { "app": "web" } }, "spec": { "x": 1 } });
        assert_eq!(read(WorkloadKind::Deployment, &set), Some((3, template.clone())));
        let mut patch = template.clone();
        patch["$patch"] = json!("replace");
        let revision = Object(json!({ "revision": 4, "data": { "spec": { "template": patch } } }));
        assert_eq!(read(WorkloadKind::StatefulSet, &revision), Some((4, template)));
        assert_eq!(read(WorkloadKind::DaemonSet, &Object(json!({ "revision": 4 }))), None);
    }
}
