//! The steps and checks of this crate against real servers.

#![cfg(test)]

mod backup;
mod connection;
mod documentation;
mod fingerprint;
mod locking;
mod sql;
mod sweeps;
mod world;
