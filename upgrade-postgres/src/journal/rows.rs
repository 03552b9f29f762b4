//! Reads records: each from the bytes that were written, in one consistent view of the run.

use sqlx::PgConnection;
use upgrade_core::entry::{ENTRY_FORMAT, Entry, Header, Record};
use upgrade_core::journal::{Fault, JournalError, chain};
use upgrade_core::names::{RunId, Seq};

use super::append::number;
use super::clerk::Clerk;
use super::failure::{damaged, server};

/// The head of a run, then its records: one statement, so that all are as of one instant.
const LOAD: &str = "
    SELECT entries AS seq, '' AS at, '' AS prev, '' AS entry, digest, true AS head FROM runs WHERE run = $1
    UNION ALL
    SELECT seq, at, prev, entry, digest, false FROM records WHERE run = $1
    ORDER BY head DESC, seq";

const FIRST: &str = "SELECT seq, at, prev, entry, digest FROM records WHERE run = $1 AND seq = 0";

/// Holds what was read of a run: its head, and the rows of its records.
struct Loaded {
    entries: i64,
    head: String,
    rows: Vec<Stored>,
}

/// Holds the columns of a record as they stand in the table.
struct Stored {
    seq: i64,
    at: String,
    prev: String,
    entry: String,
    digest: String,
}

/// Spells the line of a record up to its entry.
pub(super) fn before_entry(seq: Seq, at: &str, prev: &str) -> String {
    format!("{{\"seq\":{seq},\"at\":\"{at}\",\"prev\":\"{prev}\",\"entry\":")
}

/// Spells the line of a record behind its entry.
pub(super) fn after_entry(digest: &str) -> String {
    format!(",\"digest\":\"{digest}\"}}")
}

impl Stored {
    /// Reads the record, its digest checked over the bytes.
    fn record(&self) -> Result<Record, String> {
        let seq = Seq::try_from(self.seq).map_err(|_| format!("its number is {}", self.seq))?;
        let line = before_entry(seq, &self.at, &self.prev) + &self.entry + &after_entry(&self.digest);
        chain::read(line.as_bytes())
    }
}

/// Reads all records of a run.
pub(super) async fn load(clerk: &Clerk, run: &RunId) -> Result<Vec<Record>, JournalError> {
    let mut session = clerk.session().await?;
    let records = load_on(&mut session, clerk, run).await;
    if records.is_ok() {
        clerk.keep(session);
    }
    records
}

/// Reads all records of a run over a connection of the caller's.
pub(super) async fn load_on(
    connection: &mut PgConnection,
    clerk: &Clerk,
    run: &RunId,
) -> Result<Vec<Record>, JournalError> {
    let loaded = fetch(connection, run).await?;
    let place = place(clerk, run);
    let mut records = Vec::with_capacity(loaded.rows.len());
    let mut refused = None;
    examine(&loaded, run, |line, outcome| match outcome {
        Ok(record) => {
            if let Entry::RunCreated(header) = &record.entry
                && header.format > ENTRY_FORMAT
            {
                refused.get_or_insert(JournalError::Format {
                    place: place.clone(),
                    found: header.format,
                    known: ENTRY_FORMAT,
                });
            }
            records.push(record);
        }
        Err(reason) => drop(refused.get_or_insert_with(|| damaged(&place, line, reason))),
    });
    refused.map_or(Ok(records), Err)
}

/// Lists every row of a run that is not as it was written.
pub(super) async fn verify(clerk: &Clerk, run: &RunId) -> Result<Vec<Fault>, JournalError> {
    let mut session = clerk.session().await?;
    let loaded = fetch(&mut session, run).await?;
    clerk.keep(session);
    let mut faults = Vec::new();
    examine(&loaded, run, |line, outcome| {
        if let Err(reason) = outcome {
            faults.push(Fault { line, reason, harmless: false });
        }
    });
    Ok(faults)
}

/// Reads the description that a run begins with.
pub(super) async fn header(clerk: &Clerk, run: &RunId) -> Result<Header, JournalError> {
    let mut session = clerk.session().await?;
    let row: Option<(i64, String, String, String, String)> = sqlx::query_as(FIRST)
        .bind(run.as_str())
        .fetch_optional(&mut *session)
        .await
        .map_err(server("reading a run"))?;
    clerk.keep(session);
    let (seq, at, prev, entry, digest) = row.ok_or_else(|| JournalError::NoRun(run.clone()))?;
    let row = Stored { seq, at, prev, entry, digest };
    let place = place(clerk, run);
    match row.record().map(|record| record.entry) {
        Ok(Entry::RunCreated(header)) if header.format > ENTRY_FORMAT => {
            Err(JournalError::Format { place, found: header.format, known: ENTRY_FORMAT })
        }
        Ok(Entry::RunCreated(header)) if header.run == *run => Ok(*header),
        Ok(_) => Err(damaged(&place, 1, "the first entry is not that of this run's creation")),
        Err(reason) => Err(damaged(&place, 1, reason)),
    }
}

async fn fetch(connection: &mut PgConnection, run: &RunId) -> Result<Loaded, JournalError> {
    let rows: Vec<(i64, String, String, String, String, bool)> =
        sqlx::query_as(LOAD).bind(run.as_str()).fetch_all(connection).await.map_err(server("reading a run"))?;
    let mut rows = rows.into_iter().peekable();
    let Some((entries, .., head, _)) = rows.next_if(|(.., is_head)| *is_head) else {
        return Err(JournalError::NoRun(run.clone()));
    };
    let rows = rows.map(|(seq, at, prev, entry, digest, _)| Stored { seq, at, prev, entry, digest }).collect();
    Ok(Loaded { entries, head, rows })
}

/// Goes through the rows of a run; tells each record, or what is wrong with its row.
fn examine(loaded: &Loaded, run: &RunId, mut tell: impl FnMut(u64, Result<Record, String>)) {
    let (mut prev, mut expected) = (String::new(), 0);
    for row in &loaded.rows {
        let line = row.seq.unsigned_abs() + 1;
        let outcome = row.record().and_then(|record| {
            if record.seq != expected {
                return Err(format!("it has number {} where {expected} belongs: rows are missing", record.seq));
            }
            if record.prev != prev {
                return Err("it does not follow the record before it".into());
            }
            match &record.entry {
                Entry::RunCreated(header) if header.run != *run => Err(format!("it is of run {}", header.run)),
                Entry::RunCreated(_) if expected > 0 => Err("a run is created once".into()),
                Entry::RunCreated(_) => Ok(record),
                _ if expected == 0 => Err("the first entry is not that of a run's creation".into()),
                _ => Ok(record),
            }
        });
        expected = row.seq.unsigned_abs() + 1;
        prev.clone_from(&row.digest);
        tell(line, outcome);
    }
    // What was cut off at the end leaves a whole chain behind: the head knows better.
    if loaded.entries != number(expected) || loaded.head != prev {
        tell(expected, Err(format!("the run has {} entries by its head, and ends otherwise", loaded.entries)));
    }
}

/// Names the rows of a run in messages.
fn place(clerk: &Clerk, run: &RunId) -> String {
    format!("{} of run {run}", clerk.table("records"))
}
