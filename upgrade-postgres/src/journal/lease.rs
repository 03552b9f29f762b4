//! Leases: a row each, which stands for as long as its session holds the advisory lock of its epoch.
//!
//! Lock names may overlap without being equal, as a directory does with what lies below it. So the
//! names are compared here, one who asks at a time (the door), and the server is only asked which of
//! the holders live.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::{AssertSqlSafe, Connection, Executor};
use tokio::sync::{Mutex, MutexGuard};
use upgrade_core::journal::{Hold, JournalError, RunSummary};
use upgrade_core::names::{Actor, LockName, RunId};

use super::clerk::{ANSWER, Clerk, Session};
use super::failure::{late, server};
use crate::session::advisory_key;

/// How long a `drop` waits for a lease to be given back.
const RELEASING: Duration = Duration::from_secs(2);

/// Keeps the session that holds a lease, and what is known of the runs that are written under it.
pub(super) struct Driver {
    clerk: Arc<Clerk>,
    epoch: i64,
    /// Appends of one lease wait for each other here.
    state: Mutex<State>,
}

pub(super) struct State {
    pub(super) standing: Standing,
    /// None once the connection was lost.
    pub(super) session: Option<Session>,
    pub(super) runs: BTreeMap<RunId, Head>,
}

/// Says whether a lease may still be written under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Standing {
    Good,
    /// An append was sent, and what became of it is not known.
    Failed,
    /// The lease is somebody else's, or nobody's.
    Lost(String),
}

/// What is known of a run that is written under a lease.
#[derive(Debug, Clone)]
pub(super) struct Head {
    pub(super) digest: String,
    pub(super) summary: RunSummary,
}

/// Keeps a lease on behalf of the executor.
pub(super) struct PostgresHold {
    driver: Arc<Driver>,
}

impl PostgresHold {
    /// Takes all the names, or none and says which is held.
    pub(super) async fn take(clerk: &Arc<Clerk>, names: &[LockName]) -> Result<Self, JournalError> {
        let mut session = clerk.session().await?;
        if session.facts.standby {
            return Err(JournalError::Unusable {
                reason: "the server is a standby and takes no writes".into(),
                hint: "name the primary in the URL; a standby serves `status` and `history`".into(),
            });
        }
        let taken = tokio::time::timeout(ANSWER, take(clerk, &mut session, names)).await;
        match taken.unwrap_or_else(|_| Err(late("taking a lease", ANSWER))) {
            Ok(epoch) => {
                let state = State { standing: Standing::Good, session: Some(session), runs: BTreeMap::new() };
                let driver = Driver { clerk: clerk.clone(), epoch, state: Mutex::new(state) };
                Ok(Self { driver: Arc::new(driver) })
            }
            Err(error @ JournalError::Held { .. }) => {
                clerk.keep(session);
                Err(error)
            }
            // Dropped, the connection takes along whatever it had locked.
            Err(error) => Err(error),
        }
    }

    pub(super) fn driver(&self) -> Arc<Driver> {
        self.driver.clone()
    }

    pub(super) fn epoch(&self) -> u64 {
        self.driver.epoch.unsigned_abs()
    }
}

/// Writes the row of a new lease and locks its epoch; answers the epoch.
async fn take(clerk: &Clerk, session: &mut Session, names: &[LockName]) -> Result<i64, JournalError> {
    let doing = || server("taking a lease");
    let mut transaction = session.begin().await.map_err(doing())?;
    sqlx::query("SELECT pg_advisory_xact_lock($1)")
        .bind(door(clerk))
        .execute(&mut *transaction)
        .await
        .map_err(doing())?;
    let rows: Vec<(i64, Vec<String>, String)> =
        sqlx::query_as("SELECT epoch, locks, holder FROM leases").fetch_all(&mut *transaction).await.map_err(doing())?;
    let keys: Vec<i64> = rows.iter().map(|(epoch, ..)| key(clerk, *epoch)).collect();
    // Whoever can lock the epoch of a lease knows that its holder is gone.
    let gone: Vec<bool> = sqlx::query_scalar(
        "SELECT pg_try_advisory_xact_lock(k) FROM unnest($1::bigint[]) WITH ORDINALITY AS t(k, n) ORDER BY n",
    )
    .bind(&keys)
    .fetch_all(&mut *transaction)
    .await
    .map_err(doing())?;
    let held: Vec<(LockName, &str)> = rows
        .iter()
        .zip(&gone)
        .filter(|(_, gone)| !**gone)
        .flat_map(|((_, locks, holder), _)| locks.iter().map(move |lock| (lock, holder.as_str())))
        .filter_map(|(lock, holder)| Some((LockName::try_from(lock.clone()).ok()?, holder)))
        .collect();
    for name in names {
        if let Some((_, holder)) = held.iter().find(|(lock, _)| lock.overlaps(name)) {
            let error = JournalError::Held { lock: name.clone(), holder: (*holder).to_owned() };
            transaction.rollback().await.map_err(doing())?;
            return Err(error);
        }
    }
    let dead: Vec<i64> = rows.iter().zip(&gone).filter(|(_, gone)| **gone).map(|((epoch, ..), _)| *epoch).collect();
    let epoch: i64 = sqlx::query_scalar(
        "WITH gone AS (DELETE FROM leases WHERE epoch = ANY ($1))
         INSERT INTO leases (epoch, locks, holder) VALUES (nextval('epochs'), $2, $3) RETURNING epoch",
    )
    .bind(dead)
    .bind(names.iter().map(LockName::as_str).collect::<Vec<_>>())
    .bind(Actor::current().to_string())
    .fetch_one(&mut *transaction)
    .await
    .map_err(doing())?;
    // Before the row can be seen: whoever sees it finds the lock.
    sqlx::query("SELECT pg_advisory_lock($1)")
        .bind(key(clerk, epoch))
        .execute(&mut *transaction)
        .await
        .map_err(doing())?;
    transaction.commit().await.map_err(doing())?;
    Ok(epoch)
}

fn door(clerk: &Clerk) -> i64 {
    advisory_key(&format!("journal {} door", clerk.table("leases")))
}

/// Makes the key of the advisory lock of an epoch.
pub(super) fn key(clerk: &Clerk, epoch: i64) -> i64 {
    advisory_key(&format!("journal {} epoch {epoch}", clerk.table("leases")))
}

impl Driver {
    pub(super) fn place(&self) -> &str {
        self.clerk.place()
    }

    pub(super) fn clerk(&self) -> &Clerk {
        &self.clerk
    }

    pub(super) fn epoch(&self) -> i64 {
        self.epoch
    }

    /// Waits for the turn to write; refused under a lease that may not be written under any more.
    pub(super) async fn turn(&self) -> Result<MutexGuard<'_, State>, JournalError> {
        let state = self.state.lock().await;
        match &state.standing {
            Standing::Good => Ok(state),
            Standing::Failed => Err(JournalError::Poisoned),
            Standing::Lost(reason) => Err(JournalError::LeaseLost { reason: reason.clone() }),
        }
    }

    async fn verify(&self) -> Result<(), JournalError> {
        let mut state = self.turn().await?;
        let Some(session) = state.session.as_mut() else { return Err(JournalError::Poisoned) };
        let (pid, asked) = (session.facts.pid, "asking for the lease");
        let asking = sqlx::query_as("SELECT EXISTS (SELECT FROM leases WHERE epoch = $1), pg_backend_pid()")
            .bind(self.epoch)
            .fetch_one(&mut **session);
        let answer: Result<(bool, i32), JournalError> = match tokio::time::timeout(ANSWER, asking).await {
            Ok(answer) => answer.map_err(server(asked)),
            Err(_) => Err(late(asked, ANSWER)),
        };
        match answer {
            Ok((true, same)) if same == pid => Ok(()),
            Ok((there, same)) => Err(state.lost(loss(there, same == pid))),
            Err(error) => Err(self.broken(&mut state, error).await),
        }
    }

    /// Finds out, over a connection of its own, what a broken connection means for the lease.
    pub(super) async fn broken(&self, state: &mut State, error: JournalError) -> JournalError {
        state.session = None;
        state.standing = Standing::Failed;
        // The server answers, so it is the connection that was ended; and the lease with it.
        match tokio::time::timeout(Duration::from_secs(2), self.clerk.connect()).await {
            Ok(Ok(session)) => {
                self.clerk.keep(session);
                let cause = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
                state.lost(format!("the connection that held it was ended: {cause}"))
            }
            _ => error,
        }
    }

    /// Gives the lease back; what cannot be told to the server it finds out by itself.
    async fn release(&self) {
        let mut state = self.state.lock().await;
        let Some(mut session) = state.session.take() else { return };
        let sql = format!(
            "DELETE FROM leases WHERE epoch = {}; SELECT pg_advisory_unlock({});",
            self.epoch,
            key(&self.clerk, self.epoch)
        );
        let released = session.execute(sqlx::raw_sql(AssertSqlSafe(sql)));
        match tokio::time::timeout(RELEASING / 2, released).await {
            Ok(Ok(_)) if state.standing == Standing::Good => self.clerk.keep(session),
            Ok(Ok(_)) => session.end().await,
            // Dropped, it is closed, which releases the lock.
            _ => {}
        }
    }
}

impl State {
    /// Remembers that the lease is lost.
    pub(super) fn lost(&mut self, reason: String) -> JournalError {
        self.standing = Standing::Lost(reason.clone());
        JournalError::LeaseLost { reason }
    }
}

/// Says how a lease was lost.
pub(super) fn loss(row_is_there: bool, same_process: bool) -> String {
    match (row_is_there, same_process) {
        (false, _) => "another driver took it, or it was removed from the journal by hand".into(),
        (true, false) => "a pooler gave its connection to another session: it must work in session mode".into(),
        (true, true) => "the journal was changed by hand".into(),
    }
}

#[async_trait]
impl Hold for PostgresHold {
    async fn verify(&self) -> Result<(), JournalError> {
        let driver = self.driver.clone();
        self.driver.clerk.run(async move { driver.verify().await }).await
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

impl Drop for PostgresHold {
    fn drop(&mut self) {
        let (driver, (done, told)) = (self.driver.clone(), std::sync::mpsc::sync_channel(1));
        self.driver.clerk.spawn(async move {
            driver.release().await;
            let _ = done.send(());
        });
        // Whoever wants the names next, perhaps this very task, finds them free.
        let _ = told.recv_timeout(RELEASING);
    }
}
