//! What stands in the way of a second shape, each with its remedy.

use upgrade_core::error::StepError;

use super::catalog::{Dependent, TRIGGER, Table, Trigger};
use super::change::mentions;
use crate::identifier::TableName;

/// Collects what stands in the way, each with its remedy.
pub(super) struct Refusals(pub(super) Vec<(String, &'static str)>);

impl Refusals {
    pub(super) fn when(&mut self, refused: bool, what: impl Into<String>, remedy: &'static str) {
        if refused {
            self.0.push((what.into(), remedy));
        }
    }

    pub(super) fn into_error(self, table: &TableName) -> Option<StepError> {
        let (first, remedy) = self.0.first()?;
        let all: Vec<_> = self.0.iter().map(|(what, remedy)| format!("{what}: {remedy}")).collect();
        let error = StepError::permanent(format!("{table} cannot have a column in two shapes: {first}"))
            .with_hint((*remedy).to_owned());
        Some(if all.len() > 1 { error.with_detail(all.join("\n")) } else { error })
    }
}

pub(super) fn of_table(table: &Table, refusals: &mut Refusals) {
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

pub(super) fn of_triggers(triggers: &[Trigger], old: Option<&str>, refusals: &mut Refusals) {
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

pub(super) fn of_dependents(dependents: &[Dependent], refusals: &mut Refusals) {
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
