//! `postgres.query`: asks for one value and holds it to limits.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sqlx::types::Json;
use sqlx::{AssertSqlSafe, PgConnection};
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::{CheckError, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::units::{Share, Span};
use upgrade_core::verdict::{Limit, Verdict};

use crate::error::{Doing, PostgresError};
use crate::target::Database;

/// Configures `postgres.query`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QueryCheckConfig {
    /// The database.
    pub target: String,
    /// A query of one row and one column. It runs in a read-only transaction.
    pub query: String,
    /// What the value is called among the figures. Default `value`.
    #[serde(default = "value")]
    pub name: String,
    /// The answer that passes: a number, a text, true or false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub equals: Option<Value>,
    /// The least that passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    /// The most that passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
    /// The most that it may grow over its value before the run, as a share of it: `20%`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_increase: Option<Share>,
    /// The most that it may fall below its value before the run, as a share of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_decrease: Option<Share>,
    /// The most that it may grow over its value before the run, in its own unit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_rise: Option<f64>,
    /// How long the query may run.
    #[serde(default = "statement_timeout")]
    pub statement_timeout: Span,
}

fn value() -> String {
    "value".to_owned()
}

fn statement_timeout() -> Span {
    Span::from_secs(10)
}

impl QueryCheckConfig {
    /// Asks a query, without limits.
    pub fn new(target: impl Into<String>, query: impl Into<String>) -> Self {
        Self {
            target: target.into(),
            query: query.into(),
            name: value(),
            equals: None,
            min: None,
            max: None,
            max_increase: None,
            max_decrease: None,
            max_rise: None,
            statement_timeout: statement_timeout(),
        }
    }

    fn limit(&self) -> Limit {
        Limit {
            min: self.min,
            max: self.max,
            max_increase: self.max_increase,
            max_decrease: self.max_decrease,
            max_rise: self.max_rise,
        }
    }
}

/// Asks for one value and holds it to limits.
#[derive(Debug)]
pub struct QueryCheck {
    config: QueryCheckConfig,
    database: Arc<Database>,
}

impl QueryCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// The target is not a database, or nothing is asked of the value.
    pub fn from_config(config: QueryCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let database = cx.target::<Database>(&config.target)?;
        if config.query.trim().is_empty() {
            return Err(BuildError::new("the query is empty").at("query"));
        }
        if config.equals.is_none() && config.limit() == Limit::default() {
            return Err(BuildError::new("nothing is asked of the value")
                .at("query")
                .with_hint("give a limit (`min`, `max`, `max_increase`, `max_decrease`, `max_rise`) or `equals`"));
        }
        if let Some(equals) = &config.equals
            && (config.limit() != Limit::default() || matches!(equals, Value::Array(_) | Value::Object(_)))
        {
            return Err(
                BuildError::new("`equals` is one text, number or boolean, and takes no limits beside it").at("equals")
            );
        }
        Ok(Self { config, database })
    }

    /// Asks for at most two rows, each as one JSON object: whatever the type of the value is.
    async fn ask(&self, connection: &mut PgConnection) -> Result<Vec<Json<Map<String, Value>>>, PostgresError> {
        let timeout = self.config.statement_timeout.0.as_millis().max(1);
        sqlx::raw_sql(AssertSqlSafe(format!("begin read only; set local statement_timeout = {timeout}")))
            .execute(&mut *connection)
            .await?;
        let query = self.config.query.trim().trim_end_matches(';');
        // Prepared: a text that holds more than the one query is refused.
        sqlx::query_scalar(AssertSqlSafe(format!("select row_to_json(answer) from ({query}\n) as answer limit 2")))
            .fetch_all(connection)
            .await
            .doing(|| "the query".into())
    }

    fn judge(&self, rows: Vec<Json<Map<String, Value>>>) -> Result<Value, Verdict> {
        let unknown = |message: &str, hint: &str| Err(Verdict::unknown(message).with_hint(hint));
        let mut rows = rows.into_iter();
        let Some(Json(row)) = rows.next() else {
            return unknown("the query has no answer", "let it answer in any case: `select count(*) …`, `coalesce(…)`");
        };
        if rows.next().is_some() {
            return unknown("the query has more than one row", "let it answer with one: an aggregate, or `limit 1`");
        }
        let columns = row.len();
        match row.into_iter().next() {
            Some((_, Value::Null)) => unknown("the answer is null", "let it answer in any case: `coalesce(…, 0)`"),
            Some((_, value)) if columns == 1 => Ok(value),
            _ => unknown("the answer has more than one column", "ask for one value; a check each for several"),
        }
    }
}

/// Takes a number for what it is, also where the server writes it as a text; true is 1.
fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::Bool(is) => Some(f64::from(u8::from(*is))),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
    .filter(|number: &f64| number.is_finite())
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn equal(one: &Value, other: &Value) -> bool {
    let numbers = !one.is_boolean() && !other.is_boolean() && (one.is_number() || other.is_number());
    match (number(one), number(other)) {
        #[expect(clippy::float_cmp, reason = "equal is what was asked")]
        (Some(one), Some(other)) if numbers => one == other,
        _ => text(one) == text(other),
    }
}

#[async_trait]
impl Check for QueryCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let config = &self.config;
        let mut session = self.database.connect(cx).await?;
        let canceller = session.canceller();
        let asked = canceller.cancels(cx, self.ask(session.connection())).await;
        session.close().await;
        let rows = asked.map_err(|error| {
            let code = error.code().map(str::to_owned);
            let error = StepError::from(error);
            match code.as_deref() {
                Some("25006") => error.with_hint("a check changes nothing: let a `postgres.sql` step do that"),
                Some("57014") if !cx.cancelled().is_cancelled() => {
                    error.with_hint("raise `statement_timeout` of the check, or make the query cheaper")
                }
                _ => error,
            }
        })?;
        let value = match self.judge(rows) {
            Ok(value) => value,
            Err(verdict) => return Ok(verdict),
        };
        let shown = text(&value);
        let verdict = Verdict::pass(format!("{} is {shown}", config.name)).with_fact(&config.name, &shown);
        let figure = number(&value);
        let verdict = match figure {
            Some(figure) => verdict.with_measurement(&config.name, figure),
            None => verdict,
        };
        if let Some(equals) = &config.equals {
            if equal(&value, equals) {
                return Ok(verdict);
            }
            let message = format!("{} is {shown}, not {}", config.name, text(equals));
            return Ok(Verdict { status: upgrade_core::verdict::Status::Fail, message, ..verdict });
        }
        if figure.is_none() {
            return Ok(Verdict::unknown(format!("{} is {shown:?}, which is no number", config.name))
                .with_hint("compare a text with `equals`, or let the query answer with a number"));
        }
        let baseline = cx.baseline(&config.name).map(|figure| (config.name.clone(), figure));
        let limits = BTreeMap::from([(config.name.clone(), config.limit())]);
        Ok(verdict.held_to(&limits, &baseline.into_iter().collect()))
    }

    fn kind(&self) -> &str {
        "postgres.query"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn needs_baseline(&self) -> bool {
        self.config.limit().is_relative()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn equal_is_what_people_mean_by_it() {
        for (one, other) in [
            (json!(3), json!(3.0)),
            (json!("3"), json!(3)),
            (json!("3.50"), json!(3.5)),
            (json!(true), json!("true")),
            (json!("ready"), json!("ready")),
        ] {
            assert!(equal(&one, &other), "{one} {other}");
        }
        for (one, other) in [
            (json!(3), json!(4)),
            (json!(true), json!(1)),
            (json!("Ready"), json!("ready")),
            (json!("3.50"), json!("3.5")),
        ] {
            assert!(!equal(&one, &other), "{one} {other}");
        }
    }
}
