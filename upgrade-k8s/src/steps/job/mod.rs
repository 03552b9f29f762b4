//! `k8s.job`: runs a Job to its end, and another one to undo it.

mod config;
mod ending;
mod manifest;
mod one_off;

use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::AnyStep;
use upgrade_core::context::Context;
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Change, Effect, Prepared, Step};
use upgrade_core::target::Target;
use upgrade_core::undoable::{OptionalRollback, Undoable};

pub use config::{EnvSource, JobConfig, UndoJobConfig};

pub(super) use self::config::Work;
pub(super) use self::one_off::OneOff;
use crate::kind::Kind;
use crate::naming;
use crate::object::ObjectName;
use crate::target::{Cluster, check_name};

/// Runs a Job to its end: what cannot be undone, or [`UndoableJob`].
///
/// The Job is the record of its own run: found again after a crash, awaited, and never started a second
/// time. It is removed at commit.
#[derive(Debug, Clone)]
pub struct JobStep {
    config: JobConfig,
    cluster: Arc<Cluster>,
    namespace: String,
    work: Work,
    undo: Option<Work>,
}

/// Holds a [`JobStep`] that can be undone, by another Job.
pub type UndoableJob = Undoable<JobStep>;

/// Names what undoing a Job needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobUndo {
    /// The namespace.
    pub namespace: String,
    /// The Job.
    pub job: String,
    /// The Job that undoes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undo: Option<String>,
}

/// Tells how the Job ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobOutput {
    /// The Job.
    pub job: String,
    /// The pod that did the work, where it was still there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// The exit code.
    pub exit_code: i64,
    /// How long it took.
    pub seconds: u64,
}

impl JobStep {
    /// Makes the step from its configuration, without regard to whether it can be undone.
    ///
    /// # Errors
    /// There is no such target, or keys are missing or contradict each other.
    pub fn from_config(config: JobConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let cluster = Cluster::named(config.target.as_deref(), cx)?;
        let namespace = config.namespace.clone().unwrap_or_else(|| cluster.namespace().to_owned());
        check_name(&namespace, "namespace")?;
        check_name(&config.name, "name")?;
        let (work, undo) = (config.work()?, config.undo_work()?);
        Ok(Self { config, cluster, namespace, work, undo })
    }

    /// Makes the step from its configuration: reversible with `undo`, irreversible without it.
    ///
    /// # Errors
    /// As [`JobStep::from_config`].
    pub fn any_from_config(config: JobConfig, cx: &BuildContext) -> Result<AnyStep, BuildError> {
        Self::from_config(config, cx).map(AnyStep::optionally_reversible)
    }

    fn change(&self, refused: Option<&StepError>) -> Change {
        let mut summary = vec![format!("as a Job of namespace {}", self.namespace)];
        summary.extend(manifest::variables(&self.work.pod));
        summary.push(match &self.undo {
            Some(undo) => format!("undone by `{}`", manifest::line(&undo.pod)),
            None => "what it does stays".to_owned(),
        });
        summary.extend(refused.map(|error| format!("the cluster would refuse it as it is now: {}", error.message())));
        Change::new(Effect::Run, manifest::line(&self.work.pod)).with_summary(summary.join("; "))
    }
}

#[async_trait]
impl Step for JobStep {
    const KIND: &'static str = "k8s.job";
    type Undo = JobUndo;
    type Output = JobOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<JobUndo, JobOutput>, StepError> {
        let server = self.cluster.connect(cx).await?;
        let name = &self.config.name;
        let undo = JobUndo {
            namespace: self.namespace.clone(),
            job: naming::beside(name, "job", cx),
            undo: self.undo.is_some().then(|| naming::beside(name, "undo", cx)),
        };
        let works = [(Some(&undo.job), Some(&self.work)), (undo.undo.as_ref(), self.undo.as_ref())];
        let mut refused = None;
        for (name, work) in works.into_iter().filter_map(|(name, work)| name.zip(work)) {
            let job = OneOff::new(&server, cx, &self.namespace, name);
            job.standing().await?;
            match job.try_out(work).await {
                // What it lacks may be what earlier steps, which a plan does not run, bring.
                Err(error) if cx.is_dry_run() && error.class() == upgrade_core::error::Class::Permanent => {
                    refused.get_or_insert(error);
                }
                done => done?,
            }
        }
        Ok(Prepared::change(undo, [self.change(refused.as_ref())]))
    }

    async fn apply(&self, cx: &Context, undo: &JobUndo) -> Result<JobOutput, StepError> {
        let server = self.cluster.connect(cx).await?;
        OneOff::new(&server, cx, &undo.namespace, &undo.job).run(&self.work).await
    }

    async fn commit(&self, cx: &Context, undo: &JobUndo) -> Result<(), StepError> {
        let server = self.cluster.connect(cx).await?;
        let job = OneOff::new(&server, cx, &undo.namespace, &undo.job);
        match job.remove().await {
            // Ours is gone, and somebody else's is not ours to remove.
            Err(error) if error.as_conflict().is_some() => Ok(()),
            done => done,
        }
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        // Two migrations of one name at a time are never meant.
        vec![self.cluster.resource(&ObjectName::new(Kind::job(), &self.namespace, &self.config.name))]
    }
}

#[async_trait]
impl OptionalRollback for JobStep {
    fn irreversible_because(&self) -> Option<&'static str> {
        self.undo.is_none().then_some("no `undo` Job is given")
    }

    async fn rollback(&self, cx: &Context, undo: &JobUndo, _: Option<&JobOutput>) -> Result<(), StepError> {
        let server = self.cluster.connect(cx).await?;
        let job = OneOff::new(&server, cx, &undo.namespace, &undo.job);
        let (Some(name), Some(work)) = (&undo.undo, &self.undo) else {
            return Err(StepError::conflict(Conflict {
                subject: format!("the undo of Job {}", undo.job),
                found: "none".into(),
                intended: "an undo Job".into(),
                present: "none".into(),
            }));
        };
        job.undo_by(&OneOff::new(&server, cx, &undo.namespace, name), work).await
    }
}
