//! Damage to the file of a run: refused with its line, cut as a torn write, or mended; never
//! overlooked.
#![cfg(feature = "testkit")]
#![cfg(test)]

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;
use upgrade_core::entry::{Entry, Record};
use upgrade_core::journal::conformance::{created, entered, undoing};
use upgrade_core::journal::{FileJournal, Journal, JournalError, Lease, chain, file};
use upgrade_core::names::{LockName, RunId};
use upgrade_core::transition::RunState;

const HEAD: usize = 4096;
const SLOT: usize = HEAD / 2;

/// A run with the bytes of its file as a driver killed in its last append leaves them, and at rest.
struct Sample {
    directory: TempDir,
    journal: FileJournal,
    run: RunId,
    records: Vec<Record>,
    killed: Vec<u8>,
    rest: Vec<u8>,
    /// The heads as they were before each append.
    heads: Vec<Vec<u8>>,
}

impl Sample {
    async fn new(entries: usize) -> Self {
        Self::with_batches(&vec![1; entries - 1]).await
    }

    async fn with_batches(batches: &[usize]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let journal = FileJournal::open(directory.path()).unwrap();
        let run = RunId::generate();
        let held = lease(&journal).await;
        let mut records = journal.append(&held, &run, 0, &[created(&run, "sample")]).await.unwrap();
        let path = directory.path().join(format!("runs/{run}.jsonl"));
        let mut heads = Vec::new();
        for batch in batches {
            heads.push(std::fs::read(&path).unwrap()[..HEAD].to_vec());
            let at = records.len();
            let entries: Vec<_> = (at..at + batch).map(|number| undoing(&format!("s{number}"))).collect();
            records.extend(journal.append(&held, &run, at as u64, &entries).await.unwrap());
        }
        let mut killed = std::fs::read(&path).unwrap();
        // The head follows an append; the one of the last append is not written yet.
        killed[..HEAD].copy_from_slice(heads.last().unwrap());
        drop(held);
        let rest = std::fs::read(&path).unwrap();
        Self { directory, journal, run, records, killed, rest, heads }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join(format!("runs/{}.jsonl", self.run))
    }

    /// The place of each record's line, its end included.
    fn lines(&self) -> Vec<Range<usize>> {
        let mut start = HEAD;
        let lines = self.rest[HEAD..].split_inclusive(|byte| *byte == b'\n');
        lines
            .map(|line| {
                let range = start..start + line.len();
                start = range.end;
                range
            })
            .collect()
    }

    async fn load(&self, bytes: &[u8]) -> Result<Vec<Record>, JournalError> {
        std::fs::write(self.path(), bytes).unwrap();
        self.journal.load(&self.run).await
    }

    /// A driver takes the file up as it is, appends, and leaves it whole.
    async fn takes_up(&self, bytes: &[u8], kept: &[Record]) {
        std::fs::write(self.path(), bytes).unwrap();
        let held = lease(&self.journal).await;
        let more = self.journal.append(&held, &self.run, kept.len() as u64, &[undoing("more")]).await.unwrap();
        assert_eq!(self.journal.load(&self.run).await.unwrap(), [kept, &more].concat());
        drop(held);
        assert_eq!(self.journal.load(&self.run).await.unwrap(), [kept, &more].concat());
        assert_eq!(self.journal.verify(&self.run).await.unwrap(), []);
    }
}

async fn lease(journal: &FileJournal) -> Lease {
    journal.acquire(&[LockName::new("test", "lease").unwrap()], Duration::ZERO).await.unwrap()
}

#[track_caller]
fn damaged_line(answer: Result<Vec<Record>, JournalError>) -> u64 {
    match answer {
        Err(JournalError::Damaged { line, .. }) => line,
        Err(error) => panic!("damage, not {error}"),
        Ok(records) => panic!("damage, not {} records", records.len()),
    }
}

fn flipped(bytes: &[u8], bit: usize) -> Vec<u8> {
    let mut flipped = bytes.to_vec();
    flipped[bit / 8] ^= 1 << (bit % 8);
    flipped
}

/// Flips every bit of a part of an image, on all processors.
fn every_bit(image: &[u8], part: Range<usize>, check: impl Fn(usize, Result<Vec<Record>, JournalError>) + Sync) {
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for worker in 0..workers {
            let (check, bits) = (&check, part.start * 8 + worker..part.end * 8);
            scope.spawn(move || {
                for bit in bits.step_by(workers) {
                    check(bit, file::read_bytes(&flipped(image, bit)));
                }
            });
        }
    });
}

#[tokio::test]
async fn every_flipped_bit_of_the_head_is_harmless() {
    // Few records: each bit reads them all.
    let sample = Sample::new(3).await;
    for image in [&sample.rest, &sample.killed] {
        every_bit(image, 0..HEAD, |bit, answer| {
            assert_eq!(answer.unwrap(), sample.records, "bit {bit}");
        });
    }
}

#[tokio::test]
async fn every_flipped_bit_of_a_record_at_rest_is_refused_with_its_line() {
    let sample = Sample::new(50).await;
    let lines = sample.lines();
    assert_eq!(lines.len(), 50);
    for (number, line) in lines.into_iter().enumerate() {
        every_bit(&sample.rest, line, |bit, answer| {
            assert_eq!(damaged_line(answer), number as u64 + 3, "bit {bit}");
        });
    }
}

#[tokio::test]
async fn every_flipped_bit_of_the_append_in_flight_cuts_it() {
    let sample = Sample::new(50).await;
    let last = sample.lines().pop().unwrap();
    every_bit(&sample.killed, last.clone(), |bit, answer| {
        assert_eq!(answer.unwrap(), sample.records[..49], "bit {bit}");
    });
    every_bit(&sample.killed, last.end..last.end + 50, |bit, answer| {
        assert_eq!(answer.unwrap(), sample.records, "bit {bit} of the allocated space");
    });
}

#[tokio::test]
async fn a_damaged_slot_is_mended_by_the_next_append() {
    let sample = Sample::new(5).await;
    for image in [&sample.rest, &sample.killed] {
        for slot in [0, 1] {
            let bytes = flipped(image, (slot * SLOT + 30) * 8);
            std::fs::write(sample.path(), &bytes).unwrap();
            let faults = sample.journal.verify(&sample.run).await.unwrap();
            assert_eq!(faults.iter().map(|f| (f.line, f.harmless)).collect::<Vec<_>>(), [(slot as u64 + 1, true)]);
            sample.takes_up(&bytes, &sample.records).await;
        }
    }
    let both = flipped(&flipped(&sample.rest, 80), 8 * (SLOT + 80));
    assert_eq!(damaged_line(sample.load(&both).await), 1);
}

#[tokio::test]
async fn the_last_record_is_cut_off_at_every_byte() {
    let sample = Sample::new(6).await;
    let last = sample.lines().pop().unwrap();
    for end in last.start..last.end {
        // At rest, the head knows that it was there.
        assert_eq!(damaged_line(sample.load(&sample.rest[..end]).await), 8, "cut at {end}");
        // After a kill, it is a torn write: with and without the allocated space behind it.
        assert_eq!(sample.load(&sample.killed[..end]).await.unwrap(), sample.records[..5], "cut at {end}");
        let mut zeroed = sample.killed.clone();
        zeroed[end..last.end].fill(0);
        assert_eq!(sample.load(&zeroed).await.unwrap(), sample.records[..5], "cut at {end}");
        if end % 16 == 0 {
            sample.takes_up(&sample.killed[..end], &sample.records[..5]).await;
            sample.takes_up(&zeroed, &sample.records[..5]).await;
        }
    }
    assert_eq!(sample.load(&sample.killed[..last.end]).await.unwrap(), sample.records);
    sample.takes_up(&sample.killed[..last.end], &sample.records).await;
    sample.takes_up(&sample.killed, &sample.records).await;
}

#[tokio::test]
async fn an_append_of_several_entries_is_kept_entirely_or_not_at_all() {
    let sample = Sample::with_batches(&[2, 3]).await;
    let lines = sample.lines();
    for torn in &lines[3..] {
        let mut bytes = sample.killed.clone();
        bytes[torn.start + 5..torn.end - 5].fill(0);
        assert_eq!(sample.load(&bytes).await.unwrap(), sample.records[..3]);
        sample.takes_up(&bytes, &sample.records[..3]).await;
    }
}

#[tokio::test]
async fn appends_beyond_a_head_left_behind_are_kept_and_checked() {
    let sample = Sample::with_batches(&[1, 2, 1, 3, 2]).await;
    let lines = sample.lines();
    let first_beyond = [1, 2, 4, 5, 8];
    for (head, beyond) in sample.heads.iter().zip(first_beyond) {
        // A loss of power leaves the head behind; what follows was durable all the same.
        let mut bytes = sample.killed.clone();
        bytes[..HEAD].copy_from_slice(head);
        assert_eq!(sample.load(&bytes).await.unwrap(), sample.records);
        sample.takes_up(&bytes, &sample.records).await;
        for (number, line) in lines.iter().enumerate().skip(beyond) {
            for place in [line.start, line.start + 20, line.end - 5, line.end - 1] {
                let mut damaged = bytes.clone();
                damaged[place] ^= 1;
                let answer = sample.load(&damaged).await;
                match number {
                    // Of the last append, nothing is kept.
                    8 | 9 => assert_eq!(answer.unwrap(), sample.records[..8]),
                    // Another append follows: this one had returned.
                    _ => assert_eq!(damaged_line(answer), number as u64 + 3),
                }
            }
        }
    }
}

#[tokio::test]
async fn a_tail_cut_at_a_record_is_found() {
    let sample = Sample::new(8).await;
    for (number, line) in sample.lines().into_iter().enumerate() {
        let line_number = number as u64 + 3;
        assert_eq!(damaged_line(sample.load(&sample.rest[..line.start]).await), line_number);
        if number < 7 {
            assert_eq!(damaged_line(sample.load(&sample.killed[..line.start]).await), line_number);
        }
    }
    for end in 0..HEAD {
        assert_eq!(damaged_line(file::read_bytes(&sample.rest[..end])), 1);
    }
}

#[tokio::test]
async fn edited_deleted_inserted_and_reordered_lines_are_found() {
    let sample = Sample::new(10).await;
    let lines: Vec<Vec<u8>> = sample.lines().into_iter().map(|line| sample.rest[line].to_vec()).collect();
    let image = |lines: &[Vec<u8>]| [&sample.rest[..HEAD], &lines.concat()].concat();
    for place in 0..lines.len() {
        let number = place as u64 + 3;
        let mut deleted = lines.clone();
        deleted.remove(place);
        assert_eq!(damaged_line(sample.load(&image(&deleted)).await), number, "deleted");

        let mut inserted = lines.clone();
        inserted.insert(place, lines[place].clone());
        // The file is longer than the head says: what lies beyond was never acknowledged.
        let expected = if place == lines.len() - 1 { None } else { Some(number + 1) };
        let answer = sample.load(&image(&inserted)).await;
        match expected {
            Some(line) => assert_eq!(damaged_line(answer), line, "inserted"),
            None => assert_eq!(answer.unwrap(), sample.records),
        }

        if place > 0 {
            let mut swapped = lines.clone();
            swapped.swap(place - 1, place);
            assert_eq!(damaged_line(sample.load(&image(&swapped)).await), number - 1, "reordered");
        }

        // Edited with care: the digest of the line is right, and of the same length.
        let record = &sample.records[place];
        if let Entry::StepUndoing { step } = &record.entry {
            let other = step.as_str().replace('s', "t");
            let forged = chain::chain(record.seq, &record.prev, record.at, vec![undoing(&other)]).unwrap();
            let mut edited = lines.clone();
            edited[place] = forged.lines;
            let found = damaged_line(sample.load(&image(&edited)).await);
            assert_eq!(found, if place == 9 { 12 } else { number + 1 }, "edited");
        }
    }
}

#[tokio::test]
async fn a_tail_forged_with_all_its_digests_contradicts_the_head() {
    let sample = Sample::new(6).await;
    let kept = sample.lines()[2].end;
    let entries = (3..6).map(|number| undoing(&format!("t{number}"))).collect();
    let forged = chain::chain(3, &sample.records[2].digest, sample.records[3].at, entries).unwrap();
    let mut bytes = [&sample.rest[..kept], &forged.lines].concat();
    // Times differ in length; pad nothing: either the lengths agree and the digest does not, or
    // a line crosses the end that the head names.
    bytes.truncate(sample.rest.len());
    assert!(matches!(sample.load(&bytes).await, Err(JournalError::Damaged { .. })));
}

#[tokio::test]
async fn verify_names_every_damaged_line() {
    let sample = Sample::new(12).await;
    let lines = sample.lines();
    let mut bytes = sample.rest.clone();
    for place in [2, 3, 7] {
        bytes[lines[place].start + 40] ^= 1;
    }
    std::fs::write(sample.path(), &bytes).unwrap();
    let faults = sample.journal.verify(&sample.run).await.unwrap();
    assert_eq!(faults.iter().map(|f| (f.line, f.harmless)).collect::<Vec<_>>(), [(5, false), (6, false), (10, false)]);
    let foreign = RunId::generate();
    assert!(matches!(sample.journal.verify(&foreign).await, Err(JournalError::NoRun(_))));
}

#[tokio::test]
async fn a_damaged_run_is_listed_beside_the_others() {
    let sample = Sample::new(4).await;
    let held = lease(&sample.journal).await;
    let whole = RunId::generate();
    let entries = [created(&whole, "whole"), entered(RunState::Applying)];
    sample.journal.append(&held, &whole, 0, &entries).await.unwrap();
    let mut bytes = sample.rest.clone();
    bytes[sample.lines()[2].start + 40] ^= 1;
    std::fs::write(sample.path(), &bytes).unwrap();
    std::fs::write(sample.directory.path().join("runs/empty.jsonl"), "").unwrap();
    let runs = sample.journal.runs().await.unwrap();
    let of = |run: &str| runs.iter().find(|summary| summary.run.as_str() == run).unwrap();
    assert_eq!(of(whole.as_str()).damage, None);
    assert!(of(sample.run.as_str()).damage.as_ref().unwrap().contains("line 5"), "{runs:?}");
    assert_eq!(of(sample.run.as_str()).pipeline.as_ref().unwrap().as_str(), "sample");
    assert!(of("empty").damage.is_some());
}

#[tokio::test]
async fn a_run_under_another_name_or_of_a_newer_format_is_refused() {
    let sample = Sample::new(3).await;
    let other = RunId::generate();
    std::fs::copy(sample.path(), sample.directory.path().join(format!("runs/{other}.jsonl"))).unwrap();
    assert_eq!(damaged_line(sample.journal.load(&other).await), 3);

    let newer =
        String::from_utf8(sample.rest.clone()).unwrap().replace("\"format\":1,\"entries\"", "\"format\":9,\"entries\"");
    assert!(matches!(sample.load(newer.as_bytes()).await, Err(JournalError::Format { found: 9, .. })));

    let run = RunId::generate();
    let Entry::RunCreated(mut header) = created(&run, "newer") else { panic!("a header") };
    header.format = 9;
    let held = lease(&sample.journal).await;
    sample.journal.append(&held, &run, 0, &[Entry::RunCreated(header)]).await.unwrap();
    assert!(matches!(sample.journal.load(&run).await, Err(JournalError::Format { found: 9, .. })));
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..3000)) {
        let _ = file::read_bytes(&bytes);
    }
}
