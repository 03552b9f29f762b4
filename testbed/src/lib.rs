//! Starts the real services that the tests and benchmarks of this workspace need.
