//! The kinds of steps, one module each.

mod analysis;
mod apply;
mod backup;
mod blue_green;
mod canary;
mod config;
mod exec;
mod helm;
mod job;
mod node;
mod pair;
mod restore;
mod rollout;
mod scale;

pub use analysis::AnalysisConfig;
pub use apply::{AppliedObject, Apply, ApplyConfig, ApplyOutput, ApplyUndo};
pub use backup::{Backup, BackupConfig, BackupOutput, BackupUndo, OnRollback};
pub use blue_green::{BlueGreen, BlueGreenConfig, BlueGreenOutput, BlueGreenUndo};
pub use canary::{Canary, CanaryConfig, CanaryOutput, CanaryUndo, PausedWeightConfig, RouteUndo, WeightConfig};
pub use config::{ConfigOutput, ConfigStep, ConfigStepConfig, ConfigUndo, Renamed};
pub use exec::{Exec, ExecConfig, ExecOutput, ExecUndo, UndoableExec};
pub use helm::{FoundRelease, HelmConfig, HelmOutput, HelmStep, HelmUndo, ReleaseState};
pub use job::{EnvSource, JobConfig, JobOutput, JobStep, JobUndo, UndoJobConfig, UndoableJob};
pub use node::{
    DrainConfig, FoundNode, NodeCommandConfig, NodeConfig, NodeJobConfig, NodeOutput, NodeStep, NodeUndo, NodeUpgrade,
    UndoableNode, UpgradedNode,
};
pub use pair::{LedService, PairUndo};
pub use restore::{Restore, RestoreConfig, RestoreOutput, RestoreUndo};
pub use rollout::{Order, RolloutConfig, RolloutOutput, RolloutStep, RolloutUndo, State, WorkloadConfig, WorkloadUndo};
pub use scale::{Scale, ScaleConfig, ScaleOutput, ScaleUndo, ScaledWorkload, ScaledWorkloadConfig};

use upgrade_core::AnyStep;
use upgrade_core::registry::{BuildContext, BuildError, Registry};
use upgrade_core::step::Rollback;
use upgrade_core::units::Span;

/// Registers every kind of step: its name, what it does, and how it is made.
pub(crate) fn register(registry: &mut Registry) {
    registry.step(
        "k8s.apply",
        "Brings objects to what manifests say, by server-side apply",
        reversible(Apply::from_config),
    );
    registry.step(
        "k8s.backup",
        "Keeps objects of a namespace in a file, proven by reading it back; Secrets encrypted",
        reversible(Backup::from_config),
    );
    registry.step(
        "k8s.blue_green",
        "Brings a new Deployment beside the old one, and switches a Service to it",
        reversible(BlueGreen::from_config),
    );
    registry.step(
        "k8s.canary",
        "Lets a new Deployment have more and more of the traffic, as long as what is measured allows it",
        reversible(Canary::from_config),
    );
    registry.step(
        "k8s.config",
        "Changes ConfigMaps and Secrets together with the workloads that read them",
        reversible(ConfigStep::from_config),
    );
    registry.step(
        "k8s.exec",
        "Runs a command inside a container of a pod, and another one to undo it",
        Exec::any_from_config,
    );
    registry.step(
        "k8s.helm",
        "Brings a release of Helm to another chart or other values, and rolls it back exactly",
        reversible(HelmStep::from_config),
    );
    registry.step("k8s.job", "Runs a Job to its end, and another one to undo it", JobStep::any_from_config);
    registry.step(
        "k8s.node",
        "Drains nodes and upgrades them, a few at a time, and restores their cordon",
        NodeStep::any_from_config,
    );
    registry.step(
        "k8s.restore",
        "Brings objects back to what a backup of them holds, undoably",
        reversible(Restore::from_config),
    );
    registry.step(
        "k8s.rollout",
        "Brings workloads to other images or settings, as one unit",
        reversible(RolloutStep::from_config),
    );
    registry.step("k8s.scale", "Gives workloads another number of pods, as one unit", reversible(Scale::from_config));
}

/// How long what is followed may take where nothing else is said.
fn ten_minutes() -> Span {
    Span::from_secs(600)
}

fn reversible<C, S: Rollback>(
    make: fn(C, &BuildContext) -> Result<S, BuildError>,
) -> impl Fn(C, &BuildContext) -> Result<AnyStep, BuildError> {
    move |config, cx| make(config, cx).map(AnyStep::reversible)
}
