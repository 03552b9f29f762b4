//! Reads the file of a run: what is known durable must be whole, what lies beyond may be torn.
//!
//! ```text
//! line 1, 2   head: two slots, see `slots`; says how far the records are known durable
//! line 3 …    records, up to the head's `length`: any damage is refused
//!         …   later appends; the last may be torn
//! zeros       space allocated ahead; a line of JSON never starts with one
//! ```
//!
//! The head is written after each append and not synced: it outlives its process at once, a loss
//! of power a little later. Each append was durable before the next began, so beyond the head
//! only the last one can be torn, and an append is kept entirely or not at all: the lines say
//! which of them belong together. A damaged line with a later append behind it is damage, not a
//! torn write.
//!
//! A reader beside a driver may meet an append half written and later ones behind it. The head
//! has moved on then, and `settled` reads again: now the head vouches for it.

use std::fs::File;
use std::io::{self, BufRead, Read, Seek};
use std::os::unix::fs::FileExt;

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
    if head.length < SLOTS as u64 {
        return Err(damaged(place, 1, "the head contradicts itself"));
    }
    Ok(slots)
}

/// Reads a file until what was read is not that of a driver in the middle of a write.
pub(super) fn settled<T>(
    file: &File,
    place: &str,
    mut read: impl FnMut(&File) -> Result<T, JournalError>,
) -> Result<T, JournalError> {
    let mut before = None;
    for _ in 0..1000 {
        match read_again(file, place, &mut read) {
            Err(error @ JournalError::Damaged { .. }) => {
                let mut bytes = vec![0; SLOTS];
                let head = file.read_exact_at(&mut bytes, 0).is_ok().then_some(bytes);
                if head == before {
                    return Err(error);
                }
                before = head;
            }
            answer => return answer,
        }
    }
    read_again(file, place, &mut read)
}

fn read_again<T>(
    mut file: &File,
    place: &str,
    read: &mut impl FnMut(&File) -> Result<T, JournalError>,
) -> Result<T, JournalError> {
    file.rewind().map_err(|source| JournalError::Storage { action: "read", path: place.into(), source })?;
    read(file)
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

    let mut items = Vec::new();
    let mut buffer = Vec::new();
    let (mut position, mut line, mut seq) = (SLOTS as u64, FIRST_LINE, 0);
    // None after a damaged line: what stood in it is not known.
    let mut prev = Some(String::new());
    let mut continued = Some(false);
    let mut at_head = false;
    // Where the last whole append ends, beyond the head.
    let mut whole = (0, position, String::new());
    let mut torn = None;
    loop {
        if position >= head.length && continued != Some(true) {
            if !at_head {
                at_head = true;
                if position != head.length || seq != head.entries || prev.as_ref().is_some_and(|p| *p != head.digest) {
                    report(line.saturating_sub(1), "it is not the record that the head names here".into())?;
                }
            }
            whole = (items.len(), position, prev.clone().unwrap_or_default());
        }
        let first = reader.fill_buf().map_err(failed)?.first().copied();
        let below = position < head.length;
        if below && matches!(first, None | Some(0)) {
            let missing = head.entries.saturating_sub(seq);
            let what = match missing {
                0 => "the file ends here, before the end that its head names".to_owned(),
                more => {
                    format!("the file ends here, and entries are missing that are known to have been written: {more}")
                }
            };
            report(line, what)?;
            break;
        }
        if first.is_none() {
            if continued == Some(true) {
                torn = Some((line, "the rest of its append is missing".into()));
            }
            break;
        }
        if !at_head && !below {
            report(line, "the head names the middle of an append".into())?;
            at_head = true;
        }
        buffer.clear();
        let limit = if below { head.length - position } else { u64::MAX };
        reader.take(limit).read_until(b'\n', &mut buffer).map_err(failed)?;
        let read = match buffer.strip_suffix(b"\n") {
            Some(text) => Line::read(text).and_then(|text| {
                text.follows(seq, prev.as_deref().unwrap_or(text.prev))?;
                if continued.is_some_and(|continued| continued != text.continues) {
                    return Err("it does not belong to the append that it stands in".into());
                }
                Ok((item(&text)?, text.digest.to_owned(), text.continued))
            }),
            None => Err("it is not terminated".into()),
        };
        match read {
            Ok((item, digest, more)) => {
                items.push(item);
                prev = Some(digest);
                continued = Some(more);
                seq += 1;
            }
            Err(reason) if !below => {
                if later_append(reader, &buffer).map_err(failed)? {
                    report(line, reason)?;
                } else if buffer.iter().any(|byte| *byte != 0) || continued == Some(true) {
                    torn = Some((line, reason));
                }
                break;
            }
            Err(reason) => {
                report(line, reason)?;
                // To name the damaged lines and not every line after one, go on from what this
                // one says of itself, if it is whole.
                let kept = buffer.strip_suffix(b"\n").and_then(|text| Line::read(text).ok());
                prev = kept.map(|line| line.digest.to_owned());
                continued = kept.map(|line| line.continued);
                seq = kept.map_or(seq, |line| line.seq) + 1;
            }
        }
        position += buffer.len() as u64;
        line += 1;
    }
    let (kept, end, digest) = whole;
    items.truncate(kept);
    Ok(Scan { slots, items, end, digest, torn })
}

/// Tells whether another append follows the one that a damaged line belongs to.
fn later_append(reader: &mut impl BufRead, damaged: &[u8]) -> io::Result<bool> {
    let mut ended = false;
    let mut buffer = damaged.to_vec();
    let mut first = true;
    loop {
        if ended && buffer.iter().any(|byte| *byte != 0) {
            return Ok(true);
        }
        if let Some((place, line)) = last_whole(&buffer) {
            // The damaged line itself, or all of it but the space that it began with, is no later
            // one.
            let itself = first && place <= 1;
            if !line.continues && !itself {
                return Ok(true);
            }
            ended = !line.continued;
        }
        first = false;
        buffer.clear();
        if reader.read_until(b'\n', &mut buffer)? == 0 {
            return Ok(false);
        }
    }
}

/// Finds the whole line that some bytes end in; where a line end was damaged, it is not at their
/// start.
fn last_whole(bytes: &[u8]) -> Option<(usize, Line<'_>)> {
    const START: &[u8] = b"{\"seq\":";
    let text = bytes.strip_suffix(b"\n")?;
    if let Ok(line) = Line::read(text) {
        return Some((0, line));
    }
    let place = text.windows(START.len()).rposition(|window| window == START)?;
    let place = if place > 0 && text[place - 1] == b' ' { place - 1 } else { place };
    Line::read(&text[place..]).ok().map(|line| (place, line))
}
