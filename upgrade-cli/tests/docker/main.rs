//! The command against a real engine.

#![cfg(test)]

#[path = "../quickstart/faulty.rs"]
mod faulty;
mod handover;
mod itself;
mod killed;
mod service;
