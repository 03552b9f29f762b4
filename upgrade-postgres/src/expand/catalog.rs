//! What the catalog says about a table, a column and what stands on it.

use serde::Deserialize;
use sqlx::types::Json;
use sqlx::{AssertSqlSafe, PgConnection};
use upgrade_core::sealed::sha256_hex;

use super::change::Expansion;
use crate::error::{Doing, PostgresError};
use crate::identifier::{Identifier, TableName, literal};

/// Starts the names of our triggers: `~` sorts behind all that people write, and the triggers of a
/// row fire in the order of their names, so that ours sees what the others made of it.
pub(super) const TRIGGER: &str = "~~upgrade";

/// Describes a table.
#[derive(Deserialize)]
pub(super) struct Table {
    pub(super) oid: i64,
    pub(super) kind: String,
    pub(super) partition: bool,
    pub(super) inherits: bool,
    pub(super) rules: bool,
    pub(super) row_security: bool,
    pub(super) policies_hide: bool,
    pub(super) owned: bool,
    pub(super) published: bool,
    pub(super) rows: i64,
}

/// Describes a column.
#[derive(Deserialize)]
pub(super) struct Column {
    pub(super) name: String,
    pub(super) number: i16,
    pub(super) type_name: String,
    pub(super) collation: Option<String>,
    pub(super) not_null: bool,
    pub(super) generated: bool,
    pub(super) identity: bool,
    pub(super) default: Option<String>,
}

/// Describes what depends on a column.
#[derive(Deserialize)]
pub(super) struct Dependent {
    pub(super) class: String,
    pub(super) kind: String,
    pub(super) described: String,
    pub(super) definition: String,
}

/// Describes a trigger of a table.
#[derive(Deserialize)]
pub(super) struct Trigger {
    pub(super) name: String,
    pub(super) before_row: bool,
    pub(super) on_update: bool,
    pub(super) source: String,
    pub(super) described: String,
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

pub(super) fn found(old: Option<&Column>, dependents: &[Dependent]) -> String {
    let Some(old) = old else { return "no column".into() };
    let mut text = format!("{} {} {:?} {} {:?}", old.name, old.type_name, old.collation, old.not_null, old.default);
    for dependent in dependents {
        text.push_str(&format!("\n{} {}", dependent.described, dependent.definition));
    }
    sha256_hex(text.as_bytes())
}

pub(super) async fn table(connection: &mut PgConnection, name: &TableName) -> Result<Option<Table>, PostgresError> {
    let found: Option<Json<Table>> = sqlx::query_scalar(
        "select to_jsonb(answer) from (select c.oid::int8 as oid, c.relkind::text as kind, c.relispartition as partition, \
           exists (select from pg_inherits where c.oid in (inhrelid, inhparent)) as inherits, \
           exists (select from pg_rewrite r where r.ev_class = c.oid) as rules, c.relrowsecurity as row_security, row_security_active(c.oid) as policies_hide, \
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

pub(super) async fn columns(connection: &mut PgConnection, table: i64) -> Result<Vec<Column>, PostgresError> {
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

pub(super) async fn dependents(
    connection: &mut PgConnection,
    table: i64,
    column: i16,
) -> Result<Vec<Dependent>, PostgresError> {
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

pub(super) async fn triggers(connection: &mut PgConnection, table: i64) -> Result<Vec<Trigger>, PostgresError> {
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
