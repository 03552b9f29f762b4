//! The kinds of steps, one module each.

use upgrade_core::registry::Registry;

pub mod command;
pub mod service;

pub(crate) fn register(registry: &mut Registry) {
    registry.step("host.command", "Runs a program, and another one to undo it", command::make);
    registry.step("host.service", "Starts, stops or restarts a service and waits until that is so", service::make);
}
