//! `postgres.sql`: runs a statement, and another one to undo it, each exactly once.

use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use secrecy::ExposeSecret;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::{AssertSqlSafe, PgConnection};
use upgrade_core::AnyStep;
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::sealed::sha256_hex;
use upgrade_core::step::{Change, Effect, Prepared, Step};
use upgrade_core::target::Target;
use upgrade_core::text_or_secret::TextOrSecret;
use upgrade_core::undoable::{OptionalRollback, Undoable};

use crate::error::{Doing, PostgresError};
use crate::identifier::literal;
use crate::ledger::Ledger;
use crate::lint::leaves_transaction;
use crate::session::Session;
use crate::target::Database;

/// Configures `postgres.sql`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SqlConfig {
    /// The database.
    pub target: String,
    /// The statement; `$1`, `$2` stand for `parameters`.
    pub statement: String,
    /// The values of its parameters; the server gives each the type that the statement needs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parameters: Vec<Option<TextOrSecret>>,
    /// How many rows the statement affects; any other number undoes it and fails the step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<Rows>,
    /// The statement that undoes it. Without one the step is irreversible.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undo: Option<String>,
    /// The values of its parameters.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub undo_parameters: Vec<Option<TextOrSecret>>,
    /// How many rows the undo affects. Default: any number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undo_rows: Option<Rows>,
    /// A query for what the statement changes: a change of its answer by somebody else is noticed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// A query that answers true where there is nothing to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unless: Option<String>,
}

/// Bounds a number of rows: exactly so many, or from least to most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, deny_unknown_fields)]
pub enum Rows {
    /// Exactly so many.
    Exactly(u64),
    /// Between two bounds.
    Between {
        /// The least.
        #[serde(default)]
        min: u64,
        /// The most.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        max: Option<u64>,
    },
}

impl Rows {
    fn admits(self, rows: u64) -> bool {
        match self {
            Rows::Exactly(exactly) => rows == exactly,
            Rows::Between { min, max } => rows >= min && max.is_none_or(|max| rows <= max),
        }
    }
}

impl std::fmt::Display for Rows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Rows::Exactly(exactly) => write!(f, "{exactly}"),
            Rows::Between { min, max: Some(max) } => write!(f, "{min} to {max}"),
            Rows::Between { min, max: None } => write!(f, "at least {min}"),
        }
    }
}

/// Runs a statement in a transaction, exactly once, however often it is interrupted.
#[derive(Debug, Clone)]
pub struct Sql {
    config: SqlConfig,
    database: Arc<Database>,
}

/// Holds an [`Sql`] that can be undone by another statement.
pub type UndoableSql = Undoable<Sql>;

/// Holds what undoing a statement needs, whatever the pipeline says by then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SqlUndo {
    /// Digest of the answer of `state` before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    found: Option<String>,
    /// The statement, its parameters and the rows that it may affect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    undo: Option<Statement>,
    /// The query for the state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    state: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Statement {
    sql: String,
    parameters: Vec<Option<TextOrSecret>>,
    rows: Option<Rows>,
}

/// Tells what the statement did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SqlOutput {
    /// How many rows it affected.
    pub rows: u64,
}

/// What the ledger keeps of the statement, in its transaction.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Done {
    rows: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    intended: Option<String>,
}

const DONE: &str = "statement";

impl Sql {
    /// Makes the step from its configuration, without regard to whether it can be undone.
    ///
    /// # Errors
    /// The target is not a database, or a statement is empty.
    pub fn from_config(config: SqlConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let database = cx.target::<Database>(&config.target)?;
        let texts = [
            ("statement", Some(&config.statement)),
            ("undo", config.undo.as_ref()),
            ("state", config.state.as_ref()),
            ("unless", config.unless.as_ref()),
        ];
        if let Some((key, _)) = texts.iter().find(|(_, text)| text.is_some_and(|text| text.trim().is_empty())) {
            return Err(BuildError::new("the statement is empty").at(*key));
        }
        for (key, text) in [("statement", Some(&config.statement)), ("undo", config.undo.as_ref())] {
            if let Some(line) = text.and_then(|text| leaves_transaction(text)) {
                return Err(BuildError::new(format!("the statement in line {line} begins or ends a transaction"))
                    .at(key)
                    .with_hint("leave BEGIN, COMMIT and ROLLBACK out: the step runs all of it in one transaction"));
            }
        }
        if config.undo.is_none() && (!config.undo_parameters.is_empty() || config.undo_rows.is_some()) {
            return Err(BuildError::new("there is no `undo` that this could belong to").at("undo_parameters"));
        }
        Ok(Self { config, database })
    }

    /// Makes the step from its configuration: reversible with `undo`, irreversible without.
    ///
    /// # Errors
    /// As [`Sql::from_config`].
    pub fn any_from_config(config: SqlConfig, cx: &BuildContext) -> Result<AnyStep, BuildError> {
        Self::from_config(config, cx).map(AnyStep::optionally_reversible)
    }

    async fn begin_settled(&self, cx: &Context) -> Result<(Session, Ledger), StepError> {
        let mut session = self.database.connect(cx).await?;
        session.require_writable()?;
        let ledger = Ledger::of(&self.database, cx);
        ledger.ensure(&mut session).await?;
        Ok((session, ledger))
    }
}

/// Asks the server for the plan of a statement: that it can be understood, without running it.
async fn understood(connection: &mut PgConnection, sql: &str, what: &str) -> Result<(), PostgresError> {
    sqlx::raw_sql(AssertSqlSafe(format!("prepare upgrade_statement as {sql}")))
        .execute(&mut *connection)
        .await
        .doing(|| format!("understanding the {what}"))?;
    sqlx::raw_sql("deallocate upgrade_statement").execute(connection).await?;
    Ok(())
}

/// Runs a statement with its parameters and returns how many rows it affected.
async fn run(
    cx: &Context,
    connection: &mut PgConnection,
    sql: &str,
    parameters: &[Option<TextOrSecret>],
    rows: Option<Rows>,
    what: &str,
) -> Result<u64, PostgresError> {
    run_plain(cx, connection, sql, parameters, rows, what).await.map_err(|error| match error.code() {
        Some("25001") => StepError::from(error)
            .with_hint(
                "the step runs in a transaction: build and drop indexes with `postgres.index`, and run what else needs to \
                 be outside of one as a migration that begins with `-- no-transaction`",
            )
            .into(),
        _ => error,
    })
}

async fn run_plain(
    cx: &Context,
    connection: &mut PgConnection,
    sql: &str,
    parameters: &[Option<TextOrSecret>],
    rows: Option<Rows>,
    what: &str,
) -> Result<u64, PostgresError> {
    let affected = if parameters.is_empty() {
        sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(connection).await.doing(|| format!("the {what}"))?
    } else {
        let mut values = Vec::new();
        for parameter in parameters {
            values.push(match parameter {
                Some(value) => literal(value.resolve(cx).await?.expose_secret()),
                None => "null".to_owned(),
            });
        }
        // Of a literal, the server makes what the statement's parameter is; the driver would have to know.
        let values = values.join(", ");
        sqlx::raw_sql(AssertSqlSafe(format!("prepare upgrade_statement as {sql}")))
            .execute(&mut *connection)
            .await
            .doing(|| format!("understanding the {what}"))?;
        let affected = sqlx::raw_sql(AssertSqlSafe(format!("execute upgrade_statement({values})")))
            .execute(&mut *connection)
            .await
            .doing(|| format!("the {what}"));
        let affected = affected?;
        sqlx::raw_sql("deallocate upgrade_statement").execute(connection).await?;
        affected
    };
    let affected = affected.rows_affected();
    match rows {
        Some(rows) if !rows.admits(affected) => {
            Err(StepError::permanent(format!("the {what} affects {affected} rows, not {rows}"))
                .with_hint("look at its condition, or correct the number of rows; nothing was changed")
                .into())
        }
        _ => Ok(affected),
    }
}

/// Digests the answer of a query, whatever it is.
async fn state_of(connection: &mut PgConnection, query: &str) -> Result<String, PostgresError> {
    let rows: Option<String> = sqlx::query_scalar(AssertSqlSafe(format!(
        "select string_agg(state::text, e'\\n' order by state::text) from ({query}) as state"
    )))
    .fetch_one(connection)
    .await
    .doing(|| "the query for the state".into())?;
    Ok(sha256_hex(rows.unwrap_or_default().as_bytes()))
}

#[async_trait]
impl Step for Sql {
    const KIND: &'static str = "postgres.sql";
    type Undo = SqlUndo;
    type Output = SqlOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<SqlUndo, SqlOutput>, StepError> {
        let config = &self.config;
        let mut session = self.database.connect(cx).await?;
        session.require_writable()?;
        let canceller = session.canceller();
        let connection = session.connection();
        let asked = canceller
            .cancels(cx, async {
                if let Some(unless) = &config.unless {
                    let done: Option<bool> = sqlx::query_scalar(AssertSqlSafe(unless.clone()))
                        .fetch_optional(&mut *connection)
                        .await
                        .doing(|| "asking `unless`".into())?;
                    if done == Some(true) {
                        return Ok(None);
                    }
                }
                let found = match &config.state {
                    Some(query) => Some(state_of(&mut *connection, query).await?),
                    None => None,
                };
                if !config.parameters.is_empty() {
                    understood(&mut *connection, &config.statement, "statement").await?;
                }
                Ok(Some(found))
            })
            .await;
        session.close().await;
        let found = match asked {
            Ok(None) => return Ok(Prepared::unchanged(SqlOutput { rows: 0 }, "`unless` says so")),
            Ok(Some(found)) => found,
            // What it speaks of may be made by the steps that the plan has not run.
            Err(error) if cx.is_dry_run() && error.code().is_some_and(|code| code.starts_with("42")) => None,
            Err(error) => return Err(error.into()),
        };
        let undo = config.undo.as_ref().map(|sql| Statement {
            sql: sql.clone(),
            parameters: config.undo_parameters.clone(),
            rows: config.undo_rows,
        });
        let statement = config.statement.split_whitespace().collect::<Vec<_>>().join(" ");
        let change = Change::new(Effect::Run, statement);
        let change = match config.rows {
            Some(rows) => change.with_summary(format!("affects {rows} rows, or it fails")),
            None => change,
        };
        Ok(Prepared::change(SqlUndo { found, undo, state: config.state.clone() }, [change]))
    }

    async fn apply(&self, cx: &Context, undo: &SqlUndo) -> Result<SqlOutput, StepError> {
        let (mut session, ledger) = self.begin_settled(cx).await?;
        let (config, kept) = (&self.config, &ledger);
        let policy = self.database.lock_policy();
        let done = policy
            .transaction(cx, &mut session, "the statement", move |connection, _| {
                Box::pin(async move {
                    if let Some(done) = kept.get::<Done>(connection, DONE).await? {
                        return Ok(done);
                    }
                    if let (Some(query), Some(found)) = (&undo.state, &undo.found) {
                        let present = state_of(connection, query).await?;
                        if present != *found && cx.on_conflict() == OnConflict::Stop {
                            return Err(conflict(found, "what the statement makes of it", &present).into());
                        }
                    }
                    let rows =
                        run(cx, connection, &config.statement, &config.parameters, config.rows, "statement").await?;
                    let intended = match &undo.state {
                        Some(query) => Some(state_of(connection, query).await?),
                        None => None,
                    };
                    let done = Done { rows, intended };
                    kept.put(connection, DONE, &done).await?;
                    Ok(done)
                })
            })
            .await?;
        session.close().await;
        Ok(SqlOutput { rows: done.rows })
    }

    async fn settle(&self, cx: &Context, _undo: &SqlUndo) -> Result<(), StepError> {
        self.database.settle(cx).await
    }

    async fn commit(&self, cx: &Context, _undo: &SqlUndo) -> Result<(), StepError> {
        Ledger::forget(&self.database, cx).await
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![self.database.clone()]
    }
}

fn conflict(found: &str, intended: &str, present: &str) -> StepError {
    StepError::conflict(Conflict {
        subject: "what `state` asks for".into(),
        found: found.into(),
        intended: intended.into(),
        present: present.into(),
    })
}

#[async_trait]
impl OptionalRollback for Sql {
    fn irreversible_because(&self) -> Option<&'static str> {
        (self.config.undo.is_none()).then_some("no `undo` statement is given")
    }

    async fn rollback(&self, cx: &Context, undo: &SqlUndo, _output: Option<&SqlOutput>) -> Result<(), StepError> {
        let (mut session, ledger) = self.begin_settled(cx).await?;
        let policy = self.database.lock_policy();
        let kept = &ledger;
        policy
            .transaction(cx, &mut session, "the undo", move |connection, _| {
                Box::pin(async move {
                    // Nothing was done, or it is undone already.
                    let Some(done) = kept.get::<Done>(connection, DONE).await? else { return Ok(()) };
                    if let (Some(query), Some(found), Some(intended)) = (&undo.state, &undo.found, &done.intended) {
                        let present = state_of(connection, query).await?;
                        if present == *found {
                            return kept.remove(connection, DONE).await;
                        }
                        if present != *intended && cx.on_conflict() == OnConflict::Stop {
                            return Err(conflict(found, intended, &present).into());
                        }
                    }
                    if let Some(statement) = &undo.undo {
                        run(cx, connection, &statement.sql, &statement.parameters, statement.rows, "undo").await?;
                    }
                    kept.remove(connection, DONE).await
                })
            })
            .await?;
        ledger.clear(&mut session, &[]).await?;
        session.close().await;
        Ok(())
    }
}
