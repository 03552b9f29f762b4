//! The ranges of a walk and how far each is done, kept in the database.
//!
//! Each batch is one row of a table of the step's own, written by the statement that writes the
//! batch: rows and bookmark are there together or not at all. The bookmark is the last row of a
//! range. Its primary key is the batch's place, so that no two sessions do the same batch.
//!
//! Batches commit asynchronously. A server that crashes may lose the last of them, but rows and
//! bookmark are lost together, and what is lost is done again; the transaction that notes the end
//! commits synchronously, and with it all before it are on disk.

use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use super::statements::{Work, built};
use crate::error::{Doing, PostgresError};
use crate::identifier::TableName;
use crate::ledger::Ledger;
use crate::locking::LockPolicy;
use crate::session::Session;

/// Tables below this size are walked in one range.
const SMALL: u64 = 20_000;
/// How many pages are looked at to part a table.
const SAMPLED_PAGES: f64 = 400.0;

/// Bounds a part of the key: after `after`, up to `upto`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// The key before the first; none from the beginning on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Vec<String>>,
    /// The last key; none to the end, wherever that is by then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upto: Option<Vec<String>>,
}

/// What the ledger keeps of a walk: its ranges, once they are chosen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Walk {
    pub(crate) ranges: Vec<Range>,
    /// About how many rows are walked.
    pub(crate) total: Option<u64>,
}

/// How far a range is done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Bookmark {
    /// The number of the next batch.
    pub(crate) number: i32,
    pub(crate) after: Option<Vec<String>>,
    pub(crate) done: bool,
}

const WALK: &str = "walk";

/// Makes neighbouring ranges of the keys that part them.
pub(crate) fn ranges(parting: &[Vec<String>]) -> Vec<Range> {
    let mut ranges = vec![Range::default()];
    for key in parting {
        if let Some(last) = ranges.last_mut() {
            last.upto = Some(key.clone());
        }
        ranges.push(Range { after: Some(key.clone()), upto: None });
    }
    ranges
}

/// Finds the walk that was begun, or begins one: chooses the ranges and makes the table of batches.
pub(crate) async fn begin(
    cx: &Context,
    session: &mut Session,
    ledger: &Ledger,
    work: &Work,
    side: &TableName,
    (estimate, parts): ((Option<u64>, i64), usize),
) -> Result<Walk, StepError> {
    if let Some(walk) = ledger.get::<Walk>(session.connection(), WALK).await? {
        return Ok(walk);
    }
    let (total, size) = estimate;
    let mut parting: Vec<Vec<String>> = Vec::new();
    let pages = (size as f64 / 8192.0).max(1.0);
    let percent = (100.0 * SAMPLED_PAGES / pages).min(100.0);
    let large = total.is_none_or(|rows| rows >= SMALL) && pages > 50.0;
    if let Some(sql) = work.parting(parts, percent).filter(|_| large && parts > 1) {
        let canceller = session.canceller();
        let sampling = async {
            sqlx::query_scalar(built(&sql)).fetch_all(session.connection()).await.doing(|| "sampling the keys".into())
        };
        parting = canceller.cancels(cx, sampling).await?;
        // The largest key of the sample is not that of the table: the last range is open.
        parting.pop();
        parting.dedup();
    }
    let walk = Walk { ranges: ranges(&parting), total };
    let (kept, noted, sql) = (ledger, &walk, work.plan.make_side(side));
    let made = LockPolicy::default()
        .transaction(cx, session, "making the table of batches", move |connection, _| {
            let sql = sql.clone();
            Box::pin(async move {
                sqlx::raw_sql(built(&sql))
                    .execute(&mut *connection)
                    .await
                    .doing(|| "making the table of batches".into())?;
                kept.put(connection, WALK, noted).await
            })
        })
        .await;
    made?;
    Ok(walk)
}

/// Reads how far a range is done.
pub(crate) async fn read(
    connection: &mut PgConnection,
    side: &TableName,
    (pass, range): (i32, i32),
) -> Result<Bookmark, PostgresError> {
    let last: Option<(i32, Option<Vec<String>>, bool)> = sqlx::query_as(built(&format!(
        "select number, upto, done from {side} where pass = $1 and range = $2 order by number desc limit 1"
    )))
    .bind(pass)
    .bind(range)
    .fetch_optional(connection)
    .await
    .doing(|| "reading the bookmark".into())?;
    Ok(last.map_or_else(Bookmark::default, |(number, after, done)| Bookmark { number: number + 1, after, done }))
}

/// Sums up what is done: rows walked, rows written, and the last pass that was begun.
pub(crate) async fn sums(connection: &mut PgConnection, side: &TableName) -> Result<(u64, u64, i32), PostgresError> {
    let (walked, rows, pass): (i64, i64, i32) = sqlx::query_as(built(&format!(
        "select coalesce(sum(walked), 0)::int8, coalesce(sum(rows), 0)::int8, coalesce(max(pass), 0) from {side}"
    )))
    .fetch_one(connection)
    .await
    .doing(|| "reading what is done".into())?;
    Ok((u64::try_from(walked).unwrap_or(0), u64::try_from(rows).unwrap_or(0), pass))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_meet_and_leave_nothing_out() {
        let key = |text: &str| vec![text.to_owned()];
        assert_eq!(ranges(&[]), [Range::default()]);
        let parted = ranges(&[key("10"), key("20")]);
        assert_eq!(
            parted,
            [
                Range { after: None, upto: Some(key("10")) },
                Range { after: Some(key("10")), upto: Some(key("20")) },
                Range { after: Some(key("20")), upto: None },
            ]
        );
    }
}
