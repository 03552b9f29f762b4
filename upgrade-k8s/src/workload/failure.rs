//! What makes a rollout hopeless, read from its pods long before a deadline would say so.

use crate::object::Object;

/// Holds what is remembered of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// The uid of what owns it: a ReplicaSet, a StatefulSet, a DaemonSet.
    pub owner: String,
    /// The label by which its controller tells templates apart.
    pub revision: String,
    /// Tells whether it takes traffic.
    pub is_ready: bool,
    /// Tells whether it is being deleted.
    pub is_going: bool,
    /// What hinders it, if anything does.
    pub trouble: Option<Trouble>,
}

/// Says what hinders a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// The reason, in the cluster's word: `ImagePullBackOff`.
    pub reason: String,
    /// What the cluster says about it.
    pub message: String,
    /// The container, where it is one.
    pub container: Option<String>,
    /// How often the container was started again.
    pub restarts: u64,
    /// How sure it is that waiting does not help.
    pub kind: TroubleKind,
}

/// Says how sure it is that waiting does not help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TroubleKind {
    /// Nothing about the pod will change by itself.
    Final,
    /// The container ends again and again; some do so until what they need is there.
    Crashing,
    /// It finds no node. Pods that are on their way out may make room.
    NoRoom,
}

/// Reasons that a kubelet gives for a container that it cannot start, and that do not pass
/// (`pkg/kubelet/images/types.go` and `pkg/kubelet/kuberuntime/kuberuntime_container.go` of Kubernetes).
///
/// `ErrImagePull` alone may be a registry's hiccup; it is final only with what says so.
const FINAL: [&str; 7] = [
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImageNeverPull",
    "ImageInspectError",
    "ImagePullBackOff",
    "InvalidImageName",
    "RunContainerError",
];

/// What an `ErrImagePull` says when the registry has answered, and answered no.
const REFUSED: [&str; 6] =
    ["not found", "manifest unknown", "unauthorized", "denied", "name unknown", "no basic auth credentials"];

impl Pod {
    /// Reads what is of interest; none of what belongs to nothing.
    pub fn read(object: &Object) -> Option<Self> {
        let owner = object.list("/metadata/ownerReferences").find(|owner| owner["controller"] == true)?;
        let ready = |each: &serde_json::Value| each["type"] == "Ready" && each["status"] == "True";
        let revision = ["pod-template-hash", "controller-revision-hash"];
        Some(Self {
            name: object.name().to_owned(),
            owner: owner["uid"].as_str()?.to_owned(),
            revision: revision.iter().find_map(|label| object.label(label)).unwrap_or_default().to_owned(),
            is_ready: object.list("/status/conditions").any(ready),
            is_going: object.is_going(),
            trouble: trouble(object),
        })
    }
}

fn trouble(pod: &Object) -> Option<Trouble> {
    let unschedulable = pod
        .list("/status/conditions")
        .find(|each| each["type"] == "PodScheduled" && each["status"] == "False" && each["reason"] == "Unschedulable");
    if let Some(condition) = unschedulable {
        return Some(Trouble {
            reason: "Unschedulable".into(),
            message: condition["message"].as_str().unwrap_or_default().to_owned(),
            container: None,
            restarts: 0,
            kind: TroubleKind::NoRoom,
        });
    }
    pod.list("/status/initContainerStatuses").chain(pod.list("/status/containerStatuses")).find_map(|status| {
        let waiting = &status["state"]["waiting"];
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        let (reason, message) = (text(&waiting["reason"]), text(&waiting["message"]));
        let said = message.to_lowercase();
        let kind = if FINAL.contains(&reason.as_str())
            || (reason == "ErrImagePull" && REFUSED.iter().any(|sign| said.contains(sign)))
        {
            TroubleKind::Final
        } else if reason == "CrashLoopBackOff" {
            TroubleKind::Crashing
        } else {
            return None;
        };
        let container = status["name"].as_str().map(str::to_owned);
        let last = &status["lastState"]["terminated"];
        let message = match last["exitCode"].as_i64() {
            Some(code) if kind == TroubleKind::Crashing => {
                format!("{message}; it ended with exit code {code} ({})", text(&last["reason"]))
            }
            _ => message,
        };
        let restarts = status["restartCount"].as_u64().unwrap_or_default();
        Some(Trouble { reason, message, container, restarts, kind })
    })
}

/// Tells which pod of the new template makes waiting useless, if one does.
///
/// `restarts` are forgiven to each container. A pod without room is forgiven while another one of the
/// workload is on its way out.
pub fn hopeless<'a>(
    new: impl Iterator<Item = &'a Pod>,
    is_room_made: bool,
    restarts: u64,
) -> Option<(&'a Pod, &'a Trouble)> {
    new.filter(|pod| !pod.is_going).filter_map(|pod| pod.trouble.as_ref().map(|trouble| (pod, trouble))).find(
        |(_, trouble)| match trouble.kind {
            TroubleKind::Final => true,
            TroubleKind::Crashing => trouble.restarts > restarts,
            TroubleKind::NoRoom => !is_room_made,
        },
    )
}

/// Says what to do about a reason.
pub fn advice(reason: &str) -> &'static str {
    match reason {
        "ErrImagePull" | "ImagePullBackOff" | "ErrImageNeverPull" | "ImageInspectError" | "InvalidImageName" => {
            "check the image's name and tag, and the pull secrets of the pod's service account"
        }
        "CreateContainerConfigError" => "a ConfigMap, a Secret or a key that the pod names is missing",
        "CrashLoopBackOff" => "its last log lines say why it ends: `kubectl logs --previous`",
        "Unschedulable" => "free room, add nodes, or lower what the pod asks for",
        "FailedCreate" => "`kubectl describe` of the workload: a quota, a webhook or a policy refuses its pods",
        _ => "`kubectl describe pod` tells more",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(status: &Value) -> Pod {
        let metadata = json!({ "name": "web-1", "uid": "u", "labels": { "pod-template-hash": "h" },
            "ownerReferences": [{ "uid": "rs", "controller": true }] });
        Pod::read(&Object(json!({ "metadata": metadata, "status": status }))).unwrap()
    }

    fn waiting(reason: &str, message: &str, restarts: u64) -> Pod {
        pod(&json!({ "containerStatuses": [{ "name": "web", "restartCount": restarts,
            "state": { "waiting": { "reason": reason, "message": message } },
            "lastState": { "terminated": { "exitCode": 1, "reason": "Error" } } }] }))
    }

    #[test]
    fn what_waiting_does_not_mend_is_told_from_what_it_may() {
        for (pod, is_hopeless) in [
            (waiting("ContainerCreating", "", 0), false),
            (waiting("ErrImagePull", "dial tcp: i/o timeout", 0), false),
            (waiting("ErrImagePull", "manifest unknown", 0), true),
            (waiting("ImagePullBackOff", "Back-off", 0), true),
            (waiting("CreateContainerConfigError", "secret \"x\" not found", 0), true),
            (waiting("CrashLoopBackOff", "back-off", 1), true),
            (pod(&json!({ "conditions": [{ "type": "Ready", "status": "True" }] })), false),
        ] {
            assert_eq!(hopeless([&pod].into_iter(), false, 0).is_some(), is_hopeless, "{pod:?}");
        }
        let crashing = waiting("CrashLoopBackOff", "back-off", 2);
        assert!(hopeless([&crashing].into_iter(), false, 2).is_none(), "two restarts are forgiven");
        assert!(crashing.trouble.unwrap().message.contains("exit code 1"));
    }

    #[test]
    fn pods_on_their_way_out_make_room() {
        let condition = json!({ "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
            "message": "0/3 nodes are available" });
        let pod = pod(&json!({ "conditions": [condition] }));
        assert!(hopeless([&pod].into_iter(), true, 0).is_none());
        assert_eq!(hopeless([&pod].into_iter(), false, 0).unwrap().1.reason, "Unschedulable");
    }

    #[test]
    fn an_init_container_counts() {
        let pod = pod(&json!({ "initContainerStatuses": [{ "name": "wait", "state": { "waiting":
            { "reason": "InvalidImageName", "message": "couldn't parse image" } } }] }));
        assert_eq!(pod.trouble.unwrap().container.as_deref(), Some("wait"));
    }
}
