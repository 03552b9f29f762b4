//! The steps and checks of this crate against real servers.

#![cfg(test)]

mod backup;
mod connection;
mod documentation;
mod expand;
mod fingerprint;
mod foreign_key;
mod forwarder;
mod index;
mod integrity;
mod ledger;
mod lint;
mod locking;
mod migrate;
mod query;
mod sql;
mod sweeps;
mod traffic;
mod tunnel;
mod version;
mod world;
mod writes;
