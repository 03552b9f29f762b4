//! The kinds of steps, one module each.

mod compose;

use upgrade_core::AnyStep;
use upgrade_core::registry::{BuildContext, BuildError, Registry};
use upgrade_core::step::Rollback;

pub use compose::{Compose, ComposeConfig, ComposeOutput, ComposeUndo, Replicas, ServiceOutput, ServiceUndo};

/// Registers every kind of step: its name, what it does, and how it is made.
pub(crate) fn register(registry: &mut Registry) {
    registry.step(
        "docker.compose",
        "Brings services of a Compose project to other images or variables, as one unit",
        reversible(Compose::from_config),
    );
}

fn reversible<C, S: Rollback>(
    make: fn(C, &BuildContext) -> Result<S, BuildError>,
) -> impl Fn(C, &BuildContext) -> Result<AnyStep, BuildError> {
    move |config, cx| make(config, cx).map(AnyStep::reversible)
}
