//! The steps and checks of this crate against real engines.

#![cfg(test)]

mod blue_green;
mod checks;
mod compose;
mod container;
mod documentation;
mod exec;
mod foundation;
mod handover;
mod run;
mod sweeps;
mod tunnel;
mod volume_backup;
mod volume_restore;
mod volumes;
mod world;
