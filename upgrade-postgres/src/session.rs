//! One connection of a step's call, and how it ends: by itself, by cancellation, or from outside.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection, PgConnection};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::tunnel::Passage;
use upgrade_core::units::Span;

use crate::address::Address;
use crate::error::{Doing, PostgresError, cancelled};
use crate::target::{Opened, close};

/// How long sessions that were told to end may take to do so.
const ENDING: Duration = Duration::from_secs(30);
/// How long a cancelled statement's server may be out of reach until its connection counts as lost.
const SILENCE: Duration = Duration::from_secs(30);
/// How many looks in a row find the server idle until its answer counts as lost.
const IDLE: u32 = 15;
/// How long one attempt at a connection beside a session may take.
const BESIDE: Duration = Duration::from_secs(5);

/// Spells the `application_name` of what a step does, in both directions: `upgrade/STEP/DIGEST`.
///
/// The server cuts names at 63 bytes; the digest of the whole marker keeps two steps apart.
pub fn application_name(marker: &str) -> String {
    let digest = upgrade_core::sealed::sha256_hex(marker.as_bytes());
    let step = marker.rsplit('/').next().unwrap_or_default();
    format!("upgrade/{step:.30}/{}", &digest[..16])
}

/// Tells what a session found at the other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerFacts {
    /// The server's version as it numbers itself: 150018 is 15.18.
    pub version: i32,
    /// The process that serves the session.
    pub pid: i32,
    /// Who the session is.
    pub user: String,
    /// Whether that is a superuser.
    pub superuser: bool,
    /// Whether the server is a standby, which takes no writes.
    pub in_recovery: bool,
    /// Whether transactions are read-only unless they say otherwise.
    pub read_only: bool,
}

impl ServerFacts {
    /// Returns the number before the point: 15 of 15.18.
    pub fn major(&self) -> i32 {
        self.version / 10_000
    }
}

/// Holds one connection, with what cancels its statements.
pub struct Session {
    connection: PgConnection,
    facts: ServerFacts,
    /// When the server's process began, which tells it from a later one of the same number.
    began: String,
    address: Address,
    /// Held by all that connect beside it as well: closed with the last of them.
    passage: Option<Arc<Passage>>,
    settings: String,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("facts", &self.facts).finish_non_exhaustive()
    }
}

impl Session {
    pub(crate) async fn open(
        address: &Address,
        application: &str,
        statement_timeout: Option<Duration>,
        passage: Option<Arc<Passage>>,
    ) -> Opened {
        let options = address.options()?.application_name(application);
        let mut connection = PgConnection::connect_with(&options).await.map_err(|error| match error {
            // Of a way by the network, only a file that TLS needs can be missing.
            sqlx::Error::Io(error) if error.kind() == ErrorKind::NotFound && options.get_socket().is_none() => {
                sqlx::Error::Tls(error.into())
            }
            error => error,
        })?;
        type Row = (i32, i32, String, String, bool, bool, bool);
        let (version, pid, began, user, superuser, in_recovery, read_only): Row = sqlx::query_as(
            "select pg_catalog.current_setting('server_version_num')::int, pg_catalog.pg_backend_pid(), \
             coalesce((select backend_start::text from pg_catalog.pg_stat_activity \
                       where pid = pg_catalog.pg_backend_pid()), ''), session_user::text, \
             (select rolsuper from pg_catalog.pg_roles where rolname = session_user), \
             pg_catalog.pg_is_in_recovery(), pg_catalog.current_setting('default_transaction_read_only')::bool",
        )
        .fetch_one(&mut connection)
        .await?;
        let facts = ServerFacts { version, pid, user, superuser, in_recovery, read_only };
        let mut settings = format!(
            "set client_min_messages = warning; set lock_timeout = 0; set statement_timeout = {}; \
             set idle_in_transaction_session_timeout = 0;",
            statement_timeout.map_or(0, |timeout| timeout.as_millis())
        );
        if version >= 140_000 {
            // What a killed driver left running ends by itself, in the middle of a statement.
            settings.push_str("set client_connection_check_interval = '2s';");
        }
        sqlx::raw_sql(AssertSqlSafe(settings.clone())).execute(&mut connection).await?;
        Ok(Self { connection, facts, began, address: address.clone(), passage, settings })
    }

    /// Takes back what somebody's script set: role, search_path, temporary tables. Locks are kept.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn reset(&mut self) -> Result<(), PostgresError> {
        // DISCARD ALL would let go of the advisory locks as well.
        let sql = format!(
            "reset session authorization; reset role; reset all; close all; unlisten *; discard temp; discard sequences; {}",
            self.settings
        );
        sqlx::raw_sql(AssertSqlSafe(sql))
            .execute(&mut self.connection)
            .await
            .doing(|| "resetting the session".into())?;
        Ok(())
    }

    /// Returns the connection.
    pub fn connection(&mut self) -> &mut PgConnection {
        &mut self.connection
    }

    /// Tells what is at the other end.
    pub fn facts(&self) -> &ServerFacts {
        &self.facts
    }

    /// Returns where this side of the connection leads: through a tunnel, its near end.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Ends the session in order.
    pub async fn close(self) {
        close(self.connection).await;
        drop(self.passage);
    }

    /// Asks for a server that takes writes.
    ///
    /// # Errors
    /// It is a standby, or its transactions are read-only by default.
    pub fn require_writable(&self) -> Result<(), StepError> {
        self.require_primary()?;
        if self.facts.read_only {
            return Err(StepError::permanent("writes are switched off: default_transaction_read_only is on")
                .with_hint("switch it off for this user or database, or point the target's `url` at another user"));
        }
        Ok(())
    }

    /// Asks for a server that is no standby.
    ///
    /// # Errors
    /// It is one.
    pub fn require_primary(&self) -> Result<(), StepError> {
        if self.facts.in_recovery {
            return Err(StepError::permanent("the server is a standby and takes no writes")
                .with_hint("point the target's `url` at the primary"));
        }
        Ok(())
    }

    /// Lets this session write where the run itself has switched writes off for everybody else.
    pub(crate) async fn write_on(&mut self) -> Result<(), PostgresError> {
        sqlx::raw_sql("set default_transaction_read_only = off").execute(&mut self.connection).await?;
        self.facts.read_only = false;
        Ok(())
    }

    /// Returns what cancels the statement that runs on this session.
    pub fn canceller(&self) -> Canceller {
        Canceller {
            address: self.address.clone(),
            pid: self.facts.pid,
            began: self.began.clone(),
            _passage: self.passage.clone(),
        }
    }

    /// Runs statements that take no parameters, one or many.
    ///
    /// # Errors
    /// The server refused one; many without a transaction of their own are then all undone.
    pub async fn execute(&mut self, cx: &Context, sql: String) -> Result<u64, PostgresError> {
        let canceller = self.canceller();
        let running = sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut self.connection);
        let done = canceller.cancels(cx, async { Ok(running.await?) }).await?;
        Ok(done.rows_affected())
    }

    /// Takes an advisory lock of the session, polling: one that waits in the server would stand in
    /// the way of `CREATE INDEX CONCURRENTLY`, which waits for every transaction.
    ///
    /// Held until the session ends. Reports who holds it.
    ///
    /// # Errors
    /// The call was cancelled, or the connection broke.
    pub async fn advisory_lock(&mut self, cx: &Context, name: &str) -> Result<(), PostgresError> {
        let key = advisory_key(name);
        let began = tokio::time::Instant::now();
        loop {
            let taken: bool = sqlx::query_scalar("select pg_catalog.pg_try_advisory_lock($1)")
                .bind(key)
                .fetch_one(&mut self.connection)
                .await
                .doing(|| format!("locking {name}"))?;
            if taken {
                return Ok(());
            }
            cx.progress(0, None, format!("waits for {name}, held by another run, for {}", Span(began.elapsed())));
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(50)) => {}
                () = cx.cancelled().cancelled() => return Err(cancelled().into()),
            }
        }
    }

    /// Ends every session of that `application_name`, on all databases, and waits until they are gone.
    ///
    /// # Errors
    /// One does not end within 30 s, or may not be ended by this user.
    pub async fn end_sessions_of(&mut self, cx: &Context, application: &str) -> Result<(), StepError> {
        let began = tokio::time::Instant::now();
        loop {
            // A pooler may add where its client is. Of another user's session of that name, which
            // this one may not end, the error tells.
            // Told in the list of columns: of a condition, the planner leaves out what cannot change it.
            let left: Vec<(i32, Option<bool>)> = sqlx::query_as(
                "select pid, case when pg_catalog.pg_has_role(usesysid, 'USAGE') \
                             then pg_catalog.pg_terminate_backend(pid) end \
                 from pg_catalog.pg_stat_activity \
                 where pg_catalog.starts_with(application_name, $1) and pid <> pg_catalog.pg_backend_pid()",
            )
            .bind(application)
            .fetch_all(&mut self.connection)
            .await
            .doing(|| "ending the sessions that an interrupted call left".into())?;
            if left.is_empty() {
                return Ok(());
            }
            if began.elapsed() > ENDING {
                let pids: Vec<_> = left.iter().map(|(pid, _)| pid.to_string()).collect();
                let pids = pids.join(", ");
                return Err(StepError::transient(format!("sessions of an interrupted call do not end: {pids}"))
                    .with_hint(
                        "end them with `select pg_terminate_backend(PID)` as a superuser, then `upgrade resume`",
                    ));
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(20)) => {}
                () = cx.cancelled().cancelled() => return Err(cancelled()),
            }
        }
    }

    /// Opens another session in the same place, by the same way.
    pub(crate) async fn sibling(&self, cx: &Context, application: &str) -> Opened {
        let opening = Self::open(&self.address, application, None, self.passage.clone());
        tokio::select! {
            opened = tokio::time::timeout(BESIDE, opening) => opened.unwrap_or_else(|_| Err(sqlx::Error::PoolTimedOut.into())),
            () = cx.cancelled().cancelled() => Err(cancelled().into()),
        }
    }
}

/// Makes the key of an advisory lock from its name.
pub fn advisory_key(name: &str) -> i64 {
    use sha2::Digest;
    let digest = sha2::Sha256::digest(format!("upgrade advisory lock {name}").as_bytes());
    i64::from_be_bytes(digest[..8].try_into().expect("a digest has more than eight bytes"))
}

/// Cancels the statement of one session, from a connection of its own.
#[derive(Debug)]
pub struct Canceller {
    address: Address,
    pid: i32,
    began: String,
    _passage: Option<Arc<Passage>>,
}

impl Canceller {
    /// Awaits work on the session; when the call is cancelled, so is the statement that runs.
    ///
    /// ```
    /// # use upgrade_core::context::Context;
    /// # use upgrade_postgres::{PostgresError, session::Session};
    /// # async fn count(cx: &Context, session: &mut Session) -> Result<i64, PostgresError> {
    /// let canceller = session.canceller();
    /// let counting = async { Ok(sqlx::query_scalar("select count(*) from orders").fetch_one(session.connection()).await?) };
    /// canceller.cancels(cx, counting).await
    /// # }
    /// ```
    ///
    /// # Errors
    /// What the work says; that it was cancelled, if it was.
    pub async fn cancels<T>(
        self,
        cx: &Context,
        work: impl Future<Output = Result<T, PostgresError>>,
    ) -> Result<T, PostgresError> {
        tokio::pin!(work);
        tokio::select! {
            biased;
            done = &mut work => return done,
            () = cx.cancelled().cancelled() => {}
        }
        // A cancellation that comes between two statements is lost: it is sent until the work ends.
        let mut heard = tokio::time::Instant::now();
        let mut idle = 0;
        loop {
            let pause = async {
                let sent = tokio::time::timeout(BESIDE, self.send()).await;
                tokio::time::sleep(Duration::from_millis(200)).await;
                sent
            };
            tokio::select! {
                biased;
                done = &mut work => return if done.is_ok() { done } else { Err(cancelled().into()) },
                sent = pause => if let Ok(Ok(busy)) = sent {
                    heard = tokio::time::Instant::now();
                    idle = if busy { 0 } else { idle + 1 };
                },
            }
            // Of a connection that broke without a word, the work would wait for ever.
            if idle > IDLE || heard.elapsed() > SILENCE {
                return Err(StepError::unknown(
                    "the connection to the server was lost while a statement was cancelled",
                )
                .with_hint("check the network between here and the server, then `upgrade resume`")
                .into());
            }
        }
    }

    /// Tells whether the session was at work.
    async fn send(&self) -> Result<bool, PostgresError> {
        let options = self.address.options()?.application_name("upgrade");
        let mut connection = PgConnection::connect_with(&options).await?;
        let busy: Option<bool> = sqlx::query_scalar(
            "select state = 'active' and pg_catalog.pg_cancel_backend(pid) from pg_catalog.pg_stat_activity \
             where pid = $1 and backend_start::text = $2",
        )
        .bind(self.pid)
        .bind(&self.began)
        .fetch_optional(&mut connection)
        .await?;
        close(connection).await;
        Ok(busy == Some(true))
    }
}
