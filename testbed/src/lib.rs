//! Starts the real services that the tests and benchmarks of this workspace need.
//!
//! Everything is on loopback, in scratch directories, and ended by what started it: a server of a
//! test's own when the test lets go of it or its process dies, a shared one when nobody has used it
//! for some seconds.

mod blocking;
pub mod docker;
mod guardian;
mod home;
pub mod kubernetes;
pub mod pgbouncer;
pub mod postgres;
pub mod prometheus;
mod sharing;
