//! Reads arbitrary text as each of the small values of a pipeline file; what is read is written and
//! read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use upgrade_core::entry::Record;
use upgrade_core::names::{LockName, RunId, StepId};
use upgrade_core::secret::SecretRef;
use upgrade_core::units::{Bytes, Share, Span};
use upgrade_core::verdict::Limit;

macro_rules! survives {
    ($text:expr, $($type:ty),+) => {$(
        for json in [serde_json::to_string($text).expect("text is JSON"), $text.to_owned()] {
            if let Ok(value) = serde_json::from_str::<$type>(&json) {
                let written = serde_json::to_string(&value).expect("what was read can be written");
                let again = serde_json::from_str::<$type>(&written).expect("what was written can be read");
                assert_eq!(value, again);
            }
        }
    )+};
}

fuzz_target!(|text: &str| {
    survives!(text, LockName, RunId, StepId, SecretRef, Bytes, Share, Span, Limit, Record);
});
