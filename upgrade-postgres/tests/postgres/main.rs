//! The steps and checks of this crate against real servers.

#![cfg(test)]

mod backfill;
mod backfill_traffic;
mod backup;
mod connection;
mod documentation;
mod expand;
mod fingerprint;
mod foreign_key;
mod forwarder;
mod health;
mod index;
mod integrity;
mod interruption;
mod journal;
mod ledger;
mod lint;
mod locking;
mod migrate;
mod program;
mod query;
mod sql;
mod sweeps;
mod traffic;
mod tunnel;
mod version;
mod world;
mod writes;
