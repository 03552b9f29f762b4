//! The kinds of steps, one module each.

use upgrade_core::AnyStep;
use upgrade_core::registry::{BuildContext, BuildError, Registry};
use upgrade_core::step::Rollback;

/// Registers every kind of step: its name, what it does, and how it is made.
pub(crate) fn register(_registry: &mut Registry) {}

#[allow(dead_code)]
fn reversible<C, S: Rollback>(
    make: fn(C, &BuildContext) -> Result<S, BuildError>,
) -> impl Fn(C, &BuildContext) -> Result<AnyStep, BuildError> {
    move |config, cx| make(config, cx).map(AnyStep::reversible)
}
