//! x

#![cfg(test)]
