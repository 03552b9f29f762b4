//! `postgres.writes`: stops the writes of everybody else, and allows them again.
//!
//! ```text
//!   ALTER DATABASE … SET default_transaction_read_only = on ┐ one transaction,
//!   a row in the ledger: this run did it, this was found    ┘ exactly once
//!             │
//!   sessions that began before are ended: they have the old default
//!             │
//!   … the run's own sessions write on: the row tells them apart …
//!             │
//!   what was found is put back ┐ one transaction: `state: allowed`, the undo,
//!   and the row says so        ┘ or the end of the run
//!             │
//!   sessions that began meanwhile are ended: they have the read-only default
//! ```

mod sessions;
mod settings;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::PgConnection;
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;
use upgrade_core::units::Span;

use crate::error::{Doing, PostgresError};
use crate::ledger::Ledger;
use crate::session::Session;
use crate::target::Database;
use sessions::Patience;
use settings::Setting;

/// Configures `postgres.writes`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WritesConfig {
    /// The database.
    pub target: String,
    /// Whether others may write from here on.
    pub state: WritesState,
    /// How long a session may take to finish its transaction before it is ended. Default 5 s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace: Option<Span>,
    /// How long the sessions that are ended may take to be gone. Default 30 s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patience: Option<Span>,
}

/// Says whether others may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WritesState {
    /// Only the run itself writes, until a later step allows it again or the run is over.
    Stopped,
    /// What an earlier step of the run stopped is allowed again.
    Allowed,
}

/// Stops the writes of everybody else to a database, or allows them again.
///
/// # Guarantees
/// The settings found are put back exactly: their values, and that there was none.
///
/// # Caveats
/// A session that says itself that its transactions write can write on: see the page of the kind.
#[derive(Debug, Clone)]
pub struct Writes {
    config: WritesConfig,
    database: Arc<Database>,
}

/// Holds what was found, for every place where the setting has to change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WritesUndo {
    settings: Vec<Setting>,
    /// The step that stopped what this one allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    stopped_by: Option<String>,
}

/// Tells what became of the other sessions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WritesOutput {
    /// How many sessions were ended.
    pub ended: u64,
}

/// What the ledger keeps of a stop: while it is in force, the run's own sessions write.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Stopped {
    settings: Vec<Setting>,
    /// When, by the server's clock: sessions that began later have the read-only default.
    since: String,
    put_back: bool,
}

/// What the ledger keeps of a stop that was lifted by a later step.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Allowed {
    stopped_by: String,
    settings: Vec<Setting>,
    since: String,
    taken_back: bool,
}

const STOPPED: &str = "writes stopped";
const ALLOWED: &str = "writes allowed";

/// Tells whether writes are off because a step of this run has switched them off.
pub(crate) async fn stopped_by_run(ledger: &Ledger, connection: &mut PgConnection) -> Result<bool, PostgresError> {
    let in_force = in_force(ledger, connection).await?;
    Ok(in_force.is_some_and(|(_, stopped)| stopped.settings.iter().any(|setting| setting.role.is_none())))
}

/// Finds the stop of this run that no later step has lifted, with the marker of its step.
async fn in_force(ledger: &Ledger, connection: &mut PgConnection) -> Result<Option<(String, Stopped)>, PostgresError> {
    let allowed: Vec<(String, Allowed)> = ledger.of_run(&mut *connection, ALLOWED).await?;
    let stopped: Vec<(String, Stopped)> = ledger.of_run(connection, STOPPED).await?;
    let lifted = |marker: &str| allowed.iter().any(|(_, one)| one.stopped_by == marker && !one.taken_back);
    Ok(stopped.into_iter().find(|(marker, one)| !one.put_back && !lifted(marker)))
}

async fn is_lifted(ledger: &Ledger, connection: &mut PgConnection) -> Result<bool, PostgresError> {
    let allowed: Vec<(String, Allowed)> = ledger.of_run(connection, ALLOWED).await?;
    Ok(allowed.iter().any(|(_, one)| one.stopped_by == ledger.marker() && !one.taken_back))
}

async fn server_time(connection: &mut PgConnection) -> Result<String, PostgresError> {
    let now = sqlx::query_scalar("select clock_timestamp()::text").fetch_one(connection).await;
    now.doing(|| "reading the server's clock".into())
}

impl Writes {
    /// Makes the step from its configuration.
    ///
    /// # Errors
    /// The target is not a database.
    pub fn from_config(config: WritesConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let database = cx.target::<Database>(&config.target)?;
        Ok(Self { config, database })
    }

    fn patience(&self) -> Patience {
        Patience {
            grace: self.config.grace.map_or(Duration::from_secs(5), |span| span.0),
            end: self.config.patience.map_or(Duration::from_secs(30), |span| span.0),
        }
    }

    async fn prepare_stop(&self, session: &mut Session) -> Result<Prepared<WritesUndo, WritesOutput>, StepError> {
        settings::may_change(session).await?;
        let settings = settings::to_stop(session.connection()).await?;
        if settings.is_empty() {
            let reason = "writes are off by default already, by somebody else's doing";
            return Ok(Prepared::unchanged(WritesOutput { ended: 0 }, reason));
        }
        if settings.iter().any(|setting| setting.role.is_none()) {
            session.require_writable()?;
        }
        sessions::refuse_prepared_transactions(session.connection()).await?;
        let others = sessions::others(session, None, None).await?;
        sessions::may_end(session, &others).await?;
        let database = settings::database(session.connection()).await?;
        let ended = match others.len() {
            0 => "no session is ended".to_owned(),
            many => format!("{many} sessions are ended: {}", sessions::summary(&others)),
        };
        let change = Change::new(Effect::Modify, format!("writes to database {database}")).with_summary(format!(
            "stopped for everybody else until a later step allows them or the run ends: to write is an error meanwhile (25006); {ended}"
        ));
        let roles = settings.iter().filter_map(|setting| {
            let role = setting.role.as_ref()?;
            Some(
                Change::new(Effect::Modify, format!("default_transaction_read_only of role {role} in {database}"))
                    .with_summary(format!("{} → on", setting.shown())),
            )
        });
        let changes: Vec<_> = [change].into_iter().chain(roles).collect();
        Ok(Prepared::change(WritesUndo { settings, stopped_by: None }, changes))
    }

    async fn prepare_allow(
        &self,
        cx: &Context,
        session: &mut Session,
    ) -> Result<Prepared<WritesUndo, WritesOutput>, StepError> {
        let ledger = Ledger::of(&self.database, cx);
        let database = settings::database(session.connection()).await?;
        let change = Change::new(Effect::Modify, format!("writes to database {database}"))
            .with_summary("allowed again, as before they were stopped; sessions that began meanwhile are ended");
        if let Some((marker, stopped)) = in_force(&ledger, session.connection()).await? {
            let undo = WritesUndo { settings: stopped.settings, stopped_by: Some(marker) };
            return Ok(Prepared::change(undo, [change]));
        }
        if cx.is_dry_run() {
            return Ok(Prepared::change(WritesUndo { settings: Vec::new(), stopped_by: None }, [change]));
        }
        if session.facts().read_only {
            return Err(StepError::permanent("writes are off, but no step of this run has stopped them").with_hint(
                "let a step with `state: stopped` come before, or switch them on by hand: `alter database … reset default_transaction_read_only`",
            ));
        }
        Ok(Prepared::unchanged(WritesOutput { ended: 0 }, "writes are allowed"))
    }

    /// Sets what a stop means, having compared; `from` and `to` say which way.
    async fn swap(
        cx: &Context,
        connection: &mut PgConnection,
        settings: &[Setting],
        way: Way,
    ) -> Result<(), PostgresError> {
        for setting in settings {
            if !settings::is_there(connection, setting).await? {
                continue;
            }
            let present = settings::present(connection, setting).await?;
            let stopped = Some("on".to_owned());
            let (from, to) = match way {
                Way::Stop => (&setting.value, &stopped),
                Way::PutBack | Way::PutBackIfOurs => (&stopped, &setting.value),
            };
            if present == *to {
                continue;
            }
            if present != *from {
                if way == Way::PutBackIfOurs {
                    continue;
                }
                if cx.on_conflict() == OnConflict::Stop {
                    return Err(StepError::conflict(Conflict {
                        subject: setting.subject(),
                        found: setting.shown(),
                        intended: "on".into(),
                        present: settings::shown(present.as_deref()),
                    })
                    .into());
                }
            }
            settings::set(connection, setting, to.as_deref()).await?;
        }
        Ok(())
    }

    async fn stop(&self, cx: &Context, undo: &WritesUndo) -> Result<WritesOutput, StepError> {
        let mut session = self.database.connect(cx).await?;
        let ledger = Ledger::of(&self.database, cx);
        ledger.ensure(&mut session).await?;
        let kept = &ledger;
        let policy = self.database.lock_policy();
        policy
            .transaction(cx, &mut session, "stopping writes", move |connection, _| {
                Box::pin(async move {
                    if kept.get::<Stopped>(connection, STOPPED).await?.is_some() {
                        return Ok(());
                    }
                    sessions::refuse_prepared_transactions(connection).await?;
                    Self::swap(cx, connection, &undo.settings, Way::Stop).await?;
                    let since = server_time(connection).await?;
                    let row = Stopped { settings: undo.settings.clone(), since, put_back: false };
                    kept.put(connection, STOPPED, &row).await
                })
            })
            .await?;
        let ended = sessions::end(cx, &mut session, None, self.patience()).await?;
        session.close().await;
        Ok(WritesOutput { ended })
    }

    /// Puts back what a stop found, and ends the sessions that have its default.
    async fn put_back(&self, cx: &Context, way: Way) -> Result<(), StepError> {
        let mut session = self.database.connect(cx).await?;
        let ledger = Ledger::of(&self.database, cx);
        let kept = &ledger;
        let policy = self.database.lock_policy();
        let stopped = policy
            .transaction(cx, &mut session, "allowing writes again", move |connection, _| {
                Box::pin(async move {
                    let Some(mut row) = kept.get::<Stopped>(connection, STOPPED).await? else { return Ok(None) };
                    if row.put_back {
                        return Ok(Some(row));
                    }
                    if is_lifted(kept, connection).await? {
                        return Ok(None);
                    }
                    Self::swap(cx, connection, &row.settings, way).await?;
                    row.put_back = true;
                    kept.put(connection, STOPPED, &row).await?;
                    Ok(Some(row))
                })
            })
            .await?;
        if let Some(stopped) = stopped {
            sessions::end(cx, &mut session, Some(&stopped.since), self.patience()).await?;
        }
        ledger.clear(&mut session, &[]).await?;
        session.close().await;
        Ok(())
    }

    async fn allow(&self, cx: &Context, undo: &WritesUndo) -> Result<WritesOutput, StepError> {
        let mut session = self.database.connect(cx).await?;
        let ledger = Ledger::of(&self.database, cx);
        ledger.ensure(&mut session).await?;
        let kept = &ledger;
        let policy = self.database.lock_policy();
        let row = policy
            .transaction(cx, &mut session, "allowing writes again", move |connection, _| {
                Box::pin(async move {
                    if let Some(row) = kept.get::<Allowed>(connection, ALLOWED).await?
                        && !row.taken_back
                    {
                        return Ok(row);
                    }
                    let Some((marker, stopped)) = in_force(kept, connection)
                        .await?
                        .filter(|(marker, _)| undo.stopped_by.as_deref() == Some(marker.as_str()))
                    else {
                        return Err(StepError::permanent("what had stopped writes is not in force any more")
                            .with_hint("roll back and run again")
                            .into());
                    };
                    Self::swap(cx, connection, &stopped.settings, Way::PutBack).await?;
                    let row = Allowed {
                        stopped_by: marker,
                        settings: stopped.settings,
                        since: stopped.since,
                        taken_back: false,
                    };
                    kept.put(connection, ALLOWED, &row).await?;
                    Ok(row)
                })
            })
            .await?;
        let ended = sessions::end(cx, &mut session, Some(&row.since), self.patience()).await?;
        session.close().await;
        Ok(WritesOutput { ended })
    }

    /// Stops writes again, as they were before this step allowed them.
    async fn stop_again(&self, cx: &Context) -> Result<(), StepError> {
        let mut session = self.database.connect(cx).await?;
        let ledger = Ledger::of(&self.database, cx);
        let kept = &ledger;
        let policy = self.database.lock_policy();
        let taken_back = policy
            .transaction(cx, &mut session, "stopping writes again", move |connection, _| {
                Box::pin(async move {
                    let Some(mut row) = kept.get::<Allowed>(connection, ALLOWED).await? else { return Ok(false) };
                    if !row.taken_back {
                        Self::swap(cx, connection, &row.settings, Way::Stop).await?;
                        row.taken_back = true;
                        kept.put(connection, ALLOWED, &row).await?;
                    }
                    Ok(true)
                })
            })
            .await?;
        if taken_back {
            sessions::end(cx, &mut session, None, self.patience()).await?;
        }
        ledger.clear(&mut session, &[]).await?;
        session.close().await;
        Ok(())
    }
}

/// Says which way the settings go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Stop,
    PutBack,
    /// At the end of the run, where a foreign change is not undone and stops nothing.
    PutBackIfOurs,
}

#[async_trait]
impl Step for Writes {
    const KIND: &'static str = "postgres.writes";
    type Undo = WritesUndo;
    type Output = WritesOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<WritesUndo, WritesOutput>, StepError> {
        let mut session = self.database.connect(cx).await?;
        session.require_primary()?;
        let prepared = match self.config.state {
            WritesState::Stopped => self.prepare_stop(&mut session).await,
            WritesState::Allowed => self.prepare_allow(cx, &mut session).await,
        };
        session.close().await;
        prepared
    }

    async fn apply(&self, cx: &Context, undo: &WritesUndo) -> Result<WritesOutput, StepError> {
        match self.config.state {
            WritesState::Stopped => self.stop(cx, undo).await,
            WritesState::Allowed => self.allow(cx, undo).await,
        }
    }

    async fn settle(&self, cx: &Context, _undo: &WritesUndo) -> Result<(), StepError> {
        self.database.settle(cx).await
    }

    async fn commit(&self, cx: &Context, _undo: &WritesUndo) -> Result<(), StepError> {
        match self.config.state {
            WritesState::Stopped => self.put_back(cx, Way::PutBackIfOurs).await,
            WritesState::Allowed => {
                let mut session = self.database.connect(cx).await?;
                Ledger::of(&self.database, cx).clear(&mut session, &[]).await?;
                session.close().await;
                Ok(())
            }
        }
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![self.database.clone()]
    }
}

#[async_trait]
impl Rollback for Writes {
    async fn rollback(&self, cx: &Context, _: &WritesUndo, _: Option<&WritesOutput>) -> Result<(), StepError> {
        match self.config.state {
            WritesState::Stopped => self.put_back(cx, Way::PutBack).await,
            WritesState::Allowed => self.stop_again(cx).await,
        }
    }
}
