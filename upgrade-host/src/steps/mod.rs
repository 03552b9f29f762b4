//! The kinds of steps, one module each.

pub mod backup;
pub mod command;
pub mod config;
pub mod file;
pub mod release;
pub mod restore;
pub mod service;

use upgrade_core::registry::Registry;

pub(crate) fn register(registry: &mut Registry) {
    registry.step("host.command", "Runs a program, and another one to undo it", command::make);
    registry.step("host.service", "Starts, stops or restarts a service and waits until that is so", service::make);
    backup::register(registry);
    config::register(registry);
    file::register(registry);
    release::register(registry);
    restore::register(registry);
}
