//! What stands on the column in its old shape, spelled for the new one.

use serde::{Deserialize, Serialize};
use sqlx::{AssertSqlSafe, PgConnection};

use super::change::Expansion;
use crate::error::{Doing, PostgresError};
use crate::identifier::{Identifier, literal};

/// Lists what the new shape gets because the old one has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Copies {
    pub(crate) indexes: Vec<IndexCopy>,
    pub(crate) constraints: Vec<ConstraintCopy>,
}

/// Describes an index of the new shape.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IndexCopy {
    /// Its name until commit.
    pub(crate) name: Identifier,
    /// The name of the one that it is a copy of.
    pub(crate) original: Identifier,
    /// The statement that builds it beside live traffic.
    pub(crate) create: String,
    /// The constraint that it carries from commit on: `unique`, `primary key`, with its rest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) constraint: Option<(String, String)>,
}

/// Describes a constraint of the new shape.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ConstraintCopy {
    /// Its name until commit.
    pub(crate) name: Identifier,
    /// The name of the one that it is a copy of.
    pub(crate) original: Identifier,
    /// Its definition, without NOT VALID.
    pub(crate) definition: String,
    /// Whether the original has been validated.
    pub(crate) valid: bool,
}

/// Reads what stands on the old column.
///
/// The server spells definitions by the names of columns. So the column gets, for this moment and
/// in this transaction, a name that nothing else has: wherever it then stands is the column, and
/// nowhere else. The caller holds the table's strongest lock.
pub(super) async fn read(connection: &mut PgConnection, expansion: &Expansion) -> Result<Copies, PostgresError> {
    let Some(old) = &expansion.old else { return Ok(Copies::default()) };
    let table = &expansion.table;
    let stand_in = Identifier::derived("upgrade_stand_in", &expansion.mark);
    sqlx::raw_sql(AssertSqlSafe(format!(
        "savepoint named_apart; alter table {table} rename column {old} to {stand_in}"
    )))
    .execute(&mut *connection)
    .await?;
    let regclass = literal(&table.to_string());
    let (stand_in, new) = (stand_in.as_str(), expansion.new.to_string());
    type Index = (String, String, String, bool, Option<String>, Option<String>, bool, bool);
    let indexes: Vec<Index> = sqlx::query_as(AssertSqlSafe(format!(
        "select c.relname::text, quote_ident(c.relname), pg_get_indexdef(i.indexrelid), i.indisunique, k.conname::text, \
           k.contype::text, coalesce(k.condeferrable, false), coalesce(k.condeferred, false) \
         from pg_index i join pg_class c on c.oid = i.indexrelid \
           left join pg_constraint k on k.conindid = i.indexrelid and k.contype in ('p', 'u') \
         where i.indrelid = {regclass}::regclass and pg_get_indexdef(i.indexrelid) like '%{stand_in}%' order by 1"
    )))
    .fetch_all(&mut *connection)
    .await
    .doing(|| format!("reading the indexes of {table}"))?;
    let constraints: Vec<(String, String, bool)> = sqlx::query_as(AssertSqlSafe(format!(
        "select conname::text, pg_get_constraintdef(oid), convalidated from pg_constraint \
         where conrelid = {regclass}::regclass and contype in ('c', 'f') \
           and pg_get_constraintdef(oid) like '%{stand_in}%' order by 1"
    )))
    .fetch_all(&mut *connection)
    .await
    .doing(|| format!("reading the constraints of {table}"))?;
    sqlx::raw_sql("rollback to savepoint named_apart; release savepoint named_apart").execute(connection).await?;

    let catalog = |name: &str| Identifier::new(name).expect("a name from the catalog is a name");
    let indexes =
        indexes.into_iter().map(|(name, quoted, definition, unique, constraint, kind, deferrable, deferred)| {
            let copy = expansion.own("upgrade_index", &name);
            let unique = if unique { "unique " } else { "" };
            let rest = definition.split_once(&format!("INDEX {quoted} ON ")).map_or("", |(_, rest)| rest);
            let create = format!("create {unique}index concurrently {copy} on {}", rest.replace(stand_in, &new));
            let constraint = constraint.map(|constraint| {
                let kind = if kind.as_deref() == Some("p") { "primary key" } else { "unique" };
                let rest = match (deferrable, deferred) {
                    (true, true) => " deferrable initially deferred",
                    (true, false) => " deferrable",
                    (false, _) => "",
                };
                (constraint, format!("{kind} using index {copy}{rest}"))
            });
            IndexCopy { name: copy, original: catalog(&name), create, constraint }
        });
    let constraints = constraints.into_iter().map(|(name, definition, valid)| ConstraintCopy {
        name: expansion.own("upgrade_constraint", &name),
        original: catalog(&name),
        definition: definition.replace(stand_in, &new).trim_end_matches(" NOT VALID").to_owned(),
        valid,
    });
    Ok(Copies { indexes: indexes.collect(), constraints: constraints.collect() })
}

/// Reads what else the old column has, as statements for the new one: comment, privileges, storage.
pub(super) async fn manners(
    connection: &mut PgConnection,
    expansion: &Expansion,
) -> Result<Vec<String>, PostgresError> {
    let Some(old) = &expansion.old else { return Ok(Vec::new()) };
    let (table, new) = (expansion.table.to_string(), expansion.new.to_string());
    sqlx::query_scalar(
        "with old as (select a.*, to_jsonb(a) as j, t.typstorage from pg_attribute a join pg_type t on t.oid = a.atttypid \
           where a.attrelid = $1::regclass and a.attname = $3 and not a.attisdropped), \
         new as (select a.* from pg_attribute a where a.attrelid = $1::regclass and a.attname = $4 and not a.attisdropped) \
         select format('comment on column %s.%s is %L', $1, $2, col_description(attrelid, attnum)) from old \
           where col_description(attrelid, attnum) is not null \
         union all select format('grant %s (%s) on %s to %s%s', privilege_type, $2, $1, \
             case grantee when 0 then 'public' else quote_ident(pg_get_userbyid(grantee)) end, \
             case when is_grantable then ' with grant option' else '' end) from old, aclexplode(attacl) \
         union all select format('alter table %s alter column %s set statistics %s', $1, $2, attstattarget) from old \
           where attstattarget >= 0 \
         union all select format('alter table %s alter column %s set (%s)', $1, $2, array_to_string(attoptions, ', ')) \
           from old where attoptions is not null \
         union all select format('alter table %s alter column %s set storage %s', $1, $2, \
             case old.attstorage when 'p' then 'plain' when 'e' then 'external' when 'm' then 'main' else 'extended' end) \
           from old, new where old.attstorage <> old.typstorage and old.atttypid = new.atttypid \
         union all select format('alter table %s alter column %s set compression %s', $1, $2, \
             case j ->> 'attcompression' when 'p' then 'pglz' else 'lz4' end) \
           from old, new where j ->> 'attcompression' in ('p', 'l') and old.atttypid = new.atttypid",
    )
    .bind(table)
    .bind(new)
    .bind(old.as_str())
    .bind(expansion.new.as_str())
    .fetch_all(connection)
    .await
    .doing(|| "reading what belongs to the column".into())
}

/// Spells who may do through the view what they may do with the table.
pub(super) async fn privileges(
    connection: &mut PgConnection,
    expansion: &Expansion,
) -> Result<Vec<String>, PostgresError> {
    let (Some(view), Some(schema)) = (expansion.view(), &expansion.schema) else { return Ok(Vec::new()) };
    sqlx::query_scalar(
        "with acl as ( \
           select privilege_type, '' as columns, grantee, is_grantable from pg_class c, aclexplode(c.relacl) \
             where c.oid = $1::regclass and privilege_type in ('SELECT', 'INSERT', 'UPDATE', 'DELETE') \
           union all select privilege_type, format('(%I)', case attname when $4 then $5 else attname end), grantee, is_grantable \
             from pg_attribute, aclexplode(attacl) where attrelid = $1::regclass and attnum > 0 and not attisdropped \
               and privilege_type in ('SELECT', 'INSERT', 'UPDATE') and attname <> $6), \
         named as (select distinct privilege_type, columns, is_grantable, \
           case grantee when 0 then 'public' else quote_ident(pg_get_userbyid(grantee)) end as who from acl) \
         select format('alter view %s owner to %I', $2, pg_get_userbyid(relowner)) from pg_class where oid = $1::regclass \
         union all select distinct format('grant usage on schema %s to %s', $3, who) from named \
         union all select format('grant usage on schema %s to %I', $3, pg_get_userbyid(relowner)) from pg_class where oid = $1::regclass \
         union all select format('grant %s %s on %s to %s%s', privilege_type, columns, $2, who, \
           case when is_grantable then ' with grant option' else '' end) from named",
    )
    .bind(expansion.table.to_string())
    .bind(view.to_string())
    .bind(schema.to_string())
    .bind(expansion.old.as_ref().map_or("", Identifier::as_str))
    .bind(expansion.name_after.as_str())
    .bind(expansion.new.as_str())
    .fetch_all(connection)
    .await
    .doing(|| "reading the privileges on the table".into())
}

/// Reads the columns: their names, and those that are not generated.
pub(super) async fn columns(
    connection: &mut PgConnection,
    expansion: &Expansion,
) -> Result<(Vec<String>, Vec<String>), PostgresError> {
    let rows: Vec<(String, bool)> = sqlx::query_as(AssertSqlSafe(format!(
        "select attname::text, attgenerated <> '' from pg_attribute where attrelid = {}::regclass and attnum > 0 \
         and not attisdropped order by attnum",
        literal(&expansion.table.to_string())
    )))
    .fetch_all(connection)
    .await
    .doing(|| "reading the columns".into())?;
    // What is generated has no value yet when a row's triggers fire.
    let stored = rows.iter().filter(|(_, generated)| !generated).map(|(name, _)| name.clone()).collect();
    Ok((rows.into_iter().map(|(name, _)| name).collect(), stored))
}
