//! Two fixed-size slots that are overwritten in turn: a small value that survives a torn write.
//!
//! Each slot is a line of JSON padded with spaces, with a turn and a checksum. Writing replaces
//! the older one, so that the newer stays whole until the write after it; reading takes the
//! newest that is whole. The value needs no sync of its own: what it says was true before the
//! write that carries it, and stays true.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::sealed::sha256_hex;

/// Length of one slot: both together fill a block, so that they share none with what follows.
pub(super) const SLOT: usize = 2048;
/// Length of both slots.
pub(super) const SLOTS: usize = 2 * SLOT;

const CHECK: &str = ",\"check\":\"";
const CHECK_LENGTH: usize = 16;

#[derive(Serialize, Deserialize)]
struct Slot<T> {
    turn: u64,
    value: T,
}

/// Holds the newest value and where the next one goes.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Slots<T> {
    turn: u64,
    /// The newest value that is whole.
    pub(super) value: T,
    /// The slot that is not whole, counted from zero.
    pub(super) broken: Option<usize>,
}

impl<T: Serialize + DeserializeOwned> Slots<T> {
    /// Starts with `value` in both slots; answers their bytes.
    pub(super) fn start(value: T) -> io::Result<(Self, Vec<u8>)> {
        let mut bytes = encode(0, &value)?;
        bytes.extend(encode(1, &value)?);
        Ok((Self { turn: 1, value, broken: None }, bytes))
    }

    /// Reads the newest value that is whole; none is if both slots are damaged.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let mut slots = bytes.get(..SLOTS)?.chunks_exact(SLOT).enumerate().map(|(place, slot)| {
            // A slot in the other's place was moved there by hand.
            decode::<T>(slot).filter(|slot| slot.turn % 2 == place as u64)
        });
        match (slots.next()?, slots.next()?) {
            (Some(first), Some(second)) => {
                let newest = if first.turn > second.turn { first } else { second };
                Some(Self { turn: newest.turn, value: newest.value, broken: None })
            }
            (Some(first), None) => Some(Self { turn: first.turn, value: first.value, broken: Some(1) }),
            (None, Some(second)) => Some(Self { turn: second.turn, value: second.value, broken: Some(0) }),
            (None, None) => None,
        }
    }

    /// Overwrites the older slot. The caller syncs.
    pub(super) fn write(&mut self, file: &File, value: T) -> io::Result<()> {
        let turn = self.turn + 1;
        file.write_all_at(&encode(turn, &value)?, (turn % 2) * SLOT as u64)?;
        *self = Self { turn, value, broken: None };
        Ok(())
    }
}

fn encode<T: Serialize>(turn: u64, value: &T) -> io::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(&Slot { turn, value })?;
    bytes.pop();
    let check = check_of(&bytes);
    bytes.extend_from_slice(CHECK.as_bytes());
    bytes.extend_from_slice(check.as_bytes());
    bytes.extend_from_slice(b"\"}");
    if bytes.len() >= SLOT {
        return Err(io::Error::other("the head record is too long for its slot"));
    }
    bytes.resize(SLOT - 1, b' ');
    bytes.push(b'\n');
    Ok(bytes)
}

fn decode<T: DeserializeOwned>(slot: &[u8]) -> Option<Slot<T>> {
    // Exactly what `encode` writes, to the last space: a changed byte is never overlooked.
    let text = std::str::from_utf8(slot.strip_suffix(b"\n")?).ok()?.trim_end_matches(' ');
    let line = text.strip_suffix("\"}")?;
    let (rest, check) = line.split_at_checked(line.len().checked_sub(CHECK_LENGTH)?)?;
    let body = rest.strip_suffix(CHECK)?;
    if check_of(body.as_bytes()) != check {
        return None;
    }
    serde_json::from_str(text).ok()
}

fn check_of(body: &[u8]) -> String {
    let mut digest = sha256_hex(body);
    digest.truncate(CHECK_LENGTH);
    digest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_whole_slot_wins() {
        let file = tempfile::tempfile().unwrap();
        let (mut slots, bytes) = Slots::start(1_u64).unwrap();
        assert_eq!(bytes.len(), SLOTS);
        file.write_all_at(&bytes, 0).unwrap();
        let mut bytes = vec![0; SLOTS];
        for value in 2..6 {
            slots.write(&file, value).unwrap();
            file.read_exact_at(&mut bytes, 0).unwrap();
            assert_eq!(Slots::<u64>::read(&bytes).unwrap(), slots);
        }
        let newest = (slots.turn % 2) as usize;
        let mut torn = bytes.clone();
        torn[newest * SLOT + 20] ^= 1;
        let read = Slots::<u64>::read(&torn).unwrap();
        assert_eq!((read.value, read.broken), (4, Some(newest)));
        torn[(1 - newest) * SLOT + SLOT - 1] = b' ';
        assert!(Slots::<u64>::read(&torn).is_none());
    }

    #[test]
    fn no_bit_of_a_slot_can_change_its_value() {
        let (_, bytes) = Slots::start(7_u64).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let read = Slots::<u64>::read(&flipped).unwrap();
            assert_eq!((read.value, read.broken), (7, Some(bit / 8 / SLOT)), "bit {bit}");
        }
    }
}
