//! The steps and checks of this crate against real servers.

#![cfg(test)]

mod backfill;
mod backfill_traffic;
mod connection;
mod documentation;
mod locking;
mod sql;
mod sweeps;
mod world;
