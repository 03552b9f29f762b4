//! Indexes as the catalog knows them, built and dropped beside live traffic.
//!
//! `CREATE INDEX CONCURRENTLY` and `DROP INDEX CONCURRENTLY` wait for every transaction that may still
//! need the table as it was, and hold up nobody who reads or writes meanwhile: their lock lets both
//! pass, also while it is waited for. So they wait for as long as the budget allows, in one go: with a
//! short `lock_timeout`, one long reader would throw a finished build away. What an attempt that failed
//! leaves is an INVALID index; it is cleared before the next attempt.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use sqlx::types::Json;
use sqlx::{AssertSqlSafe, PgConnection};
use tokio::time::Instant;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use crate::error::{Doing, PostgresError, not_cancelled};
use crate::identifier::{Identifier, TableName, literal};
use crate::locking::{Blocker, LockPolicy, blockers_of, end_idle};
use crate::session::Session;

/// How often a build is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Holds all that an index is, but for its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Index {
    /// What it is on.
    pub(crate) table: TableName,
    /// Whether it allows each key only once.
    pub(crate) unique: bool,
    /// Its definition as the server spells it, from the method on: `btree (customer_id) WHERE (open)`.
    pub(crate) definition: String,
    /// Whether it is whole, so that queries may use it.
    pub(crate) valid: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tablespace: Option<Identifier>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) comment: Option<String>,
    /// The columns with a statistics target of their own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) statistics: Vec<(i16, i32)>,
}

impl Index {
    /// Tells whether both index the same in the same way, whole or not.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        self.table == other.table && self.unique == other.unique && self.definition == other.definition
    }

    /// Says what it is, in one line.
    pub(crate) fn describe(&self) -> String {
        let unique = if self.unique { "unique " } else { "" };
        let invalid = if self.valid { "" } else { ", INVALID" };
        format!("{unique}{} on {}{invalid}", self.definition, String::from(self.table.clone()))
    }
}

/// Tells whether two states of a name are the same: nothing, or indexes alike and both whole or not.
pub(crate) fn same(one: Option<&Index>, other: Option<&Index>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => one.is_like(other) && one.valid == other.valid,
        (None, None) => true,
        _ => false,
    }
}

/// Reads what stands under a name, which is spelled as SQL does; the session's `search_path` must be
/// empty, so that the definition means the same to every session.
///
/// # Errors
/// Something else than an index has that name, or the server refused it.
pub(crate) async fn read(connection: &mut PgConnection, name: &str) -> Result<Option<Index>, PostgresError> {
    type Row = (String, String, String, bool, String, bool, Option<String>, Option<String>, Json<Vec<(i16, i32)>>);
    let row: Option<Row> = sqlx::query_as(
        "select c.relkind::text, coalesce(n.nspname, ''), coalesce(t.relname, ''), coalesce(i.indisunique, false), \
           case when i.indexrelid is null then '' else substr(pg_get_indexdef(c.oid), 1 + length(format('CREATE %sINDEX %I ON %s%I.%I USING ', \
             case when i.indisunique then 'UNIQUE ' else '' end, c.relname, \
             case when c.relkind = 'I' then 'ONLY ' else '' end, \
             case when n.oid = pg_my_temp_schema() then 'pg_temp' else n.nspname end, t.relname))) end, \
           coalesce(i.indisvalid and i.indisready and i.indislive, false), s.spcname::text, \
           obj_description(c.oid, 'pg_class'), \
           (select coalesce(json_agg(json_build_array(a.attnum, a.attstattarget) order by a.attnum), '[]') \
            from pg_attribute a where a.attrelid = c.oid and a.attnum > 0 and coalesce(a.attstattarget, -1) >= 0) \
         from pg_class c left join pg_index i on i.indexrelid = c.oid left join pg_class t on t.oid = i.indrelid \
           left join pg_namespace n on n.oid = t.relnamespace left join pg_tablespace s on s.oid = c.reltablespace \
         where c.oid = to_regclass($1)",
    )
    .bind(name)
    .fetch_optional(connection)
    .await
    .doing(|| format!("reading what {name} is"))?;
    let Some((kind, schema, table, unique, definition, valid, tablespace, comment, Json(statistics))) = row else {
        return Ok(None);
    };
    if !matches!(kind.as_str(), "i" | "I") {
        return Err(StepError::permanent(format!("{name} is there already and is no index"))
            .with_hint(
                "give the index another `name`: tables, views, sequences and indexes of a schema share their names",
            )
            .into());
    }
    let catalog = |name: String| {
        Identifier::new(name)
            .map_err(|error| StepError::permanent("a name in the catalog cannot be read").with_cause(&error))
    };
    Ok(Some(Index {
        table: TableName::new(catalog(schema)?, catalog(table)?),
        unique,
        definition,
        valid,
        tablespace: tablespace.map(catalog).transpose()?,
        comment,
        statistics,
    }))
}

/// Names what stands in the way of dropping or replacing an index, which can be undone only for one
/// that nothing else rests on.
///
/// # Errors
/// The server refused it.
pub(crate) async fn obstacle(connection: &mut PgConnection, name: &str) -> Result<Option<String>, PostgresError> {
    sqlx::query_scalar::<_, Option<String>>(
        "select coalesce( \
           (select format('constraint %I of %s rests on it: drop that constraint instead', k.conname, k.conrelid::regclass) \
            from pg_constraint k where k.conindid = i.indexrelid order by k.conname limit 1), \
           case when i.indisreplident then 'it is the replica identity of its table: choose another one first' \
             when i.indisclustered then 'its table is clustered by it: ALTER TABLE … SET WITHOUT CLUSTER first' \
             when c.relkind = 'I' then 'it is the index of a partitioned table, which cannot be dropped concurrently' \
             when c.relispartition then 'it is part of the index of a partitioned table' end) \
         from pg_index i join pg_class c on c.oid = i.indexrelid where c.oid = to_regclass($1)",
    )
    .bind(name)
    .fetch_optional(connection)
    .await
    .map(Option::flatten)
    .doing(|| format!("looking what rests on {name}"))
}

/// Names the session that builds an index, if there is one.
///
/// # Errors
/// The server refused it.
pub(crate) async fn builder_of(connection: &mut PgConnection, name: &str) -> Result<Option<i32>, PostgresError> {
    sqlx::query_scalar("select pid from pg_stat_progress_create_index where index_relid = to_regclass($1)")
        .bind(name)
        .fetch_optional(connection)
        .await
        .doing(|| format!("looking who builds {name}"))
}

/// Builds an index under a name of our own, where nothing or the rest of an earlier attempt stands.
///
/// # Guarantees
/// When it returns, the index is whole. When it fails, what it left is INVALID and has that name.
///
/// # Errors
/// A key is not unique, the budget is used up behind somebody's transaction, the call was cancelled.
pub(crate) async fn build(
    cx: &Context,
    session: &mut Session,
    policy: &LockPolicy,
    name: &TableName,
    index: &Index,
) -> Result<(), PostgresError> {
    let unique = if index.unique { "unique " } else { "" };
    let create =
        format!("create {unique}index concurrently {} on {} using {}", name.name, index.table, index.definition);
    let what = format!("building an index on {}", String::from(index.table.clone()));
    let tablespace = index.tablespace.as_ref().map(ToString::to_string).unwrap_or_default();
    let began = Instant::now();
    let mut attempts = 0;
    loop {
        not_cancelled(cx)?;
        match read(session.connection(), &name.to_string()).await? {
            Some(there) if there.is_like(index) && there.valid => break,
            Some(_) => remove(cx, session, policy, name).await?,
            None => {}
        }
        attempts += 1;
        let set = format!("set default_tablespace = {}", literal(&tablespace));
        sqlx::raw_sql(AssertSqlSafe(set)).execute(session.connection()).await?;
        let error = match concurrently(cx, session, policy, &what, &create).await {
            Ok(()) => match read(session.connection(), &name.to_string()).await? {
                Some(there) if there.is_like(index) && there.valid => break,
                there => {
                    let there = there.map_or("nothing".into(), |there| there.describe());
                    return Err(StepError::unknown(format!("{what}: the server reports success and left {there}"))
                        .with_hint("look at the server's log; another session may have changed the table meanwhile")
                        .into());
                }
            },
            Err(Failed { error, blockers }) if error.is_contention() => {
                if began.elapsed() >= policy.budget {
                    return Err(policy.given_up(&what, began.elapsed(), attempts, &blockers, error).into());
                }
                error
            }
            Err(Failed { error, .. }) => {
                if !error.is_connection_lost() && !cx.cancelled().is_cancelled() {
                    // Until it is cleared, every write pays for it. If this fails, the undo clears it.
                    let _ = remove(cx, session, policy, name).await;
                }
                return Err(error.into_duplicate(index));
            }
        };
        cx.progress(0, None, format!("{what}: {}, tries again", StepError::from(error)));
    }
    let mut settings: Vec<String> = Vec::new();
    if let Some(comment) = &index.comment {
        settings.push(format!("comment on index {name} is {}", literal(comment)));
    }
    for (column, target) in &index.statistics {
        settings.push(format!("alter index {name} alter column {column} set statistics {target}"));
    }
    if !settings.is_empty() {
        session.execute(cx, settings.join("; ")).await.doing(|| format!("{what}: its comment and statistics"))?;
    }
    Ok(())
}

impl PostgresError {
    /// Adds what to do about keys that an index cannot have twice.
    fn into_duplicate(self, index: &Index) -> Self {
        if self.code() != Some("23505") {
            return self;
        }
        let table = String::from(index.table.clone());
        StepError::from(self)
            .with_hint(format!("find the rows of {table} with equal keys, correct or delete them, then run again; the index left behind is cleared"))
            .into()
    }
}

/// Drops an index without holding up anybody; one that is gone is no error.
///
/// # Errors
/// The budget is used up behind somebody's transaction, or the server refused it.
pub(crate) async fn remove(
    cx: &Context,
    session: &mut Session,
    policy: &LockPolicy,
    name: &TableName,
) -> Result<(), PostgresError> {
    let what = format!("dropping index {name}");
    let began = Instant::now();
    let mut attempts = 0;
    loop {
        not_cancelled(cx)?;
        if read(session.connection(), &name.to_string()).await?.is_none() {
            return Ok(());
        }
        attempts += 1;
        match concurrently(cx, session, policy, &what, &format!("drop index concurrently if exists {name}")).await {
            Ok(()) => return Ok(()),
            Err(Failed { error, blockers }) if error.is_contention() => {
                if began.elapsed() >= policy.budget {
                    return Err(policy.given_up(&what, began.elapsed(), attempts, &blockers, error).into());
                }
            }
            Err(Failed { error, .. }) => return Err(error),
        }
    }
}

/// Holds why a statement failed, and who was in its way when it was last looked at.
struct Failed {
    error: PostgresError,
    blockers: Vec<Blocker>,
}

/// Runs one statement outside of a transaction, while a session beside it reports how far it is and
/// whom it waits for.
async fn concurrently(
    cx: &Context,
    session: &mut Session,
    policy: &LockPolicy,
    what: &str,
    sql: &str,
) -> Result<(), Failed> {
    let mut blockers = Vec::new();
    let done = watched(cx, session, policy, what, sql, &mut blockers).await;
    done.map_err(|error| Failed { error, blockers })
}

async fn watched(
    cx: &Context,
    session: &mut Session,
    policy: &LockPolicy,
    what: &str,
    sql: &str,
    blockers: &mut Vec<Blocker>,
) -> Result<(), PostgresError> {
    let pid = session.facts().pid;
    let mut watch = session.sibling(cx, "upgrade").await?;
    let canceller = session.canceller();
    let connection = session.connection();
    let wait = policy.budget.as_millis().clamp(1, i32::MAX as u128);
    let running = canceller.cancels(cx, async {
        sqlx::raw_sql(AssertSqlSafe(format!("set lock_timeout = {wait}"))).execute(&mut *connection).await?;
        let done =
            sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut *connection).await.doing(|| what.to_owned());
        // On a connection that broke there is nothing to reset.
        let _ = sqlx::raw_sql("set lock_timeout = 0").execute(&mut *connection).await;
        done.map(drop)
    });
    tokio::pin!(running);
    let done = loop {
        tokio::select! {
            biased;
            done = &mut running => break done,
            () = tokio::time::sleep(LOOK) => {}
        }
        // A failure to look on is no failure of the work.
        if let Ok(found) = blockers_of(&mut watch, pid).await {
            *blockers = found;
        }
        if let Some(longest) = policy.end_idle_in_transaction.filter(|_| !blockers.is_empty()) {
            let _ = end_idle(&mut watch, blockers, longest).await;
        }
        report(cx, &mut watch, pid, what, blockers).await;
    };
    watch.close().await;
    done
}

/// Reports how far a build is, from the server's own account of it.
async fn report(cx: &Context, watch: &mut Session, pid: i32, what: &str, blockers: &[Blocker]) {
    let row: Option<(String, i64, i64, i64, i64)> = sqlx::query_as(
        "select phase, blocks_done, blocks_total, tuples_done, tuples_total from pg_stat_progress_create_index where pid = $1",
    )
    .bind(pid)
    .fetch_optional(watch.connection())
    .await
    .ok()
    .flatten();
    let waits = match blockers {
        [] => String::new(),
        [first, ..] => format!(", waits for {}", first.description),
    };
    match row {
        Some((phase, done, total, tuples_done, tuples_total)) => {
            let (done, total) = if total > 0 { (done, total) } else { (tuples_done, tuples_total) };
            let total = u64::try_from(total).ok().filter(|total| *total > 0);
            cx.progress(u64::try_from(done).unwrap_or_default(), total, format!("{what}: {phase}{waits}"));
        }
        None => cx.progress(0, None, format!("{what}{waits}")),
    }
}
