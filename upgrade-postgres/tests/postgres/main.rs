//! The steps and checks of this crate against real servers.

#![cfg(test)]

mod connection;
mod documentation;
mod forwarder;
mod ledger;
mod fingerprint;
mod integrity;
mod foreign_key;
mod index;
mod lint;
mod locking;
mod query;
mod sql;
mod sweeps;
mod traffic;
mod version;
mod world;
