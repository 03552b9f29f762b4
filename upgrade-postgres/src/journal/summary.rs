//! Describes runs for a list without reading those that are over from end to end.

use upgrade_core::journal::{JournalError, RunSummary};
use upgrade_core::names::RunId;

use super::clerk::Clerk;
use super::failure::server;
use super::rows;

/// The last record is looked for beside the head, so that a run whose end was cut off shows.
const LIST: &str = "
    SELECT run, entries, summary, digest = coalesce(
        (SELECT last.digest FROM records AS last WHERE last.run = runs.run ORDER BY seq DESC LIMIT 1), '')
    FROM runs ORDER BY run";

/// Lists the runs, oldest first.
pub(super) async fn list(clerk: &Clerk) -> Result<Vec<RunSummary>, JournalError> {
    let mut session = clerk.session().await?;
    let heads: Vec<(String, i64, Option<String>, bool)> =
        sqlx::query_as(LIST).fetch_all(&mut *session).await.map_err(server("listing the runs"))?;
    let mut runs = Vec::with_capacity(heads.len());
    for (name, entries, summary, ends_so) in heads {
        let Ok(run) = RunId::try_from(name.clone()) else { continue };
        let told = summary
            .and_then(|text| serde_json::from_str::<RunSummary>(&text).ok())
            .filter(|told| ends_so && told.run == run && told.entries == entries.unsigned_abs());
        // A run that is not over may block others: it is read whatever its head says.
        runs.push(match told {
            Some(told) => told,
            None => match rows::load_on(&mut session, clerk, &run).await {
                Ok(records) => RunSummary::of(&run, &records),
                Err(error @ (JournalError::Damaged { .. } | JournalError::Format { .. })) => {
                    RunSummary { damage: Some(error.to_string()), state: None, ..RunSummary::of(&run, &[]) }
                }
                // Removed since it was listed.
                Err(JournalError::NoRun(_)) => continue,
                Err(error) => return Err(error),
            },
        });
    }
    clerk.keep(session);
    runs.sort_by(|a, b| (a.created, &a.run).cmp(&(b.created, &b.run)));
    Ok(runs)
}
