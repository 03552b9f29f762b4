//! `postgres.index`: builds an index beside live traffic, or drops one.
//!
//! An index is built under a name of the run's own and gets its name only when it is whole, in one
//! transaction with the one that had it before. So whatever bears the run's names is the run's, and
//! what bears the index's name is what was found or what is intended: no crash leaves a doubt.
//!
//! ```text
//!              found            built                 swapped                     committed
//! NAME         old or nothing   old or nothing   ┌──► new                         new
//! …_built      –                new, INVALID     │    –
//!                               until whole  ────┘
//! …_aside      –                –                     old (dropped already if     –
//!                                                     the index is to be absent)
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::{AssertSqlSafe, PgConnection};
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;
use upgrade_core::units::Bytes;

use crate::error::{Doing, PostgresError};
use crate::identifier::{Identifier, TableName, literal};
use crate::indexes::{self, Index as Found, same};
use crate::ledger::Ledger;
use crate::session::Session;
use crate::target::Database;

/// Configures `postgres.index`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct IndexConfig {
    /// The database.
    pub target: String,
    /// The table or materialized view, with its schema unless that is `public`.
    pub table: TableName,
    /// The name of the index, in the schema of its table.
    pub name: Identifier,
    /// Whether the index is to be there. With `absent`, only `target`, `table` and `name` are given.
    #[serde(default)]
    pub state: IndexPresence,
    /// What is indexed, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub columns: Vec<IndexKey>,
    /// Whether each key may be there only once.
    #[serde(default)]
    pub unique: bool,
    /// Whether two keys that are null count as equal (from PostgreSQL 15 on).
    #[serde(default)]
    pub nulls_not_distinct: bool,
    /// The method: `btree`, `gin`, `gist`, `brin`, `hash`, or one of an extension. Default `btree`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<Identifier>,
    /// Columns that are stored with the keys.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub include: Vec<Identifier>,
    /// The condition for rows to be indexed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub r#where: Option<String>,
    /// Storage parameters: `fillfactor: 70`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub parameters: BTreeMap<Identifier, Value>,
    /// Where it is stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tablespace: Option<Identifier>,
}

/// Says whether an index is to be there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum IndexPresence {
    /// It is to be there.
    #[default]
    Present,
    /// It is to be gone.
    Absent,
}

/// Names one key of an index: a column, or more about it.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum IndexKey {
    /// A column, in ascending order.
    Column(Identifier),
    /// A column or an expression, and how it is indexed.
    Detailed(Box<DetailedIndexKey>),
}

/// Describes one key of an index.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DetailedIndexKey {
    /// A column.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<Identifier>,
    /// An expression, in place of a column.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expression: Option<String>,
    /// The order of the key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<Order>,
    /// Where nulls are sorted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nulls: Option<Nulls>,
    /// The operator class: `text_pattern_ops`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operator_class: Option<Identifier>,
    /// The collation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collation: Option<Identifier>,
}

/// Orders a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// The least first.
    Asc,
    /// The greatest first.
    Desc,
}

/// Places nulls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Nulls {
    /// Before every value.
    First,
    /// After every value.
    Last,
}

impl IndexKey {
    fn sql(&self) -> String {
        let key = match self {
            IndexKey::Column(column) => return column.to_string(),
            IndexKey::Detailed(key) => key,
        };
        let mut sql = match (&key.column, &key.expression) {
            (Some(column), _) => column.to_string(),
            (None, expression) => format!("({})", expression.as_deref().unwrap_or_default()),
        };
        if let Some(collation) = &key.collation {
            sql.push_str(&format!(" collate {collation}"));
        }
        if let Some(class) = &key.operator_class {
            sql.push_str(&format!(" {class}"));
        }
        sql.push_str(match key.order {
            Some(Order::Desc) => " desc",
            Some(Order::Asc) | None => "",
        });
        sql.push_str(match key.nulls {
            Some(Nulls::First) => " nulls first",
            Some(Nulls::Last) => " nulls last",
            None => "",
        });
        sql
    }
}

impl IndexConfig {
    /// Describes an index on columns, everything else by default.
    pub fn new(target: impl Into<String>, table: TableName, name: Identifier, columns: Vec<IndexKey>) -> Self {
        Self {
            target: target.into(),
            table,
            name,
            state: IndexPresence::Present,
            columns,
            unique: false,
            nulls_not_distinct: false,
            method: None,
            include: Vec::new(),
            r#where: None,
            parameters: BTreeMap::new(),
            tablespace: None,
        }
    }

    /// Writes what comes after the name of the table.
    fn definition(&self) -> String {
        let list = |names: Vec<String>| names.join(", ");
        let method = self.method.as_ref().map_or_else(|| "btree".to_owned(), ToString::to_string);
        let mut sql = format!("using {method} ({})", list(self.columns.iter().map(IndexKey::sql).collect()));
        if !self.include.is_empty() {
            sql.push_str(&format!(" include ({})", list(self.include.iter().map(ToString::to_string).collect())));
        }
        if self.nulls_not_distinct {
            sql.push_str(" nulls not distinct");
        }
        if !self.parameters.is_empty() {
            let value = |value: &Value| match value {
                Value::String(text) => literal(text),
                other => literal(&other.to_string()),
            };
            let parameters = self.parameters.iter().map(|(name, v)| format!("{name} = {}", value(v))).collect();
            sql.push_str(&format!(" with ({})", list(parameters)));
        }
        if let Some(condition) = &self.r#where {
            sql.push_str(&format!(" where ({condition})"));
        }
        sql
    }
}

/// Builds an index beside live traffic, or drops one.
#[derive(Debug, Clone)]
pub struct Index {
    config: IndexConfig,
    database: Arc<Database>,
}

/// Holds what undoing needs: both states of the name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexUndo {
    name: TableName,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    found: Option<Found>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    intended: Option<Found>,
}

/// Tells what stands there now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexOutput {
    /// The definition as the server spells it; none if the index is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub definition: Option<String>,
    /// Its size.
    pub bytes: u64,
}

/// Holds the names of the run's own, in the schema of the index.
struct Names {
    built: TableName,
    aside: TableName,
    replaced: TableName,
}

impl Names {
    fn of(ledger: &Ledger, undo: &IndexUndo) -> Self {
        let own = |start| TableName::new(undo.name.schema.clone(), ledger.table_name(start).name);
        Self { built: own("upgrade_built"), aside: own("upgrade_aside"), replaced: own("upgrade_replaced") }
    }
}

impl Index {
    /// Makes the step from its configuration.
    ///
    /// # Errors
    /// The target is not a database, or keys are missing, doubled or not for this `state`.
    pub fn from_config(config: IndexConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let database = cx.target::<Database>(&config.target)?;
        if config.state == IndexPresence::Absent {
            let plain = IndexConfig {
                state: IndexPresence::Absent,
                ..IndexConfig::new(config.target.clone(), config.table.clone(), config.name.clone(), Vec::new())
            };
            if serde_json::to_value(&plain).ok() != serde_json::to_value(&config).ok() {
                return Err(BuildError::new("an index that is to be absent has no definition").at("state").with_hint(
                    "leave out everything but `target`, `table` and `name`: undo builds it again as it was found",
                ));
            }
            return Ok(Self { config, database });
        }
        if config.columns.is_empty() {
            return Err(BuildError::new("the index has no columns").at("columns"));
        }
        for (number, key) in config.columns.iter().enumerate() {
            let IndexKey::Detailed(key) = key else { continue };
            let empty = key.expression.as_ref().is_some_and(|text| text.trim().is_empty());
            if empty || key.column.is_some() == key.expression.is_some() {
                return Err(BuildError::new("a key is either a `column` or an `expression`")
                    .at(format!("columns.{number}"))
                    .with_hint("write `columns: [customer_id]`, or `columns: [{ expression: lower(email) }]`"));
            }
        }
        if config.nulls_not_distinct && !config.unique {
            return Err(BuildError::new("only a unique index compares nulls").at("nulls_not_distinct"));
        }
        Ok(Self { config, database })
    }

    fn name(&self) -> TableName {
        TableName::new(self.config.table.schema.clone(), self.config.name.clone())
    }

    /// Asks the server how it spells the definition, by an index on an empty table of the same columns,
    /// of which nothing stays.
    async fn intended(&self, connection: &mut PgConnection) -> Result<Found, PostgresError> {
        let config = &self.config;
        sqlx::raw_sql(AssertSqlSafe(format!("begin; create temporary table upgrade_shape (like {})", config.table)))
            .execute(&mut *connection)
            .await
            .doing(|| format!("reading the columns of {}", config.table))?;
        let unique = if config.unique { "unique " } else { "" };
        let create = format!("create {unique}index upgrade_shape_index on pg_temp.upgrade_shape {}", config.definition());
        // Prepared: a text that holds more than the one statement is refused.
        sqlx::query(AssertSqlSafe(create))
            .execute(&mut *connection)
            .await
            .doing(|| "understanding the definition of the index".into())?;
        sqlx::raw_sql("set local search_path = ''").execute(&mut *connection).await?;
        let read = indexes::read(&mut *connection, "pg_temp.upgrade_shape_index").await?;
        let index = read.ok_or_else(|| StepError::unknown("an index that was just made is not there"))?;
        Ok(Found { table: config.table.clone(), tablespace: config.tablespace.clone(), ..index })
    }

    /// Reads all that the answer to `prepare` depends on.
    async fn look(&self, cx: &Context, connection: &mut PgConnection) -> Result<Look, PostgresError> {
        let config = &self.config;
        let spelled = config.table.to_string();
        let table: Option<(String, bool, i64)> = sqlx::query_as(
            "select relkind::text, pg_has_role(relowner, 'USAGE'), pg_table_size(oid) from pg_class where oid = to_regclass($1)",
        )
        .bind(&spelled)
        .fetch_optional(&mut *connection)
        .await
        .doing(|| format!("looking at {spelled}"))?;
        let Some((kind, owner, bytes)) = table else { return Ok(Look::NoTable) };
        match kind.as_str() {
            "r" | "m" => {}
            "p" => return Err(partitioned(&config.table).into()),
            _ => {
                return Err(StepError::permanent(format!("{spelled} is neither a table nor a materialized view"))
                    .with_hint("correct `table`")
                    .into());
            }
        }
        if !owner {
            return Err(StepError::permanent(format!("{spelled} belongs to another user, who alone may index it"))
                .with_hint("connect as its owner, or grant the owner's role to the user of the target's `url`")
                .into());
        }
        let intended = match config.state {
            IndexPresence::Absent => None,
            IndexPresence::Present => {
                let intended = self.intended(&mut *connection).await;
                let ended = sqlx::raw_sql("rollback").execute(&mut *connection).await;
                let intended = intended?;
                ended?;
                Some(intended)
            }
        };
        sqlx::raw_sql("set search_path = ''").execute(&mut *connection).await?;
        let name = self.name().to_string();
        let found = indexes::read(&mut *connection, &name).await?;
        if let Some(found) = found.as_ref().filter(|found| !same(Some(found), intended.as_ref())) {
            self.replaceable(cx, &mut *connection, found, intended.as_ref()).await?;
        }
        let twin: Option<String> = match &intended {
            None => None,
            Some(intended) => {
                let names: Vec<String> = sqlx::query_scalar(
                    "select format('%I.%I', n.nspname, c.relname) from pg_index i join pg_class c on c.oid = i.indexrelid \
                     join pg_namespace n on n.oid = c.relnamespace where i.indrelid = to_regclass($1)",
                )
                .bind(&spelled)
                .fetch_all(&mut *connection)
                .await?;
                let mut twin = None;
                for other in names {
                    let index = indexes::read(&mut *connection, &other).await?;
                    if same(index.as_ref(), Some(intended)) {
                        twin = Some(other);
                    }
                }
                twin
            }
        };
        Ok(Look::Table { bytes: u64::try_from(bytes).unwrap_or_default(), found, intended, twin })
    }

    /// Asks whether what stands under the name may make way.
    async fn replaceable(
        &self,
        cx: &Context,
        connection: &mut PgConnection,
        found: &Found,
        intended: Option<&Found>,
    ) -> Result<(), PostgresError> {
        let name = self.name();
        if found.table != self.config.table {
            return Err(StepError::permanent(format!("{name} is an index on another table, {}", found.table))
                .with_hint("correct `table`, or give the index another `name`")
                .into());
        }
        if let Some(pid) = indexes::builder_of(&mut *connection, &name.to_string()).await? {
            return Err(StepError::transient(format!("{name} is being built by somebody else, pid {pid}"))
                .with_hint("wait until that is done, or end it, then try again")
                .into());
        }
        if let Some(intended) = intended
            && !intended.is_like(found)
            && cx.on_conflict() == OnConflict::Stop
        {
            return Err(StepError::permanent(format!(
                "{name} is there already with another definition: {}, not {}",
                found.describe(),
                intended.describe()
            ))
            .with_hint(
                "give the index another `name`, drop the old one with a step before, or set `on_conflict: overwrite` on \
                 the step: the old one is then replaced, and undo puts it back",
            )
            .into());
        }
        match indexes::obstacle(connection, &name.to_string()).await? {
            Some(reason) => Err(StepError::permanent(format!("{name} cannot be dropped: {reason}"))
                .with_hint("an index that something else rests on is no matter of this step")
                .into()),
            None => Ok(()),
        }
    }

    fn change(&self, look: &Look) -> Change {
        let name = String::from(self.name());
        let Look::Table { bytes, found, intended, twin } = look else {
            return Change::new(Effect::Create, format!("index {name}"))
                .with_summary(format!("known when a step before it has made {}", self.config.table));
        };
        let on = format!("{} ({})", String::from(self.config.table.clone()), Bytes(*bytes));
        let Some(intended) = intended else {
            let was = found.as_ref().map(Found::describe).unwrap_or_default();
            return Change::new(Effect::Remove, format!("index {name}"))
                .with_summary(format!("{was}, concurrently; undo builds it again"));
        };
        let (effect, instead) = match found {
            None => (Effect::Create, String::new()),
            Some(found) => (Effect::Modify, format!("; replaces {}", found.describe())),
        };
        let unique = if intended.unique { "unique " } else { "" };
        let twin = twin.as_ref().map(|twin| format!("; {twin} is the same already")).unwrap_or_default();
        Change::new(effect, format!("index {name}"))
            .with_summary(format!("{unique}{} on {on}, concurrently{instead}{twin}", intended.definition))
    }

    /// Opens a session that spells definitions as the undo record does.
    async fn open(&self, cx: &Context) -> Result<Session, StepError> {
        let mut session = self.database.connect(cx).await?;
        session.require_writable()?;
        session.execute(cx, "set search_path = ''".into()).await?;
        Ok(session)
    }

    async fn output(&self, session: &mut Session, undo: &IndexUndo) -> Result<IndexOutput, StepError> {
        let bytes: Option<i64> = sqlx::query_scalar("select pg_relation_size(to_regclass($1))")
            .bind(undo.name.to_string())
            .fetch_one(session.connection())
            .await
            .doing(|| "reading the size of the index".into())?;
        Ok(IndexOutput {
            definition: undo.intended.as_ref().map(|index| index.definition.clone()),
            bytes: u64::try_from(bytes.unwrap_or_default()).unwrap_or_default(),
        })
    }

    /// Gives the name from the one to the other, in one transaction, if what has it may make way.
    async fn swap(
        &self,
        cx: &Context,
        session: &mut Session,
        swap: Swap<'_>,
    ) -> Result<(), PostgresError> {
        let policy = self.database.lock_policy();
        let swap = &swap;
        policy
            .transaction(cx, session, "giving the index its name", move |connection, _| {
                Box::pin(async move {
                    let Swap { undo, from, to, away, here } = swap;
                    let present = indexes::read(connection, &undo.name.to_string()).await?;
                    if same(present.as_ref(), *to) {
                        return Ok(());
                    }
                    if !same(present.as_ref(), *from) && cx.on_conflict() == OnConflict::Stop {
                        return Err(conflict(undo, present.as_ref()).into());
                    }
                    if present.is_some() {
                        rename(connection, &undo.name, away).await?;
                    }
                    if let Some(here) = here {
                        rename(connection, here, &undo.name).await?;
                    }
                    Ok(())
                })
            })
            .await
    }
}

/// Describes how a name changes hands.
struct Swap<'a> {
    undo: &'a IndexUndo,
    /// What may have it now.
    from: Option<&'a Found>,
    /// What has it then.
    to: Option<&'a Found>,
    /// The name for what had it.
    away: &'a TableName,
    /// The name of what gets it.
    here: Option<&'a TableName>,
}

async fn rename(connection: &mut PgConnection, from: &TableName, to: &TableName) -> Result<(), PostgresError> {
    sqlx::raw_sql(AssertSqlSafe(format!("alter index {from} rename to {}", to.name)))
        .execute(connection)
        .await
        .doing(|| format!("renaming index {from} to {}", to.name))?;
    Ok(())
}

/// Holds what `prepare` found.
enum Look {
    NoTable,
    Table { bytes: u64, found: Option<Found>, intended: Option<Found>, twin: Option<String> },
}

fn partitioned(table: &TableName) -> StepError {
    StepError::permanent(format!("{table} is partitioned: the server builds no index on it concurrently")).with_hint(
        "give each partition its index with a `postgres.index` step of its own; then one `postgres.sql` step with \
         `create index NAME on only TABLE (…)` and `alter index NAME attach partition …` for each, which takes moments",
    )
}

fn conflict(undo: &IndexUndo, present: Option<&Found>) -> StepError {
    let text = |index: Option<&Found>| index.map_or_else(|| "absent".to_owned(), Found::describe);
    StepError::conflict(Conflict {
        subject: format!("index {}", String::from(undo.name.clone())),
        found: text(undo.found.as_ref()),
        intended: text(undo.intended.as_ref()),
        present: text(present),
    })
}

#[async_trait]
impl Step for Index {
    const KIND: &'static str = "postgres.index";
    type Undo = IndexUndo;
    type Output = IndexOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<IndexUndo, IndexOutput>, StepError> {
        let mut session = self.database.connect(cx).await?;
        session.require_writable()?;
        let canceller = session.canceller();
        let looked = canceller.cancels(cx, self.look(cx, session.connection())).await;
        let look = match looked {
            Ok(Look::NoTable) if !cx.is_dry_run() => {
                return Err(StepError::permanent(format!("there is no table {}", self.config.table))
                    .with_hint("correct `table`; a schema other than `public` is written with it: `shop.orders`"));
            }
            Ok(look) => look,
            // The columns may be made by the steps that the plan has not run.
            Err(error) if cx.is_dry_run() && error.code() == Some("42703") => Look::NoTable,
            Err(error) => return Err(error.into()),
        };
        let change = self.change(&look);
        let undo = match look {
            Look::NoTable => IndexUndo { name: self.name(), found: None, intended: None },
            Look::Table { found, intended, .. } => IndexUndo { name: self.name(), found, intended },
        };
        let answer = if matches!(change.effect, Effect::Create) || !same(undo.found.as_ref(), undo.intended.as_ref()) {
            Prepared::change(undo, [change])
        } else {
            let output = self.output(&mut session, &undo).await?;
            let reason = if undo.intended.is_some() { "the index is there and valid" } else { "there is no such index" };
            Prepared::unchanged(output, reason)
        };
        session.close().await;
        Ok(answer)
    }

    async fn apply(&self, cx: &Context, undo: &IndexUndo) -> Result<IndexOutput, StepError> {
        let mut session = self.open(cx).await?;
        let policy = self.database.lock_policy();
        let names = Names::of(&Ledger::of(&self.database, cx), undo);
        let present = indexes::read(session.connection(), &undo.name.to_string()).await?;
        if !same(present.as_ref(), undo.intended.as_ref()) {
            // Before the long work: `swap` asks again.
            if !same(present.as_ref(), undo.found.as_ref()) && cx.on_conflict() == OnConflict::Stop {
                return Err(conflict(undo, present.as_ref()));
            }
            if let Some(intended) = &undo.intended {
                indexes::build(cx, &mut session, &policy, &names.built, intended).await?;
            }
            let swap = Swap {
                undo,
                from: undo.found.as_ref(),
                to: undo.intended.as_ref(),
                away: &names.aside,
                here: undo.intended.as_ref().map(|_| &names.built),
            };
            self.swap(cx, &mut session, swap).await?;
        }
        indexes::remove(cx, &mut session, &policy, &names.built).await?;
        if undo.intended.is_none() {
            indexes::remove(cx, &mut session, &policy, &names.aside).await?;
        }
        let output = self.output(&mut session, undo).await?;
        session.close().await;
        Ok(output)
    }

    async fn settle(&self, cx: &Context, _undo: &IndexUndo) -> Result<(), StepError> {
        self.database.settle(cx).await
    }

    async fn commit(&self, cx: &Context, undo: &IndexUndo) -> Result<(), StepError> {
        let mut session = self.open(cx).await?;
        let names = Names::of(&Ledger::of(&self.database, cx), undo);
        indexes::remove(cx, &mut session, &self.database.lock_policy(), &names.aside).await?;
        session.close().await;
        Ok(())
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![self.database.clone()]
    }
}

#[async_trait]
impl Rollback for Index {
    async fn rollback(&self, cx: &Context, undo: &IndexUndo, _output: Option<&IndexOutput>) -> Result<(), StepError> {
        let mut session = self.open(cx).await?;
        let policy = self.database.lock_policy();
        let names = Names::of(&Ledger::of(&self.database, cx), undo);
        let present = indexes::read(session.connection(), &undo.name.to_string()).await?;
        if !same(present.as_ref(), undo.found.as_ref()) {
            if !same(present.as_ref(), undo.intended.as_ref()) && cx.on_conflict() == OnConflict::Stop {
                return Err(conflict(undo, present.as_ref()));
            }
            let mut back = undo.found.as_ref();
            if let Some(found) = back {
                let aside = indexes::read(session.connection(), &names.aside.to_string()).await?;
                if !same(aside.as_ref(), Some(found)) {
                    if found.valid {
                        indexes::build(cx, &mut session, &policy, &names.aside, found).await?;
                    } else {
                        // An INVALID index that somebody took away meanwhile: nobody misses it.
                        back = None;
                    }
                }
            }
            let swap = Swap {
                undo,
                from: undo.intended.as_ref(),
                to: back,
                away: &names.replaced,
                here: back.map(|_| &names.aside),
            };
            self.swap(cx, &mut session, swap).await?;
        }
        for name in [&names.built, &names.replaced, &names.aside] {
            indexes::remove(cx, &mut session, &policy, name).await?;
        }
        session.close().await;
        Ok(())
    }
}
