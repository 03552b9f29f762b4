//! Reads runs, beside a driver or at rest, without a lock.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use super::scan::{damaged, scan, settled};
use super::storage;
use super::summary::check_header;
use crate::entry::{Entry, Record};
use crate::journal::chain::Line;
use crate::journal::{Fault, JournalError};
use crate::names::RunId;

fn open(path: &Path, run: &RunId) -> Result<File, JournalError> {
    File::open(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => JournalError::NoRun(run.clone()),
        _ => storage("open", path)(error),
    })
}

/// Reads all records of a run.
pub(super) fn load(path: &Path, run: &RunId) -> Result<Vec<Record>, JournalError> {
    let place = path.display().to_string();
    settled(&open(path, run)?, &place, |file| read_records(&mut reader(file), &place, Some(run)))
}

fn reader(file: &File) -> BufReader<&File> {
    BufReader::with_capacity(64 * 1024, file)
}

/// Reads records, whatever run they are of if none is named.
pub(super) fn read_records(
    reader: &mut impl BufRead,
    place: &str,
    run: Option<&RunId>,
) -> Result<Vec<Record>, JournalError> {
    let mut refused = None;
    let found = scan(
        reader,
        place,
        |line| {
            let record = line.record()?;
            if let (Entry::RunCreated(header), 0) = (&record.entry, record.seq) {
                check_header(header.format, &header.run, run.unwrap_or(&header.run), place).map_err(|error| {
                    let reason = error.to_string();
                    refused = Some(error);
                    reason
                })?;
            }
            Ok(record)
        },
        |line, reason| Err(damaged(place, line, reason)),
    );
    // What a header says of its format comes before what its line is called for it.
    refused.map_or_else(|| found.map(|found| found.items), Err)
}

/// Lists every damaged line of a run.
pub(super) fn verify(path: &Path, run: &RunId) -> Result<Vec<Fault>, JournalError> {
    let place = path.display().to_string();
    let file = open(path, run)?;
    let mut last = Vec::new();
    let answer = settled(&file, &place, |file| {
        let faults = faults_of(file, &place, run)?;
        let serious = faults.iter().find(|fault| !fault.harmless);
        let answer = serious.map_or(Ok(()), |fault| Err(damaged(&place, fault.line, fault.reason.as_str())));
        last = faults;
        answer
    });
    match answer {
        Ok(()) | Err(JournalError::Damaged { .. }) => Ok(last),
        Err(error) => Err(error),
    }
}

fn faults_of(file: &File, place: &str, run: &RunId) -> Result<Vec<Fault>, JournalError> {
    let mut faults = Vec::new();
    let found = scan(
        &mut reader(file),
        place,
        |line: &Line<'_>| {
            let record = line.record()?;
            match (&record.entry, record.seq) {
                (Entry::RunCreated(header), 0) => {
                    check_header(header.format, &header.run, run, place).map_err(|error| error.to_string())
                }
                _ => Ok(()),
            }
        },
        |line, reason| {
            faults.push(Fault { line, reason, harmless: false });
            Ok(())
        },
    );
    match found {
        Ok(found) => {
            if let Some(slot) = found.slots.broken {
                let reason = "this slot of the head is damaged; the other one stands".into();
                faults.push(Fault { line: slot as u64 + 1, reason, harmless: true });
            }
            if let Some((line, reason)) = found.torn {
                faults.push(Fault { line, reason: format!("a torn write: {reason}"), harmless: true });
            }
        }
        Err(JournalError::Damaged { line, reason, .. }) => faults.push(Fault { line, reason, harmless: false }),
        Err(error) => return Err(error),
    }
    faults.sort_by_key(|fault| fault.line);
    Ok(faults)
}
