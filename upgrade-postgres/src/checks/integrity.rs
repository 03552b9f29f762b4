//! `postgres.integrity`: whether the tables hold what they held before the run.

mod foreign_keys;
mod snapshot;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::{AssertSqlSafe, PgConnection};
use upgrade_core::check::Check;
use upgrade_core::context::{Context, Direction};
use upgrade_core::error::{CheckError, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::verdict::Verdict;

use crate::error::{Doing, PostgresError};
use crate::identifier::{Identifier, TableName};
use crate::target::Database;

pub use foreign_keys::ForeignKeys;
use snapshot::{Contents, TABLE, read};

/// How many faults are named before the rest is only counted.
const NAMED: usize = 10;

/// Configures `postgres.integrity`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct IntegrityCheckConfig {
    /// The database.
    pub target: String,
    /// The tables. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tables: Option<Vec<TableName>>,
    /// The schemas whose tables are read, where `tables` names none. Default: all but the system's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub schemas: Vec<Identifier>,
    /// Tables that are left out.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub ignore: BTreeSet<TableName>,
    /// Columns that do not count, by table: what live traffic or the upgrade changes in them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub ignore_columns: BTreeMap<TableName, Vec<Identifier>>,
    /// Tables that may have more rows than before; of these only the number of rows is compared.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub may_grow: BTreeSet<TableName>,
    /// Whether contents are compared or only numbers of rows. Default `contents`.
    #[serde(default)]
    pub compare: Compare,
    /// Which foreign keys are asked for rows that break them. Default `unproven`.
    #[serde(default)]
    pub foreign_keys: ForeignKeys,
    /// Queries of one's own that must hold.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub assertions: Vec<Assertion>,
}

/// Says what is compared of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Compare {
    /// Every row, by a fingerprint of all of them.
    #[default]
    Contents,
    /// How many rows there are.
    Rows,
}

/// Names a query that must hold: `is_true` answers true, or `is_empty` answers with no row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Assertion {
    /// Its name in messages.
    pub name: String,
    /// A query whose first column is true in its first row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub is_true: Option<String>,
    /// A query that finds no row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub is_empty: Option<String>,
}

/// Compares what tables hold with what they held before the run.
///
/// # Guarantees
/// All is read in one snapshot, in a transaction that can change nothing.
#[derive(Debug)]
pub struct IntegrityCheck {
    config: IntegrityCheckConfig,
    database: Arc<Database>,
}

impl IntegrityCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// The target is not a database, or an assertion is not one query.
    pub fn from_config(config: IntegrityCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let database = cx.target::<Database>(&config.target)?;
        for (at, assertion) in config.assertions.iter().enumerate() {
            let queries = [&assertion.is_true, &assertion.is_empty];
            let given: Vec<_> = queries.into_iter().flatten().collect();
            if given.len() != 1 || given[0].trim().is_empty() {
                return Err(BuildError::new(format!(
                    "assertion `{}` needs one query: `is_true` or `is_empty`",
                    assertion.name
                ))
                .at(format!("assertions[{at}]")));
            }
        }
        if config.tables.is_some() && !config.schemas.is_empty() {
            return Err(BuildError::new("`tables` names them all: `schemas` adds nothing").at("schemas"));
        }
        Ok(Self { config, database })
    }

    async fn measure(&self, cx: &Context, connection: &mut PgConnection) -> Result<Verdict, PostgresError> {
        sqlx::raw_sql("begin transaction isolation level repeatable read, read only")
            .execute(&mut *connection)
            .await
            .doing(|| "taking a snapshot".into())?;
        let before = snapshot::before(cx)?;
        let read = read(connection, &self.config, &self.database.state_schema(), &before, cx).await?;
        let keys = foreign_keys::violations(connection, self.config.foreign_keys, &read.names).await?;
        let mut faults = Faults::default();
        if !cx.is_baseline() {
            if before.is_empty() && self.compares() {
                let verdict = Verdict::unknown("nothing was read before the run that this could be compared with");
                return Ok(verdict.with_hint(
                    "ask the same check, by its id, before the run: the answer to it then is in the report",
                ));
            }
            self.compare(cx, &before, &read.tables, &mut faults);
            self.compare_keys(cx, &keys, &mut faults);
        }
        for assertion in &self.config.assertions {
            sqlx::raw_sql("savepoint assertion").execute(&mut *connection).await?;
            match assertion.fault(connection).await {
                Ok(fault) => fault.into_iter().for_each(|fault| faults.say(fault)),
                // It may ask for what the upgrade is yet to make; the rest of the baseline counts.
                Err(error) if cx.is_baseline() && error.code().is_some_and(|code| code.starts_with("42")) => {
                    faults.say(StepError::from(error).message().to_owned());
                }
                Err(error) => return Err(error),
            }
            sqlx::raw_sql("rollback to savepoint assertion").execute(&mut *connection).await?;
        }
        sqlx::raw_sql("rollback").execute(connection).await?;

        let rows: i64 = read.tables.values().map(|table| table.rows).sum();
        let broken: i64 = keys.values().sum();
        let mut verdict = match (faults.message(), broken) {
            (Some(message), _) => Verdict::fail(message)
                .with_hint("compare with a backup or ask who else wrote; what may differ is named by `ignore`, `ignore_columns` and `may_grow`"),
            (None, 0) => Verdict::pass(format!(
                "{} tables with {rows} rows{}",
                read.tables.len(),
                if cx.is_baseline() { "" } else { ", as before the run" }
            )),
            (None, _) => Verdict::warn(format!("{broken} rows break a foreign key, as they did before: {}", named(&keys)))
                .with_hint("correct them, then `alter table … validate constraint …`"),
        };
        for (table, contents) in &read.tables {
            verdict = verdict.with_fact(format!("{TABLE}{}", String::from(table.clone())), contents.to_text());
        }
        for (key, rows) in &keys {
            verdict = verdict.with_fact(format!("{KEY}{key}"), rows.to_string());
        }
        Ok(verdict
            .with_measurement("tables", read.tables.len() as f64)
            .with_measurement("rows", rows as f64)
            .with_measurement("differences", faults.count as f64)
            .with_measurement("foreign_key_violations", broken as f64))
    }

    /// Tells whether there is anything that needs an answer from before the run.
    fn compares(&self) -> bool {
        !self.config.tables.as_ref().is_some_and(Vec::is_empty)
    }

    fn compare(
        &self,
        cx: &Context,
        before: &BTreeMap<TableName, Contents>,
        now: &BTreeMap<TableName, Contents>,
        faults: &mut Faults,
    ) {
        let back = cx.direction() == Direction::Back;
        for (table, was) in before {
            let name = String::from(table.clone());
            let Some(is) = now.get(table) else {
                faults.say(format!("{name} is gone"));
                continue;
            };
            let gone: Vec<_> = was.columns.iter().filter(|column| !is.columns.contains(*column)).cloned().collect();
            let added: Vec<_> = is.columns.iter().filter(|column| !was.columns.contains(*column)).cloned().collect();
            if !gone.is_empty() {
                faults.say(format!("{name} has lost its columns {}", gone.join(", ")));
            } else if back && !added.is_empty() {
                faults.say(format!("{name} still has the columns {}", added.join(", ")));
            } else if self.config.may_grow.contains(table) {
                if is.rows < was.rows {
                    faults.say(format!("{name} has {} rows, had {}", is.rows, was.rows));
                }
            } else if is.rows != was.rows {
                faults.say(format!("{name} has {} rows, had {}", is.rows, was.rows));
            } else if is.digest != was.digest {
                faults.say(format!("{name} has other contents in its {} rows", is.rows));
            }
        }
        // On the way forward a new table may be what the upgrade is about.
        for table in now.keys().filter(|table| back && !before.contains_key(table)) {
            faults.say(format!("{} was not there before", String::from(table.clone())));
        }
    }

    fn compare_keys(&self, cx: &Context, keys: &BTreeMap<String, i64>, faults: &mut Faults) {
        for (key, rows) in keys {
            let before: i64 = cx.baseline_fact(&format!("{KEY}{key}")).and_then(|text| text.parse().ok()).unwrap_or(0);
            if *rows > before {
                faults.say(format!("{rows} rows break the foreign key {key}, before it were {before}"));
            }
        }
    }
}

const KEY: &str = "foreign key ";

fn named(keys: &BTreeMap<String, i64>) -> String {
    let broken: Vec<_> =
        keys.iter().filter(|(_, rows)| **rows > 0).map(|(key, rows)| format!("{key} ({rows})")).collect();
    broken.join(", ")
}

/// Collects what is not as it should be.
#[derive(Default)]
struct Faults {
    said: Vec<String>,
    count: usize,
}

impl Faults {
    fn say(&mut self, fault: String) {
        self.count += 1;
        if self.said.len() < NAMED {
            self.said.push(fault);
        }
    }

    fn message(&self) -> Option<String> {
        let more = self.count - self.said.len();
        let said = self.said.join("; ");
        match (self.count, more) {
            (0, _) => None,
            (_, 0) => Some(said),
            _ => Some(format!("{said}; and {more} more")),
        }
    }
}

impl Assertion {
    async fn fault(&self, connection: &mut PgConnection) -> Result<Option<String>, PostgresError> {
        let (name, doing) = (&self.name, || format!("the assertion `{}`", self.name));
        if let Some(query) = &self.is_true {
            let sql = format!("select to_jsonb(answer) from ({query}) as answer limit 1");
            let answer: Option<Value> =
                sqlx::query_scalar(AssertSqlSafe(sql)).fetch_optional(connection).await.doing(doing)?;
            let columns = answer.as_ref().and_then(Value::as_object);
            return Ok(match columns.and_then(|columns| columns.values().next()) {
                Some(Value::Bool(true)) => None,
                Some(other) => Some(format!("`{name}` answers {other}, not true")),
                None => Some(format!("`{name}` answers nothing, not true")),
            });
        }
        let query = self.is_empty.as_deref().unwrap_or_default();
        let sql = format!("select count(*), min(answer::text) from ({query}) as answer");
        let (rows, first): (i64, Option<String>) =
            sqlx::query_as(AssertSqlSafe(sql)).fetch_one(connection).await.doing(doing)?;
        let first = first.unwrap_or_default();
        Ok((rows > 0).then(|| format!("`{name}` finds {rows} rows, the first is {first:.200}")))
    }
}

#[async_trait]
impl Check for IntegrityCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let mut session = self.database.connect(cx).await?;
        let canceller = session.canceller();
        let verdict = canceller.cancels(cx, self.measure(cx, session.connection())).await;
        session.close().await;
        Ok(verdict?)
    }

    fn kind(&self) -> &str {
        "postgres.integrity"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn needs_baseline(&self) -> bool {
        true
    }
}
