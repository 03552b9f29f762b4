//! Runs scripts, each with the rows that say so: in one transaction where a transaction takes it.

use futures_util::StreamExt as _;
use sqlx::{AssertSqlSafe, PgConnection};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use super::outside;
use crate::error::{Doing, PostgresError};
use crate::ledger::Ledger;
use crate::locking::LockPolicy;
use crate::migrations::Script;
use crate::migrations::script::{Statement, takes_a_role};
use crate::session::Session;
use crate::target::Database;

/// The codes of objects that are not there, or there already.
const NOT_AS_EXPECTED: [&str; 10] =
    ["42704", "42P01", "42703", "42883", "3F000", "42710", "42P07", "42701", "42723", "42P06"];

/// Names the lock under which migrations are applied: one orchestrator at a time on a database.
const LOCK: &str = "the migrations of this database";

/// Holds what one call works with.
pub(super) struct Work<'a> {
    pub(super) cx: &'a Context,
    pub(super) session: Session,
    pub(super) ledger: Ledger,
    pub(super) policy: LockPolicy,
}

/// Says how a script is run.
#[derive(Debug, Clone, Copy)]
pub(super) struct How<'a> {
    /// The note under which a script outside of a transaction keeps how far it came.
    pub(super) key: &'a str,
    /// Passes over what is done already: the script undoes one that was not finished.
    pub(super) partial: bool,
}

impl<'a> Work<'a> {
    /// Connects, and waits until no other run applies migrations to this database.
    pub(super) async fn begin(cx: &'a Context, database: &Database) -> Result<Self, StepError> {
        let mut session = database.connect(cx).await?;
        session.require_writable()?;
        let ledger = Ledger::of(database, cx);
        session.advisory_lock(cx, LOCK).await?;
        ledger.ensure(&mut session).await?;
        Ok(Self { cx, session, ledger, policy: database.lock_policy() })
    }

    /// Runs a script and writes the rows that go with it.
    pub(super) async fn run(&mut self, script: &Script, how: How<'_>, rows: &[String]) -> Result<(), PostgresError> {
        script.check()?;
        let done = match (script.outside_transaction, how.partial) {
            (true, _) => outside::run(self, script, how, rows).await,
            (false, true) => self.run_tolerantly(script, rows).await,
            (false, false) => {
                let role = if takes_a_role(script) { "reset session authorization; reset role;\n" } else { "" };
                let rows = rows.iter().map(|row| format!("{row};\n")).collect::<String>();
                // The script first: the server counts its positions from the start.
                let batch = format!("{}\n;{role}{rows}", script.text);
                self.transaction(script, 1, &script.text, batch).await
            }
        };
        if script.changes_session() && self.session.reset().await.is_err() {
            // A broken connection is told by what follows; what was done is known.
            tracing::debug!(file = script.file, "the session was not reset");
        }
        done
    }

    /// Runs statements in one transaction.
    pub(super) async fn transaction(
        &mut self,
        script: &Script,
        line: usize,
        text: &str,
        batch: String,
    ) -> Result<(), PostgresError> {
        let (batch, text) = (&batch, text);
        self.policy
            .transaction(self.cx, &mut self.session, &script.file, move |connection, _| {
                Box::pin(async move {
                    run_batch(connection, batch.clone())
                        .await
                        .map_err(|(done, error)| explained(script, Place::after(text, line, done), error))
                })
            })
            .await
    }

    /// Runs the undo of a script that was not finished: what is not there is passed over.
    async fn run_tolerantly(&mut self, script: &Script, rows: &[String]) -> Result<(), PostgresError> {
        let statements = script.statements()?;
        let (statements, rows) = (&statements, rows.join(";\n"));
        let rows = &rows;
        self.policy
            .transaction(self.cx, &mut self.session, &script.file, move |connection, _| {
                Box::pin(async move {
                    for statement in statements {
                        sqlx::raw_sql("savepoint upgrade_statement").execute(&mut *connection).await?;
                        let ran = sqlx::raw_sql(AssertSqlSafe(statement.text.clone())).execute(&mut *connection).await;
                        let end = match ran.map_err(PostgresError::from) {
                            Ok(_) => "release savepoint upgrade_statement",
                            Err(error) if is_not_as_expected(&error) => "rollback to savepoint upgrade_statement",
                            Err(error) => return Err(explained(script, Place::of(statement), error)),
                        };
                        sqlx::raw_sql(end).execute(&mut *connection).await?;
                    }
                    sqlx::raw_sql(AssertSqlSafe(rows.clone())).execute(connection).await?;
                    Ok(())
                })
            })
            .await
    }

    /// Writes rows in a transaction of their own.
    pub(super) async fn write(&mut self, what: &str, rows: &[String]) -> Result<(), PostgresError> {
        let sql = rows.join(";\n");
        let sql = &sql;
        self.policy
            .transaction(self.cx, &mut self.session, what, move |connection, _| {
                Box::pin(async move {
                    sqlx::raw_sql(AssertSqlSafe(sql.clone())).execute(connection).await?;
                    Ok(())
                })
            })
            .await
    }
}

/// Runs many statements; an error comes with how many were done before it.
pub(super) async fn run_batch(connection: &mut PgConnection, batch: String) -> Result<(), (usize, PostgresError)> {
    let mut done = 0;
    let mut answers = sqlx::raw_sql(AssertSqlSafe(batch)).execute_many(connection);
    while let Some(answer) = answers.next().await {
        answer.map_err(|error| (done, error.into()))?;
        done += 1;
    }
    Ok(())
}

/// Finds the line of the statement after so many, where the text can be taken apart.
fn line_of(text: &str, first: usize, done: usize) -> usize {
    let statements = Script::new("", text.to_owned()).statements().unwrap_or_default();
    match statements.as_slice() {
        // Of one alone, the server's own word is as good.
        [] | [_] => first,
        all => all.get(done).map_or(first, |statement| statement.line + first - 1),
    }
}

/// Tells whether a statement failed because what it speaks of is not there, or there already.
pub(super) fn is_not_as_expected(error: &PostgresError) -> bool {
    error.code().is_some_and(|code| NOT_AS_EXPECTED.contains(&code))
}

/// Says which part of a script ran.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    /// What was sent.
    pub(super) text: &'a str,
    /// The line of the file where that begins.
    pub(super) first: usize,
    /// The line of the statement that failed.
    pub(super) statement: usize,
}

impl<'a> Place<'a> {
    /// Places one statement.
    pub(super) fn of(statement: &'a Statement) -> Self {
        Self { text: &statement.text, first: statement.line, statement: statement.line }
    }

    /// Places what failed after so many statements of a text.
    pub(super) fn after(text: &'a str, first: usize, done: usize) -> Self {
        Self { text, first, statement: line_of(text, first, done) }
    }
}

/// Names file and line of what failed, and what to do where the server's words do not say it.
///
/// The server's own position counts within `text`, which begins at line `first` of the file;
/// without one, it is the statement at line `statement`.
pub(super) fn explained(script: &Script, place: Place<'_>, error: PostgresError) -> PostgresError {
    let lines = place.text.lines().count().max(1);
    let line = error.line_in(place.text).filter(|line| *line <= lines).map(|line| line + place.first - 1);
    let place = format!("{}, line {},", script.file, line.unwrap_or(place.statement));
    let hint = match error.code() {
        Some("25001") => {
            Some("begin the file with `-- no-transaction`: then it runs statement by statement outside of one")
        }
        Some("55P04") => Some("use the new value in a migration of its own, after the one that adds it"),
        _ => None,
    };
    let error = Err::<(), _>(error).doing(|| place).expect_err("an error stays one");
    match hint {
        Some(hint) => StepError::from(error).with_hint(hint).into(),
        None => error,
    }
}
