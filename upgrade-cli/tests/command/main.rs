//! The command as its users meet it: real files, real processes, exit statuses, both outputs.
#![cfg(test)]

mod documents;
mod drivers;
mod exits;
mod output;
#[cfg(feature = "postgres")]
mod remote;
mod selection;
mod supervisor;
mod world;
