//! Secrets leave no trace: canaries go through everything that the command does, and are looked
//! for in all that it prints and all that it keeps.
#![cfg(test)]

mod found;
mod given;
mod server;
mod world;
