//! Upgrade steps and checks for Kubernetes.
//!
//! The crate is laid out as every adapter is: one file a step kind in `steps/`, one file a check
//! kind in `checks/`, and [`register`], which makes them known to pipeline files. What they share:
//!
//! - [`target`]: a cluster as the target of an upgrade;
//! - [`server`]: requests to its API server;
//! - [`kind`](mod@kind) and [`object`]: what is asked for, and what is answered, in the cluster's own words;
//! - [`difference`] and [`restoration`]: what is ours of an object, and how it is put back;
//! - [`manifest`]: objects as people write them down;
//! - [`follow`]: objects followed as they change;
//! - [`workload`]: how far a rollout is, and what hinders it;
//! - [`naming`]: names and labels of what a run makes.
//! - [`Tunnel`]: a port of this machine that leads to one in the cluster.
//!
//! No version of Kubernetes is chosen here: what a cluster lacks is found by discovery, and the program
//! that links this crate chooses the one version feature of `k8s-openapi` that it must have.

mod archive;
pub mod checks;
mod claims;
mod connection;
pub mod difference;
pub mod error;
pub mod follow;
mod inside;
mod kept;
pub mod kind;
pub mod manifest;
pub mod naming;
pub mod object;
mod pods;
mod printed;
mod program;
pub mod quantity;
pub mod removed_apis;
pub mod restoration;
mod selection;
pub mod server;
pub mod steps;
pub mod target;
mod tunnel;
mod which;
pub mod workload;

use upgrade_core::registry::Registry;

pub use error::KubeError;
pub use kind::Kind;
pub use object::{Object, ObjectName};
pub use server::ApiServer;
pub use target::{Cluster, ClusterConfig};
pub use tunnel::Tunnel;

/// Registers every kind of this crate: `k8s` and `k8s.*`.
pub fn register(registry: &mut Registry) {
    target::register(registry);
    steps::register(registry);
    checks::register(registry);
}
