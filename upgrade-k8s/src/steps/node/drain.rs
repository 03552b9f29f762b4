//! A node drained as `kubectl drain` drains it: by eviction, within what budgets allow.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use super::config::DrainConfig;
use crate::error::KubeError;
use crate::kind::Kind;
use crate::naming;
use crate::object::{Object, ObjectName};
use crate::server::ApiServer;

/// How many evictions are under way at once.
const AT_ONCE: usize = 20;
/// The first pause before an eviction is asked for again; each one after it is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// As long as `kubectl drain` waits.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How many pods a message names.
const NAMED: usize = 5;
/// The taint of a cordoned node: what tolerates it may be put there again at once.
const CORDONED: &str = "node.kubernetes.io/unschedulable";

/// Says what becomes of a pod whose node is drained.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Fate {
    Goes,
    /// Its DaemonSet would make it anew on the node, cordoned or not.
    OfDaemonSet,
    /// A pod that the kubelet itself runs, or the step's own.
    Stays,
    /// It may not be evicted, for this reason.
    Refused(&'static str),
}

/// What is remembered of a pod on the node.
#[derive(Debug, Clone)]
struct Leaving {
    name: ObjectName,
    uid: String,
    fate: Fate,
    is_going: bool,
    may_come_back: bool,
}

/// What is known of an eviction.
struct Asked {
    pause: Duration,
    /// When it is asked for again; none while it is under way, or was granted.
    again: Option<Instant>,
    hindered: Option<Hindered>,
}

/// Says why a pod is not evicted now.
struct Hindered {
    why: String,
    by_budget: bool,
}

/// Says what draining a node would do.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// How many pods go.
    pub(super) goes: usize,
    /// How many pods of DaemonSets stay.
    pub(super) of_daemon_sets: usize,
    refused: Vec<String>,
}

impl Plan {
    /// Looks what draining a node would do; asks for nothing to be done.
    ///
    /// # Errors
    /// The cluster cannot be asked.
    pub(super) async fn of(
        server: &ApiServer,
        cx: &Context,
        node: &str,
        config: &DrainConfig,
    ) -> Result<Self, StepError> {
        let (pods, _) = server.list(&Kind::pod(), None, "", &format!("spec.nodeName={node}")).await?;
        let mut plan = Self::default();
        for pod in pods.iter().map(|pod| read(pod, config, &naming::mark(cx))) {
            match pod.fate {
                Fate::Goes => plan.goes += 1,
                Fate::OfDaemonSet => plan.of_daemon_sets += 1,
                Fate::Stays => {}
                Fate::Refused(why) => plan.refused.push(format!("{} {why}", pod.name)),
            }
        }
        Ok(plan)
    }

    /// Refuses a node with pods that must not be evicted.
    ///
    /// # Errors
    /// There are such.
    pub(super) fn allow(&self, node: &str) -> Result<(), StepError> {
        if self.refused.is_empty() { Ok(()) } else { Err(refusal(node, &self.refused)) }
    }
}

fn refusal(node: &str, refused: &[String]) -> StepError {
    StepError::permanent(format!("node {node} cannot be drained: {}", named(refused))).with_hint(
        "move or delete these pods by hand, or say that they may be lost: `drain: { force: true }` for pods without \
         a controller, `drain: { delete_emptydir_data: true }` for emptyDir volumes",
    )
}

fn named(all: &[String]) -> String {
    let more = all.len().saturating_sub(NAMED);
    let first = all[..all.len() - more].join("; ");
    if more == 0 { first } else { format!("{first}; and {more} more") }
}

/// Judges a pod as `kubectl drain` does.
fn read(pod: &Object, config: &DrainConfig, own: &str) -> Leaving {
    let controller = pod.list("/metadata/ownerReferences").find(|owner| owner["controller"] == true);
    let is_finished = matches!(pod.text("/status/phase"), "Succeeded" | "Failed");
    let has_empty_dir = pod.list("/spec/volumes").any(|volume| volume.get("emptyDir").is_some());
    let fate = if pod.annotation("kubernetes.io/config.mirror").is_some() || pod.label(naming::MARK) == Some(own) {
        Fate::Stays
    } else if is_finished {
        Fate::Goes
    } else if controller.is_some_and(|owner| owner["kind"] == "DaemonSet") {
        Fate::OfDaemonSet
    } else if controller.is_none() && !config.force {
        Fate::Refused("has no controller that would make it anew")
    } else if has_empty_dir && !config.delete_emptydir_data {
        Fate::Refused("has data in an emptyDir volume")
    } else {
        Fate::Goes
    };
    let tolerates = |toleration: &Value| {
        let text = |field: &str| toleration[field].as_str().unwrap_or_default().to_owned();
        let key = text("key");
        (key == CORDONED || (key.is_empty() && text("operator") == "Exists"))
            && matches!(text("effect").as_str(), "" | "NoSchedule")
    };
    Leaving {
        name: ObjectName::new(Kind::pod(), pod.namespace(), pod.name()),
        uid: pod.uid().to_owned(),
        fate,
        is_going: pod.is_going(),
        may_come_back: pod.list("/spec/tolerations").any(tolerates),
    }
}

/// Returns the version of the Eviction that the cluster takes: `policy/v1` since 1.22.
async fn eviction_version(server: &ApiServer) -> Result<String, KubeError> {
    let core = server.get_path("/api/v1", &[], || "asking the cluster how pods are evicted".into()).await?;
    let resources = core["resources"].as_array().into_iter().flatten();
    let version = resources.filter(|each| each["name"] == "pods/eviction").find_map(|each| each["version"].as_str());
    Ok(format!("policy/{}", version.unwrap_or("v1")))
}

/// Drains a cordoned node: evicts its pods, and returns when they are gone.
///
/// # Errors
/// A pod must not be evicted, or is still there at the deadline: each is named, with the budget that holds
/// it; the call is cancelled; the cluster cannot be asked.
pub(super) async fn drain(server: &ApiServer, cx: &Context, node: &str, config: &DrainConfig) -> Result<(), StepError> {
    let until = Instant::now() + config.deadline.0;
    let version = eviction_version(server).await?;
    let (settings, own) = (config.clone(), naming::mark(cx));
    let keep = move |pod: &Object| {
        let pod = read(pod, &settings, &own);
        (!matches!(pod.fate, Fate::OfDaemonSet | Fate::Stays)).then_some(pod)
    };
    let mut pods = server.follow(Kind::pod(), None, "", keep).with_fields(format!("spec.nodeName={node}"));
    pods.changed().await?;
    let first: BTreeSet<String> = pods.objects().keys().cloned().collect();
    let mut asked: BTreeMap<String, Asked> = BTreeMap::new();
    let mut evictions = FuturesUnordered::new();
    loop {
        // What is made anew here whatever the cordon says would never come to an end.
        let left: Vec<_> =
            pods.objects().values().filter(|pod| first.contains(&pod.uid) || !pod.may_come_back).cloned().collect();
        if left.is_empty() {
            return Ok(());
        }
        let refused = left.iter().filter_map(|pod| match pod.fate {
            Fate::Refused(why) => Some(format!("{} {why}", pod.name)),
            _ => None,
        });
        let refused: Vec<_> = refused.collect();
        if !refused.is_empty() {
            return Err(refusal(node, &refused));
        }
        let now = Instant::now();
        if now >= until {
            return Err(late(node, config, &left, &asked));
        }
        let due = |pod: &&Leaving| {
            !pod.is_going && asked.get(&pod.uid).is_none_or(|asked| asked.again.is_some_and(|again| again <= now))
        };
        let due: Vec<_> = left.iter().filter(due).take(AT_ONCE - evictions.len()).cloned().collect();
        for pod in due {
            let known = asked.entry(pod.uid.clone());
            known.or_insert(Asked { pause: FIRST_PAUSE, again: None, hindered: None }).again = None;
            evictions.push(evict(server, &version, pod, config));
        }
        cx.progress(0, None, format!("draining {node}: {} pods are left", left.len()));
        // Of those alone that may be asked for again: a time that is over would be waited for without an end.
        let again = left.iter().filter(|pod| !pod.is_going).filter_map(|pod| asked.get(&pod.uid)?.again).min();
        let again = again.map_or(until, |again| again.min(until));
        tokio::select! {
            changed = pods.changed() => changed?,
            Some((uid, done)) = evictions.next(), if !evictions.is_empty() => {
                if let (Some(asked), Some(hindered)) = (asked.get_mut(&uid), done?) {
                    let (why, wait) = hindered;
                    asked.again = Some(Instant::now() + asked.pause.max(wait));
                    asked.pause = (asked.pause * 2).min(LONGEST_PAUSE);
                    asked.hindered = Some(why);
                }
            }
            () = sleep_until(again), if evictions.len() < AT_ONCE => {}
        }
    }
}

/// Asks once for an eviction; answers with what hinders it now, and when to ask again.
async fn evict(
    server: &ApiServer,
    version: &str,
    pod: Leaving,
    config: &DrainConfig,
) -> (String, Result<Option<(Hindered, Duration)>, StepError>) {
    let mut options = json!({ "preconditions": { "uid": pod.uid } });
    if let Some(grace) = config.grace_period {
        options["gracePeriodSeconds"] = grace.0.as_secs().into();
    }
    let body = json!({ "apiVersion": version, "kind": "Eviction", "deleteOptions": options,
        "metadata": { "name": pod.name.name, "namespace": pod.name.namespace } });
    let path = format!("{}/eviction", pod.name.path());
    let error = match server.post_once(&path, &body, || format!("evicting {}", pod.name)).await {
        Ok(_) => return (pod.uid, Ok(None)),
        Err(error) => error,
    };
    let answer = error.answer().cloned();
    let message = answer.as_ref().map(|answer| answer.message.as_str()).unwrap_or_default();
    let done = match error.status() {
        // It is gone, or another one has its name.
        Some(404 | 409) => Ok(None),
        // Its namespace goes, and it goes with it.
        Some(403) if message.contains("being terminated") => Ok(None),
        Some(500) if message.contains("more than one PodDisruptionBudget") => {
            Err(StepError::permanent(format!("{} cannot be evicted: {message}", pod.name))
                .with_hint("let only one budget select the pod: `kubectl get poddisruptionbudgets --all-namespaces`"))
        }
        _ if error.is_passing() => {
            let causes = answer.iter().flat_map(|answer| &answer.causes);
            let budget = causes.clone().find(|(reason, _)| reason == "DisruptionBudget");
            let by_budget = budget.is_some();
            let said = budget.map(|(_, message)| message.clone()).filter(|message| !message.is_empty());
            let wait = answer.as_ref().and_then(|answer| answer.retry_after).unwrap_or_default();
            let why = said.unwrap_or_else(|| if by_budget { message.to_owned() } else { error.to_string() });
            Ok(Some((Hindered { why, by_budget }, wait.min(LONGEST_PAUSE))))
        }
        _ => Err(error.into()),
    };
    (pod.uid, done)
}

/// Names what is still there at the deadline, and what holds it.
fn late(node: &str, config: &DrainConfig, left: &[Leaving], asked: &BTreeMap<String, Asked>) -> StepError {
    let hindered =
        |pod: &Leaving| asked.get(&pod.uid).and_then(|asked| asked.hindered.as_ref()).filter(|_| !pod.is_going);
    let each = left.iter().map(|pod| match hindered(pod) {
        Some(hindered) => format!("{}: {}", pod.name, hindered.why.trim_end_matches('.')),
        None => format!("{} was evicted and has not ended", pod.name),
    });
    let each: Vec<_> = each.collect();
    let error =
        StepError::permanent(format!("node {node} was not drained within {}: {}", config.deadline, named(&each)));
    if left.iter().filter_map(hindered).any(|hindered| hindered.by_budget) {
        error.with_hint(
            "bring up the missing pods, run more of them, or loosen the budget; the check k8s.budget tells beforehand, \
             a longer `drain.deadline` helps only where pods are on their way",
        )
    } else {
        error.with_hint(format!(
            "see what they wait for (finalizers, a long grace period, a kubelet that does not answer): `kubectl get pods \
             --all-namespaces --field-selector spec.nodeName={node}`; `drain.grace_period` shortens it"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_judged_as_kubectl_judges_them() {
        let owner = |kind: &str| json!([{ "kind": kind, "name": "x", "controller": true }]);
        let pod = |owners: Value, phase: &str, volumes: Value, metadata: Value| {
            let mut pod = json!({ "metadata": { "name": "p", "namespace": "shop", "ownerReferences": owners },
                "spec": { "volumes": volumes }, "status": { "phase": phase } });
            pod["metadata"].as_object_mut().unwrap().extend(metadata.as_object().unwrap().clone());
            Object(pod)
        };
        let (none, empty) = (json!([]), json!([{ "name": "tmp", "emptyDir": {} }]));
        let (plain, mirror) = (json!({}), json!({ "annotations": { "kubernetes.io/config.mirror": "x" } }));
        let unmanaged = Fate::Refused("has no controller that would make it anew");
        let with_data = Fate::Refused("has data in an emptyDir volume");
        for (pod, strict, loose) in [
            (pod(owner("ReplicaSet"), "Running", none.clone(), plain.clone()), Fate::Goes, Fate::Goes),
            (pod(owner("DaemonSet"), "Running", empty.clone(), plain.clone()), Fate::OfDaemonSet, Fate::OfDaemonSet),
            (pod(owner("DaemonSet"), "Failed", none.clone(), plain.clone()), Fate::Goes, Fate::Goes),
            (pod(json!([]), "Running", none.clone(), mirror), Fate::Stays, Fate::Stays),
            (pod(json!([]), "Running", none.clone(), plain.clone()), unmanaged, Fate::Goes),
            (pod(json!([]), "Succeeded", empty.clone(), plain.clone()), Fate::Goes, Fate::Goes),
            (pod(owner("ReplicaSet"), "Running", empty, plain), with_data, Fate::Goes),
            (pod(json!([]), "Running", none, json!({ "labels": { naming::MARK: "own" } })), Fate::Stays, Fate::Stays),
        ] {
            assert_eq!(read(&pod, &DrainConfig::default(), "own").fate, strict, "{pod:?}");
            let loosened = DrainConfig { force: true, delete_emptydir_data: true, ..DrainConfig::default() };
            assert_eq!(read(&pod, &loosened, "own").fate, loose, "{pod:?}");
        }
    }

    #[test]
    fn what_tolerates_a_cordon_may_come_back() {
        for (tolerations, may) in [
            (json!([]), false),
            (json!([{ "operator": "Exists" }]), true),
            (json!([{ "operator": "Exists", "effect": "NoExecute" }]), false),
            (json!([{ "key": CORDONED, "operator": "Exists", "effect": "NoSchedule" }]), true),
            (json!([{ "key": "other", "operator": "Exists" }]), false),
        ] {
            let pod = Object(json!({ "metadata": { "name": "p" }, "spec": { "tolerations": tolerations } }));
            assert_eq!(read(&pod, &DrainConfig::default(), "own").may_come_back, may, "{pod:?}");
        }
    }
}
