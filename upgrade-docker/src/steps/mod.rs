//! The kinds of steps, one module each.

mod blue_green;
mod compose;
mod container;
mod exec;
mod image;
mod image_push;
mod image_save;
mod run;
mod volume_backup;
mod volume_restore;

pub use crate::building::{BuildConfig, Built};
pub use crate::volumes::consumers::{Consumer, Consumers};
pub use blue_green::{
    AliasSwitch, BlueGreen, BlueGreenConfig, BlueGreenOutput, BlueGreenUndo, NamesUndo, ProxySwitch, ProxyUndo, Switch,
};
pub use compose::{Compose, ComposeConfig, ComposeOutput, ComposeUndo, Replicas, ServiceOutput, ServiceUndo};
pub use container::{Container, ContainerConfig, ContainerOutput, ContainerUndo};
pub use exec::{Exec, ExecConfig, ExecOutput, ExecUndo, UndoableExec};
pub use image::{Image, ImageConfig, ImageOutput, ImageUndo, LoadConfig, Loaded};
pub use image_push::{FoundManifest, ImagePush, ImagePushConfig, ImagePushOutput, ImagePushUndo};
pub use image_save::{ImageSave, ImageSaveConfig, ImageSaveOutput, ImageSaveUndo};
pub use run::{Run, RunConfig, RunOutput, RunUndo, UndoCommand, UndoConfig, UndoableRun};
pub use volume_backup::{OnRollback, Prove, VolumeBackup, VolumeBackupConfig, VolumeBackupOutput, VolumeBackupUndo};
pub use volume_restore::{VolumeRestore, VolumeRestoreConfig, VolumeRestoreOutput, VolumeRestoreUndo};

use upgrade_core::AnyStep;
use upgrade_core::registry::{BuildContext, BuildError, Registry};
use upgrade_core::step::Rollback;

/// Registers every kind of step: its name, what it does, and how it is made.
pub(crate) fn register(registry: &mut Registry) {
    registry
        .step(
            "docker.blue_green",
            "Replaces a container by a new one beside it, and switches traffic without a failed request",
            reversible(BlueGreen::from_config),
        )
        .step(
            "docker.compose",
            "Brings services of a Compose project to other images or variables, as one unit",
            reversible(Compose::from_config),
        )
        .step(
            "docker.container",
            "Replaces a container by one from another image, everything else the same",
            reversible(Container::from_config),
        )
        .step(
            "docker.exec",
            "Runs a command inside a running container, and another one to undo it",
            Exec::any_from_config,
        )
        .step(
            "docker.image",
            "Brings an image to an engine under a name: pulled, built, loaded or one that is there",
            reversible(Image::from_config),
        )
        .step(
            "docker.image_push",
            "Pushes an image to a registry, and lets the tag lead back to what it led to",
            reversible(ImagePush::from_config),
        )
        .step(
            "docker.image_save",
            "Writes an image to an archive, and keeps the file that was there until commit",
            reversible(ImageSave::from_config),
        )
        .step(
            "docker.run",
            "Runs a command in a container of its own, and another one to undo it",
            Run::any_from_config,
        )
        .step(
            "docker.volume_backup",
            "Keeps what a volume holds in an archive, and proves it by reading it back",
            reversible(VolumeBackup::from_config),
        )
        .step(
            "docker.volume_restore",
            "Puts what a backup holds into a volume, and keeps what it held until commit",
            reversible(VolumeRestore::from_config),
        );
}

fn reversible<C, S: Rollback>(
    make: fn(C, &BuildContext) -> Result<S, BuildError>,
) -> impl Fn(C, &BuildContext) -> Result<AnyStep, BuildError> {
    move |config, cx| make(config, cx).map(AnyStep::reversible)
}
