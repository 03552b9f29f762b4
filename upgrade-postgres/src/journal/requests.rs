//! Requests to drivers: a row each.

use upgrade_core::entry::Request;
use upgrade_core::journal::JournalError;
use upgrade_core::names::RunId;

use super::clerk::Clerk;
use super::failure::{damaged, server};

/// Leaves a request to the driver of a run that there is.
pub(super) async fn post(clerk: &Clerk, run: &RunId, request: &Request) -> Result<(), JournalError> {
    let doing = || server("leaving a request");
    let text = serde_json::to_string(request).map_err(|error| JournalError::Storage {
        action: "write a request to",
        path: clerk.table("requests").into(),
        source: error.into(),
    })?;
    let mut session = clerk.session().await?;
    // Both in one statement: the run is looked for, and a request that is there already is left.
    let there: bool = sqlx::query_scalar(
        "WITH posted AS (
            INSERT INTO requests (run, id, request) SELECT run, $2, $3 FROM runs WHERE run = $1
            ON CONFLICT (run, id) DO UPDATE SET request = excluded.request
        ) SELECT EXISTS (SELECT FROM runs WHERE run = $1)",
    )
    .bind(run.as_str())
    .bind(&request.id)
    .bind(text)
    .fetch_one(&mut *session)
    .await
    .map_err(doing())?;
    clerk.keep(session);
    if there { Ok(()) } else { Err(JournalError::NoRun(run.clone())) }
}

/// Reads the requests to a run, by id, which is by time.
pub(super) async fn list(clerk: &Clerk, run: &RunId) -> Result<Vec<Request>, JournalError> {
    let mut session = clerk.session().await?;
    let texts: Vec<String> = sqlx::query_scalar("SELECT request FROM requests WHERE run = $1 ORDER BY id")
        .bind(run.as_str())
        .fetch_all(&mut *session)
        .await
        .map_err(server("reading the requests to a run"))?;
    clerk.keep(session);
    (1..)
        .zip(&texts)
        .map(|(line, text)| {
            serde_json::from_str(text)
                .map_err(|error| damaged(&clerk.table("requests"), line, format!("not a request: {error}")))
        })
        .collect()
}

/// Removes a request.
pub(super) async fn withdraw(clerk: &Clerk, run: &RunId, id: &str) -> Result<(), JournalError> {
    let mut session = clerk.session().await?;
    // An id that PostgreSQL cannot hold names no row.
    if !id.contains('\0') {
        sqlx::query("DELETE FROM requests WHERE run = $1 AND id = $2")
            .bind(run.as_str())
            .bind(id)
            .execute(&mut *session)
            .await
            .map_err(server("withdrawing a request"))?;
    }
    clerk.keep(session);
    Ok(())
}
