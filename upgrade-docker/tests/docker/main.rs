//! The steps and checks of this crate against real engines.

#![cfg(test)]

mod blue_green;
mod checks;
mod compose;
mod compose_trouble;
mod container;
mod documentation;
mod exec;
mod foundation;
mod handover;
mod image;
mod image_build;
mod image_load;
mod image_push;
mod run;
mod stack;
mod sweeps;
mod tunnel;
mod volume_backup;
mod volume_restore;
mod volumes;
mod world;
