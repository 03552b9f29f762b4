//! The journal's own threads and connections.
//!
//! Work runs on a runtime of the journal's own: it is done to its end even if whoever asked for it
//! is dropped, and a lease can be given back from a `drop`, which may not wait for the caller's
//! runtime.

use std::future::Future;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor, Row};
use tokio::runtime::{Builder, Runtime};
use upgrade_core::journal::JournalError;
use upgrade_core::names::LockName;

use super::address::JournalAddress;
use super::failure::{late, server};
use super::{pooler, residence, schema};
use crate::target::lock_name;

/// How long a connection may take to be made.
const CONNECTING: Duration = Duration::from_secs(10);
/// How long one answer may take before the connection counts as lost.
pub(super) const ANSWER: Duration = Duration::from_secs(30);
/// Connections at rest that are kept for the next who needs one.
const KEPT: usize = 4;
/// One that rested longer is asked whether it is still there.
const FRESH: Duration = Duration::from_secs(1);

/// Set where a connection is made, and lost on the way through any pooler.
const MARK: (&str, &str) = ("upgrade.way", "direct");

/// Holds what all handles of one journal share.
pub(super) struct Clerk {
    runtime: Option<Runtime>,
    address: JournalAddress,
    place: String,
    idle: Mutex<Vec<(Session, Instant)>>,
    /// Whether the way is direct; asked once.
    way: OnceLock<Way>,
    residence: OnceLock<Vec<LockName>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Direct,
    Pooled,
}

/// Tells what a session found at the other end.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    /// The process that serves the session.
    pub(super) pid: i32,
    /// Whether the server is a standby.
    pub(super) standby: bool,
    /// Whether the journal's tables are there.
    pub(super) made: bool,
    direct: bool,
    fsync: bool,
}

/// Holds one connection with the settings that the journal relies on.
pub(super) struct Session {
    connection: PgConnection,
    pub(super) facts: Facts,
}

impl Clerk {
    pub(super) fn start(address: JournalAddress) -> Result<Arc<Self>, JournalError> {
        let runtime =
            Builder::new_multi_thread().worker_threads(1).thread_name("upgrade-journal").enable_all().build().map_err(
                |source| JournalError::Storage { action: "start a thread for", path: "the journal".into(), source },
            )?;
        Ok(Arc::new(Self {
            runtime: Some(runtime),
            place: address.place(),
            address,
            idle: Mutex::default(),
            way: OnceLock::new(),
            residence: OnceLock::new(),
        }))
    }

    /// Spells the journal in messages and in the keys of its locks.
    pub(super) fn place(&self) -> &str {
        &self.place
    }

    /// Names a table in messages.
    pub(super) fn table(&self, name: &str) -> String {
        format!("{}.{name}", self.address.schema)
    }

    /// Runs work on the journal's own threads, to its end.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, JournalError>> + Send + 'static,
    ) -> Result<T, JournalError> {
        let ended = |error: tokio::task::JoinError| JournalError::Storage {
            action: "work on",
            path: "the journal".into(),
            source: std::io::Error::other(error),
        };
        self.runtime().spawn(work).await.map_err(ended)?
    }

    /// Starts work on the journal's own threads and does not wait for it.
    pub(super) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.runtime().spawn(work);
    }

    fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().expect("it is taken in drop alone")
    }

    /// Makes the journal's tables where they are missing.
    pub(super) async fn make(&self) -> Result<(), JournalError> {
        let mut session = self.session().await?;
        self.settle_in(&mut session).await?;
        if !session.facts.made {
            if session.facts.standby {
                return Err(JournalError::Unusable {
                    reason: "the server is a standby and takes no writes".into(),
                    hint: "name the primary in the URL".into(),
                });
            }
            schema::make(&mut session, &self.address.schema).await?;
            session.facts.made = true;
        }
        schema::check(&mut session, &self.table("format")).await?;
        self.keep(session);
        Ok(())
    }

    /// Tells whether the journal's tables are there.
    pub(super) async fn find(&self) -> Result<bool, JournalError> {
        let mut session = self.session().await?;
        self.settle_in(&mut session).await?;
        let made = session.facts.made;
        if made {
            schema::check(&mut session, &self.table("format")).await?;
            self.keep(session);
        }
        Ok(made)
    }

    /// Finds out once what the journal relies on.
    async fn settle_in(&self, session: &mut Session) -> Result<(), JournalError> {
        if !session.facts.fsync {
            tracing::warn!("the journal's server runs with fsync off: a loss of power may lose what is recorded");
        }
        if self.way.get() == Some(&Way::Pooled) {
            pooler::require_session_mode(self, session).await?;
        }
        let _ = self.residence.set(residence::of(&self.address.address, session.facts.pid));
        Ok(())
    }

    /// Names what the journal lives in.
    pub(super) fn home(&self) -> Vec<LockName> {
        let mut names = vec![lock_name(&self.address.address)];
        names.extend(self.address.lives_in.iter().flat_map(residence::spellings));
        names.extend(self.residence.get().into_iter().flatten().cloned());
        names
    }

    /// Takes a connection: one that rests, or a new one.
    pub(super) async fn session(&self) -> Result<Session, JournalError> {
        loop {
            let resting = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            match resting {
                Some((session, since)) if since.elapsed() < FRESH => return Ok(session),
                Some((mut session, _)) => {
                    if let Ok(Ok(())) = tokio::time::timeout(Duration::from_secs(2), session.connection.ping()).await {
                        return Ok(session);
                    }
                }
                None => return self.connect().await,
            }
        }
    }

    /// Gives a connection back that holds nothing.
    pub(super) fn keep(&self, session: Session) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < KEPT {
            idle.push((session, Instant::now()));
        }
    }

    /// Opens a new connection.
    pub(super) async fn connect(&self) -> Result<Session, JournalError> {
        const DOING: &str = "connecting to the journal";
        match tokio::time::timeout(CONNECTING, self.connect_either_way()).await {
            Ok(connected) => connected,
            Err(_) => Err(late(DOING, CONNECTING)),
        }
    }

    async fn connect_either_way(&self) -> Result<Session, JournalError> {
        let doing = || server("connecting to the journal");
        let options = self.address.address.options().map_err(doing())?;
        // Poolers refuse the setting that sqlx sends by default.
        let options = options.application_name("upgrade journal").extra_float_digits(None);
        if self.way.get() == Some(&Way::Pooled) {
            let mut connection = options.connect().await.map_err(doing())?;
            let facts = self.prepare(&mut connection).await?;
            return Ok(Session { connection, facts });
        }
        let marked = connect_marked(&options).await;
        let (mut connection, way) = match marked {
            Ok(connection) => (connection, Way::Direct),
            Err(error) if is_refused_setting(&error) => (options.connect().await.map_err(doing())?, Way::Pooled),
            Err(error) => return Err(doing()(error)),
        };
        let facts = self.prepare(&mut connection).await?;
        let way = if facts.direct { way } else { Way::Pooled };
        let _ = self.way.set(way);
        Ok(Session { connection, facts })
    }

    /// Makes the settings that the journal relies on, in one statement.
    async fn prepare(&self, connection: &mut PgConnection) -> Result<Facts, JournalError> {
        // Not prepared, so with literals: a pooler in the wrong mode is to be recognised as one, and
        // not by the prepared statement that it loses.
        let schema = literal(&self.address.schema.to_string());
        let (mark, direct) = (literal(MARK.0), literal(MARK.1));
        let sql = format!(
            "SELECT pg_backend_pid(), pg_is_in_recovery(), to_regclass({schema} || '.format') IS NOT NULL,
                current_setting('server_encoding'), coalesce(current_setting({mark}, true) = {direct}, false),
                current_setting('fsync')::bool
            FROM (SELECT
                set_config('search_path', {schema}, false),
                set_config('synchronous_commit', CASE current_setting('synchronous_commit')
                    WHEN 'off' THEN 'on' ELSE current_setting('synchronous_commit') END, false),
                set_config('default_transaction_isolation', 'read committed', false),
                set_config('lock_timeout', '10s', false),
                set_config('statement_timeout', '25s', false),
                set_config('idle_in_transaction_session_timeout', '60s', false),
                set_config('tcp_keepalives_idle', '10', false),
                set_config('tcp_keepalives_interval', '5', false),
                set_config('tcp_keepalives_count', '4', false),
                set_config('client_min_messages', 'warning', false),
                CASE WHEN current_setting('server_version_num')::int >= 140000
                    THEN set_config('client_connection_check_interval', '2s', false) END
                OFFSET 0) AS settings"
        );
        let row = connection
            .fetch_one(sqlx::raw_sql(AssertSqlSafe(sql)))
            .await
            .map_err(server("preparing a session of the journal"))?;
        let text = |column: usize| row.try_get_unchecked::<String, _>(column).unwrap_or_default();
        let encoding = text(3);
        if encoding != "UTF8" {
            return Err(JournalError::Unusable {
                reason: format!("the database is in {encoding}, which cannot hold every text"),
                hint: "create one for the journal: CREATE DATABASE upgrade ENCODING 'UTF8' TEMPLATE template0".into(),
            });
        }
        let pid = text(0).parse().map_err(|_| JournalError::Unusable {
            reason: "the server does not say which process serves the session".into(),
            hint: "name a PostgreSQL server in the URL".into(),
        })?;
        Ok(Facts { pid, standby: text(1) == "t", made: text(2) == "t", direct: text(4) == "t", fsync: text(5) == "t" })
    }
}

/// Quotes a text for a statement.
fn literal(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

async fn connect_marked(options: &PgConnectOptions) -> Result<PgConnection, sqlx::Error> {
    options.clone().options([MARK]).connect().await
}

/// Tells whether a pooler refused a setting that a server takes.
fn is_refused_setting(error: &sqlx::Error) -> bool {
    let text = error.to_string();
    text.contains("startup parameter") || text.contains("startup option")
}

impl Drop for Clerk {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // The caller may be inside of a runtime, where nothing may wait.
            runtime.shutdown_background();
        }
    }
}

impl Deref for Session {
    type Target = PgConnection;
    fn deref(&self) -> &PgConnection {
        &self.connection
    }
}

impl DerefMut for Session {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.connection
    }
}

impl Session {
    /// Ends the session in order, without waiting for a server that does not answer.
    pub(super) async fn end(self) {
        let _ = tokio::time::timeout(Duration::from_secs(1), self.connection.close()).await;
    }
}
