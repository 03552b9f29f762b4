//! The kinds of steps, one module each.

mod volume_backup;
mod volume_restore;

use upgrade_core::AnyStep;
use upgrade_core::registry::{BuildContext, BuildError, Registry};
use upgrade_core::step::Rollback;

pub use crate::volumes::consumers::{Consumer, Consumers};
pub use volume_backup::{OnRollback, Prove, VolumeBackup, VolumeBackupConfig, VolumeBackupOutput, VolumeBackupUndo};
pub use volume_restore::{VolumeRestore, VolumeRestoreConfig, VolumeRestoreOutput, VolumeRestoreUndo};

/// Registers every kind of step: its name, what it does, and how it is made.
pub(crate) fn register(registry: &mut Registry) {
    let backup = "Keeps what a volume holds in an archive, and proves it by reading it back";
    registry.step("docker.volume_backup", backup, reversible(VolumeBackup::from_config));
    let restore = "Puts what a backup holds into a volume, and keeps what it held until commit";
    registry.step("docker.volume_restore", restore, reversible(VolumeRestore::from_config));
}

fn reversible<C, S: Rollback>(
    make: fn(C, &BuildContext) -> Result<S, BuildError>,
) -> impl Fn(C, &BuildContext) -> Result<AnyStep, BuildError> {
    move |config, cx| make(config, cx).map(AnyStep::reversible)
}
