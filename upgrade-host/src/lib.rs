//! Upgrade steps and checks for the machine itself: commands, files, releases, configuration,
//! services, HTTP.
//!
//! Every kind has the same shape: `XConfig` is its configuration, `X::from_config` makes it,
//! `XUndo` is what its undo needs, `XOutput` what later steps see; a check is `XCheck` with
//! `XCheckConfig`. A step is used from Rust without a file:
//!
//! ```
//! use upgrade_core::pipeline::Pipeline;
//! use upgrade_core::registry::BuildContext;
//! use upgrade_host::steps::{Action, Command, Service, ServiceConfig};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let restart = ServiceConfig::unit(Action::Restart, "notes.service");
//! let pipeline = Pipeline::builder("notes")
//!     .step("index", Command::new(["notes", "reindex"]).undone_by(["notes", "reindex", "--old"]))
//!     .step("restart", Service::from_config(restart, &BuildContext::new("/srv/notes"))?)
//!     .build()?;
//! # Ok(())
//! # }
//! ```
//!
//! or by its kind, once [`register`] has made it known:
//!
//! ```
//! use upgrade_core::registry::{BuildContext, Registry};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut registry = Registry::new();
//! upgrade_host::register(&mut registry);
//! let with = serde_json::json!({ "path": "/etc/motd", "content": "hello\n" });
//! registry.make_step("host.file", with, &BuildContext::new("/"))?;
//! # Ok(())
//! # }
//! ```

mod archive;
pub mod checks;
pub mod document;
mod error;
mod files;
mod http;
pub mod machine;
mod process;
pub mod steps;
mod version_text;

use upgrade_core::registry::Registry;

pub use upgrade_core::text_or_secret::TextOrSecret;

/// Registers every kind of this crate: `host.*`, `http.*`, `tcp.*`.
pub fn register(registry: &mut Registry) {
    machine::register(registry);
    steps::register(registry);
    checks::register(registry);
}

/// Holds the example of the readme to what compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
