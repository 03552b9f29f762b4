//! The kinds of checks, one module each.

mod access;
mod apis;
mod budget;
mod capacity;
mod cluster;
mod pods;
mod workload;

pub use access::{AccessCheck, AccessCheckConfig, ResourceName, RightConfig};
pub use apis::{ApisCheck, ApisCheckConfig};
pub use budget::{BudgetCheck, BudgetCheckConfig};
pub use capacity::{CapacityCheck, CapacityCheckConfig};
pub use cluster::{ClusterCheck, ClusterCheckConfig};
pub use pods::{PodsCheck, PodsCheckConfig};
pub use workload::{WorkloadCheck, WorkloadCheckConfig};

use upgrade_core::registry::Registry;

/// Registers every kind of check: its name, what it asks, and how it is made.
pub(crate) fn register(registry: &mut Registry) {
    registry
        .check(
            "k8s.access",
            "Asks whether the cluster lets this user do what a pipeline needs",
            AccessCheck::from_config,
        )
        .check(
            "k8s.apis",
            "Asks whether manifests and objects are of APIs that the next version of Kubernetes has removed",
            ApisCheck::from_config,
        )
        .check(
            "k8s.budget",
            "Asks whether PodDisruptionBudgets allow a pod to be evicted now",
            BudgetCheck::from_config,
        )
        .check(
            "k8s.capacity",
            "Asks whether nodes and quotas have room for the pods that an upgrade adds",
            CapacityCheck::from_config,
        )
        .check(
            "k8s.cluster",
            "Asks a cluster for its version, and whether its nodes are ready and go together with it",
            ClusterCheck::from_config,
        )
        .check("k8s.pods", "Asks whether pods are ready and stay up, whatever they belong to", PodsCheck::from_config)
        .check(
            "k8s.workload",
            "Asks whether workloads are rolled out, ready, of the right images, and stay up",
            WorkloadCheck::from_config,
        );
}

/// Joins what was found wrong into a line, or says that nothing was.
fn joined(faults: &[String]) -> Option<String> {
    (!faults.is_empty()).then(|| faults.join("; "))
}
