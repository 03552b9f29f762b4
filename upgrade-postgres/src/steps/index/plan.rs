//! What stands where an index is to be, and what is to be done about it.

use sqlx::{AssertSqlSafe, PgConnection};
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::StepError;
use upgrade_core::step::{Change, Effect};
use upgrade_core::units::Bytes;

use super::{Index, IndexPresence};
use crate::error::{Doing, PostgresError};
use crate::identifier::TableName;
use crate::indexes::{self, Index as Found, same};

/// Holds what `prepare` found.
pub(super) struct Look {
    bytes: u64,
    pub(super) found: Option<Found>,
    pub(super) intended: Option<Found>,
    twin: Option<String>,
}

fn partitioned(table: &TableName) -> StepError {
    StepError::permanent(format!("{table} is partitioned: the server builds no index on it concurrently")).with_hint(
        "give each partition its index with a `postgres.index` step of its own; then one `postgres.sql` step with \
         `create index NAME on only TABLE (…)` and `alter index NAME attach partition …` for each, which takes moments",
    )
}

impl Index {
    /// Asks the server how it spells the definition, by an index on an empty table of the same columns,
    /// of which nothing stays.
    async fn intended(&self, connection: &mut PgConnection) -> Result<Found, PostgresError> {
        let config = &self.config;
        sqlx::raw_sql(AssertSqlSafe(format!("begin; create temporary table upgrade_shape (like {})", config.table)))
            .execute(&mut *connection)
            .await
            .doing(|| format!("reading the columns of {}", config.table))?;
        let unique = if config.unique { "unique " } else { "" };
        let create =
            format!("create {unique}index upgrade_shape_index on pg_temp.upgrade_shape {}", config.definition());
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
    pub(super) async fn look(
        &self,
        cx: &Context,
        connection: &mut PgConnection,
    ) -> Result<Option<Look>, PostgresError> {
        let config = &self.config;
        let spelled = config.table.to_string();
        let table: Option<(String, bool, i64)> = sqlx::query_as(
            "select relkind::text, pg_has_role(relowner, 'USAGE'), pg_table_size(oid) from pg_class where oid = to_regclass($1)",
        )
        .bind(&spelled)
        .fetch_optional(&mut *connection)
        .await
        .doing(|| format!("looking at {spelled}"))?;
        let Some((kind, owner, bytes)) = table else { return Ok(None) };
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
        Ok(Some(Look { bytes: u64::try_from(bytes).unwrap_or_default(), found, intended, twin }))
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

    pub(super) fn change(&self, look: Option<&Look>) -> Change {
        let name = String::from(self.name());
        let Some(Look { bytes, found, intended, twin }) = look else {
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
}
