//! Reads the file of a run: what is known durable must be whole, what lies beyond may be torn.
//!
//! ```text
//! line 1, 2   head: two slots, see `slots`; says what was durable before the last append
//! line 3 …    records, up to the head's `length`: any damage is refused
//!         …   the last append, up to the head's `end`: whole, or dropped as a torn write
//! zeros       space allocated ahead; a line of JSON never starts with one
//! ```
//!
//! A write that never returned may have reached the disk in any part and order, so what lies
//! beyond `length` counts only if all of it is whole: an append is kept entirely or not at all.
//! What lies beyond `end` belongs to an append whose slot never became durable; nobody was told
//! that it succeeded. When one slot is damaged, `end` may be an older one: then every whole
//! record is kept.

use std::io::{self, BufRead, Read};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::slots::{SLOTS, Slots};
use crate::journal::JournalError;
use crate::journal::chain::Line;
use crate::names::Seq;
use crate::transition::RunState;

/// Numbers the format of run files that this code writes.
pub(super) const FORMAT: u32 = 1;
/// The line of the first record: two lines are the head's.
pub(super) const FIRST_LINE: u64 = 3;

/// Says how far a run is known durable.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Head {
    /// The format of the file.
    pub(super) format: u32,
    /// How many entries are known durable.
    pub(super) entries: Seq,
    /// Where they end in the file.
    pub(super) length: u64,
    /// Where the append ends that was being written; equals `length` in a file at rest.
    pub(super) end: u64,
    /// The digest of the last entry known durable.
    pub(super) digest: String,
    /// The state that the run was left in, in a file at rest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) state: Option<RunState>,
    /// When its last entry was written, in a file at rest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) updated: Option<Timestamp>,
}

/// Holds what was read from the file of a run.
#[derive(Debug)]
pub(super) struct Scan<T> {
    pub(super) slots: Slots<Head>,
    /// One item a record that is kept.
    pub(super) items: Vec<T>,
    /// Where the records that are kept end.
    pub(super) end: u64,
    /// The digest of the last of them.
    pub(super) digest: String,
    /// Line and reason why the rest is not kept.
    pub(super) torn: Option<(u64, String)>,
}

/// Makes the error of a damaged line.
pub(super) fn damaged(place: &str, line: u64, reason: impl Into<String>) -> JournalError {
    JournalError::Damaged { place: place.into(), line, reason: reason.into() }
}

/// Reads the head alone.
pub(super) fn read_head(reader: &mut impl Read, place: &str) -> Result<Slots<Head>, JournalError> {
    let mut bytes = vec![0; SLOTS];
    reader.read_exact(&mut bytes).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => damaged(place, 1, "the file ends within its head"),
        _ => JournalError::Storage { action: "read", path: place.into(), source: error },
    })?;
    let Some(slots) = Slots::<Head>::read(&bytes) else {
        return Err(match foreign_format(&bytes) {
            Some(found) => JournalError::Format { place: place.into(), found, known: FORMAT },
            None => damaged(place, 1, "both slots of the head are damaged"),
        });
    };
    let head = &slots.value;
    if head.format > FORMAT {
        return Err(JournalError::Format { place: place.into(), found: head.format, known: FORMAT });
    }
    if head.length < SLOTS as u64 || head.end < head.length {
        return Err(damaged(place, 1, "the head contradicts itself"));
    }
    Ok(slots)
}

/// Finds out whether a head that cannot be read is one of a newer format, whatever its shape.
fn foreign_format(head: &[u8]) -> Option<u32> {
    #[derive(Deserialize)]
    struct Value {
        format: u32,
    }
    #[derive(Deserialize)]
    struct Slot {
        value: Value,
    }
    let line = head.split(|byte| *byte == b'\n').next()?;
    serde_json::from_slice::<Slot>(line).ok().map(|slot| slot.value.format).filter(|format| *format > FORMAT)
}

/// Reads a whole file, an item a record.
///
/// `report` hears of every damaged line below the head; its error ends the scan.
pub(super) fn scan<T>(
    reader: &mut impl BufRead,
    place: &str,
    mut item: impl FnMut(&Line<'_>) -> Result<T, String>,
    mut report: impl FnMut(u64, String) -> Result<(), JournalError>,
) -> Result<Scan<T>, JournalError> {
    let failed = |source| JournalError::Storage { action: "read", path: place.into(), source };
    let slots = read_head(reader, place)?;
    let head = &slots.value;
    let bound = if slots.broken.is_some() { u64::MAX } else { head.end };

    let mut items = Vec::new();
    let mut buffer = Vec::new();
    let (mut position, mut line, mut seq) = (SLOTS as u64, FIRST_LINE, 0);
    // None after a damaged line: what stood in it is not known.
    let mut prev = Some(String::new());
    let mut durable = None;
    let mut torn = None;
    loop {
        if position >= head.length && durable.is_none() {
            if seq != head.entries || prev.as_ref().is_some_and(|prev| *prev != head.digest) {
                report(line.saturating_sub(1), "it is not the record that the head names here".into())?;
            }
            durable = Some(items.len());
        }
        if position >= bound {
            break;
        }
        let limit = if position < head.length { head.length } else { bound } - position;
        let first = reader.fill_buf().map_err(failed)?.first().copied();
        if matches!(first, None | Some(0)) {
            if position < head.length {
                let missing = head.entries.saturating_sub(seq);
                report(line, format!("the file ends here, and {missing} more entries are known to have been written"))?;
            } else if bound != u64::MAX {
                torn = Some((line, "the last append is missing".into()));
            }
            break;
        }
        buffer.clear();
        reader.take(limit).read_until(b'\n', &mut buffer).map_err(failed)?;
        let read = match buffer.strip_suffix(b"\n") {
            Some(text) => Line::read(text).and_then(|text| {
                text.follows(seq, prev.as_deref().unwrap_or(text.prev))?;
                Ok((item(&text)?, text.digest.to_owned()))
            }),
            None => Err("it is not terminated".into()),
        };
        match read {
            Ok((item, digest)) => {
                items.push(item);
                prev = Some(digest);
                seq += 1;
            }
            Err(reason) if position >= head.length => {
                torn = Some((line, reason));
                break;
            }
            Err(reason) => {
                report(line, reason)?;
                // To name the damaged lines and not every line after one, go on from what this
                // one says of itself, if it is whole.
                let whole = buffer.strip_suffix(b"\n").and_then(|text| Line::read(text).ok());
                prev = whole.map(|line| line.digest.to_owned());
                seq = whole.map_or(seq, |line| line.seq) + 1;
            }
        }
        position += buffer.len() as u64;
        line += 1;
    }
    if torn.is_some() && slots.broken.is_none() {
        items.truncate(durable.unwrap_or_default());
        position = head.length;
        prev = Some(head.digest.clone());
    }
    Ok(Scan { end: position, digest: prev.unwrap_or_default(), items, torn, slots })
}
