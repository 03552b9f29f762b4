//! Foreign keys as the catalog knows them, and the rows that break them.

use serde::{Deserialize, Serialize};
use sqlx::{AssertSqlSafe, PgConnection};
use upgrade_core::error::StepError;

use super::config::Action;
use crate::error::{Doing, PostgresError};
use crate::identifier::{Identifier, TableName, literal};

/// Holds all that a foreign key is, but for its name and the table that has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Key {
    pub(super) columns: Vec<Identifier>,
    pub(super) references: TableName,
    pub(super) referenced: Vec<Identifier>,
    pub(super) on_delete: Action,
    pub(super) on_update: Action,
    pub(super) match_full: bool,
    pub(super) deferrable: bool,
    pub(super) initially_deferred: bool,
    /// Whether every row is known to keep it.
    pub(super) valid: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) comment: Option<String>,
    /// What else it is that a step does not say: `NOT ENFORCED`, columns of `SET NULL`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) beyond: Option<String>,
}

impl Key {
    /// Tells whether both ask for the same, valid or not.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        Self { valid: other.valid, comment: other.comment.clone(), ..self.clone() } == *other
    }

    /// Writes it as it stands after `ADD CONSTRAINT name`.
    pub(super) fn sql(&self, references: &str) -> String {
        let mut sql = format!(
            "foreign key ({}) references {references} ({}){} on delete {} on update {}",
            list(&self.columns),
            list(&self.referenced),
            if self.match_full { " match full" } else { "" },
            self.on_delete,
            self.on_update,
        );
        if self.deferrable {
            sql.push_str(" deferrable");
        }
        if self.initially_deferred {
            sql.push_str(" initially deferred");
        }
        sql
    }

    /// Says what it is, in one line.
    pub(super) fn describe(&self) -> String {
        let plain = |names: &[Identifier]| names.iter().map(Identifier::as_str).collect::<Vec<_>>().join(", ");
        let mut text = format!(
            "({}) references {} ({})",
            plain(&self.columns),
            String::from(self.references.clone()),
            plain(&self.referenced)
        );
        for (action, event) in [(self.on_delete, "delete"), (self.on_update, "update")] {
            if action != Action::NoAction {
                text.push_str(&format!(" on {event} {action}"));
            }
        }
        let properties = [
            (self.match_full, "match full"),
            (self.deferrable, "deferrable"),
            (self.initially_deferred, "initially deferred"),
            (!self.valid, "NOT VALID"),
        ];
        for (_, property) in properties.into_iter().filter(|(is, _)| *is) {
            text.push_str(&format!(" {property}"));
        }
        self.beyond.iter().for_each(|beyond| text.push_str(&format!(" {beyond}")));
        text
    }
}

pub(super) fn list(names: &[Identifier]) -> String {
    names.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Reads the foreign key of that name.
///
/// # Errors
/// The name belongs to a constraint of another kind, or the server refused it.
pub(super) async fn read(
    connection: &mut PgConnection,
    table: &TableName,
    name: &Identifier,
) -> Result<Option<Key>, PostgresError> {
    type Row = (
        String,
        String,
        Vec<String>,
        String,
        String,
        Vec<String>,
        String,
        String,
        String,
        bool,
        bool,
        bool,
        Option<String>,
        String,
    );
    let names = |relation: &str, numbers: &str| {
        format!(
            "(select coalesce(array_agg(a.attname::text order by k.place), '{{}}') \
              from unnest(c.{numbers}) with ordinality as k(number, place) \
              join pg_attribute a on a.attrelid = c.{relation} and a.attnum = k.number)"
        )
    };
    let row: Option<Row> = sqlx::query_as(AssertSqlSafe(format!(
        "select c.contype::text, pg_get_constraintdef(c.oid), {columns}, coalesce(n.nspname, '')::text, coalesce(t.relname, '')::text, \
           {referenced}, c.confdeltype::text, c.confupdtype::text, c.confmatchtype::text, c.condeferrable, c.condeferred, \
           c.convalidated, obj_description(c.oid, 'pg_constraint'), \
           concat_ws(' ', case when to_jsonb(c) ->> 'conenforced' = 'false' then 'NOT ENFORCED' end, \
             case when to_jsonb(c) ->> 'conperiod' = 'true' then 'PERIOD' end, \
             'ON DELETE columns ' || nullif(to_jsonb(c) ->> 'confdelsetcols', '[]')) \
         from pg_constraint c left join pg_class t on t.oid = c.confrelid left join pg_namespace n on n.oid = t.relnamespace \
         where c.conrelid = to_regclass($1) and c.conname = $2",
        columns = names("conrelid", "conkey"),
        referenced = names("confrelid", "confkey"),
    )))
    .bind(table.to_string())
    .bind(name.as_str())
    .fetch_optional(connection)
    .await
    .doing(|| format!("reading constraint {name} of {table}"))?;
    let Some((
        kind,
        definition,
        columns,
        schema,
        relation,
        referenced,
        delete,
        update,
        matching,
        deferrable,
        deferred,
        valid,
        comment,
        beyond,
    )) = row
    else {
        return Ok(None);
    };
    let catalog = |error: &dyn std::fmt::Display| StepError::permanent(format!("the catalog cannot be read: {error}"));
    if kind != "f" {
        return Err(StepError::permanent(format!("{table} has a constraint {name} already: {definition}"))
            .with_hint("give the foreign key another `name`")
            .into());
    }
    let identifiers = |names: Vec<String>| {
        names.into_iter().map(Identifier::new).collect::<Result<Vec<_>, _>>().map_err(|error| catalog(&error))
    };
    let identifier = |name: String| Identifier::new(name).map_err(|error| catalog(&error));
    let action = |letter: &str| {
        Action::of_catalog(letter).ok_or_else(|| catalog(&format!("`{letter}` is no action of a foreign key")))
    };
    Ok(Some(Key {
        columns: identifiers(columns)?,
        references: TableName::new(identifier(schema)?, identifier(relation)?),
        referenced: identifiers(referenced)?,
        on_delete: action(&delete)?,
        on_update: action(&update)?,
        match_full: matching == "f",
        deferrable,
        initially_deferred: deferred,
        valid,
        comment,
        beyond: (!beyond.is_empty()).then_some(beyond),
    }))
}

/// Adds a foreign key that is checked for new rows only, with its comment.
pub(super) async fn add(
    connection: &mut PgConnection,
    table: &TableName,
    name: &Identifier,
    key: &Key,
) -> Result<(), PostgresError> {
    let definition = key.sql(&key.references.to_string());
    let mut sql = format!("alter table {table} add constraint {name} {definition} not valid");
    if let Some(comment) = &key.comment {
        sql.push_str(&format!("; comment on constraint {name} on {table} is {}", literal(comment)));
    }
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.doing(|| format!("adding {name} to {table}"))?;
    Ok(())
}

/// Takes a constraint away.
pub(super) async fn drop_key(
    connection: &mut PgConnection,
    table: &TableName,
    name: &Identifier,
) -> Result<(), PostgresError> {
    sqlx::raw_sql(AssertSqlSafe(format!("alter table {table} drop constraint {name}")))
        .execute(connection)
        .await
        .doing(|| format!("dropping {name} of {table}"))?;
    Ok(())
}

/// Counts the rows that break a foreign key, and names some of their keys.
pub(super) struct Violations {
    pub(super) rows: i64,
    keys: Vec<String>,
}

impl Violations {
    /// Looks for rows that refer to nothing.
    ///
    /// # Errors
    /// The server refused it.
    pub(super) async fn find(
        connection: &mut PgConnection,
        table: &TableName,
        key: &Key,
    ) -> Result<Self, PostgresError> {
        let columns: Vec<_> = key.columns.iter().map(|column| format!("a.{column}")).collect();
        let pairs: Vec<_> =
            columns.iter().zip(&key.referenced).map(|(column, other)| format!("b.{other} = {column}")).collect();
        let given: Vec<_> = columns.iter().map(|column| format!("{column} is not null")).collect();
        let missing = format!("not exists (select from {} b where {})", key.references, pairs.join(" and "));
        let broken = match key.match_full {
            false => format!("{} and {missing}", given.join(" and ")),
            true => format!(
                "({}) and ({} or {missing})",
                given.join(" or "),
                columns.iter().map(|c| format!("{c} is null")).collect::<Vec<_>>().join(" or ")
            ),
        };
        let shown: Vec<_> = columns.iter().map(|column| format!("coalesce({column}::text, 'null')")).collect();
        let (rows, keys): (i64, Vec<String>) = sqlx::query_as(AssertSqlSafe(format!(
            "with broken as materialized (select concat_ws(', ', {}) as key from {table} a where {broken}) \
             select (select count(*) from broken), \
               (select coalesce(array_agg(key order by key), '{{}}') from (select distinct key from broken order by key limit 5) k)",
            shown.join(", "),
        )))
        .fetch_one(connection)
        .await
        .doing(|| format!("looking for rows of {table} that refer to nothing"))?;
        Ok(Self { rows, keys })
    }

    /// Says which they are.
    pub(super) fn error(&self, table: &TableName, key: &Key) -> StepError {
        let shown: Vec<_> = self.keys.iter().map(|key| format!("({key})")).collect();
        StepError::permanent(format!(
            "{} rows of {table} refer to no row of {}: {} = {}{}",
            self.rows,
            key.references,
            list(&key.columns),
            shown.join(", "),
            if i64::try_from(shown.len()).unwrap_or_default() < self.rows { ", …" } else { "" },
        ))
        .with_hint("correct or delete these rows, with a step before this one, or add the rows that they refer to")
    }
}
