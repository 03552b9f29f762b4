//! `postgres.backfill`: fills rows in batches beside live traffic, resumable, within a budget.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::{Executor as _, PgConnection, SqlSafeStr as _, Statement as _};
use tokio::time::Instant;
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::StepError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;
use upgrade_core::units::{Bytes, Share, Span};

use crate::backfill::bookmark::{self, Range};
use crate::backfill::budget::{BudgetConfig, Monitor};
use crate::backfill::conduct::Conductor;
use crate::backfill::pace::Pace;
use crate::backfill::plan::{Found, Plan};
use crate::backfill::relation::{self, Event, Refusal, Relation};
use crate::backfill::restore;
use crate::backfill::statements::{Work, built, refutes, settings};
use crate::backfill::throttle::Governor;
use crate::backfill::vacuum::Cadence;
use crate::backfill::workers::Crew;
use crate::error::{Doing, PostgresError};
use crate::identifier::{Identifier, TableName};
use crate::ledger::Ledger;
use crate::session::Session;
use crate::target::Database;

/// How often the walk may end and find rows that came meanwhile.
const PASSES: i32 = 20;

/// Configures `postgres.backfill`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BackfillConfig {
    /// The database.
    pub target: String,
    /// The table whose rows are updated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<TableName>,
    /// The columns that are set, each with its expression over the row.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub set: BTreeMap<Identifier, String>,
    /// Which rows are still to be written. Default: all that do not hold what `set` makes of them.
    #[serde(default, rename = "where", skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// The table that rows are inserted into.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub into: Option<TableName>,
    /// The query that gives them; its columns have the names of those of `into`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub select: Option<String>,
    /// The columns of the unique key that is walked. Default: the primary key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<Vec<Identifier>>,
    /// Writes each row exactly once although nothing on it shows that it was written: `n = n + 1`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub once: bool,
    /// For each column the expression that undoes it. Default: the values found are kept.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub inverse: BTreeMap<Identifier, String>,
    /// How long a batch should take. Default 100 ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch_time: Option<Span>,
    /// How many rows a batch has at most. Default 50000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_batch_rows: Option<u32>,
    /// How many sessions work at a time. Default: 2, with a budget 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workers: Option<u32>,
    /// How many rows are written in a second at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_rows_per_second: Option<u32>,
    /// What the backfill may cost others. Default: it is not throttled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<BudgetConfig>,
    /// After which share of dead rows the table is vacuumed; `0%` is never. Default 10%.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vacuum: Option<Share>,
}

/// Fills rows in batches, each exactly once, however often it is interrupted.
#[derive(Debug, Clone)]
pub struct Backfill {
    config: BackfillConfig,
    database: Arc<Database>,
}

/// Holds what undoing a backfill needs; the values found are in the database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackfillUndo {
    /// What is written; none if that was not known yet, in a plan.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    plan: Option<Plan>,
}

/// Tells what the backfill did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackfillOutput {
    /// How many rows it wrote.
    pub rows: u64,
}

/// What `prepare` finds.
struct Outlook {
    plan: Plan,
    relation: Relation,
    /// About how many rows are pending; none if there is none at all.
    pending: Option<u64>,
}

impl Backfill {
    /// Makes the step from its configuration.
    ///
    /// # Errors
    /// The target is not a database, or what is to be written is not stated, or stated twice.
    pub fn from_config(config: BackfillConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let database = cx.target::<Database>(&config.target)?;
        let wrong = |key: &str, message: &str| Err(BuildError::new(message).at(key));
        match (&config.table, &config.into) {
            (Some(_), Some(_)) => {
                return wrong("into", "`table` is updated, `into` is inserted into: state one of them");
            }
            (None, None) => {
                return wrong("table", "neither `table` with `set` is stated, nor `into` with `select`");
            }
            (Some(_), None) => {
                if config.set.is_empty() {
                    return wrong("set", "it sets no column");
                }
                if config.select.is_some() {
                    return wrong("select", "rows of a `select` go `into` a table; for `table` state `set`");
                }
            }
            (None, Some(_)) => {
                if config.select.as_ref().is_none_or(|select| select.trim().is_empty()) {
                    return wrong("select", "what is inserted is not stated");
                }
                if !config.set.is_empty() || config.filter.is_some() || !config.inverse.is_empty() {
                    return wrong("set", "`set`, `where` and `inverse` belong to `table`; state all in the `select`");
                }
            }
        }
        let texts =
            config.set.iter().map(|text| ("set", text)).chain(config.inverse.iter().map(|text| ("inverse", text)));
        for (key, (column, expression)) in texts {
            if expression.trim().is_empty() {
                return wrong(&format!("{key}.{}", column.as_str()), "the expression is empty");
            }
        }
        if config.filter.as_ref().is_some_and(|filter| filter.trim().is_empty()) {
            return wrong("where", "the condition is empty");
        }
        if !config.inverse.is_empty() && !config.inverse.keys().eq(config.set.keys()) {
            return wrong("inverse", "it must name the very columns of `set`");
        }
        for (key, zero) in [
            ("workers", config.workers == Some(0)),
            ("max_rows_per_second", config.max_rows_per_second == Some(0)),
            ("max_batch_rows", config.max_batch_rows == Some(0)),
            ("batch_time", config.batch_time.is_some_and(|time| time.0.is_zero())),
            ("key", config.key.as_ref().is_some_and(Vec::is_empty)),
        ] {
            if zero {
                return wrong(key, "it must be more than nothing");
            }
        }
        if let Some((key, message)) = config.budget.as_ref().and_then(BudgetConfig::problem) {
            return wrong(&format!("budget.{key}"), message);
        }
        Ok(Self { config, database })
    }

    fn event(&self) -> Event {
        if self.config.into.is_some() { Event::Insert } else { Event::Update }
    }

    fn table(&self) -> &TableName {
        let named = self.config.table.as_ref().or(self.config.into.as_ref());
        named.expect("a configuration without a table is refused")
    }

    fn work(&self, plan: Plan, major: i32) -> Work {
        let expressions = plan.columns.iter().filter_map(|column| self.config.set.get(&column.name).cloned()).collect();
        Work {
            plan,
            expressions,
            filter: self.config.filter.clone(),
            select: self.config.select.clone(),
            once: self.config.once,
            returns_old: major >= 18,
        }
    }

    fn workers(&self) -> usize {
        let default = if self.config.budget.is_some() { 1 } else { 2 };
        self.config.workers.map_or(default, |workers| usize::try_from(workers).unwrap_or(default)).min(64)
    }

    fn cadence(&self, relation: Option<&Relation>) -> Option<Cadence> {
        let relation = relation.filter(|relation| relation.vacuums)?;
        let share = self.config.vacuum.map_or(0.1, |share| share.0);
        Cadence::of(self.table(), share, relation.rows, self.config.budget.is_some())
    }

    /// Finds out what would be written, and refuses what cannot be.
    async fn look(&self, session: &mut Session) -> Result<Result<Outlook, Refusal>, PostgresError> {
        let (config, table, event) = (&self.config, self.table(), self.event());
        let major = session.facts().major();
        let connection = session.connection();
        let names: Vec<Identifier> = match &config.select {
            Some(select) => columns_of(connection, select).await?,
            None => config.set.keys().cloned().collect(),
        };
        let relation = match relation::read(connection, table, event).await? {
            Ok(relation) => relation,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let known = relation
            .key(table, config.key.as_deref())
            .and_then(|key| relation.written(table, &names, event).map(|columns| (key, columns)));
        let (key, columns) = match known {
            Ok(known) => known,
            Err(refusal) => return Ok(Err(refusal)),
        };
        if let Some(refusal) = against_the_key(table, &key, &columns, event) {
            return Ok(Err(refusal));
        }
        let found = match event {
            Event::Insert => Found::Nothing,
            Event::Update if !config.inverse.is_empty() => {
                Found::Inverse(columns.iter().filter_map(|column| config.inverse.get(&column.name).cloned()).collect())
            }
            Event::Update
                if self.found_is_null(connection, &columns.iter().map(|c| &c.name).collect::<Vec<_>>()).await? =>
            {
                Found::Null
            }
            Event::Update => Found::Values,
        };
        let plan = Plan { table: table.clone(), key, columns, found };
        let work = self.work(plan.clone(), major);
        sqlx::raw_sql(built(&settings(&plan))).execute(&mut *connection).await?;
        explained(connection, &dry(&work), "understanding what is written").await?;
        if let Found::Inverse(expressions) = &plan.found {
            let inverse = Work { expressions: expressions.clone(), filter: None, once: true, ..work.clone() };
            explained(connection, &dry(&inverse), "understanding `inverse`").await?;
        }
        if let Some(probe) = config.budget.as_ref().and_then(|budget| budget.probe.as_ref()) {
            sqlx::query(built(probe)).fetch_all(&mut *connection).await.doing(|| "the probe of the budget".into())?;
        }
        sqlx::raw_sql("set enable_seqscan = on").execute(&mut *connection).await?;
        let any: bool = sqlx::query_scalar(built(&work.any_pending()))
            .fetch_one(&mut *connection)
            .await
            .doing(|| "looking for rows to fill".into())?;
        let pending = if any {
            let estimated = explained(connection, &work.estimate(), "estimating the rows to fill").await?;
            Some(estimated[0]["Plan"]["Plan Rows"].as_f64().unwrap_or(1.0) as u64)
        } else {
            None
        };
        Ok(Ok(Outlook { plan, relation, pending }))
    }

    /// Asks the server whether the condition admits nothing but NULL in the columns.
    async fn found_is_null(
        &self,
        connection: &mut PgConnection,
        columns: &[&Identifier],
    ) -> Result<bool, PostgresError> {
        let Some(filter) = &self.config.filter else { return Ok(false) };
        sqlx::raw_sql("set constraint_exclusion = on").execute(&mut *connection).await?;
        let mut all = true;
        for column in columns {
            let plan = explained(connection, &refutes(self.table(), filter, column), "understanding `where`").await?;
            let plan = &plan[0]["Plan"];
            all &= plan["Node Type"] == "Result" && plan["One-Time Filter"] == "false";
        }
        sqlx::raw_sql("set constraint_exclusion = partition").execute(connection).await?;
        Ok(all)
    }

    fn changes(&self, outlook: &Outlook) -> Vec<Change> {
        let Outlook { plan, relation, pending } = outlook;
        let names = |columns: &[crate::backfill::plan::Column]| {
            columns.iter().map(|column| column.name.as_str().to_owned()).collect::<Vec<_>>().join(", ")
        };
        let rows = pending.unwrap_or(0);
        let size = Bytes(u64::try_from(relation.size).unwrap_or(0));
        let workers = self.workers();
        let pace = match (&self.config.budget, self.config.max_rows_per_second) {
            (Some(budget), _) => format!("held to: {}", budget.describe()),
            (None, Some(most)) => format!("at most {most} rows/s"),
            (None, None) => "not throttled".to_owned(),
        };
        let per_row = 8 * (plan.key.len() as u64 + 1) + 16 * plan.kept_columns().len() as u64;
        let kept = match &plan.found {
            Found::Null => "the keys, as the rows hold NULL",
            Found::Values => "keys and values found",
            Found::Inverse(_) => "the keys, and undoes by `inverse`",
            Found::Nothing => "the keys of the inserted rows",
        };
        let mut summary = format!(
            "about {rows} rows{}, {size} of table, in the order of ({}), batches of {} by {workers} {}, {pace}; undo keeps {kept}, about {}, until commit",
            relation.rows.map_or(String::new(), |all| if self.event() == Event::Update {
                format!(" of {all}")
            } else {
                String::new()
            }),
            names(&plan.key),
            self.config.batch_time.unwrap_or(Span::from_millis(100)),
            if workers == 1 { "worker" } else { "workers" },
            Bytes(per_row * rows),
        );
        if !relation.primary && self.config.key.is_none() {
            summary.push_str("; the table has no primary key");
        }
        if !relation.vacuums && self.event() == Event::Update {
            summary.push_str("; not vacuumed, as this user does not own the table");
        }
        if !relation.triggers.is_empty() {
            summary.push_str(&format!(
                "; fires the triggers {} for each row, in both directions",
                relation.triggers.join(", ")
            ));
        }
        let effect = if self.event() == Event::Insert { Effect::Create } else { Effect::Modify };
        vec![Change::new(effect, format!("{} ({})", plan.table, names(&plan.columns))).with_summary(summary)]
    }

    fn pace(&self) -> Arc<Pace> {
        let config = &self.config;
        let governor = if config.budget.is_some() { Governor::careful() } else { Governor::unlimited() };
        let batch_time = config.batch_time.map_or(std::time::Duration::from_millis(100), |span| span.0);
        Arc::new(Pace::new(batch_time, config.max_rows_per_second.map(f64::from), config.max_batch_rows, governor))
    }

    async fn crew(&self, cx: &Context, plan: &Plan, session: &Session) -> Arc<Crew> {
        let side = Ledger::of(&self.database, cx).table_name("backfill");
        let work = self.work(plan.clone(), session.facts().major());
        Arc::new(Crew { cx: cx.clone(), database: self.database.clone(), work, side, pace: self.pace() })
    }

    fn conductor(&self, crew: &Crew, cadence: Option<Cadence>, total: Option<u64>, verb: &str) -> Conductor {
        Conductor {
            cx: crew.cx.clone(),
            database: self.database.clone(),
            ledger: Ledger::of(&self.database, &crew.cx),
            pace: crew.pace.clone(),
            cadence,
            total,
            doing: format!("{verb} {}", crew.work.plan.table),
            began: Instant::now(),
            before: crew.pace.walked.load(Ordering::SeqCst),
        }
    }

    /// Watches the budget while `work` goes on; what it says goes first, as it stops the work.
    async fn governed<T>(&self, crew: &Crew, work: impl Future<Output = Result<T, StepError>>) -> Result<T, StepError> {
        let Some(config) = self.config.budget.clone() else { return work.await };
        let monitor = Monitor { config, pace: crew.pace.clone() };
        let watching = tokio::spawn(monitor.run(crew.cx.clone(), self.database.clone()));
        let done = work.await;
        crew.pace.stop();
        let watched = watching
            .await
            .unwrap_or_else(|panic| Err(StepError::unknown("the watch of the budget ended early").with_cause(&panic)));
        match (watched, done) {
            (Err(error), _) => Err(error),
            (Ok(()), done) => done,
        }
    }
}

/// Refuses to change what the walk goes by, and rows that could not be found again.
fn against_the_key(
    table: &TableName,
    key: &[crate::backfill::plan::Column],
    columns: &[crate::backfill::plan::Column],
    event: Event,
) -> Option<Refusal> {
    let (message, hint) = match event {
        Event::Update => {
            let both = key.iter().find(|part| columns.contains(part))?;
            (
                format!(
                    "column {} is part of the key that {table} is walked by, and would be changed",
                    both.name.as_str()
                ),
                "walk by another unique key (`key:`), or change keys in one statement (`postgres.sql`)",
            )
        }
        Event::Insert => {
            let missing = key.iter().find(|part| !columns.contains(part))?;
            (
                format!("the `select` gives no column {}, which is part of the key of {table}", missing.name.as_str()),
                "select the key's columns too, or name another unique key of `into` in `key`",
            )
        }
    };
    Some(Refusal { error: StepError::permanent(message).with_hint(hint), may_come: false })
}

/// Writes all as one statement, to ask the server whether it understands it.
fn dry(work: &Work) -> String {
    let plan = &work.plan;
    let names = plan.columns.iter().map(|column| column.name.to_string()).collect::<Vec<_>>().join(", ");
    match &work.select {
        Some(select) => format!(
            "explain (format json) insert into {} ({names}) select {names} from ({select}\n) as upgrade_source",
            plan.table
        ),
        None => {
            let set = plan
                .columns
                .iter()
                .zip(&work.expressions)
                .map(|(column, expression)| format!("{} = ({expression}\n)", column.name));
            format!(
                "explain (format json) update {} set {} where {}",
                plan.table,
                set.collect::<Vec<_>>().join(", "),
                work.pending()
            )
        }
    }
}

async fn explained(connection: &mut PgConnection, sql: &str, what: &str) -> Result<Value, PostgresError> {
    let sqlx::types::Json(plan): sqlx::types::Json<Value> =
        sqlx::query_scalar(built(sql)).fetch_one(connection).await.doing(|| what.to_owned())?;
    Ok(plan)
}

async fn columns_of(connection: &mut PgConnection, select: &str) -> Result<Vec<Identifier>, PostgresError> {
    use sqlx::Column as _;
    let statement = connection.prepare(built(select).into_sql_str()).await.doing(|| "understanding `select`".into())?;
    let name = |column: &sqlx::postgres::PgColumn| {
        Identifier::new(column.name()).map_err(|error| {
            StepError::permanent(error.to_string()).with_hint("name each column of the `select`: `… as NAME`").into()
        })
    };
    statement.columns().iter().map(name).collect()
}

#[async_trait]
impl Step for Backfill {
    const KIND: &'static str = "postgres.backfill";
    type Undo = BackfillUndo;
    type Output = BackfillOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<BackfillUndo, BackfillOutput>, StepError> {
        let mut session = self.database.connect(cx).await?;
        session.require_writable()?;
        let canceller = session.canceller();
        let looked = canceller.cancels(cx, self.look(&mut session)).await;
        session.close().await;
        let later = |error: &StepError| {
            let change = Change::new(Effect::Modify, self.table().to_string())
                .with_summary(format!("known when the steps before it have run: {}", error.message()));
            Prepared::change(BackfillUndo { plan: None }, [change])
        };
        match looked {
            Ok(Ok(outlook)) if outlook.pending.is_none() => Ok(Prepared::unchanged(
                BackfillOutput { rows: 0 },
                format!("no row of {} is left to be filled", outlook.plan.table),
            )),
            Ok(Ok(outlook)) => {
                let changes = self.changes(&outlook);
                Ok(Prepared::change(BackfillUndo { plan: Some(outlook.plan) }, changes))
            }
            Ok(Err(refusal)) if cx.is_dry_run() && refusal.may_come => Ok(later(&refusal.error)),
            Ok(Err(refusal)) => Err(refusal.error),
            // What it speaks of may be made by the steps that the plan has not run.
            Err(error)
                if cx.is_dry_run() && matches!(error.code(), Some("42703" | "42P01" | "3F000" | "42883" | "42704")) =>
            {
                Ok(later(&error.into()))
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn apply(&self, cx: &Context, undo: &BackfillUndo) -> Result<BackfillOutput, StepError> {
        let plan =
            undo.plan.as_ref().ok_or_else(|| StepError::permanent("the backfill was prepared for a plan only"))?;
        let mut session = self.database.connect(cx).await?;
        session.require_writable()?;
        let ledger = Ledger::of(&self.database, cx);
        ledger.ensure(&mut session).await?;
        let crew = self.crew(cx, plan, &session).await;
        session.execute(cx, settings(plan)).await?;
        let relation =
            relation::read(session.connection(), &plan.table, self.event()).await?.map_err(|refusal| refusal.error)?;
        let parts = if self.workers() == 1 { 1 } else { self.workers() * 4 };
        let estimate = (relation.rows, relation.size);
        let policy = self.database.lock_policy();
        let walk = bookmark::begin(cx, &mut session, &ledger, &crew.work, &crew.side, (estimate, parts)).await?;
        let (walked, written, mut pass) = bookmark::sums(session.connection(), &crew.side).await?;
        crew.pace.walked.store(walked, Ordering::SeqCst);
        crew.pace.written.store(written, Ordering::SeqCst);
        let cadence = self.cadence(Some(&relation)).filter(|_| self.event() == Event::Update);
        let conductor = self.conductor(&crew, cadence, walk.total, "filling");
        let relation_name = plan.table.to_string();
        let writes_to = self.config.table.as_ref().map(|_| relation_name.as_str());
        let filling = async {
            for _ in 0..PASSES {
                let ranges = if pass == 0 { walk.ranges.clone() } else { vec![Range::default()] };
                let workers = crew.start(pass, &Arc::new(ranges), self.workers());
                conductor.until_done(&mut session, workers).await?;
                if self.config.once {
                    return Ok(());
                }
                // A row that is not committed when its place is passed is seen once its writer has ended.
                conductor.writers_gone(&mut session, writes_to).await?;
                let left = crew.work.any_pending();
                let canceller = session.canceller();
                let asking = async {
                    sqlx::raw_sql("set enable_seqscan = on").execute(session.connection()).await?;
                    sqlx::query_scalar::<_, bool>(built(&left))
                        .fetch_one(session.connection())
                        .await
                        .doing(|| "looking for rows to fill".into())
                };
                if !canceller.cancels(cx, asking).await? {
                    return Ok(());
                }
                pass += 1;
            }
            Err(StepError::permanent(format!(
                "rows that need the backfill keep coming: after {PASSES} passes over {} there are still some",
                plan.table
            ))
            .with_hint("let new rows be right from the beginning: a default, a trigger (`postgres.expand`), or the new version of the application; then `upgrade resume`"))
        };
        self.governed(&crew, filling).await?;
        let (_, rows, _) = bookmark::sums(session.connection(), &crew.side).await?;
        // Committed synchronously: on disk with it are all batches before.
        let (kept, output) = (&ledger, BackfillOutput { rows });
        let noted = output.clone();
        policy
            .transaction(cx, &mut session, "noting the end", move |connection, _| {
                let noted = noted.clone();
                Box::pin(async move {
                    sqlx::raw_sql("set local synchronous_commit = on").execute(&mut *connection).await?;
                    kept.put(connection, "complete", &noted).await
                })
            })
            .await?;
        session.close().await;
        Ok(output)
    }

    async fn settle(&self, cx: &Context, _undo: &BackfillUndo) -> Result<(), StepError> {
        self.database.settle(cx).await
    }

    async fn commit(&self, cx: &Context, _undo: &BackfillUndo) -> Result<(), StepError> {
        let mut session = self.database.connect(cx).await?;
        let ledger = Ledger::of(&self.database, cx);
        ledger.clear(&mut session, &[ledger.table_name("backfill")]).await?;
        session.close().await;
        Ok(())
    }

    fn definition(&self) -> Value {
        // How fast it goes may change between two attempts: that makes it no other step.
        let mut config = self.config.clone();
        config.budget = None;
        config.batch_time = None;
        config.max_batch_rows = None;
        config.workers = None;
        config.max_rows_per_second = None;
        config.vacuum = None;
        serde_json::to_value(config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![self.database.clone()]
    }
}

#[async_trait]
impl Rollback for Backfill {
    async fn rollback(
        &self,
        cx: &Context,
        undo: &BackfillUndo,
        _output: Option<&BackfillOutput>,
    ) -> Result<(), StepError> {
        let mut session = self.database.connect(cx).await?;
        session.require_writable()?;
        let ledger = Ledger::of(&self.database, cx);
        let side = ledger.table_name("backfill");
        let Some(plan) = undo.plan.as_ref() else { return ledger.clear(&mut session, &[side]).await };
        let crew = self.crew(cx, plan, &session).await;
        session.execute(cx, settings(plan)).await?;
        let begun = restore::last_pass(session.connection(), &side).await?;
        if begun.is_some() {
            ledger.ensure(&mut session).await?;
            let event = if plan.found == Found::Nothing { Event::Insert } else { Event::Update };
            let relation =
                relation::read(session.connection(), &plan.table, event).await?.map_err(|refusal| refusal.error)?;
            let (_, written, _) = bookmark::sums(session.connection(), &side).await?;
            let conductor = self.conductor(&crew, self.cadence(Some(&relation)), Some(written), "putting back");
            let back = async {
                while let Some((pass, batches)) = restore::last_pass(session.connection(), &side).await? {
                    let workers = crew.start_back(pass, batches, self.workers());
                    conductor.until_done(&mut session, workers).await?;
                }
                Ok(())
            };
            self.governed(&crew, back).await?;
        }
        let changed = restore::changed(&mut session, &ledger).await?;
        if changed.rows > 0 && cx.on_conflict() == OnConflict::Stop {
            let keys = changed.keys.join("; ");
            tracing::warn!(rows = changed.rows, %keys, table = %plan.table, "rows that were changed since they were filled are left as they are");
            cx.progress(
                changed.rows,
                None,
                format!("{} rows of {} were changed since and are left as they are: {keys}", changed.rows, plan.table),
            );
        }
        ledger.clear(&mut session, &[side]).await?;
        session.close().await;
        Ok(())
    }
}
