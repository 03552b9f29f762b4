//! The steps and checks of this crate against real engines.

#![cfg(test)]

mod documentation;
mod foundation;
mod sweeps;
mod volume_backup;
mod volume_restore;
mod volumes;
mod world;
