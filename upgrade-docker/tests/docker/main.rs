//! The steps and checks of this crate against real engines.

#![cfg(test)]

mod compose;
mod compose_trouble;
mod documentation;
mod foundation;
mod stack;
mod sweeps;
mod world;
