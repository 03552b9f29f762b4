//! The steps and checks of this crate against real engines.

#![cfg(test)]

mod checks;
mod container;
mod compose;
mod documentation;
mod foundation;
mod handover;
mod run;
mod sweeps;
mod volume_backup;
mod volumes;
mod world;
