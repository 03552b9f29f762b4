//! Upgrade steps and checks for PostgreSQL.
//!
//! The crate is laid out as every adapter is: one file a step kind in `steps/`, one file a check
//! kind in `checks/`, and [`register`], which makes them known to pipeline files. What they share:
//!
//! - [`target`]: a database as the target of an upgrade;
//! - [`session`]: one connection, cancelled with the call, ended after a crash;
//! - [`locking`]: strong locks under live traffic;
//! - [`backfill`]: what a backfill is made of;
//! - [`ledger`]: what a run keeps in the database, in the transaction of the effect it speaks of;
//! - [`identifier`]: names, quoted.

pub mod address;
pub mod backfill;
pub mod checks;
pub mod error;
pub mod identifier;
pub mod ledger;
pub mod locking;
pub mod session;
pub mod steps;
pub mod target;

use upgrade_core::registry::Registry;

pub use error::PostgresError;
pub use target::{Database, DatabaseConfig};

/// Registers every kind of this crate: `postgres` and `postgres.*`.
pub fn register(registry: &mut Registry) {
    target::register(registry);
    steps::register(registry);
    checks::register(registry);
}
