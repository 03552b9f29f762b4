//! Recognises a pooler that gives each transaction another session.
//!
//! Behind one, a lease would be an advisory lock of whatever session came first, and two drivers
//! could hold it. With one client the sessions look stable: the pooler hands out the one that was
//! used last. So others are made to take it: while this connection rests, several more begin a
//! transaction each. In session mode none of them can get the session of a connection that is open;
//! otherwise the first of them gets it.

use std::time::Duration;

use sqlx::{Executor, Row};
use upgrade_core::journal::JournalError;

use super::clerk::{Clerk, Session};

/// How many others hold a transaction at once, so that the session is given out even where it is
/// not the next in the pooler's order.
const OTHERS: usize = 4;
/// How often it is tried: a session may be in use elsewhere for a moment.
const ROUNDS: usize = 3;
/// A pool may be exhausted: then nothing is learned, and the epoch and process that every append
/// compares keep the journal safe.
const PATIENCE: Duration = Duration::from_secs(2);

/// Refuses a way on which sessions change.
pub(super) async fn require_session_mode(clerk: &Clerk, session: &mut Session) -> Result<(), JournalError> {
    let mut others: Vec<Session> = Vec::new();
    for _ in 0..ROUNDS {
        let pid = session.facts.pid;
        // A pooler that takes its sessions in turn shows by itself, if it has more than one.
        for _ in 0..OTHERS {
            if process(session, "SELECT pg_backend_pid()").await?.is_some_and(|found| found != pid) {
                return Err(refusal());
            }
        }
        for number in 0..OTHERS {
            if others.len() == number {
                match tokio::time::timeout(PATIENCE, clerk.connect()).await {
                    Ok(Ok(other)) => others.push(other),
                    _ => break,
                }
            }
            match process(&mut others[number], "BEGIN; SELECT pg_backend_pid()").await? {
                Some(other) if other == pid => return Err(refusal()),
                Some(_) => {}
                None => break,
            }
        }
        for other in &mut others {
            let _ = tokio::time::timeout(PATIENCE, other.execute("ROLLBACK")).await;
        }
    }
    for other in others {
        other.end().await;
    }
    Ok(())
}

/// Asks for the process that serves a session; none if it does not answer in time.
async fn process(session: &mut Session, sql: &'static str) -> Result<Option<i32>, JournalError> {
    let asked = tokio::time::timeout(PATIENCE, session.fetch_all(sqlx::raw_sql(sql))).await;
    match asked {
        Ok(Ok(rows)) => Ok(rows.last().and_then(|row| row.try_get_unchecked::<&str, _>(0).ok()?.parse().ok())),
        // In statement mode a pooler refuses transactions.
        Ok(Err(error)) if error.to_string().contains("transaction blocks not allowed") => Err(refusal()),
        Ok(Err(error)) => Err(super::failure::server("asking for the mode of the pooler")(error)),
        Err(_) => Ok(None),
    }
}

fn refusal() -> JournalError {
    JournalError::Unusable {
        reason: "the pooler before the server gives each transaction another session, and a lease needs one that stays"
            .into(),
        hint: "let the pooler work in session mode for this database (PgBouncer: pool_mode = session), \
               or name the server itself in the URL"
            .into(),
    }
}
