//! The kinds of checks, one module each.

mod workload;

pub use workload::{WorkloadCheck, WorkloadCheckConfig};

use upgrade_core::registry::Registry;

/// Registers every kind of check: its name, what it asks, and how it is made.
pub(crate) fn register(registry: &mut Registry) {
    registry.check(
        "k8s.workload",
        "Asks whether workloads are rolled out, ready, of the right images, and stay up",
        WorkloadCheck::from_config,
    );
}

/// Joins what was found wrong into a line, or says that nothing was.
fn joined(faults: &[String]) -> Option<String> {
    (!faults.is_empty()).then(|| faults.join("; "))
}
