//! The steps and checks of this crate against real engines.

#![cfg(test)]

mod blue_green;
mod documentation;
mod foundation;
mod sweeps;
mod world;
