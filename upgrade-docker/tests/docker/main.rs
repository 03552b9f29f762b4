//! The steps and checks of this crate against real engines.

#![cfg(test)]

mod checks;
mod documentation;
mod foundation;
mod run;
mod sweeps;
mod world;
