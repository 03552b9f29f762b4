//! How far a rollout is, by the conditions that `kubectl rollout status` uses.
//!
//! Source: `polymorphichelpers/rollout_status.go` of kubectl, which has been the same in this since 1.16. The
//! observed generation is looked at first: what a controller says about an older specification says nothing.

use crate::object::Object;
use crate::workload::WorkloadKind;

/// Says how far a rollout is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rollout {
    /// All that was asked for is there.
    Complete,
    /// It goes on.
    Going {
        /// How many pods of the new template are available.
        done: u64,
        /// How many there shall be.
        total: u64,
        /// What it waits for, in a few words.
        waits_for: String,
    },
    /// The controller has given up: no progress within `progressDeadlineSeconds`.
    GaveUp,
}

/// Tells how far the rollout of a workload is.
pub fn of(kind: WorkloadKind, object: &Object) -> Rollout {
    if object.number("/metadata/generation") > object.number("/status/observedGeneration") {
        let total = count(wanted(kind, object));
        return Rollout::Going { done: 0, total, waits_for: "the controller has not seen the change yet".into() };
    }
    match kind {
        WorkloadKind::Deployment => deployment(object),
        WorkloadKind::StatefulSet => stateful_set(object),
        WorkloadKind::DaemonSet => daemon_set(object),
        WorkloadKind::ReplicaSet => replica_set(object),
    }
}

/// Returns how many pods there shall be.
fn wanted(kind: WorkloadKind, object: &Object) -> i64 {
    match kind {
        WorkloadKind::DaemonSet => object.number("/status/desiredNumberScheduled"),
        // What is left out is one.
        _ => object.at("/spec/replicas").as_i64().unwrap_or(1),
    }
}

fn count(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}

fn going(done: i64, total: i64, waits_for: String) -> Rollout {
    Rollout::Going { done: count(done), total: count(total), waits_for }
}

fn deployment(object: &Object) -> Rollout {
    let mut conditions = object.list("/status/conditions");
    if conditions.any(|each| each["type"] == "Progressing" && each["reason"] == "ProgressDeadlineExceeded") {
        return Rollout::GaveUp;
    }
    let wanted = wanted(WorkloadKind::Deployment, object);
    let all = object.number("/status/replicas");
    let updated = object.number("/status/updatedReplicas");
    let available = object.number("/status/availableReplicas");
    // Of the old and the new ones: those of the new are no more than either figure.
    let done = available.min(updated);
    if updated < wanted {
        return going(done, wanted, format!("{updated} of {wanted} pods are of the new template"));
    }
    if all > updated {
        return going(done, wanted, format!("{} old pods are still there", all - updated));
    }
    if available < updated {
        return going(done, wanted, format!("{available} of {updated} new pods are available"));
    }
    Rollout::Complete
}

fn stateful_set(object: &Object) -> Rollout {
    let wanted = wanted(WorkloadKind::StatefulSet, object);
    let (ready, updated) = (object.number("/status/readyReplicas"), object.number("/status/updatedReplicas"));
    let partition = object.number("/spec/updateStrategy/rollingUpdate/partition").min(wanted);
    let done = ready.min(updated);
    if ready < wanted {
        return going(done, wanted - partition, format!("{ready} of {wanted} pods are ready"));
    }
    if partition > 0 {
        let due = wanted - partition;
        if updated < due {
            return going(done, due, format!("{updated} of {due} pods above the partition are of the new template"));
        }
        return Rollout::Complete;
    }
    if object.text("/status/updateRevision") != object.text("/status/currentRevision") {
        return going(done, wanted, format!("{updated} of {wanted} pods are of the new template"));
    }
    Rollout::Complete
}

fn daemon_set(object: &Object) -> Rollout {
    let wanted = wanted(WorkloadKind::DaemonSet, object);
    let updated = object.number("/status/updatedNumberScheduled");
    let available = object.number("/status/numberAvailable");
    let done = available.min(updated);
    if updated < wanted {
        return going(done, wanted, format!("{updated} of {wanted} pods are of the new template"));
    }
    if available < wanted {
        return going(done, wanted, format!("{available} of {wanted} pods are available"));
    }
    Rollout::Complete
}

/// Nothing is rolled out by a ReplicaSet: it has as many pods as asked for, or not yet.
fn replica_set(object: &Object) -> Rollout {
    let wanted = wanted(WorkloadKind::ReplicaSet, object);
    let (all, available) = (object.number("/status/replicas"), object.number("/status/availableReplicas"));
    if all > wanted {
        return going(wanted, wanted, format!("{} pods too many are still there", all - wanted));
    }
    if available < wanted {
        return going(available, wanted, format!("{available} of {wanted} pods are available"));
    }
    Rollout::Complete
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn state(kind: WorkloadKind, spec: &Value, status: &Value) -> Rollout {
        of(kind, &Object(json!({ "metadata": { "generation": 2 }, "spec": spec, "status": status })))
    }

    fn waits(rollout: Rollout) -> String {
        match rollout {
            Rollout::Going { waits_for, .. } => waits_for,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn nothing_is_believed_that_is_said_of_an_older_specification() {
        let status = json!({ "observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "availableReplicas": 1 });
        for kind in [WorkloadKind::Deployment, WorkloadKind::StatefulSet, WorkloadKind::DaemonSet] {
            assert!(waits(state(kind, &json!({ "replicas": 1 }), &status)).contains("not seen"), "{kind:?}");
        }
    }

    #[test]
    fn a_deployment_is_complete_when_only_new_pods_are_there_and_available() {
        let of = |replicas: i64, updated: i64, available: i64| {
            let status = json!({ "observedGeneration": 2, "replicas": replicas, "updatedReplicas": updated,
                "availableReplicas": available });
            state(WorkloadKind::Deployment, &json!({ "replicas": 3 }), &status)
        };
        assert!(waits(of(4, 1, 3)).contains("1 of 3"));
        assert!(waits(of(4, 3, 3)).contains("1 old"));
        assert!(waits(of(3, 3, 2)).contains("2 of 3"));
        assert_eq!(of(3, 3, 3), Rollout::Complete);
        let status = json!({ "observedGeneration": 2,
            "conditions": [{ "type": "Progressing", "reason": "ProgressDeadlineExceeded" }] });
        assert_eq!(state(WorkloadKind::Deployment, &json!({}), &status), Rollout::GaveUp);
    }

    #[test]
    fn a_partition_leaves_pods_as_they_are() {
        let spec = json!({ "replicas": 3, "updateStrategy": { "rollingUpdate": { "partition": 2 } } });
        let status = json!({ "observedGeneration": 2, "readyReplicas": 3, "updatedReplicas": 1,
            "updateRevision": "b", "currentRevision": "a" });
        assert_eq!(state(WorkloadKind::StatefulSet, &spec, &status), Rollout::Complete);
        let whole = json!({ "replicas": 3 });
        assert!(waits(state(WorkloadKind::StatefulSet, &whole, &status)).contains("1 of 3"));
    }

    #[test]
    fn a_daemon_set_is_on_every_node_that_it_should_be_on() {
        let status = |updated: i64, available: i64| {
            json!({ "observedGeneration": 2, "desiredNumberScheduled": 3, "updatedNumberScheduled": updated,
                "numberAvailable": available })
        };
        let of = |updated, available| state(WorkloadKind::DaemonSet, &json!({}), &status(updated, available));
        assert!(waits(of(1, 3)).contains("1 of 3 pods are of the new"));
        assert!(waits(of(3, 2)).contains("available"));
        assert_eq!(of(3, 3), Rollout::Complete);
    }
}
