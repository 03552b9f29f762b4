//! The kinds of checks, one module each.

mod container;
mod engine;
mod image;
mod logs;
mod ports;

pub use container::{ContainerCheck, ContainerCheckConfig};
pub use engine::{EngineCheck, EngineCheckConfig};
pub use image::{ImageCheck, ImageCheckConfig, Place};
pub use logs::{LogsCheck, LogsCheckConfig};
pub use ports::{PortSpec, PortsCheck, PortsCheckConfig, Transport};

use upgrade_core::registry::Registry;

/// Registers every kind of check: its name, what it asks, and how it is made.
pub(crate) fn register(registry: &mut Registry) {
    registry
        .check(
            "docker.container",
            "Asks whether a container runs, is healthy, and is of the right image",
            ContainerCheck::from_config,
        )
        .check("docker.engine", "Asks an engine for its version, its storage and its space", EngineCheck::from_config)
        .check("docker.image", "Asks for an image, on the engine or in its registry", ImageCheck::from_config)
        .check(
            "docker.logs",
            "Looks for errors in a container's log that were not there before",
            LogsCheck::from_config,
        )
        .check("docker.ports", "Asks whether ports can be published", PortsCheck::from_config);
}

/// Joins what was found wrong into a line, or says that nothing was.
fn joined(faults: &[String]) -> Option<String> {
    (!faults.is_empty()).then(|| faults.join("; "))
}
