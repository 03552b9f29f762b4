//! The steps and checks of this crate against real engines.

#![cfg(test)]

mod container;
mod documentation;
mod foundation;
mod handover;
mod sweeps;
mod world;
