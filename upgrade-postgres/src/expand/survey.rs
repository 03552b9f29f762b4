//! Reads what stands around a column, and refuses what cannot be kept in step.

use sqlx::{AssertSqlSafe, PgConnection};
use upgrade_core::error::StepError;

use super::catalog::{self, Column};
use super::change::{Change, Expansion, search_path};
use super::refusals::{Refusals, of_dependents, of_table, of_triggers};
use super::statements;
use crate::error::{Doing, PostgresError};
use crate::identifier::{Identifier, TableName};

/// Answers what is to be done about a table.
#[derive(Debug)]
pub(crate) enum Answer {
    /// It is as it should be.
    Unchanged(String),
    /// The table or the column is not there; and the change as far as that can be said.
    Missing(StepError, Box<Expansion>),
    /// It can be changed.
    Change(Box<Surveyed>),
}

/// Holds a resolved change and what was found.
#[derive(Debug)]
pub(crate) struct Surveyed {
    pub(crate) expansion: Expansion,
    /// Digest of the column and all that depends on it.
    pub(crate) found: String,
    /// How many rows there are, as the server estimates it.
    pub(crate) rows: i64,
    /// What is copied for the new shape, described.
    pub(crate) copied: Vec<String>,
}

/// Reads the table and resolves the change; changes nothing.
///
/// # Errors
/// The change cannot be made; or the server refused a query.
pub(crate) async fn survey(
    connection: &mut PgConnection,
    wanted: &Change,
    name: &TableName,
    schema: Option<&Identifier>,
    state_schema: &Identifier,
    mark: &str,
) -> Result<Answer, PostgresError> {
    // The server spells names as the path needs them: what is read here is compared and used under it.
    sqlx::raw_sql(AssertSqlSafe(format!("set search_path to {}", search_path(name)))).execute(&mut *connection).await?;
    let missing = |error: StepError| {
        let expansion = resolve(wanted, name, schema, state_schema, mark, None, None);
        Ok(Answer::Missing(error, Box::new(expansion)))
    };
    let Some(table) = catalog::table(connection, name).await? else {
        let error = StepError::permanent(format!("table {name} is not there"));
        return missing(error.with_hint("correct `table`; without a schema it is looked for in `public`"));
    };
    let columns = catalog::columns(connection, table.oid).await?;
    let column = |name: &Identifier| columns.iter().find(|column| column.name == name.as_str());
    let (old, after) = (wanted.old().and_then(column), column(wanted.name_after()));
    let probe = probe(connection, name, wanted, old, wanted.name_after()).await?;
    if let Some(reason) = unchanged(wanted, old, after, probe.as_ref()) {
        return Ok(Answer::Unchanged(reason));
    }
    if let (Some(old), None) = (wanted.old(), old) {
        return missing(StepError::permanent(format!("{name} has no column {old}")).with_hint("correct `column`"));
    }
    let in_place = wanted.old() == Some(wanted.name_after());
    if after.is_some() && !in_place {
        return Err(StepError::permanent(format!("{name} has a column {} already", wanted.name_after()))
            .with_hint("choose another name, or drop or rename the one that is there")
            .into());
    }

    let mut refusals = Refusals(Vec::new());
    of_table(&table, &mut refusals);
    let triggers = catalog::triggers(connection, table.oid).await?;
    let old_name = wanted.old().map(Identifier::as_str);
    of_triggers(&triggers, old_name, &mut refusals);
    let dependents = match old {
        Some(old) => {
            refusals.when(old.generated, "the column is generated", "change its expression in a migration instead");
            refusals.when(
                old.identity,
                "the column is an identity column",
                "turn it into a sequence of its own first: DROP IDENTITY, CREATE SEQUENCE … OWNED BY, SET DEFAULT nextval(…)",
            );
            let dependents = catalog::dependents(connection, table.oid, old.number).await?;
            of_dependents(&dependents, &mut refusals);
            dependents
        }
        None => Vec::new(),
    };
    if let (Change::Retype(retype), Some(old)) = (wanted, old) {
        refusals.when(
            retype.up.is_some() && retype.default.is_none() && old.default.is_some(),
            format!(
                "the column has the default {}, and `up` changes what values mean",
                old.default.as_deref().unwrap_or("")
            ),
            "say what the new shape's default is: `default: …`, or `default: \"null\"` for none",
        );
    }
    if let Some(schema) = schema {
        let view = TableName::new(schema.clone(), name.name.clone());
        let taken: bool = sqlx::query_scalar("select to_regclass($1) is not null")
            .bind(view.to_string())
            .fetch_one(&mut *connection)
            .await
            .doing(|| format!("looking for {view}"))?;
        let may: bool = sqlx::query_scalar(
            "select case when to_regnamespace($1) is null then has_database_privilege(current_database(), 'create') \
             else has_schema_privilege(to_regnamespace($1)::oid, 'create') end",
        )
        .bind(schema.to_string())
        .fetch_one(&mut *connection)
        .await
        .doing(|| format!("looking for schema {schema}"))?;
        refusals.when(
            !may,
            format!("this user may not make a view in schema {schema}"),
            "grant CREATE on the database, or make the schema and grant CREATE on it",
        );
        refusals.when(taken, format!("{view} is there already"), "name another `schema`");
        let version: i32 =
            sqlx::query_scalar("select current_setting('server_version_num')::int").fetch_one(&mut *connection).await?;
        refusals.when(
            table.row_security && version < 150_000,
            "the table has row security, which a view before PostgreSQL 15 goes round",
            "use `as` instead of `schema`",
        );
    }
    let silent = may_be_silent(connection).await?;
    let fires: Vec<_> = triggers.iter().filter(|trigger| trigger.on_update).map(|t| t.described.clone()).collect();
    refusals.when(
        !silent && !fires.is_empty(),
        format!("filling would fire {} for every row", fires.join(", ")),
        "connect as a superuser, or GRANT SET ON PARAMETER session_replication_role (from PostgreSQL 15 on)",
    );
    if let Some(error) = refusals.into_error(name) {
        return Err(error.into());
    }

    let mut expansion = resolve(wanted, name, schema, state_schema, mark, old, probe.as_ref());
    expansion.silent = silent;
    understood(connection, &expansion, &stored(&columns)).await?;
    let found = catalog::found(old, &dependents);
    let copied =
        dependents.iter().filter(|dependent| dependent.class != "attrdef").map(|d| d.described.clone()).collect();
    Ok(Answer::Change(Box::new(Surveyed { expansion, found, rows: table.rows, copied })))
}

/// Names the columns that have a value when a row's triggers fire.
fn stored(columns: &[Column]) -> Vec<&str> {
    columns.iter().filter(|column| !column.generated).map(|column| column.name.as_str()).collect()
}

/// Tells whether this user may keep triggers from firing.
async fn may_be_silent(connection: &mut PgConnection) -> Result<bool, PostgresError> {
    sqlx::raw_sql("begin").execute(&mut *connection).await?;
    let set = sqlx::raw_sql("set local session_replication_role = replica").execute(&mut *connection).await;
    sqlx::raw_sql("rollback").execute(&mut *connection).await?;
    match set.map_err(PostgresError::from) {
        Ok(_) => Ok(true),
        Err(error) if error.code() == Some("42501") => Ok(false),
        Err(error) => Err(error),
    }
}

/// What a column of the new shape turns out to be.
struct Probe {
    type_name: String,
    collation: Option<String>,
    /// Whether the server would write the table anew to give existing rows the default.
    rewrites: bool,
}

/// Makes the column in an empty table that only this transaction sees, and takes that back.
async fn probe(
    connection: &mut PgConnection,
    table: &TableName,
    wanted: &Change,
    old: Option<&Column>,
    name: &Identifier,
) -> Result<Option<Probe>, PostgresError> {
    let (type_name, default, key) = match wanted {
        Change::Add(add) => (&add.type_name, add.default.as_deref(), "add"),
        Change::Retype(retype) => {
            let carried = old.and_then(|old| old.default.as_deref());
            (&retype.type_name, retype.default.as_deref().or(carried), "retype")
        }
        Change::Rename(_) | Change::NotNull(_) => return Ok(None),
    };
    let default = default.map(|default| format!(" default {default}")).unwrap_or_default();
    let path = search_path(table);
    sqlx::raw_sql(AssertSqlSafe(format!(
        "begin; set local search_path to {path}; create temp table upgrade_probe () on commit drop"
    )))
    .execute(&mut *connection)
    .await
    .doing(|| "making a temporary table".into())?;
    let probing = async {
        let node = || sqlx::query_scalar::<_, i64>("select pg_relation_filenode('pg_temp.upgrade_probe')::int8");
        let before = node().fetch_one(&mut *connection).await?;
        // Prepared: one statement, whatever the texts hold.
        sqlx::query(AssertSqlSafe(format!("alter table pg_temp.upgrade_probe add column {name} {type_name}{default}")))
            .execute(&mut *connection)
            .await
            .doing(|| format!("understanding the type or the default of `{key}`"))
            .map_err(|error| hinted(error, "correct `type` or `default`; name what is outside of the table's schema and `public` with its schema"))?;
        let after = node().fetch_one(&mut *connection).await?;
        let (type_name, collation) = sqlx::query_as(
            "select format_type(a.atttypid, a.atttypmod), \
               case when a.attcollation <> t.typcollation then a.attcollation::regcollation::text end \
             from pg_attribute a join pg_type t on t.oid = a.atttypid \
             where a.attrelid = 'pg_temp.upgrade_probe'::regclass and a.attnum = 1",
        )
        .fetch_one(&mut *connection)
        .await?;
        Ok(Some(Probe { type_name, collation, rewrites: before != after }))
    }
    .await;
    sqlx::raw_sql("rollback").execute(connection).await?;
    probing
}

fn unchanged(wanted: &Change, old: Option<&Column>, after: Option<&Column>, probe: Option<&Probe>) -> Option<String> {
    let same_type = |column: &Column| probe.is_none_or(|probe| probe.type_name == column.type_name);
    let column = after?;
    let in_place = wanted.old() == Some(wanted.name_after());
    let done = match wanted {
        Change::Add(add) => same_type(column) && (column.not_null || !add.not_null),
        Change::Rename(_) => old.is_none(),
        Change::Retype(_) => same_type(column) && (in_place || old.is_none()),
        Change::NotNull(_) => column.not_null && (in_place || old.is_none()),
    };
    done.then(|| format!("column {} is so already", column.name))
}

fn resolve(
    wanted: &Change,
    table: &TableName,
    schema: Option<&Identifier>,
    state_schema: &Identifier,
    mark: &str,
    old: Option<&Column>,
    probe: Option<&Probe>,
) -> Expansion {
    let spelled = |type_name: &str, collation: Option<&str>| match collation {
        Some(collation) => format!("{type_name} collate {collation}"),
        None => type_name.to_owned(),
    };
    let name_after = wanted.name_after().clone();
    let in_place = wanted.old() == Some(&name_after);
    let derived = |start: &str| Identifier::derived(start, &format!("{mark} {start}"));
    let none = |default: &String| !default.trim().eq_ignore_ascii_case("null");
    let rewrites = probe.is_some_and(|probe| probe.rewrites);
    let type_name = match (probe, old) {
        (Some(probe), _) => spelled(&probe.type_name, probe.collation.as_deref()),
        (None, Some(old)) => spelled(&old.type_name, old.collation.as_deref()),
        (None, None) => String::new(),
    };
    let carried = old.and_then(|old| old.default.clone());
    let source = wanted.old().map(ToString::to_string);
    let (default, up, down, not_null) = match wanted {
        Change::Add(add) => {
            let filled = add.up.clone().or_else(|| add.default.clone().filter(|_| rewrites));
            (add.default.clone(), filled, None, add.not_null)
        }
        Change::Rename(_) => (carried, source, Some(name_after.to_string()), old.is_some_and(|old| old.not_null)),
        Change::Retype(retype) => (
            retype.default.clone().or(carried).filter(none),
            retype.up.clone().or(source),
            retype.down.clone().or_else(|| Some(name_after.to_string())),
            old.is_some_and(|old| old.not_null),
        ),
        Change::NotNull(not_null) => (
            carried,
            source.map(|column| format!("case when {column} is null then ({}) else {column} end", not_null.up)),
            not_null.down.clone().or_else(|| Some(name_after.to_string())),
            true,
        ),
    };
    Expansion {
        table: table.clone(),
        old: wanted.old().cloned(),
        new: if in_place { derived(name_after.as_str()) } else { name_after.clone() },
        name_after,
        type_name,
        not_null,
        default,
        pending: up.is_some().then(|| derived("upgrade_pending")),
        up,
        down,
        schema: schema.cloned(),
        function: TableName::new(state_schema.clone(), derived("in_step")),
        mark: mark.to_owned(),
        silent: false,
    }
}

/// Adds what to do about a text that the server does not understand.
fn hinted(error: PostgresError, hint: &str) -> PostgresError {
    if error.code().is_some_and(|code| code.starts_with("42") || code.starts_with("22")) {
        StepError::from(error).with_hint(hint).into()
    } else {
        error
    }
}

/// Lets the server read both expressions, so that a mistake shows before anything is changed.
async fn understood(
    connection: &mut PgConnection,
    expansion: &Expansion,
    columns: &[&str],
) -> Result<(), PostgresError> {
    for (key, query) in statements::readings(expansion, columns) {
        sqlx::raw_sql(AssertSqlSafe(format!("begin; set local search_path to {}", expansion.search_path())))
            .execute(&mut *connection)
            .await?;
        let read = sqlx::query(AssertSqlSafe(format!("explain {query}")))
            .execute(&mut *connection)
            .await
            .doing(|| format!("understanding `{key}`"));
        sqlx::raw_sql("rollback").execute(&mut *connection).await?;
        read.map_err(|error| match key {
            "up" => hinted(error, "`up` is an expression over the columns of a row in the old shape; name functions outside of the table's schema and `public` with their schema"),
            _ => hinted(error, "`down` is an expression over the columns of a row in the new shape; name functions outside of the table's schema and `public` with their schema"),
        })?;
    }
    Ok(())
}
