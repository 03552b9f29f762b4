//! The kinds of steps, one module each.

mod backup;
mod command;
mod config;
mod file;
mod release;
mod restore;
mod service;

pub use backup::{Backup, BackupConfig, BackupOutput, BackupUndo, OnRollback};
pub use command::{Command, CommandConfig, CommandOutput, CommandUndo, SuccessCodes, UndoableCommand};
pub use config::{Config, ConfigConfig, ConfigOutput, ConfigUndo};
pub use file::{File, FileConfig, FileOutput, Presence};
pub use release::{Release, ReleaseConfig, ReleaseOutput, ReleaseUndo};
pub use restore::{Restore, RestoreConfig, RestoreOutput, RestorePlace, RestoreUndo};
pub use service::{Action, Service, ServiceConfig, ServiceOutput, ServiceUndo};

pub use crate::files::ownership::Mode;
pub use crate::files::path_state::{Modified, PathState};
pub use crate::files::swap::{FileUndo, Kept};
pub use crate::files::template::Template;

pub(crate) use backup::SUFFIX as BACKUP_SUFFIX;
pub(crate) use command::argv_of;
pub(crate) use config::{check_validation, format_of, text_of};

use upgrade_core::AnyStep;
use upgrade_core::registry::{BuildContext, BuildError, Registry};
use upgrade_core::step::Rollback;

/// Registers every kind of step: its name, what it does, and how it is made.
pub(crate) fn register(registry: &mut Registry) {
    registry
        .step("host.backup", "Keeps paths in an archive, proven by reading it back", reversible(Backup::from_config))
        .step("host.command", "Runs a program, and another one to undo it", Command::any_from_config)
        .step(
            "host.config",
            "Migrates a configuration file by rules, comments and order kept",
            reversible(Config::from_config),
        )
        .step("host.file", "Writes, copies or removes a file, with its mode and owner", reversible(File::from_config))
        .step(
            "host.release",
            "Lays a verified release down and switches a link to it",
            reversible(Release::from_config),
        )
        .step("host.restore", "Swaps what a backup holds into place", reversible(Restore::from_config))
        .step(
            "host.service",
            "Starts, stops or restarts a service and waits until that is so",
            reversible(Service::from_config),
        );
}

fn reversible<C, S: Rollback>(
    make: fn(C, &BuildContext) -> Result<S, BuildError>,
) -> impl Fn(C, &BuildContext) -> Result<AnyStep, BuildError> {
    move |config, cx| make(config, cx).map(AnyStep::reversible)
}
