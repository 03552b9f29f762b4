//! A Job that runs once, and is itself the record of how that ended.
//!
//! Its name is the step's own and it stays until the step is committed or undone: whoever takes over after
//! a crash finds it and awaits it, and never starts another.
//!
//! ```text
//! absent -> running -> complete
//!    ^         |-----> failed ------> removed, and said
//!    |         '-----> stopped: cancelled; made anew by whoever comes next
//!    |                    '-> never ran: hopeless, and no container was ever started
//!    '-------------------------' removed before it is made anew
//! ```

use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;
use upgrade_core::context::Context;
use upgrade_core::error::{Conflict, StepError};

use super::JobOutput;
use super::config::Work;
use super::ending::{End, Ending};
use super::manifest;
use crate::error::{KubeError, not_cancelled};
use crate::kind::Kind;
use crate::naming;
use crate::object::{Object, ObjectName, patch};
use crate::server::{ApiServer, Deletion};

/// The annotation of a Job of which it is certain that none of its containers ever started.
const NEVER_RAN: &str = "upgrade-rs.github.io/never-ran";
/// How long a stopped Job's pods are looked at, to learn whether they ran.
const GOES: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(200);
/// How long a quota is waited for that is used up: pods of the step before may be on their way out.
const ROOM: Duration = Duration::from_secs(10);

/// Says how a Job is.
#[derive(Debug)]
pub(in crate::steps) enum Standing {
    Absent,
    /// It is being deleted.
    Going(Object),
    Running(Object),
    Complete(Object),
    Failed(Object),
    /// It starts no more pods.
    Stopped(Object),
    NeverRan(Object),
}

/// A Job of the step that is called.
pub(in crate::steps) struct OneOff<'a> {
    server: &'a ApiServer,
    cx: &'a Context,
    name: ObjectName,
}

impl<'a> OneOff<'a> {
    pub(in crate::steps) fn new(server: &'a ApiServer, cx: &'a Context, namespace: &str, name: &str) -> Self {
        Self { server, cx, name: ObjectName::new(Kind::job(), namespace, name) }
    }

    /// Looks how it is.
    ///
    /// # Errors
    /// The Job of that name is somebody else's, which is a conflict.
    pub(in crate::steps) async fn standing(&self) -> Result<Standing, StepError> {
        let Some(job) = self.server.get(&self.name).await? else { return Ok(Standing::Absent) };
        if !naming::is_ours(&job, self.cx) {
            return Err(StepError::conflict(Conflict {
                subject: self.name.to_string(),
                found: "none".into(),
                intended: "one of this step".into(),
                present: "one of somebody else's".into(),
            }));
        }
        // What is done is done, also while somebody removes it.
        Ok(if is(&job, "Complete") {
            Standing::Complete(job)
        } else if job.is_going() {
            Standing::Going(job)
        } else if job.annotation(NEVER_RAN).is_some() {
            Standing::NeverRan(job)
        } else if is(&job, "Failed") {
            Standing::Failed(job)
        } else if job.at("/spec/parallelism") == 0 {
            Standing::Stopped(job)
        } else {
            Standing::Running(job)
        })
    }

    /// Asks whether the cluster would take the Job and its pod, and makes neither.
    ///
    /// # Errors
    /// It would not; the cluster cannot be asked.
    pub(in crate::steps) async fn try_out(&self, work: &Work) -> Result<(), StepError> {
        let job = manifest::job(self.cx, &self.name, work).await?;
        unless_unasked(self.server.try_create(&self.name, &job).await)?;
        let namespace = self.name.namespace.as_deref().unwrap_or_default();
        let pod = ObjectName::new(Kind::pod(), namespace, &self.name.name);
        let body = manifest::pod(&job);
        let until = Instant::now() + ROOM;
        loop {
            match unless_unasked(self.server.try_create(&pod, &body).await) {
                Err(error) if is_quota(&error) && !self.cx.is_dry_run() && Instant::now() < until => {
                    self.cx.progress(0, None, "waiting for room in the namespace's quota");
                    self.server.pause(Duration::from_secs(1)).await?;
                }
                done => return Ok(done?),
            }
        }
    }

    /// Removes the Job, awaits the end of all that it ran, and runs the one that undoes it; nothing is left
    /// of either.
    ///
    /// # Errors
    /// The undo failed; one of both is somebody else's.
    pub(in crate::steps) async fn undo_by(&self, undo: &Self, work: &Work) -> Result<(), StepError> {
        if matches!(self.standing().await?, Standing::NeverRan(_)) {
            return self.remove().await;
        }
        // Gone, with all that it runs, before the undo begins.
        self.remove().await?;
        loop {
            undo.run(work).await?;
            if matches!(self.standing().await?, Standing::Absent) {
                // The last: as long as it stands, a call that is repeated does not undo twice.
                return undo.remove().await;
            }
            // A request of the driver that died came through only now: that one is undone as well.
            self.remove().await?;
            undo.remove().await?;
        }
    }

    /// Runs the Job to its end, once: one that runs or has ended is taken for what it is.
    ///
    /// # Errors
    /// It could not be made, it failed, or the call was cancelled: it has been stopped then.
    pub(in crate::steps) async fn run(&self, work: &Work) -> Result<JobOutput, StepError> {
        let (job, is_new) = loop {
            match self.standing().await? {
                Standing::Absent => {
                    not_cancelled(self.cx)?;
                    let body = manifest::job(self.cx, &self.name, work).await?;
                    match self.server.create(&self.name, &body).await {
                        Ok(job) => break (job, true),
                        // An answer that was lost, somebody else, or writers to a quota: the next look tells.
                        Err(error) if error.is_in_conflict() => self.server.pause(LOOK).await?,
                        Err(error) => return Err(error.into()),
                    }
                }
                Standing::Going(_) | Standing::Stopped(_) | Standing::NeverRan(_) => self.remove().await?,
                Standing::Complete(job) => return self.follow(&job).complete(&job).await,
                Standing::Running(job) | Standing::Failed(job) => break (job, false),
            }
        };
        let mut ending = self.follow(&job);
        let end = ending.end(work.deadline.0).await;
        match end {
            Ok(End::Complete(output)) => Ok(output),
            Ok(End::Failed(error)) => Err(self.failed(&mut ending, is_new, error).await),
            Ok(End::Hopeless(error)) => {
                self.stop(&job).await?;
                Err(self.failed(&mut ending, is_new, error).await)
            }
            Err(error) if self.cx.cancelled().is_cancelled() => match self.stop(&job).await {
                // It may have ended by itself just now.
                Ok(Some(job)) if is(&job, "Complete") => Ok(ending.output(&job)),
                Ok(_) => Err(error),
                Err(worse) => Err(worse),
            },
            // The Job goes on: whoever asks again finds it.
            Err(error) => Err(error),
        }
    }

    fn follow(&self, job: &Object) -> Ending {
        Ending::of(self.server, &self.name, job, &naming::selector(self.cx))
    }

    /// Leaves nothing of a Job that failed, but the knowledge that it never ran, if that is certain.
    async fn failed(&self, ending: &mut Ending, is_new: bool, error: StepError) -> StepError {
        let left = async {
            let gone = tokio::time::timeout(GOES, ending.over()).await.is_ok_and(|over| over.is_ok());
            if is_new && gone && !ending.has_ran() {
                let path = format!("/metadata/annotations/{}", NEVER_RAN.replace('/', "~1"));
                let say = |job: &Object| Ok(Some(patch(job, [(path.clone(), Some(json!("true")))])));
                return self.server.change(&self.name, say).await.map(drop);
            }
            self.remove().await
        };
        // What it failed of is worth more than what hinders its removal, which the undo finds again.
        if let Err(trouble) = left.await {
            tracing::warn!("{}: {trouble}", self.name);
        }
        error
    }

    /// Lets the Job start no more pods and end those it has, also for a call that is cancelled; none where
    /// it is gone.
    async fn stop(&self, job: &Object) -> Result<Option<Object>, StepError> {
        let stop = json!([
            { "op": "test", "path": "/metadata/uid", "value": job.uid() },
            { "op": "replace", "path": "/spec/parallelism", "value": 0 },
        ]);
        match self.server.patch(&self.name, &stop).await {
            Ok(job) => Ok(Some(job)),
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes the Job and awaits the end of all that it ran; one that does not exist is left alone, its
    /// pods are awaited all the same.
    pub(in crate::steps) async fn remove(&self) -> Result<(), StepError> {
        let there = match self.standing().await? {
            Standing::Absent => None,
            Standing::Going(job)
            | Standing::Running(job)
            | Standing::Complete(job)
            | Standing::Failed(job)
            | Standing::Stopped(job)
            | Standing::NeverRan(job) => Some(job),
        };
        if let Some(job) = there {
            let how = Deletion { uid: Some(job.uid().to_owned()), ..Deletion::default() };
            self.server.delete(&self.name, &how).await?;
            self.server.await_gone(&self.name, job.uid()).await?;
        }
        while let Some(pod) = self.running_pod().await? {
            self.cx.progress(0, None, format!("waiting for pod {pod} to end"));
            self.server.pause(LOOK).await?;
        }
        Ok(())
    }

    /// Names a pod of the Job that may still do something.
    async fn running_pod(&self) -> Result<Option<String>, StepError> {
        let namespace = self.name.namespace.as_deref();
        let (pods, _) = self.server.list(&Kind::pod(), namespace, &naming::selector(self.cx), "").await?;
        let own = |pod: &&Object| pod.list("/metadata/ownerReferences").any(|owner| owner["name"] == self.name.name);
        let runs = |pod: &&Object| !matches!(pod.text("/status/phase"), "Succeeded" | "Failed");
        Ok(pods.iter().filter(own).find(runs).map(|pod| pod.name().to_owned()))
    }
}

/// Tells whether a Job has a condition.
pub(super) fn is(job: &Object, condition: &str) -> bool {
    job.list("/status/conditions").any(|each| each["type"] == condition && each["status"] == "True")
}

/// Lets pass what only says that nobody can be asked: no permission to make pods, which their controller
/// has, or a webhook that knows no dry run.
fn unless_unasked<T>(answer: Result<T, KubeError>) -> Result<(), KubeError> {
    match answer {
        Err(error)
            if error.answer().is_some_and(|answer| answer.message.contains("cannot create resource \"pods\"")) =>
        {
            Ok(())
        }
        Err(error) if error.answer().is_some_and(|answer| answer.message.contains("does not support dry run")) => {
            Ok(())
        }
        answer => answer.map(drop),
    }
}

fn is_quota(error: &KubeError) -> bool {
    error.answer().is_some_and(|answer| answer.status == 403 && answer.message.contains("exceeded quota"))
}
