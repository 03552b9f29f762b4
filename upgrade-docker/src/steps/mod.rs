//! The kinds of steps, one module each.

mod blue_green;
mod container;

pub use blue_green::{
    AliasSwitch, BlueGreen, BlueGreenConfig, BlueGreenOutput, BlueGreenUndo, NamesUndo, ProxySwitch, ProxyUndo, Switch,
};
pub use container::{Container, ContainerConfig, ContainerOutput, ContainerUndo};

use upgrade_core::AnyStep;
use upgrade_core::registry::{BuildContext, BuildError, Registry};
use upgrade_core::step::Rollback;

/// Registers every kind of step: its name, what it does, and how it is made.
pub(crate) fn register(registry: &mut Registry) {
    registry.step(
        "docker.blue_green",
        "Replaces a container by a new one beside it, and switches traffic without a failed request",
        reversible(BlueGreen::from_config),
    );
    registry.step(
        "docker.container",
        "Replaces a container by one from another image, everything else the same",
        reversible(Container::from_config),
    );
}

fn reversible<C, S: Rollback>(
    make: fn(C, &BuildContext) -> Result<S, BuildError>,
) -> impl Fn(C, &BuildContext) -> Result<AnyStep, BuildError> {
    move |config, cx| make(config, cx).map(AnyStep::reversible)
}
