//! Upgrade steps and checks for PostgreSQL.
//!
//! The crate is laid out as every adapter is: one file a step kind in `steps/`, one file a check
//! kind in `checks/`, and [`register`], which makes them known to pipeline files. What they share:
//!
//! - [`target`]: a database as the target of an upgrade;
//! - [`session`]: one connection, cancelled with the call, ended after a crash;
//! - [`locking`]: strong locks under live traffic;
//! - [`ledger`]: what a run keeps in the database, in the transaction of the effect it speaks of;
//! - [`program`]: PostgreSQL's own programs and other people's, run to their end;
//! - [`fingerprint`]: what tables hold, compared without reading them twice;
//! - [`backfill`]: what a backfill is made of;
//! - [`backup`]: a database kept in a directory that proves itself;
//! - [`migrations`]: versioned SQL scripts, and what a database knows of them;
//! - [`lint`]: statements that are dangerous under traffic;
//! - [`identifier`]: names, quoted.
//!
//! And [`journal`]: the record of a run in a database, for drivers on several machines.

pub mod address;
pub mod backfill;
pub mod backup;
pub mod checks;
pub mod error;
mod expand;
pub mod fingerprint;
pub mod identifier;
mod indexes;
pub mod journal;
pub mod ledger;
pub mod lint;
pub mod locking;
pub mod migrations;
pub mod program;
pub mod session;
pub mod steps;
pub mod target;

use upgrade_core::registry::Registry;

pub use error::PostgresError;
pub use journal::{JournalAddress, PostgresJournal};
pub use target::{Database, DatabaseConfig};

/// Registers every kind of this crate: `postgres` and `postgres.*`.
pub fn register(registry: &mut Registry) {
    target::register(registry);
    steps::register(registry);
    checks::register(registry);
}

/// Holds the example of the readme to what compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
