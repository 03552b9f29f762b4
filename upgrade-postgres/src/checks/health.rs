//! `postgres.health`: figures of a server that tell whether an upgrade would add to its troubles.

mod figures;
mod keys;

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::PgConnection;
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::CheckError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::verdict::{Limit, Status, Verdict};

use crate::error::PostgresError;
use crate::target::Database;

/// Configures `postgres.health`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HealthCheckConfig {
    /// The database.
    pub target: String,
    /// What the figures are held to, in place of the default for each that is named.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub limits: BTreeMap<String, Limit>,
}

/// Measures a server and one of its databases.
#[derive(Debug)]
pub struct HealthCheck {
    database: Arc<Database>,
    config: HealthCheckConfig,
    limits: BTreeMap<String, Limit>,
}

/// What is measured: its name, the most that passes by default, and what to do about more.
const FIGURES: [(&str, Option<f64>, &str); 16] = [
    ("connections", None, "end sessions that are not used"),
    (
        "connections_share",
        Some(0.9),
        "end sessions that are not used, put a pooler in between, or raise max_connections",
    ),
    ("database_bytes", None, "free space, or give the server more"),
    ("dead_rows_share", None, "`vacuum (verbose)` the table, and look at what holds vacuum back"),
    ("not_valid_constraints", None, "`alter table … validate constraint …`"),
    (
        "idle_in_transaction_s",
        Some(60.0),
        "end the session with `select pg_terminate_backend(PID)`, and set idle_in_transaction_session_timeout",
    ),
    ("integer_key_share", Some(0.8), "widen the column to bigint before it is full"),
    (
        "invalid_indexes",
        Some(0.0),
        "`reindex index concurrently`, or drop what an interrupted CREATE INDEX CONCURRENTLY left",
    ),
    (
        "longest_transaction_s",
        Some(300.0),
        "wait for it, or end it: strong locks queue behind it, and vacuum removes nothing",
    ),
    ("prepared_transactions", Some(0.0), "end each with `commit prepared` or `rollback prepared`"),
    ("replication_lag_bytes", Some(1_073_741_824.0), "look at the standby and the network to it"),
    ("replication_lag_s", Some(30.0), "look at the standby and the network to it"),
    (
        "replication_slot_bytes",
        Some(10_737_418_240.0),
        "see who should read the slot, or drop it: the server keeps WAL for it until the disk is full",
    ),
    ("sequence_share", Some(0.8), "give the sequence and its column the type bigint before it is used up"),
    ("standbys", None, "look at the standby that is missing"),
    (
        "wraparound_share",
        Some(0.5),
        "`vacuum (freeze)` the oldest tables, and end what holds back the oldest transaction",
    ),
];

/// Holds one figure as it was measured.
#[derive(Debug)]
struct Figure {
    name: &'static str,
    /// None where the user may not see what it takes.
    value: Option<f64>,
    /// Who or what it is about.
    culprit: Option<String>,
    /// What makes it visible.
    grant: Option<String>,
}

impl Figure {
    fn new(name: &'static str, value: f64, culprit: Option<String>) -> Self {
        Self { name, value: Some(value), culprit, grant: None }
    }

    fn hidden(name: &'static str, grant: impl Into<String>) -> Self {
        Self { name, value: None, culprit: None, grant: Some(grant.into()) }
    }
}

impl HealthCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// The target is not a database, or a limit is on something that is not measured.
    pub fn from_config(config: HealthCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let database = cx.target::<Database>(&config.target)?;
        let names = FIGURES.map(|(name, ..)| name);
        if let Some(unknown) = config.limits.keys().find(|name| !names.contains(&name.as_str())) {
            return Err(BuildError::new(format!("there is no figure `{unknown}`"))
                .at("limits")
                .with_hint(format!("the figures are {}", names.join(", "))));
        }
        let defaults = FIGURES
            .iter()
            .filter_map(|(name, max, _)| Some(((*name).to_owned(), Limit { max: Some((*max)?), ..Limit::default() })));
        let limits = defaults.chain(config.limits.clone()).collect();
        Ok(Self { database, config, limits })
    }

    fn judge(&self, cx: &Context, figures: &[Figure]) -> Verdict {
        let mut verdict = Verdict::pass("");
        for figure in figures {
            if let Some(value) = figure.value {
                verdict = verdict.with_measurement(figure.name, value);
            }
            if let Some(culprit) = &figure.culprit {
                verdict = verdict.with_fact(figure.name, culprit.clone());
            }
        }
        verdict.message = summary(&verdict.measurements);
        let mut limits = self.limits.clone();
        // Before the run there is nothing to compare with: what is measured is the baseline.
        limits.retain(|_, limit| !cx.is_baseline() || !limit.is_relative());
        let baseline = limits.keys().filter_map(|name| Some((name.clone(), cx.baseline(name)?))).collect();
        verdict = verdict.held_to(&limits, &baseline);
        let advice = figures.iter().filter_map(|figure| {
            let limit = limits.get(figure.name)?;
            limit.judge(figure.name, figure.value, cx.baseline(figure.name))?;
            let (.., advice) = FIGURES.iter().find(|(name, ..)| *name == figure.name)?;
            Some(match (&figure.grant, &figure.culprit) {
                (Some(grant), _) => grant.clone(),
                (None, Some(culprit)) => format!("{culprit}: {advice}"),
                (None, None) => (*advice).to_owned(),
            })
        });
        let mut advice: Vec<_> = advice.collect();
        advice.dedup();
        if verdict.status == Status::Pass { verdict } else { verdict.with_hint(advice.join("; ")) }
    }
}

fn summary(measured: &BTreeMap<String, f64>) -> String {
    let figure = |name: &str| measured.get(name).copied();
    let mut parts = Vec::new();
    if let (Some(count), Some(share)) = (figure("connections"), figure("connections_share")) {
        parts.push(format!("{count} connections ({:.0}%)", share * 100.0));
    }
    if let Some(seconds) = figure("longest_transaction_s") {
        parts.push(format!("longest transaction {seconds:.0} s"));
    }
    if let (Some(count), Some(seconds)) = (figure("standbys"), figure("replication_lag_s")) {
        parts.push(format!("{count} standbys, {seconds:.1} s behind"));
    }
    parts.join(", ")
}

async fn measure(connection: &mut PgConnection, user: &str) -> Result<Vec<Figure>, PostgresError> {
    let mut measured = figures::of_sessions(connection, user).await?;
    measured.extend(figures::of_replication(connection, user).await?);
    measured.extend(figures::of_storage(connection).await?);
    measured.push(keys::sequences(connection, user).await?);
    measured.push(keys::integer_keys(connection, user).await?);
    Ok(measured)
}

#[async_trait]
impl Check for HealthCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let mut session = self.database.connect(cx).await?;
        let (canceller, user) = (session.canceller(), session.facts().user.clone());
        let figures = canceller.cancels(cx, measure(session.connection(), &user)).await;
        session.close().await;
        Ok(self.judge(cx, &figures?))
    }

    fn kind(&self) -> &str {
        "postgres.health"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn needs_baseline(&self) -> bool {
        self.limits.values().any(Limit::is_relative)
    }
}
