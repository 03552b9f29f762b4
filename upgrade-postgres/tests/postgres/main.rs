//! The steps and checks of this crate against real servers.

#![cfg(test)]

mod backup;
mod backfill;
mod backfill_traffic;
mod connection;
mod documentation;
mod expand;
mod fingerprint;
mod foreign_key;
mod forwarder;
mod index;
mod health;
mod integrity;
mod interruption;
mod ledger;
mod lint;
mod locking;
mod program;
mod query;
mod migrate;
mod sql;
mod sweeps;
mod traffic;
mod tunnel;
mod version;
mod world;
mod writes;
