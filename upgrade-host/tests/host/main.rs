//! The steps and checks of this crate against real files, processes and servers.

#![cfg(test)]

mod archive_refused;
mod backup;
mod command;
mod config;
mod documentation;
mod file;
mod http;
mod machine_checks;
mod prometheus;
mod release;
mod server;
mod service;
mod sweeps;
mod world;
