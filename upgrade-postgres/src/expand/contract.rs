//! How one shape is left: the new one at commit, the old one at rollback.

use sqlx::PgConnection;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use super::change::Expansion;
use super::definitions::Copies;
use super::phases::{MADE_BY_US, Phase, Record, begin, run, same};
use crate::error::{Doing, PostgresError};
use crate::identifier::{Identifier, literal};
use crate::ledger::Ledger;
use crate::locking::LockPolicy;
use crate::session::Session;

/// Leaves only the new shape, in one short transaction.
pub(crate) async fn contract(
    cx: &Context,
    session: &mut Session,
    policy: &LockPolicy,
    ledger: &Ledger,
    expansion: &Expansion,
) -> Result<(), PostgresError> {
    let what = format!("contracting {}", expansion.table);
    policy
        .transaction(cx, session, &what, move |connection, _| {
            Box::pin(async move {
                let record = match ledger.get::<Record>(connection, Record::ITEM).await? {
                    Some(record) if record.phase != Phase::Contracted => record,
                    _ => return Ok(()),
                };
                begin(connection, expansion).await?;
                same(cx, connection, expansion, &record).await?;
                drop_view(connection, expansion).await?;
                run(connection, &format!("drop function if exists {}() cascade", expansion.function)).await?;
                if let Some(old) = &expansion.old {
                    replace(connection, expansion, old, &record.copies).await?;
                }
                ledger.put(connection, Record::ITEM, &record.at(Phase::Contracted)).await
            })
        })
        .await
}

/// Drops the old column and gives all that the new one has the names that it had.
async fn replace(
    connection: &mut PgConnection,
    expansion: &Expansion,
    old: &Identifier,
    copies: &Copies,
) -> Result<(), PostgresError> {
    let Expansion { table, new, name_after, .. } = expansion;
    let sequences: Vec<String> = sqlx::query_scalar(
        "select d.objid::regclass::text from pg_depend d join pg_class c on c.oid = d.objid and c.relkind = 'S' \
           join pg_attribute a on a.attrelid = d.refobjid and a.attnum = d.refobjsubid \
         where d.classid = 'pg_class'::regclass and d.deptype = 'a' and a.attrelid = $1::regclass and a.attname = $2",
    )
    .bind(table.to_string())
    .bind(old.as_str())
    .fetch_all(&mut *connection)
    .await
    .doing(|| "looking for the sequence of the column".into())?;
    for sequence in sequences {
        run(connection, &format!("alter sequence {sequence} owned by {table}.{new}")).await?;
    }
    let not_null = not_null_name(connection, expansion, old).await?;
    let drop = format!("alter table {table} drop column {old}");
    run(connection, &drop).await.map_err(held_back)?;
    if new != name_after {
        run(connection, &format!("alter table {table} rename column {new} to {name_after}")).await?;
    }
    if let Some(default) = &expansion.default {
        run(connection, &format!("alter table {table} alter column {name_after} set default {default}")).await?;
    }
    for copy in &copies.indexes {
        let sql = match &copy.constraint {
            Some((name, constraint)) => {
                let name = Identifier::new(name.clone()).expect("a name from the catalog is a name");
                format!("alter table {table} add constraint {name} {constraint}")
            }
            None => format!("alter index {}.{} rename to {}", table.schema, copy.name, copy.original),
        };
        run(connection, &sql).await?;
    }
    for copy in &copies.constraints {
        run(connection, &format!("alter table {table} rename constraint {} to {}", copy.name, copy.original)).await?;
    }
    // From PostgreSQL 18 on, NOT NULL is a constraint with a name.
    if let Some(present) = not_null_name(connection, expansion, name_after).await? {
        let usual = format!("{}_{}_not_null", table.name.as_str(), name_after.as_str());
        let wanted = not_null.or_else(|| Identifier::new(usual).ok());
        if let Some(wanted) = wanted.filter(|wanted| *wanted != present) {
            run(connection, &format!("alter table {table} rename constraint {present} to {wanted}")).await?;
        }
    }
    Ok(())
}

/// Says what to do about what was made on a column since, and would go with it.
fn held_back(error: PostgresError) -> PostgresError {
    if error.code() != Some("2BP01") {
        return error;
    }
    let hint = "something was made on the column since: drop it, or make it on the other one, then `upgrade resume`";
    StepError::from(error).with_hint(hint).into()
}

async fn not_null_name(
    connection: &mut PgConnection,
    expansion: &Expansion,
    column: &Identifier,
) -> Result<Option<Identifier>, PostgresError> {
    let name: Option<String> = sqlx::query_scalar(
        "select k.conname::text from pg_constraint k join pg_attribute a on a.attrelid = k.conrelid and k.conkey = array[a.attnum] \
         where k.contype = 'n' and k.conrelid = $1::regclass and a.attname = $2",
    )
    .bind(expansion.table.to_string())
    .bind(column.as_str())
    .fetch_optional(connection)
    .await
    .doing(|| "reading the name of NOT NULL".into())?;
    Ok(name.map(|name| Identifier::new(name).expect("a name from the catalog is a name")))
}

async fn drop_view(connection: &mut PgConnection, expansion: &Expansion) -> Result<(), PostgresError> {
    let (Some(view), Some(schema)) = (expansion.view(), &expansion.schema) else { return Ok(()) };
    run(connection, &format!("drop view if exists {view}")).await.map_err(held_back)?;
    run(
        connection,
        &format!(
            "do $do$ begin if obj_description(to_regnamespace({name}), 'pg_namespace') = {comment} then \
             drop schema {schema}; end if; exception when dependent_objects_still_exist then null; end $do$",
            name = literal(&schema.to_string()),
            comment = literal(MADE_BY_US)
        ),
    )
    .await
}

/// Takes the new shape back, in one short transaction, from whatever phase.
pub(crate) async fn withdraw(
    cx: &Context,
    session: &mut Session,
    policy: &LockPolicy,
    ledger: &Ledger,
    expansion: &Expansion,
) -> Result<(), PostgresError> {
    let what = format!("taking back the new shape of {}", expansion.table);
    policy
        .transaction(cx, session, &what, move |connection, _| {
            Box::pin(async move {
                // Nothing was done, or it is undone already.
                let Some(record) = ledger.get::<Record>(connection, Record::ITEM).await? else { return Ok(()) };
                begin(connection, expansion).await?;
                same(cx, connection, expansion, &record).await?;
                // Before that phase, a view of that name is somebody else's.
                if record.phase >= Phase::InStep {
                    drop_view(connection, expansion).await?;
                }
                run(connection, &format!("drop function if exists {}() cascade", expansion.function)).await?;
                let Expansion { table, new, .. } = expansion;
                let drop = format!("alter table {table} drop column if exists {new}");
                run(connection, &drop).await.map_err(held_back)?;
                if let Some(pending) = &expansion.pending {
                    run(connection, &format!("alter table {table} drop column if exists {pending}")).await?;
                }
                ledger.remove(connection, Record::ITEM).await
            })
        })
        .await
}
