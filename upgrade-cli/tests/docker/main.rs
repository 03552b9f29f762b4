//! The command against a real engine.

#![cfg(test)]

mod itself;
