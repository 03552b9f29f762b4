//! A database as the target of an upgrade: where it is, and how sessions on it behave.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use schemars::JsonSchema;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use sqlx::Connection as _;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::names::LockName;
use upgrade_core::registry::{BuildContext, BuildError, Registry};
use upgrade_core::secret::SecretRef;
use upgrade_core::target::Target;
use upgrade_core::text_or_secret::TextOrSecret;
use upgrade_core::tunnel::Tunnel;
use upgrade_core::units::Span;

use crate::address::Address;
use crate::error::{Doing, PostgresError, cancelled};
use crate::identifier::Identifier;
use crate::ledger::Ledger;
use crate::locking::LockPolicy;
use crate::session::{Session, application_name};
use crate::steps::writes::stopped_by_run;

/// Configures the target kind `postgres`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DatabaseConfig {
    /// Where the database is: `postgres://USER@HOST:PORT/DATABASE`, or a reference to a secret that
    /// holds such a URL, with its password.
    pub url: TextOrSecret,
    /// The password, if the URL has none. If absent: `PGPASSWORD`, then `~/.pgpass`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<SecretRef>,
    /// Another target through which host and port of the URL are reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub via: Option<String>,
    /// How long a connection may take to be made. Default 10 s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connect_timeout: Option<Span>,
    /// How long a statement waits for a lock before it lets those pass that queue behind it.
    /// Default 50 ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lock_timeout: Option<Span>,
    /// How long such a statement is tried again, all in all. Default 5 m.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lock_budget: Option<Span>,
    /// How long one statement may run. Default: as long as the step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub statement_timeout: Option<Span>,
    /// Ends sessions that hold a lock that is needed and have been idle in their transaction for
    /// this long. Default: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_idle_in_transaction: Option<Span>,
    /// The schema for what a run keeps in the database until its end. Default `_upgrade`, made and
    /// removed as needed; one that is there already is used and kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_schema: Option<Identifier>,
}

impl DatabaseConfig {
    /// Describes a database by its URL, everything else by default.
    pub fn new(url: impl Into<TextOrSecret>) -> Self {
        Self {
            url: url.into(),
            password: None,
            via: None,
            connect_timeout: None,
            lock_timeout: None,
            lock_budget: None,
            statement_timeout: None,
            end_idle_in_transaction: None,
            state_schema: None,
        }
    }
}

pub(crate) fn register(registry: &mut Registry) {
    registry.target("postgres", "Names a PostgreSQL database, and how sessions on it behave", Database::from_config);
}

/// Names a PostgreSQL database and connects to it.
///
/// # Guarantees
/// Every session names the run and the step in its `application_name`, and ends when the process
/// that opened it has ended, also in the middle of a statement (from PostgreSQL 14 on).
///
/// # Assumptions
/// The URL leads to the server itself or to a pooler in session mode.
#[derive(Clone)]
pub struct Database {
    config: DatabaseConfig,
    lock: LockName,
    tunnel: Option<Arc<dyn Tunnel>>,
}

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Database").field("lock", &self.lock).finish_non_exhaustive()
    }
}

impl Database {
    /// Makes the target from its configuration.
    ///
    /// # Errors
    /// The URL is wrong, holds a password as plain text, or `via` names nothing that leads anywhere.
    pub fn from_config(config: DatabaseConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        if let TextOrSecret::Text(text) = &config.url {
            let address = Address::parse(text).map_err(|error| {
                BuildError::new(error.message()).at("url").with_hint(error.hint().unwrap_or_default())
            })?;
            if address.password().is_some() {
                return Err(BuildError::new("the URL holds a password as plain text")
                    .at("url")
                    .with_hint("take it out and name it: `password: { env: PGPASSWORD }`, or the whole URL: `url: { env: DATABASE_URL }`"));
            }
            if config.via.is_some() && address.is_socket() {
                return Err(BuildError::new("a socket of this machine cannot be reached through another target")
                    .at("via")
                    .with_hint("take `via` out, or write host and port as the other side knows them into the `url`"));
            }
        }
        let tunnel = config.via.as_deref().map(|name| cx.tunnel(name)).transpose()?;
        let lock = lock_of(&config, cx);
        Ok(Self { config, lock, tunnel })
    }

    /// Returns how statements that need strong locks behave.
    pub fn lock_policy(&self) -> LockPolicy {
        let config = &self.config;
        let mut policy = LockPolicy::default();
        if let Some(timeout) = config.lock_timeout {
            policy.lock_timeout = timeout.0;
        }
        if let Some(budget) = config.lock_budget {
            policy.budget = budget.0;
        }
        policy.end_idle_in_transaction = config.end_idle_in_transaction.map(|span| span.0);
        policy
    }

    /// Returns the schema for what a run keeps in the database until its end.
    pub fn state_schema(&self) -> Identifier {
        self.config.state_schema.clone().unwrap_or_else(|| Identifier::new("_upgrade").expect("the default is a name"))
    }

    /// Reads where the database is; its password is masked from then on.
    ///
    /// # Errors
    /// A secret cannot be resolved, or is not the URL of a database.
    pub async fn address(&self, cx: &Context) -> Result<Address, StepError> {
        let url = self.config.url.resolve(cx).await?;
        let address = Address::parse(url.expose_secret())?;
        let password: Option<SecretString> = match &self.config.password {
            Some(reference) => Some(cx.secret(reference).await?),
            None => None,
        };
        let address = address.or_password(password);
        if let Some(password) = address.password() {
            cx.remember_secret(password);
        }
        Ok(address)
    }

    /// Opens a session for the step or check that is called.
    ///
    /// # Errors
    /// The server cannot be reached, or does not let the user in.
    pub async fn connect(&self, cx: &Context) -> Result<Session, StepError> {
        let address = self.address(cx).await?;
        self.connect_at(cx, address, &application_name(&cx.marker())).await
    }

    /// Opens a session on another database of the same server.
    ///
    /// # Errors
    /// As [`Database::connect`].
    pub async fn connect_to(&self, cx: &Context, database: &str) -> Result<Session, StepError> {
        let address = self.address(cx).await?.database(database);
        self.connect_at(cx, address, &application_name(&cx.marker())).await
    }

    /// Opens a session that [`Database::settle`] does not end: for looking on, for ending others.
    ///
    /// # Errors
    /// As [`Database::connect`].
    pub async fn connect_aside(&self, cx: &Context) -> Result<Session, StepError> {
        let address = self.address(cx).await?;
        self.connect_at(cx, address, "upgrade").await
    }

    /// Opens a session on another database of the server than the target itself: from there it can
    /// be renamed, copied or dropped.
    ///
    /// # Errors
    /// As [`Database::connect`]; neither `postgres` nor `template1` is to be had.
    pub async fn connect_maintenance(&self, cx: &Context) -> Result<Session, StepError> {
        let address = self.address(cx).await?;
        let own = address.database_name();
        let mut failed = None;
        for name in ["postgres", "template1"].into_iter().filter(|name| *name != own) {
            match self.connect_at(cx, address.clone().database(name), &application_name(&cx.marker())).await {
                Ok(session) => return Ok(session),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        Err(failed
            .expect("at least one of two names is not the target's")
            .with_hint("to exchange or copy a database, the user must be let into another one: postgres, or template1"))
    }

    async fn connect_at(&self, cx: &Context, address: Address, application: &str) -> Result<Session, StepError> {
        let patience = self.config.connect_timeout.map_or(Duration::from_secs(10), |span| span.0);
        let (host, port, name) = (address.host(), address.port(), address.database_name());
        let connecting = async {
            let (address, passage) = match &self.tunnel {
                Some(tunnel) => {
                    let passage = tunnel.open(cx, &host, port).await?;
                    (address.through(passage.address()), Some(Arc::new(passage)))
                }
                None => (address, None),
            };
            let statement_timeout = self.config.statement_timeout.map(|span| span.0);
            let mut session = Session::open(&address, application, statement_timeout, passage).await?;
            if session.facts().read_only
                && !session.facts().in_recovery
                && stopped_by_run(&Ledger::of(self, cx), session.connection()).await?
            {
                session.write_on().await?;
            }
            Ok::<_, PostgresError>(session)
        };
        let opened = tokio::select! {
            opened = tokio::time::timeout(patience, connecting) => opened,
            () = cx.cancelled().cancelled() => return Err(cancelled()),
        };
        let doing = || format!("connecting to database {name} at {host}:{port}");
        match opened {
            // A server that is killed in the middle of a greeting says half of it.
            Ok(Err(PostgresError::Sql { source: source @ sqlx::Error::Protocol(_), .. })) => {
                Err(StepError::transient(format!("{} failed", doing()))
                    .with_cause(&source)
                    .with_hint("the server may be starting or stopping, or something else listens there"))
            }
            Ok(opened) => Ok(opened.doing(doing)?),
            Err(_) => Err(StepError::transient(format!("{} took longer than {}", doing(), Span(patience)))
                .with_hint("check host, port and firewalls between here and the server; `connect_timeout` on the target gives it longer")),
        }
    }

    /// Refuses a pooler that gives each transaction another session: while one rests, a second one
    /// begins a transaction. Of a server, or in session mode, it cannot get the process of the first.
    async fn require_session_of_its_own(&self, cx: &Context, session: &mut Session) -> Result<(), StepError> {
        let mut other = self.connect_aside(cx).await?;
        sqlx::raw_sql("begin").execute(other.connection()).await.doing(|| "beginning a transaction".into())?;
        let pid = sqlx::query_scalar::<_, i32>("select pg_catalog.pg_backend_pid()").persistent(false);
        let pid = pid.fetch_one(other.connection()).await.doing(|| "asking for the server's process".into())?;
        other.close().await;
        if pid == session.facts().pid { Err(crate::error::transaction_pooler()) } else { Ok(()) }
    }

    /// Ends what an interrupted call of this step left running on the server, and waits for its end.
    ///
    /// What `Step::settle` of every kind calls.
    ///
    /// # Errors
    /// The server cannot be reached, or a session does not end.
    pub async fn settle(&self, cx: &Context) -> Result<(), StepError> {
        let mut session = self.connect_aside(cx).await?;
        session.end_sessions_of(cx, &application_name(&cx.marker())).await?;
        session.close().await;
        Ok(())
    }
}

#[async_trait]
impl Target for Database {
    fn lock(&self) -> LockName {
        self.lock.clone()
    }

    async fn identity(&self, cx: &Context) -> Result<String, StepError> {
        let mut session = self.connect_aside(cx).await?;
        // Asked once, before anything is changed: behind such a pooler nothing of a session holds.
        self.require_session_of_its_own(cx, &mut session).await?;
        // Not the oid: a restore swaps another database into the name.
        let identity = sqlx::query_scalar::<_, String>(
            "select pg_catalog.concat('system ', (select system_identifier::text from pg_catalog.pg_control_system()), \
             ' database ', current_database()::text)",
        )
        .fetch_one(session.connection())
        .await
        .map_err(|error| {
            let error = PostgresError::Sql { doing: "reading the server's identity".into(), source: error };
            let denied = error.code() == Some("42501");
            let error = StepError::from(error);
            if denied {
                error.with_hint(
                    "as a superuser: `grant execute on function pg_control_system() to` the user of the target's `url`",
                )
            } else {
                error
            }
        })?;
        session.close().await;
        Ok(identity)
    }
}

/// Spells the name under which a database is locked.
pub fn lock_name(address: &Address) -> LockName {
    let resource = format!("{}:{}/{}", address.host(), address.port(), address.database_name());
    LockName::new("postgres", &resource.escape_debug().to_string()).expect("an escaped text is printable")
}

/// Names the database as far as that is known while the pipeline is built: a secret that cannot be
/// read yet gives its reference.
fn lock_of(config: &DatabaseConfig, cx: &BuildContext) -> LockName {
    let text = match &config.url {
        TextOrSecret::Text(text) => Some(text.clone()),
        TextOrSecret::Secret(reference) if reference.scheme() == "env" => std::env::var(reference.place()).ok(),
        TextOrSecret::Secret(reference) if reference.scheme() == "file" => {
            std::fs::read_to_string(cx.path(reference.place())).ok()
        }
        TextOrSecret::Secret(_) => None,
    };
    let own = match text.map(|text| Address::parse(text.trim_end())) {
        Some(Ok(address)) => lock_name(&address),
        _ => {
            let reference = serde_json::to_string(&config.url).unwrap_or_default();
            LockName::new("postgres", &reference.escape_debug().to_string()).expect("an escaped text is printable")
        }
    };
    match &config.via {
        // The same host and port through another tunnel is another database.
        Some(via) => LockName::new("postgres", &format!("{} via {}", own.parts().1, via.escape_debug()))
            .expect("an escaped text is printable"),
        None => own,
    }
}

/// Gives back the server's own words where a session could not be opened.
pub(crate) type Opened = Result<Session, PostgresError>;

/// Closes a connection without waiting for a server that does not answer.
pub(crate) async fn close(connection: sqlx::PgConnection) {
    let _ = tokio::time::timeout(Duration::from_secs(1), connection.close()).await;
}
