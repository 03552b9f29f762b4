//! A Job followed to its end, and what is said where that is a bad one.

use std::future::{Future, pending};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;
use tokio::time::{Instant, sleep, timeout};
use upgrade_core::error::{Class, StepError};

use super::JobOutput;
use super::one_off::is;
use crate::follow::Follow;
use crate::kind::Kind;
use crate::object::{Object, ObjectName};
use crate::pods;
use crate::server::ApiServer;
use crate::workload::failure::{self, Pod, TroubleKind};

/// How long something must be so that may pass by itself: no node, no permission to make pods.
const SETTLES: Duration = Duration::from_secs(2);
/// How often it is looked again while nothing is told: what must last has no event of its own.
const LOOK: Duration = Duration::from_millis(500);
/// How often the log is asked for, for the progress.
const LOG: Duration = Duration::from_secs(2);
/// How long a node may take to give the last lines of a log.
const LAST_LINES: Duration = Duration::from_secs(5);
/// How long after the deadline the cluster itself may take to end the Job.
const LATE: Duration = Duration::from_secs(30);

/// What is remembered of a pod of the Job.
#[derive(Clone)]
struct JobPod {
    pod: Pod,
    phase: String,
    created: String,
    /// The container whose log is asked for where none is known to be of more interest.
    first: Option<String>,
    /// Why the pod as a whole failed: `Evicted`.
    reason: String,
    ended: Option<Ended>,
}

/// How a container ended.
#[derive(Clone)]
struct Ended {
    container: String,
    code: i64,
    reason: String,
}

/// Says how a Job ended.
pub(super) enum End {
    Complete(JobOutput),
    /// The cluster has ended it.
    Failed(StepError),
    /// It will not get any further: it is to be stopped.
    Hopeless(StepError),
}

type Log = Pin<Box<dyn Future<Output = Vec<String>> + Send>>;

/// Follows one Job and its pods.
pub(super) struct Ending {
    server: ApiServer,
    name: ObjectName,
    uid: String,
    jobs: Follow<Object>,
    pods: Follow<JobPod>,
    /// Whether any container was ever seen to have started.
    ran: Arc<AtomicBool>,
    /// Since when something is so that must last to count.
    since: Option<Instant>,
    log: Option<Log>,
    asked: Option<Instant>,
    line: Option<String>,
}

impl Ending {
    /// Begins to follow a Job whose objects a label selector finds.
    pub(super) fn of(server: &ApiServer, name: &ObjectName, job: &Object, selector: &str) -> Self {
        let uid = job.uid().to_owned();
        let ran = Arc::new(AtomicBool::new(false));
        let namespace = name.namespace.as_deref();
        let (wanted, owner, seen) = (uid.clone(), uid.clone(), ran.clone());
        let jobs = server
            .follow(Kind::job(), namespace, selector, move |object| (object.uid() == wanted).then(|| object.clone()));
        let pods = server.follow(Kind::pod(), namespace, selector, move |object| {
            let pod = read(object).filter(|pod| pod.pod.owner == owner)?;
            if has_started(object) {
                seen.store(true, Ordering::Relaxed);
            }
            Some(pod)
        });
        let (server, name) = (server.clone(), name.clone());
        Self { server, name, uid, jobs, pods, ran, since: None, log: None, asked: None, line: None }
    }

    /// Tells whether any container was seen to have started.
    pub(super) fn has_ran(&self) -> bool {
        self.ran.load(Ordering::Relaxed)
    }

    /// Waits until the Job has ended, or is hopeless.
    ///
    /// # Errors
    /// The call is cancelled; somebody deleted the Job; the cluster cannot be asked.
    pub(super) async fn end(&mut self, deadline: Duration) -> Result<End, StepError> {
        let until = Instant::now() + deadline + LATE;
        self.jobs.changed().await?;
        self.pods.changed().await?;
        loop {
            if let Some(end) = self.look(deadline, until).await? {
                return Ok(end);
            }
            self.tell();
            let log = async {
                match &mut self.log {
                    Some(log) => log.await,
                    None => pending().await,
                }
            };
            tokio::select! {
                changed = self.jobs.changed() => changed?,
                changed = self.pods.changed() => changed?,
                lines = log => {
                    self.log = None;
                    self.line = lines.into_iter().next_back().or(self.line.take());
                }
                () = sleep(LOOK) => {}
            }
        }
    }

    /// Says what a Job did that is complete already.
    ///
    /// # Errors
    /// As [`Ending::end`].
    pub(super) async fn complete(&mut self, job: &Object) -> Result<JobOutput, StepError> {
        self.pods.changed().await?;
        Ok(self.output(job))
    }

    /// Waits until none of the Job's pods runs.
    ///
    /// # Errors
    /// As [`Ending::end`].
    pub(super) async fn over(&mut self) -> Result<(), StepError> {
        while self.pods.objects().values().any(|pod| !matches!(pod.phase.as_str(), "Succeeded" | "Failed")) {
            self.pods.changed().await?;
        }
        Ok(())
    }

    /// Says what the Job did.
    pub(super) fn output(&self, job: &Object) -> JobOutput {
        let pod = self.pods.objects().values().find(|pod| pod.phase == "Succeeded");
        let time = |field: &str| job.text(field).parse::<jiff::Timestamp>().ok();
        let seconds = match (time("/status/startTime"), time("/status/completionTime")) {
            (Some(began), Some(ended)) => u64::try_from(ended.duration_since(began).as_secs()).unwrap_or_default(),
            _ => 0,
        };
        // A Job is complete when its pod succeeded, and a pod does when its containers end with zero.
        JobOutput { job: self.name.name.clone(), pod: pod.map(|pod| pod.pod.name.clone()), exit_code: 0, seconds }
    }

    async fn look(&mut self, deadline: Duration, until: Instant) -> Result<Option<End>, StepError> {
        let Some(job) = self.jobs.objects().get(&self.uid).cloned() else {
            return Err(StepError::unknown(format!("{} is gone: somebody deleted it while it ran", self.name))
                .with_hint("find out who deletes Jobs here; nobody knows how far it came"));
        };
        if is(&job, "Complete") {
            return Ok(Some(End::Complete(self.output(&job))));
        }
        if is(&job, "Failed") {
            return Ok(Some(End::Failed(self.failure(&job, deadline).await)));
        }
        if Instant::now() >= until {
            let (why, hint) = if job.at("/spec/suspend") == true {
                (
                    "it is suspended",
                    "a queue or a webhook suspends Jobs here, and has not let it begin: ask whose it is",
                )
            } else {
                ("the cluster does not end it", "`kubectl describe job` tells more; does the controller manager run?")
            };
            let message = format!("{}: not done within {} s, and {why}", self.name, secs(deadline));
            let error = StepError::permanent(message).with_hint(hint);
            return Ok(Some(End::Hopeless(error)));
        }
        let all = self.pods.objects().values();
        let hopeless =
            failure::hopeless(all.map(|pod| &pod.pod), false, 0).map(|(pod, trouble)| (pod.clone(), trouble.clone()));
        if let Some((pod, trouble)) = hopeless {
            if trouble.kind == TroubleKind::NoRoom && !self.lasts() {
                return Ok(None);
            }
            let container = trouble.container.as_deref();
            let message =
                format!("{}: {}: {}: {}", self.name, named(&pod.name, container), trouble.reason, trouble.message);
            let error =
                StepError::permanent(message.trim_end_matches([':', ' '])).with_hint(failure::advice(&trouble.reason));
            return Ok(Some(End::Hopeless(self.detailed(error, &pod.name, None).await)));
        }
        if self.pods.objects().is_empty()
            && let Some(refused) = self.refused().await
        {
            if !self.lasts() {
                return Ok(None);
            }
            let error = StepError::permanent(format!("{}: its pod is refused: {refused}", self.name))
                .with_hint(failure::advice("FailedCreate"));
            return Ok(Some(End::Hopeless(error)));
        }
        self.since = None;
        Ok(None)
    }

    fn lasts(&mut self) -> bool {
        self.since.get_or_insert_with(Instant::now).elapsed() >= SETTLES
    }

    /// Returns why the cluster refuses the Job's pod, as its controller says; none where it cannot be asked.
    async fn refused(&mut self) -> Option<String> {
        let fields = format!("involvedObject.uid={},reason=FailedCreate", self.uid);
        let (events, _) = self.server.list(&Kind::event(), self.name.namespace.as_deref(), "", &fields).await.ok()?;
        events.last().map(|event| event.text("/message").to_owned())
    }

    /// Says why the cluster has ended the Job.
    async fn failure(&mut self, job: &Object, deadline: Duration) -> StepError {
        let condition = job.list("/status/conditions").find(|each| each["type"] == "Failed");
        let text = |key: &str| condition.and_then(|each| each[key].as_str()).unwrap_or_default().to_owned();
        let (reason, said) = (text("reason"), text("message"));
        let failed = self.pods.objects().values().filter(|pod| pod.phase == "Failed" || pod.ended.is_some());
        let last = failed.max_by(|a, b| a.created.cmp(&b.created)).cloned();
        if reason == "DeadlineExceeded" {
            let error = StepError::permanent(format!("{}: not done within {} s", self.name, secs(deadline)))
                .with_hint("its last log lines tell how far it came; raise `deadline` where it needs longer");
            return match (last, self.line.clone()) {
                (Some(pod), _) => self.detailed(error, &pod.pod.name, pod.first.as_deref()).await,
                // The cluster has removed its pod by then.
                (None, Some(line)) => error.with_detail(line),
                (None, None) => error,
            };
        }
        let Some(pod) = last else {
            return StepError::permanent(format!("{} failed: {reason}: {said}", self.name))
                .with_hint("its pods are gone: the log of the cluster's nodes may tell more");
        };
        let Some(ended) = pod.ended.as_ref().filter(|ended| ended.code != 0) else {
            let error = StepError::unknown(format!("{}: pod {} failed: {}", self.name, pod.pod.name, pod.reason))
                .with_hint("it was ended from outside: `kubectl get events`; nobody knows how far it came");
            return self.detailed(error, &pod.pod.name, pod.first.as_deref()).await;
        };
        let which = named(&pod.pod.name, Some(&ended.container));
        let message = format!("{}: {which} ended with exit code {} ({})", self.name, ended.code, ended.reason);
        let (class, hint) = advice(ended);
        let error = StepError::new(class, message).with_hint(hint);
        self.detailed(error, &pod.pod.name, Some(&ended.container)).await
    }

    /// Adds the pod's warnings, and the last lines of a container's log.
    async fn detailed(&mut self, error: StepError, pod: &str, container: Option<&str>) -> StepError {
        let namespace = self.name.namespace.as_deref().unwrap_or_default();
        let mut detail = pods::events(&self.server, namespace, pod).await;
        if self.has_ran() {
            let lines = pods::last_lines(&self.server, namespace, pod, container, false);
            detail.extend(timeout(LAST_LINES, lines).await.unwrap_or_default());
        }
        if detail.is_empty() { error } else { error.with_detail(detail.join("\n")) }
    }

    /// Tells what is going on, with the last line of the log where one can be had.
    fn tell(&mut self) {
        let newest = self.pods.objects().values().max_by(|a, b| a.created.cmp(&b.created));
        let Some(pod) = newest else {
            return self.server.context().progress(0, None, format!("{}: no pod yet", self.name));
        };
        let is_due = self.log.is_none() && self.asked.is_none_or(|asked| asked.elapsed() >= LOG);
        if pod.phase == "Running" && is_due {
            self.asked = Some(Instant::now());
            let (server, namespace) = (self.server.clone(), self.name.namespace.clone().unwrap_or_default());
            let (name, first) = (pod.pod.name.clone(), pod.first.clone());
            let log = async move { pods::last_lines(&server, &namespace, &name, first.as_deref(), false).await };
            self.log = Some(Box::pin(log));
        }
        let message = match &self.line {
            Some(line) => format!("pod {}: {line}", pod.pod.name),
            None => format!("pod {} is {}", pod.pod.name, pod.phase.to_lowercase()),
        };
        self.server.context().progress(0, None, message);
    }
}

fn secs(span: Duration) -> u64 {
    u64::try_from(span.as_millis().div_ceil(1000)).unwrap_or(u64::MAX)
}

fn named(pod: &str, container: Option<&str>) -> String {
    container.map_or_else(|| format!("pod {pod}"), |container| format!("pod {pod} (container {container})"))
}

/// Says what an exit code promises: 75 (`EX_TEMPFAIL`) is worth another try, and after a signal nobody knows
/// what was done.
fn advice(ended: &Ended) -> (Class, &'static str) {
    match ended.code {
        _ if ended.reason == "OOMKilled" => {
            (Class::Permanent, "give it more memory (`template`, `resources`), or less to do")
        }
        75 => (Class::Transient, "it says itself that it may pass; try again"),
        126 | 127 => {
            (Class::Permanent, "the program is not there, or may not be run: check `command` against the image")
        }
        137 | 143 => {
            (Class::Unknown, "it was ended from outside: `kubectl get events` and the node's log tell by whom")
        }
        _ => (Class::Permanent, "read what it said, mend that, and run it by hand to see it pass"),
    }
}

fn read(object: &Object) -> Option<JobPod> {
    let ended = |status: &Value| {
        let ended = &status["state"]["terminated"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let code = ended["exitCode"].as_i64()?;
        Some(Ended { container: text(&status["name"]), code, reason: text(&ended["reason"]) })
    };
    let mut all: Vec<_> = statuses(object).filter_map(ended).collect();
    // One that failed says more than those that did not.
    all.sort_by_key(|ended| ended.code == 0);
    Some(JobPod {
        pod: Pod::read(object)?,
        phase: object.text("/status/phase").to_owned(),
        created: object.text("/metadata/creationTimestamp").to_owned(),
        first: object.at("/spec/containers/0/name").as_str().map(str::to_owned),
        reason: format!("{} {}", object.text("/status/reason"), object.text("/status/message")).trim().to_owned(),
        ended: all.into_iter().next(),
    })
}

fn has_started(object: &Object) -> bool {
    let is_so = |state: &Value| state["running"].is_object() || state["terminated"].is_object();
    statuses(object).any(|status| is_so(&status["state"]) || is_so(&status["lastState"]))
}

fn statuses(object: &Object) -> impl Iterator<Item = &Value> {
    object.list("/status/initContainerStatuses").chain(object.list("/status/containerStatuses"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(status: &Value) -> Object {
        let metadata = json!({ "name": "m-1", "uid": "p", "ownerReferences": [{ "uid": "j", "controller": true }] });
        Object(json!({ "metadata": metadata, "status": status }))
    }

    #[test]
    fn a_container_that_failed_is_the_one_that_is_told_of() {
        let ended = |name: &str, code: i64| json!({ "name": name, "state": { "terminated": { "exitCode": code } } });
        let read =
            read(&pod(&json!({ "phase": "Failed", "containerStatuses": [ended("a", 0), ended("b", 3)] }))).unwrap();
        let ended = read.ended.unwrap();
        assert_eq!((ended.container.as_str(), ended.code), ("b", 3));
    }

    #[test]
    fn what_waits_has_not_started() {
        let waits = json!({ "name": "a", "state": { "waiting": { "reason": "ErrImagePull" } } });
        let done = json!({ "name": "i", "state": { "terminated": { "exitCode": 0 } } });
        assert!(!has_started(&pod(&json!({ "containerStatuses": [waits] }))));
        assert!(has_started(&pod(&json!({ "initContainerStatuses": [done], "containerStatuses": [waits] }))));
    }

    #[test]
    fn exit_codes_are_classed() {
        let of = |code: i64, reason: &str| advice(&Ended { container: String::new(), code, reason: reason.into() }).0;
        assert_eq!(of(75, "Error"), Class::Transient);
        assert_eq!(of(137, "Error"), Class::Unknown);
        assert_eq!(of(137, "OOMKilled"), Class::Permanent);
        assert_eq!(of(3, "Error"), Class::Permanent);
    }
}
