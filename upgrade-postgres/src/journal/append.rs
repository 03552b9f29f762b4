//! Appends: one statement, which checks the lease and the head of the run, and writes both.

use jiff::Timestamp;
use sqlx::{Connection, PgConnection};
use upgrade_core::entry::{Entry, Record};
use upgrade_core::journal::chain::{self, Chained};
use upgrade_core::journal::{JournalError, RunSummary};
use upgrade_core::names::{LockName, RunId, Seq};
use upgrade_core::transition::RunState;

use super::clerk::{ANSWER, Session};
use super::failure::{late, server};
use super::lease::{Driver, Head, Standing, State, key, loss};
use super::rows;

/// The row of the lease is locked: whoever takes the lease away waits for the append, and an append
/// that comes later does not find the row. The process of the session is compared because a pooler
/// in another mode than `session` would change it.
const APPEND: &str = "
    WITH lease AS MATERIALIZED (
        SELECT epoch FROM leases WHERE epoch = $1 AND pg_backend_pid() = $2 FOR SHARE
    ), head AS (
        UPDATE runs SET entries = $5, digest = $7, summary = $8
        FROM lease
        WHERE run = $3 AND entries = $4 AND digest = $6 AND runs.epoch = lease.epoch
        RETURNING run
    )
    INSERT INTO records (run, seq, at, prev, entry, digest)
    SELECT head.run, $4 + n - 1, $9, prev, entry, digest
    FROM head, unnest($10::text[], $11::text[], $12::text[]) WITH ORDINALITY AS new(prev, entry, digest, n)";

/// The same for the first append of a run.
const CREATE: &str = "
    WITH lease AS MATERIALIZED (
        SELECT epoch FROM leases WHERE epoch = $1 AND pg_backend_pid() = $2 FOR SHARE
    ), head AS (
        INSERT INTO runs (run, entries, digest, epoch, summary)
        SELECT $3, $5, $7, epoch, $8 FROM lease WHERE $4 = 0 AND $6 = ''
        ON CONFLICT (run) DO NOTHING
        RETURNING run
    )
    INSERT INTO records (run, seq, at, prev, entry, digest)
    SELECT head.run, $4 + n - 1, $9, prev, entry, digest
    FROM head, unnest($10::text[], $11::text[], $12::text[]) WITH ORDINALITY AS new(prev, entry, digest, n)";

impl Driver {
    pub(super) async fn append(&self, run: &RunId, at: Seq, entries: Vec<Entry>) -> Result<Vec<Record>, JournalError> {
        let mut state = self.turn().await?;
        if !state.runs.contains_key(run) {
            match self.claim(&mut state, run).await {
                Ok(Some(head)) => drop(state.runs.insert(run.clone(), head)),
                Ok(None) => {}
                Err(error @ JournalError::Server { .. }) => return Err(self.broken(&mut state, error).await),
                Err(error) => return Err(error),
            }
        }
        let head = state.runs.get(run).cloned();
        let actual = head.as_ref().map_or(0, |head| head.summary.entries);
        if actual != at {
            return Err(JournalError::Sequence { run: run.clone(), expected: at, actual });
        }
        if entries.is_empty() {
            return Ok(Vec::new());
        }
        let prev = head.as_ref().map_or("", |head| head.digest.as_str());
        let unwritable = |error: serde_json::Error| JournalError::Storage {
            action: "write an entry to",
            path: self.clerk().table("records").into(),
            source: error.into(),
        };
        // Whole microseconds, so that the text reads back as the time it is.
        let chained = chain::chain(at, prev, now(), entries).map_err(unwritable)?;
        let summary = match &head {
            Some(head) => {
                let mut summary = head.summary.clone();
                summary.follow(&chained.records);
                summary
            }
            None => RunSummary::of(run, &chained.records),
        };
        let digest = chained.records.last().map(|record| record.digest.clone()).unwrap_or_default();
        let next = Head { digest, summary };
        self.write(&mut state, run, at, prev, &chained, &next, head.is_none()).await?;
        state.runs.insert(run.clone(), next);
        Ok(chained.records)
    }

    #[expect(clippy::too_many_arguments, reason = "each is a column or decides between two statements")]
    async fn write(
        &self,
        state: &mut State,
        run: &RunId,
        at: Seq,
        prev: &str,
        chained: &Chained,
        next: &Head,
        is_new: bool,
    ) -> Result<(), JournalError> {
        const DOING: &str = "appending to the journal";
        let columns = Columns::of(chained);
        let over = next.summary.state.is_some_and(RunState::is_final);
        // A run that is over is listed for years: let its head tell, so that nobody reads the rest.
        let summary = over.then(|| serde_json::to_string(&next.summary)).transpose().map_err(|error| {
            JournalError::Storage { action: "describe", path: self.clerk().table("runs").into(), source: error.into() }
        })?;
        let Some(session) = state.session.as_mut() else { return Err(JournalError::Poisoned) };
        let pid = session.facts.pid;
        let appending = sqlx::query(if is_new { CREATE } else { APPEND })
            .bind(self.epoch())
            .bind(pid)
            .bind(run.as_str())
            .bind(number(at))
            .bind(number(next.summary.entries))
            .bind(prev)
            .bind(next.digest.as_str())
            .bind(summary)
            .bind(columns.at)
            .bind(&columns.prev)
            .bind(&columns.entry)
            .bind(&columns.digest)
            .execute(&mut **session);
        // Whatever comes now, until the answer is here nobody knows what the server has.
        state.standing = Standing::Failed;
        let written = match tokio::time::timeout(ANSWER, appending).await {
            Ok(Ok(done)) => done.rows_affected(),
            Ok(Err(error)) => {
                let answered = error.as_database_error().is_some_and(|error| {
                    error.code().is_some_and(|code| !code.starts_with("57P") && !code.starts_with("08"))
                });
                let error = server(DOING)(error);
                return Err(if answered { error } else { self.broken(state, error).await });
            }
            Err(_) => return Err(self.broken(state, late(DOING, ANSWER)).await),
        };
        if written == chained.records.len() as u64 {
            state.standing = Standing::Good;
            return Ok(());
        }
        let session = state.session.as_mut().expect("it was there a moment ago");
        match self.explain(session, run, at).await {
            // The run is somebody else's by now; so may be what else is under this lease.
            Ok(Refusal::Lost(reason)) => Err(state.lost(reason)),
            Ok(Refusal::Sequence(actual)) => {
                state.standing = Standing::Good;
                state.runs.remove(run);
                Err(JournalError::Sequence { run: run.clone(), expected: at, actual })
            }
            Err(error) => Err(error),
        }
    }

    /// Finds out why an append wrote nothing.
    async fn explain(&self, session: &mut Session, run: &RunId, at: Seq) -> Result<Refusal, JournalError> {
        let pid = session.facts.pid;
        let (there, same, entries, epoch): (bool, i32, Option<i64>, Option<i64>) = sqlx::query_as(
            "SELECT EXISTS (SELECT FROM leases WHERE epoch = $1), pg_backend_pid(),
                (SELECT entries FROM runs WHERE run = $2), (SELECT epoch FROM runs WHERE run = $2)",
        )
        .bind(self.epoch())
        .bind(run.as_str())
        .fetch_one(&mut **session)
        .await
        .map_err(server("appending to the journal"))?;
        let actual = entries.map_or(0, i64::unsigned_abs);
        if !there || same != pid {
            return Ok(Refusal::Lost(loss(there, same == pid)));
        }
        if actual != at {
            return Ok(Refusal::Sequence(actual));
        }
        Ok(Refusal::Lost(match epoch {
            Some(epoch) if epoch != self.epoch() => format!("the run is written under the lease of epoch {epoch}"),
            _ => loss(true, true),
        }))
    }

    /// Takes a run for this lease and reads it; none if there is no such run.
    ///
    /// Leases on other names must not let two drivers write one run.
    async fn claim(&self, state: &mut State, run: &RunId) -> Result<Option<Head>, JournalError> {
        let doing = || server("taking a run over");
        let Some(session) = state.session.as_mut() else { return Err(JournalError::Poisoned) };
        let mut transaction = session.begin().await.map_err(doing())?;
        // Ended here in either case: one that is only dropped keeps its locks until the next call.
        match self.claim_in(&mut transaction, run).await {
            Ok(head) => {
                transaction.commit().await.map_err(doing())?;
                Ok(head)
            }
            Err(error) => {
                transaction.rollback().await.map_err(doing())?;
                Err(error)
            }
        }
    }

    async fn claim_in(&self, connection: &mut PgConnection, run: &RunId) -> Result<Option<Head>, JournalError> {
        let doing = || server("taking a run over");
        let epoch: Option<i64> = sqlx::query_scalar("SELECT epoch FROM runs WHERE run = $1 FOR UPDATE")
            .bind(run.as_str())
            .fetch_optional(&mut *connection)
            .await
            .map_err(doing())?;
        let Some(epoch) = epoch else { return Ok(None) };
        if epoch != self.epoch() {
            let holder: Option<String> =
                sqlx::query_scalar("SELECT holder FROM leases WHERE epoch = $1 AND NOT pg_try_advisory_xact_lock($2)")
                    .bind(epoch)
                    .bind(key(self.clerk(), epoch))
                    .fetch_optional(&mut *connection)
                    .await
                    .map_err(doing())?;
            if let Some(holder) = holder {
                let lock = LockName::new("run", run.as_str()).expect("a run's id is printable");
                return Err(JournalError::Held { lock, holder });
            }
            sqlx::query("UPDATE runs SET epoch = $2 WHERE run = $1")
                .bind(run.as_str())
                .bind(self.epoch())
                .execute(&mut *connection)
                .await
                .map_err(doing())?;
        }
        let records = rows::load_on(connection, self.clerk(), run).await?;
        let digest = records.last().map(|record| record.digest.clone()).unwrap_or_default();
        Ok(Some(Head { digest, summary: RunSummary::of(run, &records) }))
    }
}

/// Says why an append wrote nothing.
enum Refusal {
    Lost(String),
    Sequence(Seq),
}

/// Holds the columns of new records.
struct Columns<'a> {
    at: String,
    prev: Vec<&'a str>,
    entry: Vec<&'a str>,
    digest: Vec<&'a str>,
}

impl<'a> Columns<'a> {
    fn of(chained: &'a Chained) -> Self {
        let text = std::str::from_utf8(&chained.lines).expect("JSON is UTF-8");
        let entry = chained.records.iter().zip(text.lines()).map(|(record, line)| {
            // The text as it stands in the line, which the digest is over.
            let line = line.trim_matches(' ');
            let start = rows::before_entry(record.seq, &record.at.to_string(), &record.prev).len();
            &line[start..line.len() - rows::after_entry(&record.digest).len()]
        });
        Self {
            at: chained.records.first().map(|record| record.at.to_string()).unwrap_or_default(),
            prev: chained.records.iter().map(|record| record.prev.as_str()).collect(),
            entry: entry.collect(),
            digest: chained.records.iter().map(|record| record.digest.as_str()).collect(),
        }
    }
}

fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_microsecond(now.as_microsecond()).unwrap_or(now)
}

/// Spells a count as PostgreSQL keeps it.
pub(super) fn number(count: Seq) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
