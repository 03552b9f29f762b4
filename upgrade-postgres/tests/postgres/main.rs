//! The steps and checks of this crate against real servers.

#![cfg(test)]

mod connection;
mod documentation;
mod expand;
mod locking;
mod sql;
mod sweeps;
mod world;
