//! Describes runs for a list without reading those that are over from end to end.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use jiff::Timestamp;
use semver::Version;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::run::{is_adoption, state_of};
use super::scan::{FIRST_LINE, damaged, read_head, scan, settled};
use super::storage;
use crate::entry::{Entry, Header};
use crate::journal::chain::Line;
use crate::journal::{JournalError, RunSummary};
use crate::names::{LockName, PipelineName, RunId};
use crate::transition::RunState;

/// The longest first record that is read for a list; it holds the whole pipeline.
const LONGEST_HEADER: u64 = 64 * 1024 * 1024;

/// Describes a run; one that is damaged is described as far as it can be.
pub(super) fn summarize(path: &Path, run: &RunId) -> RunSummary {
    let mut summary = RunSummary::unread(run);
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
    let (_, entry) = first_entry::<Entry>(reader, path, &place)?;
    match entry {
        Entry::RunCreated(header) => Ok(*header),
        _ => Err(damaged(&place, FIRST_LINE, "the first entry is not that of a run's creation")),
    }
}

/// Reads of a run's first entry what a list shows, and skips the pipeline that it holds.
#[derive(Deserialize)]
struct Described {
    r#type: String,
    format: u32,
    run: RunId,
    pipeline: PipelineName,
    environment: Option<String>,
    from: Option<Version>,
    to: Option<Version>,
    locks: Vec<LockName>,
    definition: Fingerprints,
}

#[derive(Deserialize)]
struct Fingerprints {
    fingerprint: String,
    base_fingerprint: String,
}

fn first_entry<E: DeserializeOwned>(
    reader: impl BufRead,
    path: &Path,
    place: &str,
) -> Result<(Timestamp, E), JournalError> {
    let mut first = Vec::new();
    reader.take(LONGEST_HEADER).read_until(b'\n', &mut first).map_err(storage("read", path))?;
    let read = |line| {
        let line = Line::read(line)?;
        let entry = serde_json::from_str(line.entry).map_err(|error| format!("its entry cannot be read: {error}"))?;
        Ok((line.at()?, entry))
    };
    first
        .strip_suffix(b"\n")
        .ok_or_else(|| "it is not terminated".to_owned())
        .and_then(read)
        .map_err(|reason| damaged(place, FIRST_LINE, reason))
}

fn fill(summary: &mut RunSummary, path: &Path) -> Result<(), JournalError> {
    let place = path.display().to_string();
    let file = File::open(path).map_err(storage("open", path))?;
    let length = file.metadata().map_err(storage("read", path))?.len();
    let mut reader = BufReader::with_capacity(16 * 1024, &file);
    let slots = read_head(&mut reader, &place)?;
    let (created, described) = first_entry::<Described>(reader, path, &place)?;
    summary.created = Some(created);
    describe(summary, described, &place)?;
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

fn describe(summary: &mut RunSummary, header: Described, place: &str) -> Result<(), JournalError> {
    if header.r#type != "run_created" {
        return Err(damaged(place, FIRST_LINE, "the first entry is not that of a run's creation"));
    }
    check_header(header.format, &header.run, &summary.run, place)?;
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
pub(super) fn check_header(format: u32, named: &RunId, run: &RunId, place: &str) -> Result<(), JournalError> {
    if named != run {
        return Err(damaged(place, FIRST_LINE, format!("it is the journal of run {named}")));
    }
    if format > crate::entry::ENTRY_FORMAT {
        return Err(JournalError::Format { place: place.into(), found: format, known: crate::entry::ENTRY_FORMAT });
    }
    Ok(())
}
