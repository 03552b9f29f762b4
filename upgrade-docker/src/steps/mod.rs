//! The kinds of steps, one module each.

mod run;

pub use run::{Run, RunConfig, RunOutput, RunUndo, UndoCommand, UndoConfig, UndoableRun};

use upgrade_core::AnyStep;
use upgrade_core::registry::{BuildContext, BuildError, Registry};
use upgrade_core::step::Rollback;

/// Registers every kind of step: its name, what it does, and how it is made.
pub(crate) fn register(registry: &mut Registry) {
    registry.step(
        "docker.run",
        "Runs a command in a container of its own, and another one to undo it",
        Run::any_from_config,
    );
}

#[allow(dead_code)]
fn reversible<C, S: Rollback>(
    make: fn(C, &BuildContext) -> Result<S, BuildError>,
) -> impl Fn(C, &BuildContext) -> Result<AnyStep, BuildError> {
    move |config, cx| make(config, cx).map(AnyStep::reversible)
}
