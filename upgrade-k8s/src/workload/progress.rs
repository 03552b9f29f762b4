//! Rollouts followed to their end, several at once, by one watch a kind.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures_util::future::select_all;
use tokio::time::{Instant, sleep, sleep_until};
use upgrade_core::error::StepError;

use super::failure::{self, Pod, Trouble, TroubleKind};
use super::status::{self, Rollout};
use super::{WorkloadKind, WorkloadName};
use crate::error::KubeError;
use crate::follow::Follow;
use crate::kind::Kind;
use crate::object::Object;
use crate::pods;
use crate::server::ApiServer;

/// How long a pod may find no room, or a controller be refused its pods, before that counts: what is on
/// its way out may not have been seen yet.
const SETTLES: Duration = Duration::from_secs(2);
/// How often is looked again while nothing is told: what must last has no event of its own.
const LOOK: Duration = Duration::from_millis(500);

/// Says how long a rollout is waited for, and what is forgiven to it.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// How long it may take.
    pub deadline: Duration,
    /// How often a container may be started again.
    pub restarts: u64,
}

/// What is remembered of a workload.
struct Seen {
    name: WorkloadName,
    rollout: Rollout,
    /// The revision of the newest template, as its controller names it.
    revision: String,
    wanted: bool,
    refused: Option<String>,
}

/// What is remembered of a ReplicaSet or a ControllerRevision.
struct Revision {
    owner: String,
    number: String,
    hash: String,
}

/// Follows workloads of a namespace until their rollouts are complete.
pub struct Rollouts<'a> {
    server: &'a ApiServer,
    workloads: Vec<Follow<Seen>>,
    revisions: Vec<Follow<Revision>>,
    pods: Follow<Pod>,
    awaited: BTreeMap<WorkloadName, String>,
    /// Since when something is so that must last to count, by uid.
    since: BTreeMap<String, Instant>,
    /// Pods that an autoscaler makes room for.
    promised: BTreeSet<String>,
}

impl<'a> Rollouts<'a> {
    /// Begins to follow workloads, given by name and uid. `labels` may narrow the pods that are looked at.
    pub fn of(server: &'a ApiServer, namespace: &str, awaited: BTreeMap<WorkloadName, String>, labels: &str) -> Self {
        let kinds: BTreeSet<_> = awaited.keys().map(|name| name.kind).collect();
        let mut revisions = Vec::new();
        if kinds.contains(&WorkloadKind::Deployment) {
            revisions.push(server.follow(Kind::replica_set(), Some(namespace), labels, |object| {
                revision(object, object.annotation("deployment.kubernetes.io/revision"), "pod-template-hash")
            }));
        }
        if kinds.contains(&WorkloadKind::DaemonSet) {
            revisions.push(server.follow(Kind::controller_revision(), Some(namespace), labels, |object| {
                revision(object, Some(&object.number("/revision").to_string()), "controller-revision-hash")
            }));
        }
        let workloads = kinds.into_iter().map(|kind| {
            let names: BTreeSet<_> = awaited.keys().filter(|name| name.kind == kind).cloned().collect();
            server.follow(kind.kind(), Some(namespace), "", move |object| seen(kind, object, &names))
        });
        let workloads = workloads.collect();
        let pods = server.follow(Kind::pod(), Some(namespace), labels, Pod::read);
        Self { server, workloads, revisions, pods, awaited, since: BTreeMap::new(), promised: BTreeSet::new() }
    }

    /// Waits until all rollouts are complete.
    ///
    /// # Errors
    /// One of them is hopeless, which is said with the pod, the reason and its last log lines; or they took
    /// longer than `patience`; or the call is cancelled.
    pub async fn complete(mut self, patience: Patience) -> Result<(), StepError> {
        let until = Instant::now() + patience.deadline;
        for follow in &mut self.workloads {
            follow.changed().await?;
        }
        for follow in &mut self.revisions {
            follow.changed().await?;
        }
        self.pods.changed().await?;
        loop {
            if let Some(hindrance) = self.look(patience.restarts) {
                let namespace = self.pods.namespace().unwrap_or_default().to_owned();
                match hindrance.pod_without_room() {
                    Some(pod) if pods::is_room_promised(self.server, &namespace, &pod).await => {
                        self.promised.insert(pod);
                    }
                    _ => return Err(hindrance.explain(self.server, &namespace).await),
                }
            }
            if self.is_over(until, patience.deadline)? {
                return Ok(());
            }
            tokio::select! {
                changed = any(&mut self.workloads) => changed?,
                changed = any(&mut self.revisions) => changed?,
                changed = self.pods.changed() => changed?,
                () = sleep(LOOK) => {}
                () = sleep_until(until) => {}
            }
        }
    }

    /// Tells whether all are complete.
    fn is_over(&self, until: Instant, deadline: Duration) -> Result<bool, StepError> {
        if let Some(error) = self.gone() {
            return Err(error);
        }
        let waiting: Vec<_> = self.waiting().collect();
        if waiting.is_empty() {
            return Ok(true);
        }
        self.tell(&waiting);
        if Instant::now() >= until { Err(too_late(&waiting, deadline)) } else { Ok(false) }
    }

    fn seen(&self) -> impl Iterator<Item = (&String, &Seen)> {
        self.workloads.iter().flat_map(|follow| follow.objects().iter())
    }

    fn waiting(&self) -> impl Iterator<Item = (&WorkloadName, u64, u64, &str)> {
        self.seen().filter_map(|(_, seen)| match &seen.rollout {
            Rollout::Going { done, total, waits_for } => Some((&seen.name, *done, *total, waits_for.as_str())),
            _ => None,
        })
    }

    /// Says that a workload was deleted, or made anew, while it was followed.
    fn gone(&self) -> Option<StepError> {
        let is_there = |uid: &String| self.seen().any(|(found, _)| found == uid);
        let (name, _) = self.awaited.iter().find(|(_, uid)| !is_there(uid))?;
        Some(
            StepError::permanent(format!("{name} was deleted while its rollout was followed"))
                .with_hint("find out who deletes it, bring it back, then run again"),
        )
    }

    fn tell(&self, waiting: &[(&WorkloadName, u64, u64, &str)]) {
        let (done, total) = waiting.iter().fold((0, 0), |sum, one| (sum.0 + one.1, sum.1 + one.2));
        let (name, _, _, waits_for) = waiting[0];
        let more = if waiting.len() > 1 { format!(" (and {} more)", waiting.len() - 1) } else { String::new() };
        self.server.context().progress(done, total, format!("{name}: {waits_for}{more}"));
    }

    /// Looks whether a rollout is hopeless.
    fn look(&mut self, restarts: u64) -> Option<Hindrance> {
        let mut lasting = BTreeSet::new();
        let found = self.hindrance(restarts, &mut lasting);
        self.since.retain(|key, _| lasting.contains(key));
        for key in lasting {
            self.since.entry(key).or_insert_with(Instant::now);
        }
        found
    }

    /// Finds what makes a rollout hopeless; notes in `lasting` what will if it stays so.
    fn hindrance(&self, restarts: u64, lasting: &mut BTreeSet<String>) -> Option<Hindrance> {
        let mut gave_up = None;
        let is_room_made = self.pods.objects().values().any(|pod| pod.is_going);
        let mut lasts = |key: &String| {
            lasting.insert(key.clone());
            self.since.get(key).is_some_and(|since| since.elapsed() >= SETTLES)
        };
        for (uid, seen) in self.seen().filter(|(_, seen)| seen.wanted && seen.rollout != Rollout::Complete) {
            let name = || seen.name.clone();
            let owners = self.owners_of(uid, seen);
            let new = self.pods.objects().values().filter(|pod| owners.iter().any(|owner| owner.owns(pod)));
            let lacks_room =
                |pod: &Pod| pod.trouble.as_ref().is_some_and(|trouble| trouble.kind == TroubleKind::NoRoom);
            let new = new.filter(|pod| !(lacks_room(pod) && self.promised.contains(&pod.name)));
            if let Some((pod, trouble)) = failure::hopeless(new, is_room_made, restarts)
                && (trouble.kind != TroubleKind::NoRoom || lasts(&pod.name))
            {
                return Some(Hindrance::Pod(name(), Box::new((pod.clone(), trouble.clone()))));
            }
            if let Some(message) = &seen.refused
                && !is_room_made
                && lasts(uid)
            {
                return Some(Hindrance::Refused(name(), message.clone()));
            }
            if seen.rollout == Rollout::GaveUp {
                gave_up = Some(Hindrance::GaveUp(name()));
            }
        }
        gave_up
    }

    /// Tells by what the pods of a workload's newest template are known.
    fn owners_of(&self, uid: &str, seen: &Seen) -> Vec<Owner> {
        let revisions = || self.revisions.iter().flat_map(|follow| follow.objects().iter());
        match seen.name.kind {
            WorkloadKind::StatefulSet => vec![Owner { uid: uid.to_owned(), hash: Some(seen.revision.clone()) }],
            WorkloadKind::Deployment => revisions()
                .filter(|(_, revision)| revision.owner == uid && revision.number == seen.revision)
                .map(|(uid, _)| Owner { uid: uid.clone(), hash: None })
                .collect(),
            WorkloadKind::ReplicaSet => vec![Owner { uid: uid.to_owned(), hash: None }],
            WorkloadKind::DaemonSet => {
                let own = revisions().map(|(_, revision)| revision).filter(|revision| revision.owner == uid);
                let newest = own.max_by_key(|revision| revision.number.parse::<u64>().unwrap_or_default());
                newest
                    .map(|newest| Owner { uid: uid.to_owned(), hash: Some(newest.hash.clone()) })
                    .into_iter()
                    .collect()
            }
        }
    }
}

fn too_late(waiting: &[(&WorkloadName, u64, u64, &str)], deadline: Duration) -> StepError {
    let each: Vec<_> = waiting.iter().map(|(name, _, _, waits_for)| format!("{name}: {waits_for}")).collect();
    StepError::permanent(format!("not rolled out within {} s: {}", deadline.as_secs(), each.join("; ")))
        .with_hint("`kubectl describe` of its pods tells what they wait for; raise `deadline` where they need longer")
}

/// What makes the rollout of a workload hopeless.
enum Hindrance {
    /// One of its pods.
    Pod(WorkloadName, Box<(Pod, Trouble)>),
    /// The cluster refuses its pods.
    Refused(WorkloadName, String),
    /// Its controller has given up.
    GaveUp(WorkloadName),
}

impl Hindrance {
    /// Names the pod, if what it lacks is room.
    fn pod_without_room(&self) -> Option<String> {
        match self {
            Self::Pod(_, what) if what.1.kind == TroubleKind::NoRoom => Some(what.0.name.clone()),
            _ => None,
        }
    }

    /// Says it with all that whoever must mend it will ask for.
    async fn explain(self, server: &ApiServer, namespace: &str) -> StepError {
        let (name, (pod, trouble)) = match self {
            Self::Pod(name, what) => (name, *what),
            Self::Refused(name, message) => {
                return StepError::permanent(format!("{name}: its pods are refused: {message}"))
                    .with_hint(failure::advice("FailedCreate"));
            }
            Self::GaveUp(name) => {
                let message =
                    format!("{name}: no progress within its `progressDeadlineSeconds`, as its controller says");
                return StepError::permanent(message)
                    .with_hint("`kubectl describe` of its pods tells what they wait for");
            }
        };
        let container = trouble.container.as_deref();
        let which = container.map(|container| format!(" (container {container})")).unwrap_or_default();
        let message = format!("{name}: pod {}{which}: {}: {}", pod.name, trouble.reason, trouble.message);
        let error =
            StepError::permanent(message.trim_end_matches([':', ' '])).with_hint(failure::advice(&trouble.reason));
        let mut detail = pods::events(server, namespace, &pod.name).await;
        if trouble.restarts > 0 || trouble.kind == TroubleKind::Crashing {
            detail.extend(pods::last_lines(server, namespace, &pod.name, container, true).await);
        }
        if detail.is_empty() { error } else { error.with_detail(detail.join("\n")) }
    }
}

/// By what pods are known.
struct Owner {
    uid: String,
    hash: Option<String>,
}

impl Owner {
    fn owns(&self, pod: &Pod) -> bool {
        pod.owner == self.uid && self.hash.as_ref().is_none_or(|hash| *hash == pod.revision)
    }
}

async fn any<T>(follows: &mut [Follow<T>]) -> Result<(), KubeError> {
    if follows.is_empty() {
        return std::future::pending().await;
    }
    let all = follows.iter_mut().map(|follow| Box::pin(follow.changed()));
    select_all(all).await.0
}

fn revision(object: &Object, number: Option<&str>, label: &str) -> Option<Revision> {
    let owner = object.list("/metadata/ownerReferences").find(|owner| owner["controller"] == true)?;
    Some(Revision {
        owner: owner["uid"].as_str()?.to_owned(),
        number: number?.to_owned(),
        hash: object.label(label).unwrap_or_default().to_owned(),
    })
}

fn seen(kind: WorkloadKind, object: &Object, names: &BTreeSet<WorkloadName>) -> Option<Seen> {
    let name = WorkloadName { kind, name: object.name().to_owned() };
    if !names.contains(&name) {
        return None;
    }
    let revision = match kind {
        WorkloadKind::Deployment => object.annotation("deployment.kubernetes.io/revision").unwrap_or_default(),
        _ => object.text("/status/updateRevision"),
    };
    let is_seen = object.number("/metadata/generation") <= object.number("/status/observedGeneration");
    let refused = object
        .list("/status/conditions")
        .find(|each| each["type"] == "ReplicaFailure" && each["status"] == "True" && each["reason"] == "FailedCreate");
    let refused = refused.map(|condition| condition["message"].as_str().unwrap_or_default().to_owned());
    let rollout = status::of(kind, object);
    Some(Seen { name, rollout, revision: revision.to_owned(), wanted: is_seen, refused })
}
