//! The steps and checks of this crate against real engines.

#![cfg(test)]

mod blue_green;
mod container;
mod documentation;
mod foundation;
mod sweeps;
mod world;
