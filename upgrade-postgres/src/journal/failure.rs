//! What a server's refusal means to whoever keeps a journal on it.

use sqlx::postgres::PgDatabaseError;
use upgrade_core::journal::JournalError;

/// Makes the error of something that the server or the connection refused.
pub(super) fn server(doing: &'static str) -> impl FnOnce(sqlx::Error) -> JournalError {
    move |error| {
        let Some(database) = error.as_database_error().and_then(|e| e.try_downcast_ref::<PgDatabaseError>()) else {
            return of_connection(doing, error);
        };
        match remedy(database.code(), database.message()) {
            Some(hint) => JournalError::Unusable {
                reason: format!("{doing}: {} ({})", database.message(), database.code()),
                hint: hint.into(),
            },
            None => JournalError::Server { message: doing.into(), source: Box::new(error) },
        }
    }
}

/// Says what to do about a refusal that waiting does not mend.
fn remedy(code: &str, message: &str) -> Option<&'static str> {
    Some(match code {
        "28P01" => "check user and password: PGPASSWORD, PGPASSFILE or ~/.pgpass hold the one that the URL leaves out",
        "28000" if message.contains("no encryption") => {
            "the server asks for TLS: add `?sslmode=require` (or verify-full with `sslrootcert`) to the URL"
        }
        "28000" => "let pg_hba.conf of the server allow this user, database and address",
        "3D000" => "create the database, or name another one in the URL",
        "42501" => "let the user create a schema (GRANT CREATE ON DATABASE), or own the schema that the URL names",
        "25006" => "name the primary in the URL: this server, database or user is read-only",
        "53100" => "make room on the server's disk, then `upgrade resume`",
        "42P01" | "42703" => "the journal's tables are not as they were made: restore them from a backup",
        // What a pooler that hands out another session for each transaction makes of a prepared statement.
        "26000" | "42P05" => "let the pooler work in session mode (PgBouncer: pool_mode = session), or go around it",
        _ => return None,
    })
}

fn of_connection(doing: &'static str, error: sqlx::Error) -> JournalError {
    match error {
        sqlx::Error::Tls(_) => JournalError::Unusable {
            reason: format!("{doing}: {error}"),
            hint: "the server may not offer TLS, or its certificate is not trusted: see `sslmode` and `sslrootcert` in the URL"
                .into(),
        },
        error => JournalError::Server { message: doing.into(), source: Box::new(error) },
    }
}

/// Makes the error of a server that did not answer in time.
pub(super) fn late(doing: &'static str, limit: std::time::Duration) -> JournalError {
    let source = std::io::Error::new(std::io::ErrorKind::TimedOut, format!("no answer for {limit:?}"));
    JournalError::Server { message: doing.into(), source: Box::new(source) }
}

/// Makes the error of a record that is not as it was written.
pub(super) fn damaged(place: &str, line: u64, reason: impl Into<String>) -> JournalError {
    JournalError::Damaged { place: place.to_owned(), line, reason: reason.into() }
}
