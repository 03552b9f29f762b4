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

mod config;
mod plan;

pub use config::{DetailedIndexKey, IndexConfig, IndexKey, IndexPresence, Nulls, Order};

use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::{AssertSqlSafe, PgConnection};
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;

use crate::error::{Doing, PostgresError};
use crate::identifier::TableName;
use crate::indexes::{self, Index as Found, same};
use crate::ledger::Ledger;
use crate::session::Session;
use crate::target::Database;

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
    async fn swap(&self, cx: &Context, session: &mut Session, swap: Swap<'_>) -> Result<(), PostgresError> {
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
            Ok(None) if !cx.is_dry_run() => {
                return Err(StepError::permanent(format!("there is no table {}", self.config.table))
                    .with_hint("correct `table`; a schema other than `public` is written with it: `shop.orders`"));
            }
            Ok(look) => look,
            // The columns may be made by the steps that the plan has not run.
            Err(error) if cx.is_dry_run() && error.code() == Some("42703") => None,
            Err(error) => return Err(error.into()),
        };
        let change = self.change(look.as_ref());
        let (found, intended) = look.map(|look| (look.found, look.intended)).unwrap_or_default();
        let undo = IndexUndo { name: self.name(), found, intended };
        let answer = if matches!(change.effect, Effect::Create) || !same(undo.found.as_ref(), undo.intended.as_ref()) {
            Prepared::change(undo, [change])
        } else {
            let output = self.output(&mut session, &undo).await?;
            let reason =
                if undo.intended.is_some() { "the index is there and valid" } else { "there is no such index" };
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
