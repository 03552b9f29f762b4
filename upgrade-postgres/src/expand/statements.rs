//! The statements that make a second shape, and what keeps both in step.

use super::catalog::TRIGGER;
use super::change::Expansion;
use crate::identifier::{Identifier, literal};

/// Names the trigger on every write.
pub(super) fn trigger(expansion: &Expansion) -> Identifier {
    expansion.own(TRIGGER, "writes")
}

/// Names the trigger on writes of sessions that see the new shape through its view.
fn trigger_of_view(expansion: &Expansion) -> Identifier {
    expansion.own(TRIGGER, "writes through the view")
}

/// Names the trigger on updates that name the new column in a row that is still to be filled.
///
/// It fires before the other: `~~upgrade` followed by `_`, and this one by a blank before that.
fn trigger_of_pending(expansion: &Expansion) -> Identifier {
    expansion.own(&format!("{TRIGGER} early"), "writes")
}

/// Spells a row of one shape as a subquery, with the columns that `expression` may speak of.
///
/// Only those: a column of others that is dropped meanwhile does not stop the writes.
fn row(expansion: &Expansion, columns: &[&str], expression: &str, new_shape: bool, of: &str) -> String {
    let mut listed = Vec::new();
    for column in columns {
        let name = Identifier::new(*column).expect("a name from the catalog is a name");
        let ours = [expansion.old.as_ref(), Some(&expansion.new), expansion.pending.as_ref()];
        if !ours.contains(&Some(&name)) && Expansion::mentions(expression, column) {
            listed.push(format!("{of}.{name}"));
        }
    }
    if new_shape {
        listed.push(format!("{of}.{} as {}", expansion.new, expansion.name_after));
    } else if let Some(old) = &expansion.old {
        listed.push(format!("{of}.{old}"));
    }
    if listed.is_empty() {
        listed.push("1".into());
    }
    listed.join(", ")
}

/// Spells queries that only show that both expressions can be understood.
pub(super) fn readings(expansion: &Expansion, columns: &[&str]) -> Vec<(&'static str, String)> {
    let (table, mut queries) = (&expansion.table, Vec::new());
    if let Some(up) = &expansion.up {
        let row = row(expansion, columns, up, false, "t");
        queries.push(("up", format!("select ({up}) from (select {row} from {table} as t) as row_in_the_old_shape")));
    }
    if let Some(down) = &expansion.down {
        let others = row(expansion, columns, down, true, "t");
        let new = &expansion.new;
        // The type may carry a collation, which stands behind what it is cast to.
        let with_new = format!("select t.*, null::{} as {new} from {table} as t", expansion.type_name);
        queries.push((
            "down",
            format!("select ({down}) from (select {others} from ({with_new}) as t) as row_in_the_new_shape"),
        ));
    }
    queries
}

/// Spells the function of the triggers, with or without rows that are still to be filled.
///
/// It only ever changes the row that is being written, so that it never sets off another one.
/// Values are compared as they are stored: `*<>` knows every type, and 1.0 from 1.00.
/// Rows that are not cast would be compared column by column, by an operator that no type has.
pub(super) fn function(expansion: &Expansion, columns: &[&str], filling: bool) -> String {
    let new = &expansion.new;
    let pending = expansion.pending.as_ref().filter(|_| filling);
    let up = match &expansion.up {
        Some(up) => {
            let row = row(expansion, columns, up, false, "NEW");
            format!("NEW.{new} := (select ({up}) from (select {row}) as row_in_the_old_shape);")
        }
        None => "null;".into(),
    };
    let done = pending.map(|pending| format!("NEW.{pending} := false;")).unwrap_or_default();
    let body = match (&expansion.old, &expansion.down) {
        (Some(old), Some(down)) => {
            let row = row(expansion, columns, down, true, "NEW");
            let down = format!("NEW.{old} := (select ({down}) from (select {row}) as row_in_the_new_shape);");
            let unfilled = pending
                .map(|pending| {
                    format!(
                        "elsif OLD.{pending} then \
                           if not NEW.{pending} then return NEW; end if; \
                           through_the_new := TG_NARGS = 2 or row(NEW.{new})::record operator(pg_catalog.*<>) row(OLD.{new})::record; "
                    )
                })
                .unwrap_or_default();
            format!(
                "if TG_OP = 'INSERT' then \
                   through_the_new := TG_NARGS = 1 or NEW.{new} is not null; \
                 {unfilled}\
                 elsif row(NEW.{new})::record operator(pg_catalog.*<>) row(OLD.{new})::record then through_the_new := true; \
                 elsif row(NEW.{old})::record operator(pg_catalog.*<>) row(OLD.{old})::record then through_the_new := false; \
                 else return NEW; end if; \
                 {done} \
                 if through_the_new then {down} else {up} end if; \
                 return NEW;"
            )
        }
        _ => {
            // Where the column has a default, the server gave it to the row already.
            let inserted = match expansion.default {
                None => format!("if NEW.{new} is null then {up} end if;"),
                Some(_) => String::new(),
            };
            let unfilled = pending
                .map(|pending| {
                    format!(
                        "elsif OLD.{pending} and NEW.{pending} then {done} \
                           if TG_NARGS < 2 and NEW.{new} is null then {up} end if; "
                    )
                })
                .unwrap_or_default();
            format!("if TG_OP = 'INSERT' then {done} {inserted} {unfilled} end if; return NEW;")
        }
    };
    format!(
        "create or replace function {name}() returns trigger language plpgsql set search_path to {path} as {body}",
        name = expansion.function,
        path = expansion.search_path(),
        body = literal(&format!("\n#variable_conflict use_column\ndeclare through_the_new boolean;\nbegin {body} end")),
    )
}

/// Spells the triggers, with or without rows that are still to be filled; they fire whatever
/// `session_replication_role` says.
pub(super) fn triggers(expansion: &Expansion, filling: bool) -> Vec<String> {
    let (table, function) = (&expansion.table, &expansion.function);
    let mut sql = Vec::new();
    let mut add = |name: Identifier, event: &str, when: String, arguments: &str| {
        sql.push(format!(
            "create trigger {name} before {event} on {table} for each row {when} execute function {function}({arguments})"
        ));
        sql.push(format!("alter table {table} enable always trigger {name}"));
    };
    let schema = expansion.schema.as_ref().filter(|_| !filling);
    match schema.map(|schema| literal(schema.as_str())) {
        // Who has the view's schema first in the path sees the new shape: NULL is then what was meant.
        Some(schema) => {
            let seen = |how: &str| format!("when (pg_catalog.current_schema() is {how} {schema})");
            add(trigger(expansion), "insert or update", seen("distinct from"), "");
            add(trigger_of_view(expansion), "insert or update", seen("not distinct from"), "'view'");
        }
        None => add(trigger(expansion), "insert or update", String::new(), ""),
    }
    if let Some(pending) = expansion.pending.as_ref().filter(|_| filling) {
        let event = format!("update of {}", expansion.new);
        add(trigger_of_pending(expansion), &event, format!("when (OLD.{pending})"), "'new', 'named'");
    }
    sql
}

/// Spells what takes away what only filling needed.
pub(super) fn filled(expansion: &Expansion, columns: &[&str]) -> Vec<String> {
    let (table, function) = (&expansion.table, &expansion.function);
    let Some(pending) = &expansion.pending else { return Vec::new() };
    let mut sql = vec![format!("drop function if exists {function}() cascade")];
    // An added column that has a default gets it from the server.
    if expansion.old.is_some() || expansion.default.is_none() {
        sql.push(self::function(expansion, columns, false));
        sql.extend(triggers(expansion, false));
    }
    sql.push(format!("alter table {table} drop column if exists {pending}"));
    sql
}

/// Spells the check that stands for NOT NULL until that can be set without a scan.
pub(super) fn not_null_check(expansion: &Expansion) -> Option<(Identifier, String)> {
    let name = expansion.own("upgrade_not_null", "check");
    expansion.not_null.then(|| (name, format!("check ({} is not null)", expansion.new)))
}

/// Spells the view of the new shape: the table as it will be after commit.
pub(super) fn view(expansion: &Expansion, columns: &[&str], version: i32) -> Vec<String> {
    let Some(view) = expansion.view() else { return Vec::new() };
    let table = &expansion.table;
    let ours = [expansion.old.as_ref(), Some(&expansion.new), expansion.pending.as_ref()];
    let mut listed: Vec<String> = columns
        .iter()
        .map(|column| Identifier::new(*column).expect("a name from the catalog is a name"))
        .filter(|column| !ours.contains(&Some(column)))
        .map(|column| column.to_string())
        .collect();
    listed.push(format!("{} as {}", expansion.new, expansion.name_after));
    let options = if version >= 150_000 { "with (security_invoker = true) " } else { "" };
    let mut sql = vec![format!("create view {view} {options}as select {} from {table}", listed.join(", "))];
    if let Some(default) = &expansion.default {
        sql.push(format!("alter view {view} alter column {} set default {default}", expansion.name_after));
    }
    sql
}
