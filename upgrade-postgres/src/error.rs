//! Errors of a server or of the way to it, as a step reports them.
//!
//! The codes are those of Appendix A of PostgreSQL's documentation, "PostgreSQL Error Codes".

use std::io::ErrorKind;

use sqlx::postgres::{PgDatabaseError, PgErrorPosition};
use upgrade_core::context::Context;
use upgrade_core::error::{Class, StepError};

/// Says why work on a server failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PostgresError {
    /// The server refused a statement, or it is not to be reached.
    #[error("{doing} failed")]
    Sql {
        /// What was tried: "reading the history".
        doing: String,
        /// What the server or the connection said.
        source: sqlx::Error,
    },
    /// Anything else, as a step reports it already.
    #[error(transparent)]
    Step(#[from] StepError),
}

impl From<sqlx::Error> for PostgresError {
    fn from(source: sqlx::Error) -> Self {
        Self::Sql { doing: "a statement".into(), source }
    }
}

/// Says what was tried when a statement failed.
pub trait Doing<T> {
    /// Names what was tried: "reading the history".
    ///
    /// # Errors
    /// The one that there was.
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, PostgresError>;
}

impl<T, E: Into<PostgresError>> Doing<T> for Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, PostgresError> {
        self.map_err(|error| match error.into() {
            PostgresError::Sql { source, .. } => PostgresError::Sql { doing: what(), source },
            other @ PostgresError::Step(_) => other,
        })
    }
}

impl PostgresError {
    /// Returns the server's error code, if the server answered.
    pub fn code(&self) -> Option<&str> {
        self.server().map(PgDatabaseError::code)
    }

    /// Returns the line of `sql` that the server complained about, from one.
    pub fn line_in(&self, sql: &str) -> Option<usize> {
        let PgErrorPosition::Original(position) = self.server()?.position()? else { return None };
        Some(sql.chars().take(position.saturating_sub(1)).filter(|c| *c == '\n').count() + 1)
    }

    /// Tells whether another session's locks or transactions were in the way, and nothing was done.
    pub fn is_contention(&self) -> bool {
        matches!(self.code(), Some("55P03" | "40P01" | "40001"))
    }

    /// Tells whether the connection ended, so that nobody knows whether the last statement was done.
    pub fn is_connection_lost(&self) -> bool {
        match self {
            Self::Sql { source: sqlx::Error::Io(_) | sqlx::Error::WorkerCrashed, .. } => true,
            _ => matches!(self.code(), Some(code) if code.starts_with("08") || code.starts_with("57P")),
        }
    }

    fn server(&self) -> Option<&PgDatabaseError> {
        match self {
            Self::Sql { source: sqlx::Error::Database(error), .. } => error.try_downcast_ref(),
            _ => None,
        }
    }
}

impl From<PostgresError> for StepError {
    fn from(error: PostgresError) -> Self {
        let (doing, source) = match error {
            PostgresError::Step(error) => return error,
            PostgresError::Sql { doing, source } => (doing, source),
        };
        let Some(server) = source.as_database_error().and_then(|e| e.try_downcast_ref::<PgDatabaseError>()) else {
            return of_connection(&doing, &source);
        };
        // What a pooler that gives each transaction another session makes of a prepared statement.
        if matches!(server.code(), "26000" | "42P05") && server.message().contains("\"sqlx_s_") {
            return transaction_pooler().with_cause(&source);
        }
        let (class, hint) = advice(server.code(), server.message());
        let mut error = StepError::new(class, format!("{doing} failed: {} ({})", server.message(), server.code()));
        if let Some(hint) = hint.or(server.hint()) {
            error = error.with_hint(hint);
        }
        let said = [
            server.detail().map(|text| format!("DETAIL: {text}")),
            server.r#where().map(|text| format!("CONTEXT: {text}")),
        ];
        let said: Vec<_> = said.into_iter().flatten().collect();
        if said.is_empty() { error } else { error.with_detail(said.join("\n")) }
    }
}

/// Classes what a server answered, with the line that tells what to do.
fn advice<'a>(code: &str, message: &str) -> (Class, Option<&'a str>) {
    use Class::{Permanent, Transient, Unknown};
    let (class, hint) = match code {
        "28P01" => (Permanent, "check the user and the password of the target's `url`, or its `password` reference"),
        "28000" if message.contains("no encryption") || message.contains("SSL off") => (
            Permanent,
            "the server asks for TLS: add `?sslmode=require` (or verify-full with `sslrootcert`) to the URL",
        ),
        "28000" => (Permanent, "let pg_hba.conf of the server allow this user, database and address"),
        "3D000" => (Permanent, "check the database's name in the target's `url`"),
        "42501" => (Permanent, "grant the privilege to the user of the target's `url`, or connect as the owner"),
        "25006" => (Permanent, "connect to the primary: this server, database or user is read-only"),
        "53100" => (Permanent, "free space on the server's disk (old WAL, logs, backups), then try again"),
        "53300" => (Transient, "raise max_connections, or end sessions that are not used"),
        "57P01" | "57P02" | "57P03" => {
            (Transient, "the server is starting or stopping: `upgrade resume` when it is back")
        }
        "55P03" => (Transient, "another session holds the lock: end it, or raise `lock_budget` on the target"),
        "40P01" | "40001" => (Transient, "another transaction was in the way: it is worth trying again"),
        "57014" if message.contains("statement timeout") => {
            (Permanent, "raise `statement_timeout` on the target, or make the statement cheaper")
        }
        "57014" => (Transient, "the statement was cancelled: `upgrade resume` goes on"),
        "XX001" | "XX002" => (Permanent, "the server reports damaged data: restore it before you upgrade"),
        code if code.starts_with("08") => {
            (Transient, "the connection broke: `upgrade resume` when the server is reachable")
        }
        code if code.starts_with("53") || code.starts_with("58") => {
            (Transient, "look at the server's memory, disk and log")
        }
        code if code.starts_with("XX") => (Unknown, "look at the server's log"),
        _ => return (Permanent, None),
    };
    (class, Some(hint))
}

fn of_connection(doing: &str, source: &sqlx::Error) -> StepError {
    let tls = (
        Class::Permanent,
        "the server may not offer TLS, or its certificate is not trusted: see `sslmode` and `sslrootcert` in the URL",
    );
    let (class, hint) = match source {
        // What the driver makes of a handshake that failed.
        sqlx::Error::Io(error) if error.kind() == ErrorKind::InvalidData => tls,
        sqlx::Error::Io(_) | sqlx::Error::WorkerCrashed | sqlx::Error::PoolTimedOut => {
            (Class::Transient, "check that the server runs and that host and port of the target's `url` lead to it")
        }
        sqlx::Error::Tls(_) => tls,
        sqlx::Error::Configuration(_) => {
            (Class::Permanent, "write the target's `url` as postgres://USER@HOST:PORT/DATABASE")
        }
        _ => (Class::Unknown, "this is not expected of a server: look at its log, and report it"),
    };
    StepError::new(class, format!("{doing} failed")).with_cause(source).with_hint(hint)
}

/// Says that what the URL leads to keeps no session.
pub(crate) fn transaction_pooler() -> StepError {
    StepError::permanent("the pooler before the server gives each transaction another session, and an upgrade needs one that stays")
        .with_hint("let the pooler work in session mode for this database (PgBouncer: pool_mode = session), or name the server itself in the `url`")
}

/// Says that the call was asked to end.
pub(crate) fn cancelled() -> StepError {
    StepError::transient("cancelled before it was done")
        .with_hint("run `upgrade resume` to go on, or `upgrade rollback` to put everything back")
}

/// Ends the work when the call is cancelled, before it changes anything more.
pub(crate) fn not_cancelled(cx: &Context) -> Result<(), StepError> {
    if cx.cancelled().is_cancelled() { Err(cancelled()) } else { Ok(()) }
}
