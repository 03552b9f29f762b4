//! How records hang together: the text of a record, its digest, and the digest of the one before.
//!
//! A record is written as one line of JSON, `{"seq","at","prev","entry","digest"}` in this order
//! and without spaces. The digest is the SHA-256 of the line with its `digest` field taken out, so
//! that anybody can compute it with the tools at hand. Digests are taken over the bytes as they
//! stand in the line, never over a value read and written again: nothing depends on how a parser
//! treats numbers or the order of keys.
//!
//! The lines of one append hold together: each but the last ends in a space, each but the first
//! begins with one. So a reader knows which lines are there entirely or not at all.

use jiff::Timestamp;
use sha2::{Digest, Sha256};

use crate::entry::{Entry, Record};
use crate::names::Seq;
use crate::sealed::hex;

const BEFORE_DIGEST: &[u8] = b",\"digest\":\"";
const AFTER_DIGEST: &[u8] = b"\"}";
/// Length of a digest in hexadecimal.
pub(crate) const DIGEST_LENGTH: usize = 64;

/// Holds the records of one append and the lines that they are written as.
#[derive(Debug)]
pub struct Chained {
    /// The records.
    pub records: Vec<Record>,
    /// Their lines, each with its line end.
    pub lines: Vec<u8>,
}

/// Chains entries to the record before them, the first of them with number `at`.
///
/// # Errors
/// An entry cannot be written as JSON: a path in it is not UTF-8.
pub fn chain(at: Seq, prev: &str, now: Timestamp, entries: Vec<Entry>) -> Result<Chained, serde_json::Error> {
    let mut chained = Chained { records: Vec::with_capacity(entries.len()), lines: Vec::with_capacity(512) };
    let mut prev = prev.to_owned();
    let last = at + (entries.len() as Seq).saturating_sub(1);
    for (seq, entry) in (at..).zip(entries) {
        if seq > at {
            chained.lines.push(b' ');
        }
        let start = chained.lines.len();
        write_body(&mut chained.lines, seq, now, &prev, &entry)?;
        let digest = digest_of_body(chained.lines.get(start..).unwrap_or_default());
        chained.lines.extend_from_slice(BEFORE_DIGEST);
        chained.lines.extend_from_slice(digest.as_bytes());
        chained.lines.extend_from_slice(AFTER_DIGEST);
        chained.lines.extend_from_slice(if seq < last { b" \n" } else { b"\n" });
        let before = std::mem::replace(&mut prev, digest.clone());
        chained.records.push(Record { seq, at: now, prev: before, entry, digest });
    }
    Ok(chained)
}

/// Checks a record against its place in the chain; answers what is wrong with it.
///
/// # Errors
/// The number, the digest before or its own digest is another one.
pub fn verify(record: &Record, seq: Seq, prev: &str) -> Result<(), String> {
    check_place(record.seq, &record.prev, seq, prev)?;
    let mut body = Vec::with_capacity(512);
    write_body(&mut body, record.seq, record.at, &record.prev, &record.entry)
        .map_err(|error| format!("it cannot be written as JSON: {error}"))?;
    check_digest(&digest_of_body(&body), &record.digest)
}

/// Reads a record from its line (without the line's end) and checks its digest over the bytes.
///
/// # Errors
/// It is not a record, or not as it was written.
pub fn read(line: &[u8]) -> Result<Record, String> {
    Line::read(line)?.record()
}

/// Holds the parts of a line as they stand in it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Line<'a> {
    pub(crate) seq: Seq,
    pub(crate) at: &'a str,
    pub(crate) prev: &'a str,
    pub(crate) entry: &'a str,
    pub(crate) digest: &'a str,
    /// Whether it belongs to the same append as the line before.
    pub(crate) continues: bool,
    /// Whether the next line belongs to the same append.
    pub(crate) continued: bool,
}

impl<'a> Line<'a> {
    /// Takes a line (without its end) apart and checks its digest.
    pub(crate) fn read(line: &'a [u8]) -> Result<Self, String> {
        // The digest first: it covers every byte, so that what follows never guesses.
        let shape = || "it is not a record of a journal".to_owned();
        let (line, continues) = line.strip_prefix(b" ").map_or((line, false), |line| (line, true));
        let (line, continued) = line.strip_suffix(b" ").map_or((line, false), |line| (line, true));
        let body_length = line
            .len()
            .checked_sub(BEFORE_DIGEST.len() + DIGEST_LENGTH + AFTER_DIGEST.len())
            .ok_or_else(|| "it is too short for a record".to_owned())?;
        let (body, rest) = line.split_at(body_length);
        let digest = rest
            .strip_prefix(BEFORE_DIGEST)
            .and_then(|rest| rest.strip_suffix(AFTER_DIGEST))
            .ok_or_else(|| "it does not end in a digest".to_owned())?;
        let digest = std::str::from_utf8(digest).map_err(|_| shape())?;
        check_digest(&digest_of_body(body), digest)?;
        let body = std::str::from_utf8(body).map_err(|_| "it is not UTF-8".to_owned())?;
        let rest = body.strip_prefix("{\"seq\":").ok_or_else(shape)?;
        let (seq, rest) = rest.split_once(",\"at\":\"").ok_or_else(shape)?;
        let (at, rest) = rest.split_once("\",\"prev\":\"").ok_or_else(shape)?;
        let (prev, entry) = rest.split_once("\",\"entry\":").ok_or_else(shape)?;
        let seq = seq.parse().map_err(|_| "its number cannot be read".to_owned())?;
        Ok(Self { seq, at, prev, entry, digest, continues, continued })
    }

    /// Checks that the line follows the record before it.
    pub(crate) fn follows(&self, seq: Seq, prev: &str) -> Result<(), String> {
        check_place(self.seq, self.prev, seq, prev)
    }

    /// Reads the time of the record.
    pub(crate) fn at(&self) -> Result<Timestamp, String> {
        self.at.parse().map_err(|error| format!("its time cannot be read: {error}"))
    }

    /// Reads the whole record.
    pub(crate) fn record(&self) -> Result<Record, String> {
        let entry = serde_json::from_str(self.entry).map_err(|error| format!("its entry cannot be read: {error}"))?;
        Ok(Record { seq: self.seq, at: self.at()?, prev: self.prev.into(), entry, digest: self.digest.into() })
    }
}

/// Writes a record up to its digest, without the closing brace.
fn write_body(out: &mut Vec<u8>, seq: Seq, at: Timestamp, prev: &str, entry: &Entry) -> Result<(), serde_json::Error> {
    out.extend_from_slice(format!("{{\"seq\":{seq},\"at\":\"{at}\",\"prev\":\"{prev}\",\"entry\":").as_bytes());
    serde_json::to_writer(out, entry)
}

fn digest_of_body(body: &[u8]) -> String {
    let mut hasher = Sha256::new();
    hasher.update(body);
    hasher.update(b"}");
    hex(&hasher.finalize())
}

fn check_place(seq: Seq, prev: &str, expected_seq: Seq, expected_prev: &str) -> Result<(), String> {
    if seq != expected_seq {
        return Err(format!("it has number {seq} where {expected_seq} belongs"));
    }
    if prev != expected_prev {
        return Err("it does not follow the record before it".into());
    }
    Ok(())
}

fn check_digest(computed: &str, written: &str) -> Result<(), String> {
    if computed == written { Ok(()) } else { Err("its digest does not match: it was changed".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::StepId;

    fn entries() -> Vec<Entry> {
        let step = StepId::try_from("a").unwrap();
        vec![Entry::StepUndoing { step: step.clone() }, Entry::StepUndone { step, elapsed_ms: 3 }]
    }

    #[test]
    fn a_line_is_the_record_as_serde_writes_it() {
        let chained = chain(0, "", Timestamp::UNIX_EPOCH, entries()).unwrap();
        let lines = String::from_utf8(chained.lines).unwrap();
        for (line, record) in lines.lines().zip(&chained.records) {
            assert_eq!(line.trim(), serde_json::to_string(record).unwrap());
            assert_eq!(&Line::read(line.as_bytes()).unwrap().record().unwrap(), record);
        }
    }

    #[test]
    fn the_digest_is_that_of_the_line_without_it() {
        let chained = chain(0, "", Timestamp::UNIX_EPOCH, entries()).unwrap();
        for record in &chained.records {
            let mut value = serde_json::to_value(record).unwrap();
            value.as_object_mut().unwrap().remove("digest");
            assert_eq!(crate::sealed::sha256_hex(value.to_string().as_bytes()), record.digest);
        }
    }

    #[test]
    fn every_part_of_a_record_is_covered() {
        let chained = chain(4, "p", Timestamp::UNIX_EPOCH, entries()).unwrap();
        let record = &chained.records[0];
        assert_eq!(verify(record, 4, "p"), Ok(()));
        assert!(verify(record, 5, "p").is_err());
        assert!(verify(record, 4, "q").is_err());
        let moved = Record { at: Timestamp::now(), ..record.clone() };
        assert!(verify(&moved, 4, "p").is_err());
        let edited = Record { entry: chained.records[1].entry.clone(), ..record.clone() };
        assert!(verify(&edited, 4, "p").is_err());
        assert_eq!(verify(&chained.records[1], 5, &record.digest), Ok(()));
    }
}
