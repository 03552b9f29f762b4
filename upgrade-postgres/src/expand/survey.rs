//! Reads what stands around a column, and refuses what cannot be kept in step.

use serde::Deserialize;
use sqlx::types::Json;
use sqlx::{AssertSqlSafe, PgConnection};
use upgrade_core::error::StepError;
use upgrade_core::sealed::sha256_hex;

use super::change::{Change, Expansion, mentions, search_path};
use super::statements;
use crate::error::{Doing, PostgresError};
use crate::identifier::{Identifier, TableName, literal};

/// Starts the names of our triggers: `~` sorts behind all that people write, and the triggers of a
/// row fire in the order of their names, so that ours sees what the others made of it.
pub(super) const TRIGGER: &str = "~~upgrade";

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

#[derive(Deserialize)]
struct Table {
    oid: i64,
    kind: String,
    partition: bool,
    inherits: bool,
    rules: bool,
    row_security: bool,
    policies_hide: bool,
    owned: bool,
    published: bool,
    rows: i64,
}

#[derive(Deserialize)]
struct Column {
    name: String,
    number: i16,
    type_name: String,
    collation: Option<String>,
    not_null: bool,
    generated: bool,
    identity: bool,
    default: Option<String>,
}

#[derive(Deserialize)]
struct Dependent {
    class: String,
    kind: String,
    described: String,
    definition: String,
}

#[derive(Deserialize)]
struct Trigger {
    name: String,
    before_row: bool,
    on_update: bool,
    source: String,
    described: String,
}

/// Collects what stands in the way, each with its remedy.
struct Refusals(Vec<(String, &'static str)>);

impl Refusals {
    fn when(&mut self, refused: bool, what: impl Into<String>, remedy: &'static str) {
        if refused {
            self.0.push((what.into(), remedy));
        }
    }

    fn into_error(self, table: &TableName) -> Option<StepError> {
        let (first, remedy) = self.0.first()?;
        let all: Vec<_> = self.0.iter().map(|(what, remedy)| format!("{what}: {remedy}")).collect();
        let error = StepError::permanent(format!("{table} cannot have a column in two shapes: {first}"))
            .with_hint((*remedy).to_owned());
        Some(if all.len() > 1 { error.with_detail(all.join("\n")) } else { error })
    }
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
    let missing = |error: StepError| {
        let expansion = resolve(wanted, name, schema, state_schema, mark, None, None);
        Ok(Answer::Missing(error, Box::new(expansion)))
    };
    let Some(table) = table(connection, name).await? else {
        let error = StepError::permanent(format!("table {name} is not there"));
        return missing(error.with_hint("correct `table`; without a schema it is looked for in `public`"));
    };
    let columns = columns(connection, table.oid).await?;
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
    let triggers = triggers(connection, table.oid).await?;
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
            let dependents = dependents(connection, table.oid, old.number).await?;
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

    let mut expansion = resolve(wanted, name, schema, state_schema, mark, old, probe);
    expansion.silent = silent;
    understood(connection, &expansion, &stored(&columns)).await?;
    let found = found(old, &dependents);
    let copied =
        dependents.iter().filter(|dependent| dependent.class != "attrdef").map(|d| d.described.clone()).collect();
    Ok(Answer::Change(Box::new(Surveyed { expansion, found, rows: table.rows, copied })))
}

/// Names the columns that have a value when a row's triggers fire.
fn stored(columns: &[Column]) -> Vec<&str> {
    columns.iter().filter(|column| !column.generated).map(|column| column.name.as_str()).collect()
}

/// Digests the column in its old shape and what depends on it, to notice a change of somebody else.
pub(super) async fn present(connection: &mut PgConnection, expansion: &Expansion) -> Result<String, PostgresError> {
    let Some(table) = table(connection, &expansion.table).await? else { return Ok("no table".into()) };
    let columns = columns(connection, table.oid).await?;
    match &expansion.old {
        None => {
            let taken = columns.iter().any(|column| column.name == expansion.name_after.as_str());
            Ok(if taken { "a column of that name".into() } else { found(None, &[]) })
        }
        Some(name) => match columns.iter().find(|column| column.name == name.as_str()) {
            None => Ok("no column".into()),
            Some(old) => {
                let dependents = dependents(connection, table.oid, old.number).await?;
                Ok(found(Some(old), &dependents))
            }
        },
    }
}

fn found(old: Option<&Column>, dependents: &[Dependent]) -> String {
    let Some(old) = old else { return "no column".into() };
    let mut text = format!("{} {} {:?} {} {:?}", old.name, old.type_name, old.collation, old.not_null, old.default);
    for dependent in dependents {
        text.push_str(&format!("\n{} {}", dependent.described, dependent.definition));
    }
    sha256_hex(text.as_bytes())
}

async fn table(connection: &mut PgConnection, name: &TableName) -> Result<Option<Table>, PostgresError> {
    let found: Option<Json<Table>> = sqlx::query_scalar(
        "select to_jsonb(answer) from (select c.oid::int8 as oid, c.relkind::text as kind, c.relispartition as partition, \
           exists (select from pg_inherits where c.oid in (inhrelid, inhparent)) as inherits, \
           c.relhasrules as rules, c.relrowsecurity as row_security, row_security_active(c.oid) as policies_hide, \
           pg_has_role(c.relowner, 'USAGE') as owned, \
           exists (select from pg_publication_tables p where p.schemaname = n.nspname and p.tablename = c.relname) \
             as published, \
           greatest(c.reltuples, 0)::int8 as rows \
         from pg_class c join pg_namespace n on n.oid = c.relnamespace \
         where n.nspname = $1 and c.relname = $2 and c.relkind in ('r', 'p', 'v', 'm', 'f')) as answer",
    )
    .bind(name.schema.as_str())
    .bind(name.name.as_str())
    .fetch_optional(connection)
    .await
    .doing(|| format!("looking at {name}"))?;
    Ok(found.map(|Json(table)| table))
}

async fn columns(connection: &mut PgConnection, table: i64) -> Result<Vec<Column>, PostgresError> {
    let found: Vec<Json<Column>> = sqlx::query_scalar(
        "select to_jsonb(answer) from (select a.attname::text as name, a.attnum as number, format_type(a.atttypid, a.atttypmod) as type_name, \
           case when a.attcollation <> t.typcollation then a.attcollation::regcollation::text end as collation, \
           a.attnotnull as not_null, a.attgenerated <> '' as generated, a.attidentity <> '' as identity, \
           case when a.attgenerated = '' then pg_get_expr(d.adbin, d.adrelid) end as \"default\" \
         from pg_attribute a join pg_type t on t.oid = a.atttypid \
           left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum \
         where a.attrelid = $1::int8::oid and a.attnum > 0 and not a.attisdropped) as answer order by number",
    )
    .bind(table)
    .fetch_all(connection)
    .await
    .doing(|| "reading the columns".into())?;
    Ok(found.into_iter().map(|Json(column)| column).collect())
}

async fn dependents(connection: &mut PgConnection, table: i64, column: i16) -> Result<Vec<Dependent>, PostgresError> {
    let found: Vec<Json<Dependent>> = sqlx::query_scalar(
        "select to_jsonb(answer) from (select distinct case d.classid when 'pg_class'::regclass then 'class' when 'pg_constraint'::regclass then 'constraint' \
             when 'pg_attrdef'::regclass then 'attrdef' when 'pg_rewrite'::regclass then 'rule' else 'other' end as class, \
           case d.classid \
             when 'pg_class'::regclass then c.relkind::text || case when i.indisreplident then 'R' else '' end \
             when 'pg_constraint'::regclass then \
               k.contype::text || case when k.contype = 'f' and k.confrelid = $1::int8::oid and $2 = any(k.confkey) then 'R' else '' end \
               || case when exists (select from pg_index o where o.indexrelid = k.conindid and o.indisreplident) then 'I' else '' end \
             when 'pg_attrdef'::regclass then case when f.adnum = $2 then 'own' else 'generated' end else '' end as kind, \
           pg_describe_object(d.classid, d.objid, d.objsubid) as described, \
           coalesce(pg_get_indexdef(i.indexrelid), pg_get_constraintdef(k.oid), '') as definition \
         from pg_depend d \
           left join pg_class c on d.classid = 'pg_class'::regclass and c.oid = d.objid \
           left join pg_index i on i.indexrelid = c.oid \
           left join pg_constraint k on d.classid = 'pg_constraint'::regclass and k.oid = d.objid \
           left join pg_attrdef f on d.classid = 'pg_attrdef'::regclass and f.oid = d.objid \
         where d.refclassid = 'pg_class'::regclass and d.refobjid = $1::int8::oid and d.refobjsubid = $2) as answer order by described",
    )
    .bind(table)
    .bind(column)
    .fetch_all(connection)
    .await
    .doing(|| "looking for what depends on the column".into())?;
    Ok(found.into_iter().map(|Json(dependent)| dependent).collect())
}

async fn triggers(connection: &mut PgConnection, table: i64) -> Result<Vec<Trigger>, PostgresError> {
    let found: Vec<Json<Trigger>> = sqlx::query_scalar(
        "select to_jsonb(answer) from (select t.tgname::text as name, t.tgtype & 3 = 3 as before_row, t.tgtype & 16 <> 0 as on_update, \
           p.prosrc || ' ' || pg_get_triggerdef(t.oid) as source, format('trigger %I', t.tgname) as described \
         from pg_trigger t join pg_proc p on p.oid = t.tgfoid \
         where t.tgrelid = $1::int8::oid and not t.tgisinternal and t.tgenabled <> 'D') as answer order by name",
    )
    .bind(table)
    .fetch_all(connection)
    .await
    .doing(|| "reading the triggers".into())?;
    Ok(found.into_iter().map(|Json(trigger)| trigger).collect())
}

fn of_table(table: &Table, refusals: &mut Refusals) {
    refusals.when(!table.owned, "this user does not own it", "connect as its owner or a member of that role");
    refusals.when(
        table.kind != "r",
        "it is not an ordinary table",
        "name an ordinary table; a partitioned one is changed in a migration",
    );
    refusals.when(
        table.partition || table.inherits,
        "it is a partition, or tables inherit from it or it from others",
        "change such tables in a migration, parent and children alike",
    );
    refusals.when(table.rules, "it has rewrite rules", "replace the rules by triggers first");
    refusals.when(
        table.policies_hide,
        "row security hides rows from this user",
        "connect as a role with BYPASSRLS, or lift FORCE ROW LEVEL SECURITY meanwhile",
    );
    refusals.when(
        table.published,
        "it is published for logical replication, and subscribers lack the new column",
        "take it out of the publication until commit, or add the columns at the subscribers in a migration",
    );
}

fn of_triggers(triggers: &[Trigger], old: Option<&str>, refusals: &mut Refusals) {
    for trigger in triggers {
        if trigger.name.starts_with(TRIGGER) {
            refusals.when(
                true,
                "another change of a column of it is under way",
                "commit or roll back that run first; a pipeline changes one column of a table at a time",
            );
            continue;
        }
        refusals.when(
            old.is_some_and(|old| mentions(&trigger.source, old)),
            format!("{} speaks of the column", trigger.described),
            "drop the trigger before this step and make it anew, for the new shape, behind it",
        );
        refusals.when(
            trigger.before_row && trigger.name.as_str() > TRIGGER,
            format!("{} would fire after ours", trigger.described),
            "rename it, so that it sorts before `~~`",
        );
    }
}

fn of_dependents(dependents: &[Dependent], refusals: &mut Refusals) {
    for Dependent { class, kind, described, .. } in dependents {
        let remedy = match (class.as_str(), kind.as_str()) {
            ("class", "i" | "S") | ("constraint", "c" | "u" | "p" | "f" | "n") | ("attrdef", "own") => continue,
            ("class", "iR") | ("constraint", "uI" | "pI") => {
                "name another replica identity until commit: ALTER TABLE … REPLICA IDENTITY"
            }
            ("constraint", "fR") => {
                "foreign keys of tables refer to the column: drop them before this step and add them anew behind it (postgres.foreign_key)"
            }
            ("attrdef", _) => "drop the generated column before this step and add it anew behind it",
            ("rule", _) => "drop the view before this step and make it anew, for the new shape, behind it",
            _ => "drop it before this step and make it anew, for the new shape, behind it",
        };
        refusals.when(true, format!("{described} depends on the column"), remedy);
    }
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
    probe: Option<Probe>,
) -> Expansion {
    let spelled = |type_name: &str, collation: Option<&str>| match collation {
        Some(collation) => format!("{type_name} collate {collation}"),
        None => type_name.to_owned(),
    };
    let name_after = wanted.name_after().clone();
    let in_place = wanted.old() == Some(&name_after);
    let derived = |start: &str| Identifier::derived(start, &format!("{mark} {start}"));
    let none = |default: &String| !default.trim().eq_ignore_ascii_case("null");
    let rewrites = probe.as_ref().is_some_and(|probe| probe.rewrites);
    let type_name = match (&probe, old) {
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

/// Digests what keeps the shapes in step, to notice a change of somebody else.
pub(super) async fn in_step(connection: &mut PgConnection, expansion: &Expansion) -> Result<String, PostgresError> {
    let text: Option<String> = sqlx::query_scalar(AssertSqlSafe(format!(
        "select string_agg(line, e'\\n' order by line) from ( \
           select format('column %s %s %s %s', a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, \
               pg_get_expr(d.adbin, d.adrelid)) as line \
             from pg_attribute a left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum \
             where a.attrelid = to_regclass({table}) and not a.attisdropped and a.attname in ({old}, {new}) \
           union all select format('trigger %s %s', tgenabled, pg_get_triggerdef(oid)) from pg_trigger \
             where tgrelid = to_regclass({table}) and not tgisinternal and tgname like '{TRIGGER}%' \
           union all select 'function ' || prosrc from pg_proc \
             where proname = {function} and pronamespace = to_regnamespace({schema}) \
           union all select 'view ' || pg_get_viewdef(to_regclass({view}))) as lines",
        table = literal(&expansion.table.to_string()),
        old = literal(expansion.old.as_ref().map_or("", Identifier::as_str)),
        new = literal(expansion.new.as_str()),
        function = literal(expansion.function.name.as_str()),
        schema = literal(&expansion.function.schema.to_string()),
        view = expansion.view().map_or("null::text".to_owned(), |view| literal(&view.to_string())),
    )))
    .fetch_one(connection)
    .await
    .doing(|| "looking at both shapes".into())?;
    Ok(sha256_hex(text.unwrap_or_default().as_bytes()))
}
