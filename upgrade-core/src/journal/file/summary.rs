//! Describes runs for a list without reading those that are over from end to end.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use jiff::Timestamp;

use super::run::{is_adoption, state_of};
use super::scan::{FIRST_LINE, damaged, read_head, scan, settled};
use super::storage;
use crate::entry::{Entry, Header};
use crate::journal::chain::Line;
use crate::journal::{JournalError, RunSummary};
use crate::names::RunId;
use crate::transition::RunState;

/// The longest first record that is read for a list; it holds the whole pipeline.
const LONGEST_HEADER: u64 = 64 * 1024 * 1024;

/// Describes a run; one that is damaged is described as far as it can be.
pub(super) fn summarize(path: &Path, run: &RunId) -> RunSummary {
    let mut summary = RunSummary {
        run: run.clone(),
        pipeline: None,
        environment: None,
        from: None,
        to: None,
        locks: Vec::new(),
        fingerprint: String::new(),
        base_fingerprint: String::new(),
        state: None,
        created: None,
        updated: None,
        entries: 0,
        damage: None,
    };
    if let Err(error) = fill(&mut summary, path) {
        let mut text = error.to_string();
        if let Some(source) = std::error::Error::source(&error) {
            text = format!("{text}: {source}");
        }
        summary.damage = Some(text);
    }
    summary
}

/// Reads the description that a run begins with, and nothing after it.
pub(super) fn header(path: &Path, run: &RunId) -> Result<Header, JournalError> {
    let file = match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(JournalError::NoRun(run.clone())),
        other => other.map_err(storage("open", path))?,
    };
    let place = path.display().to_string();
    let mut reader = BufReader::with_capacity(16 * 1024, &file);
    read_head(&mut reader, &place)?;
    first_entry(reader, path, &place).map(|(_, header)| header)
}

fn first_entry(reader: impl BufRead, path: &Path, place: &str) -> Result<(Timestamp, Header), JournalError> {
    let mut first = Vec::new();
    reader.take(LONGEST_HEADER).read_until(b'\n', &mut first).map_err(storage("read", path))?;
    let record = first
        .strip_suffix(b"\n")
        .ok_or_else(|| "it is not terminated".to_owned())
        .and_then(|line| Line::read(line)?.record())
        .map_err(|reason| damaged(place, FIRST_LINE, reason))?;
    match record.entry {
        Entry::RunCreated(header) => Ok((record.at, *header)),
        _ => Err(damaged(place, FIRST_LINE, "the first entry is not that of a run's creation")),
    }
}

fn fill(summary: &mut RunSummary, path: &Path) -> Result<(), JournalError> {
    let place = path.display().to_string();
    let file = File::open(path).map_err(storage("open", path))?;
    let length = file.metadata().map_err(storage("read", path))?.len();
    let mut reader = BufReader::with_capacity(16 * 1024, &file);
    let slots = read_head(&mut reader, &place)?;
    let (created, header) = first_entry(reader, path, &place)?;
    summary.created = Some(created);
    describe(summary, header, &place)?;
    let head = slots.value;
    // At rest, the head tells the state of a run that is over. A run that is not over may block
    // others: it is read whatever its head says.
    if let (true, Some(state)) = (head.length == length, head.state.filter(|state| state.is_final())) {
        summary.state = Some(state);
        summary.updated = head.updated;
        summary.entries = head.entries;
        return Ok(());
    }
    let found = settled(&file, &place, |file| {
        scan(
            &mut BufReader::with_capacity(64 * 1024, file),
            &place,
            |line| {
                if is_adoption(line.entry)
                    && let Entry::DefinitionAdopted { definition, .. } = line.record()?.entry
                {
                    summary.fingerprint = definition.fingerprint;
                    summary.base_fingerprint = definition.base_fingerprint;
                }
                Ok((line.at()?, state_of(line.entry)?))
            },
            |line, reason| Err(damaged(&place, line, reason)),
        )
    })?;
    summary.entries = found.items.len() as u64;
    summary.state = Some(found.items.iter().rev().find_map(|(_, state)| *state).unwrap_or(RunState::Checking));
    summary.updated = found.items.last().map(|(at, _)| *at);
    Ok(())
}

fn describe(summary: &mut RunSummary, header: Header, place: &str) -> Result<(), JournalError> {
    check_header(&header, &summary.run, place)?;
    summary.pipeline = Some(header.pipeline);
    summary.environment = header.environment;
    summary.from = header.from;
    summary.to = header.to;
    summary.locks = header.locks;
    summary.fingerprint = header.definition.fingerprint;
    summary.base_fingerprint = header.definition.base_fingerprint;
    Ok(())
}

/// Checks that a run is the one that its file is named after, in a format that is known.
pub(super) fn check_header(header: &Header, run: &RunId, place: &str) -> Result<(), JournalError> {
    if header.run != *run {
        return Err(damaged(place, FIRST_LINE, format!("it is the journal of run {}", header.run)));
    }
    if header.format > crate::entry::ENTRY_FORMAT {
        return Err(JournalError::Format {
            place: place.into(),
            found: header.format,
            known: crate::entry::ENTRY_FORMAT,
        });
    }
    Ok(())
}
