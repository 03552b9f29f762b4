//! Reads arbitrary bytes as the file of a run, and arbitrary records as a run: what happened, or the
//! damaged line, never a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use upgrade_core::entry::Record;
use upgrade_core::executor::state::Run;
use upgrade_core::journal::file::read_bytes;

fuzz_target!(|bytes: &[u8]| {
    if let Err(error) = read_bytes(bytes) {
        drop((error.to_string(), error.hint()));
    }
    // The chain of digests keeps changed records out of the replay; here they meet it.
    let records = bytes.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice::<Record>(line).ok());
    if let Err(error) = Run::replay(&records.collect::<Vec<_>>()) {
        drop(error.to_string());
    }
});
