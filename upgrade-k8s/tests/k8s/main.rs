//! The steps and checks of this crate against a real control plane.

#![cfg(test)]

mod apply;
mod blue_green;
mod checks;
mod config;
mod documentation;
mod exec;
mod formats;
mod foundation;
mod job;
mod kubelet;
mod rollout;
mod scale;
mod sweeps;
mod tunnel;
mod world;
