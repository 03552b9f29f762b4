//! The steps and checks of this crate against a real control plane.

#![cfg(test)]

mod documentation;
mod foundation;
mod rollout;
mod sweeps;
mod world;
