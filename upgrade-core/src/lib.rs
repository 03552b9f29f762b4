//! Carries out an upgrade of a running system as one transaction.
//!
//! An upgrade is a [`Pipeline`](pipeline::Pipeline) of [`Step`](step::Step)s and
//! [`Check`](check::Check)s. The [`Executor`](executor::Executor) drives it, and keeps every
//! decision and every effect in a [`Journal`](journal::Journal): the upgrade completes, or
//! everything it touched is back as it was, and a crash at any instant changes neither promise.
//!
//! ```
//! use std::sync::Arc;
//!
//! use upgrade_core::executor::{Executor, Interrupt, Outcome, RunOptions};
//! use upgrade_core::journal::MemoryJournal;
//! use upgrade_core::pipeline::Pipeline;
//! # #[cfg(feature = "testkit")]
//! use upgrade_core::testkit::toy::{SetText, TextIs, ToyWorld};
//!
//! # #[cfg(feature = "testkit")]
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let world = ToyWorld::new([("greeting", "hello"), ("language", "en")]);
//! let pipeline = Pipeline::builder("greeting")
//!     .step("greeting", SetText::new(&world, "greeting", "bonjour"))
//!     .step("language", SetText::new(&world, "language", "fr"))
//!     .verify("polite", TextIs::new(&world, "greeting", "bonjour, madame"))
//!     .build()?;
//!
//! let executor = Executor::new(Arc::new(MemoryJournal::new()));
//! let report = executor.run(&pipeline, &RunOptions::default(), &Interrupt::new()).await?;
//!
//! // The verification failed, so both steps were undone.
//! assert!(matches!(report.outcome, Outcome::RolledBack { .. }));
//! assert_eq!(world.get("greeting").as_deref(), Some("hello"));
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "testkit"))]
//! # fn main() {}
//! ```
//!
//! # Features
//! - `file` (on by default): pipeline files, the registry of kinds, the JSON Schema.
//! - `encryption`: found contents are encrypted at rest where a key is configured.
//! - `testkit`: sweeps and fault injection for steps of one's own.

pub mod check;
pub mod context;
pub mod durable;
pub mod entry;
mod erased;
pub mod error;
pub mod executor;
#[cfg(feature = "file")]
pub mod file;
pub mod graph;
pub mod journal;
pub mod leftovers;
pub mod names;
pub mod pipeline;
#[cfg(feature = "file")]
pub mod registry;
pub mod sealed;
pub mod secret;
pub mod step;
pub mod target;
#[cfg(feature = "testkit")]
pub mod testkit;
pub mod text_or_secret;
pub mod transition;
pub mod tunnel;
pub mod undoable;
pub mod units;
pub mod verdict;

pub use erased::AnyStep;
