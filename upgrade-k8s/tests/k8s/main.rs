//! The steps and checks of this crate against a real control plane.

#![cfg(test)]

mod apply;
mod backup;
mod blue_green;
mod canary;
mod checks;
mod claims;
mod config;
mod documentation;
mod exec;
mod faults;
mod formats;
mod foundation;
mod helm;
mod job;
mod kubelet;
mod node;
mod requests;
mod restore;
mod rights;
mod rollout;
mod scale;
mod sweeps;
mod tunnel;
mod world;
