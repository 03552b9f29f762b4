//! Reads arbitrary bytes as the file of a run: records whose chain holds, or the damaged line, never a
//! panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use upgrade_core::journal::file::read_bytes;

fuzz_target!(|bytes: &[u8]| {
    if let Err(error) = read_bytes(bytes) {
        drop((error.to_string(), error.hint()));
    }
});
