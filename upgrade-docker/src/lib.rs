//! Upgrade steps and checks for Docker Engine and Compose.
//!
//! The crate is laid out as every adapter is: one file a step kind in `steps/`, one file a check
//! kind in `checks/`, and [`register`], which makes them known to pipeline files. What they share:
//!
//! - [`target`]: an engine as the target of an upgrade;
//! - [`reference`](mod@reference): names of images, and `credentials`: who may pull them;
//! - [`images`]: images obtained, verified and kept;
//! - [`containers`]: what is done to one container;
//! - [`handover`]: a run that goes on when its own container stops;
//! - `left_over`: what an engine forgot that it started;
//! - [`mounts`], `oneoff` and `printed`: containers that run one command, and what it printed;
//! - [`health`]: when a container counts as serving;
//! - [`naming`]: names and labels of what a run makes;
//! - [`specification`]: what a container is made of, taken from one that is there;
//! - `tunnel`: a way into the networks of an engine;
//! - [`verbatim`]: containers in the engine's own words;
//! - `volumes`: what volumes hold, read and written through the archive API.

mod building;
pub mod checks;
mod compose;
mod connection;
pub mod containers;
mod credentials;
pub mod error;
pub mod handover;
pub mod health;
mod image_archive;
pub mod images;
mod inside;
mod left_over;
pub mod mounts;
mod moved_tag;
pub mod naming;
mod oneoff;
mod printed;
pub mod reference;
mod registry;
pub mod specification;
pub mod steps;
mod streams;
pub mod target;
mod tls;
mod tunnel;
pub mod verbatim;
mod volumes;

use upgrade_core::registry::Registry;

pub use connection::TlsFiles;
pub use error::DockerError;
pub use mounts::MountSpec;
pub use reference::ImageReference;
pub use target::{Engine, EngineConfig, RegistryLogin};
pub use tunnel::TunnelConfig;

/// Registers every kind of this crate: `docker` and `docker.*`.
pub fn register(registry: &mut Registry) {
    target::register(registry);
    steps::register(registry);
    checks::register(registry);
}
