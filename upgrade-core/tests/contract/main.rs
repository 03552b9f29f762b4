//! The contract, point by point: each test fails without the promise that its name reads as.
#![cfg(test)]
#![cfg(feature = "testkit")]

mod bounded;
mod commit;
mod decisions;
mod definition;
mod document;
mod journal_failure;
mod known_later;
mod nothing_runs_on;
mod one_driver;
mod past_the_pivot;
mod pivot;
mod scripted;
mod secrets;
mod stuck;
mod taken_up_again;
mod undo_first;
mod unknown;
mod versions;
