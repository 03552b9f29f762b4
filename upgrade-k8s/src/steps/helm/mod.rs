//! `k8s.helm`: brings a release of Helm to another chart or other values, by the `helm` program.

mod client;
mod config;
mod plan;
mod remains;
mod standing;

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::leftovers;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;

pub use config::HelmConfig;
pub use standing::ReleaseState;

use crate::manifest::Manifest;
use crate::target::{Cluster, check_name};
use crate::workload::WorkloadKind;
use crate::workload::status::{self, Rollout};
use client::{Helm, Scratch};
use standing::{Revision, Standing, judge};

/// Brings a release to another chart or other values.
///
/// # Guarantees
/// A release is told from another by its chart, its values and its manifest: whoever upgraded it meanwhile
/// is met with a conflict. A revision that a crash left pending is recovered in either direction.
///
/// # Caveats
/// What hooks of the chart do is theirs, and so are CustomResourceDefinitions in its `crds/`.
#[derive(Debug, Clone)]
pub struct HelmStep {
    config: HelmConfig,
    cluster: Arc<Cluster>,
    namespace: String,
    directory: PathBuf,
}

/// Holds what rolling a release back needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelmUndo {
    /// The namespace.
    pub namespace: String,
    /// The name of the release.
    pub release: String,
    /// The revision that was deployed; none if there was no such release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found: Option<FoundRelease>,
    /// What the upgrade is to make.
    pub intended: ReleaseState,
}

/// Holds the revision of a release that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundRelease {
    /// Its number.
    pub revision: u64,
    /// What it consists of.
    #[serde(flatten)]
    pub state: ReleaseState,
    /// Tells whether all its workloads were rolled out.
    #[serde(default)]
    pub was_complete: bool,
}

/// Tells what the release is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelmOutput {
    /// The number of the revision.
    pub revision: u64,
    /// The chart and its version.
    pub chart: String,
    /// The version of what the chart deploys.
    pub app_version: String,
    /// The number of the revision that was found; absent if there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found_revision: Option<u64>,
}

impl HelmStep {
    /// Makes the step from its configuration; relative paths start from the context's directory.
    ///
    /// # Errors
    /// There is no such target, or a key cannot be what it says.
    pub fn from_config(mut config: HelmConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let cluster = Cluster::named(config.target.as_deref(), cx)?;
        let namespace = config.namespace.clone().unwrap_or_else(|| cluster.namespace().to_owned());
        check_name(&namespace, "namespace")?;
        config.check(cx)?;
        Ok(Self { config, cluster, namespace, directory: cx.path("") })
    }

    fn helm<'a>(&'a self, cx: &'a Context) -> Result<Helm<'a>, StepError> {
        Helm::new(cx, &self.cluster, &self.config, &self.directory, &self.namespace)
    }

    fn subject(&self) -> String {
        format!("release {}/{}", self.namespace, self.config.release)
    }

    /// Refuses a release that no upgrade could start from, or go back to.
    fn refuse(&self, last: &Revision) -> Result<(), StepError> {
        let (name, subject) = (&self.config.release, self.subject());
        let number = last.revision;
        if last.is_deployed() {
            return Ok(());
        }
        Err(match last.status.as_str() {
            "failed" => StepError::permanent(format!("{subject}: revision {number} failed: {}", last.description))
                .with_hint(format!("bring it to a revision that was deployed: `helm history {name}`, `helm rollback {name} REVISION`")),
            "uninstalled" => StepError::permanent(format!("{subject} was uninstalled, and its history kept"))
                .with_hint(format!("`helm uninstall {name}` again removes the history")),
            status => StepError::transient(format!("{subject}: revision {number} is {status}: somebody works on it, or a crash left it so"))
                .with_hint(format!("wait for it; if nobody does: `helm rollback {name} REVISION`, `helm uninstall {name}` if it never was deployed")),
        })
    }

    async fn plan(&self, cx: &Context) -> Result<Prepared<HelmUndo, HelmOutput>, StepError> {
        let helm = self.helm(cx)?;
        let version = helm.version().await?;
        let history = helm.history().await?;
        let last = history.last();
        if last.is_none() && !self.config.install {
            return Err(StepError::permanent(format!("there is no {}", self.subject()))
                .with_hint("correct `release` or `namespace`; `install: true` installs it"));
        }
        last.map(|last| self.refuse(last)).transpose()?;
        let found = match last {
            Some(last) => Some((last, helm.state(last).await?)),
            None => None,
        };
        let intended = helm.render(&version).await?;
        if let Some((last, found)) = &found
            && found.state == intended.state
        {
            return Ok(Prepared::unchanged(output(last, Some(last.revision)), "the release is as the chart makes it"));
        }
        let manifest = found.as_ref().map_or("", |(_, found)| &found.manifest);
        let whole = match &found {
            None => Change::new(Effect::Create, self.subject()).with_summary(intended.state.chart.clone()),
            Some((last, found)) => Change::new(Effect::Modify, self.subject())
                .with_summary(format!("revision {}: {} -> {}", last.revision, found.state.chart, intended.state.chart)),
        };
        let mut changes = vec![whole];
        changes.extend(plan::changes(cx, manifest, &intended.manifest)?);
        let found = match found {
            Some((last, found)) => {
                let was_complete = self.is_complete(cx, &found.manifest).await?;
                Some(FoundRelease { revision: last.revision, state: found.state, was_complete })
            }
            None => None,
        };
        let undo = HelmUndo {
            namespace: self.namespace.clone(),
            release: self.config.release.clone(),
            found,
            intended: intended.state,
        };
        Ok(Prepared::change(undo, changes))
    }

    /// Tells whether the workloads of a manifest are rolled out.
    async fn is_complete(&self, cx: &Context, manifest: &str) -> Result<bool, StepError> {
        let server = self.cluster.connect(cx).await?;
        for each in Manifest::parse(manifest, "the present manifest")? {
            let kinds = [WorkloadKind::Deployment, WorkloadKind::StatefulSet, WorkloadKind::DaemonSet];
            let Some(kind) = kinds.into_iter().find(|kind| kind.kind().kind == each.object.text("/kind")) else {
                continue;
            };
            let present = server.get(&each.name(&server, &self.namespace).await?).await?;
            if present.is_none_or(|present| status::of(kind, &present) != Rollout::Complete) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Looks at the release as it is.
    async fn look(&self, helm: &Helm<'_>, cx: &Context, undo: &HelmUndo) -> Result<Look, StepError> {
        let history = helm.history().await?;
        let state = match history.last() {
            Some(last) => Some(helm.state(last).await?.state),
            None => None,
        };
        let last = history.last().zip(state.as_ref());
        let found = undo.found.as_ref().map(|found| &found.state);
        let standing = judge(last, found, &undo.intended, &description(cx));
        Ok(Look { history, state, standing })
    }

    fn conflict(&self, undo: &HelmUndo, look: &Look) -> StepError {
        let none = || "no release".to_owned();
        let present = look.history.last().zip(look.state.as_ref());
        StepError::conflict(Conflict {
            subject: self.subject(),
            found: undo.found.as_ref().map_or_else(none, |found| found.state.token()),
            intended: undo.intended.token(),
            present: present.map_or_else(none, |(last, state)| {
                format!("revision {}, {}: {}", last.revision, last.status, state.token())
            }),
        })
    }

    async fn forward(&self, cx: &Context, undo: &HelmUndo) -> Result<HelmOutput, StepError> {
        let helm = self.helm(cx)?;
        let mut look = self.look(&helm, cx, undo).await?;
        if look.standing == Standing::BrokenOff {
            self.bring_back(&helm, cx, undo, look).await?;
            look = self.look(&helm, cx, undo).await?;
        }
        match look.standing {
            Standing::Intended => {}
            Standing::Foreign if cx.on_conflict() == OnConflict::Stop => return Err(self.conflict(undo, &look)),
            Standing::BrokenOff => return Err(self.not_as_found()),
            Standing::Found | Standing::Foreign => {
                helm.upgrade(&description(cx)).await?;
                look = self.look(&helm, cx, undo).await?;
            }
        }
        match look.history.last() {
            Some(last) if look.standing == Standing::Intended => {
                Ok(output(last, undo.found.as_ref().map(|found| found.revision)))
            }
            _ => Err(self.conflict(undo, &look)),
        }
    }

    async fn back(&self, cx: &Context, undo: &HelmUndo) -> Result<(), StepError> {
        let helm = self.helm(cx)?;
        let look = self.look(&helm, cx, undo).await?;
        let overwrites = cx.on_conflict() == OnConflict::Overwrite && !look.history.is_empty();
        match look.standing {
            Standing::Found => return self.mark_own(&helm, cx, undo, &look).await,
            Standing::Foreign if !overwrites => return Err(self.conflict(undo, &look)),
            _ => self.bring_back(&helm, cx, undo, look).await?,
        }
        let look = self.look(&helm, cx, undo).await?;
        match look.standing {
            Standing::Found => self.mark_own(&helm, cx, undo, &look).await,
            _ => Err(self.not_as_found()),
        }
    }

    /// Marks what a rollback made again as this release's; Helm 3 does not, and would not know it later.
    async fn mark_own(&self, helm: &Helm<'_>, cx: &Context, undo: &HelmUndo, look: &Look) -> Result<(), StepError> {
        let last = look.history.last().map(|last| last.revision);
        match (last, &undo.found) {
            (Some(last), Some(found)) if last != found.revision => {
                let (manifest, server) = (helm.manifest(last).await?, self.cluster.connect(cx).await?);
                remains::mark_own(&server, &self.namespace, &self.config.release, &manifest).await
            }
            // It was never rolled back.
            _ => Ok(()),
        }
    }

    fn not_as_found(&self) -> StepError {
        StepError::unknown(format!("{} is not as it was found after it was rolled back", self.subject()))
            .with_hint(format!("somebody else may work on it: `helm history {}`, then try again", self.config.release))
    }

    /// Brings the release to the revision found, or removes what was not there.
    async fn bring_back(&self, helm: &Helm<'_>, cx: &Context, undo: &HelmUndo, look: Look) -> Result<(), StepError> {
        let Some(found) = &undo.found else { return helm.uninstall().await };
        if !look.history.iter().any(|each| each.revision == found.revision) {
            return Err(StepError::permanent(format!(
                "revision {} of {}, which was found, is no longer kept",
                found.revision,
                self.subject()
            ))
            .with_hint(
                "install its chart and values by hand, then `upgrade resolve`; a larger `history_max` keeps more",
            ));
        }
        // A rollback that was broken off: the next one would compare with it, not with the upgrade.
        let is_second = look.standing == Standing::BrokenOff && look.state.as_ref() == Some(&found.state);
        if is_second {
            self.take_back(helm, cx, undo, found, &look).await?;
        }
        match helm.rollback(found.revision, found.was_complete).await {
            Err(error) if error.detail().is_some_and(is_still_there) => {
                self.take_back(helm, cx, undo, found, &look).await?;
                helm.rollback(found.revision, found.was_complete).await
            }
            done => done,
        }
    }

    /// Takes the objects back that the newest revision of ours made.
    async fn take_back(
        &self,
        helm: &Helm<'_>,
        cx: &Context,
        undo: &HelmUndo,
        found: &FoundRelease,
        look: &Look,
    ) -> Result<(), StepError> {
        let since = look.history.iter().rev().take_while(|each| each.revision > found.revision);
        for each in since.filter(|each| each.chart == undo.intended.chart) {
            let ours = helm.state(each).await?;
            if ours.state != found.state && ours.state.is_of_same_making(&undo.intended) {
                let before = helm.manifest(found.revision).await?;
                let server = self.cluster.connect(cx).await?;
                let release = &self.config.release;
                return remains::take_back(&server, &self.namespace, release, &before, &ours.manifest).await;
            }
        }
        Ok(())
    }
}

/// A release as it is, and how that is to be taken.
struct Look {
    history: Vec<Revision>,
    state: Option<ReleaseState>,
    standing: Standing,
}

/// What an upgrade of ours is called in the history.
fn description(cx: &Context) -> String {
    format!("Upgrade complete ({})", cx.marker())
}

fn output(last: &Revision, found_revision: Option<u64>) -> HelmOutput {
    HelmOutput {
        revision: last.revision,
        chart: last.chart.clone(),
        app_version: last.app_version.clone(),
        found_revision,
    }
}

/// Tells whether Helm complains of an object that is there, and not in the revision it compares with.
fn is_still_there(said: &str) -> bool {
    said.contains(" with the name \"") && said.contains("found")
}

#[async_trait]
impl Step for HelmStep {
    const KIND: &'static str = "k8s.helm";
    type Undo = HelmUndo;
    type Output = HelmOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<HelmUndo, HelmOutput>, StepError> {
        self.plan(cx).await
    }

    async fn apply(&self, cx: &Context, undo: &HelmUndo) -> Result<HelmOutput, StepError> {
        self.forward(cx, undo).await
    }

    async fn settle(&self, cx: &Context, _: &HelmUndo) -> Result<(), StepError> {
        leftovers::end(cx).await?;
        Scratch::clear(cx)
    }

    fn definition(&self) -> Value {
        let mut definition = serde_json::to_value(&self.config).unwrap_or_default();
        if let Some(definition) = definition.as_object_mut() {
            definition.remove("deadline");
            definition.remove("program");
        }
        definition
    }

    fn inputs(&self) -> Vec<PathBuf> {
        self.config.files()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![self.cluster.part("releases", &format!("{}/{}", self.namespace, self.config.release))]
    }
}

#[async_trait]
impl Rollback for HelmStep {
    async fn rollback(&self, cx: &Context, undo: &HelmUndo, _: Option<&HelmOutput>) -> Result<(), StepError> {
        self.back(cx, undo).await
    }
}
