//! Where `default_transaction_read_only` is set for a database, and by whom.
//!
//! What holds in a session is the first of: the role's setting in this database, the role's
//! setting everywhere, the database's. So stopping a database takes more than its own setting where
//! a role has one that says off.

use serde::{Deserialize, Serialize};
use sqlx::{AssertSqlSafe, PgConnection};
use upgrade_core::error::StepError;

use crate::error::{Doing, PostgresError};
use crate::identifier::{Identifier, literal};
use crate::session::Session;

/// Holds the setting of the database, or of a role in it, as it was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Setting {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) role: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) value: Option<String>,
}

impl Setting {
    pub(super) fn shown(&self) -> String {
        shown(self.value.as_deref())
    }

    pub(super) fn subject(&self) -> String {
        match &self.role {
            Some(role) => format!("default_transaction_read_only of role {role} in the database"),
            None => "default_transaction_read_only of the database".into(),
        }
    }
}

pub(super) fn shown(value: Option<&str>) -> String {
    value.unwrap_or("not set").to_owned()
}

/// Reads a boolean as the server does.
fn is_on(text: &str) -> bool {
    let text = text.to_lowercase();
    text == "on" || text == "1" || (!text.is_empty() && ("true".starts_with(&text) || "yes".starts_with(&text)))
}

pub(super) async fn database(connection: &mut PgConnection) -> Result<Identifier, PostgresError> {
    let name: String = sqlx::query_scalar("select current_database()::text").fetch_one(connection).await?;
    Ok(Identifier::new(name).expect("the catalog holds names"))
}

/// Finds every place that has to change so that no session of others writes by default.
pub(super) async fn to_stop(connection: &mut PgConnection) -> Result<Vec<Setting>, PostgresError> {
    let found: Vec<(Option<String>, Option<String>, Option<String>)> = sqlx::query_as(
        "with given as (select s.setdatabase <> 0 as here, s.setrole, substr(entry, strpos(entry, '=') + 1) as value \
           from pg_db_role_setting s, unnest(s.setconfig) as entry \
           where entry like 'default_transaction_read_only=%' \
             and (s.setdatabase = (select oid from pg_database where datname = current_database()) \
               or (s.setdatabase = 0 and s.setrole <> 0))) \
         select r.rolname::text, max(value) filter (where here), max(value) filter (where not here) \
         from given left join pg_roles r on r.oid = setrole where not coalesce(r.rolsuper, false) \
         group by r.rolname order by r.rolname",
    )
    .fetch_all(connection)
    .await
    .doing(|| "reading who may write by default".into())?;
    let of_database = found.iter().find(|(role, ..)| role.is_none()).and_then(|(_, here, _)| here.clone());
    let mut settings = Vec::new();
    if !of_database.as_deref().is_some_and(is_on) {
        settings.push(Setting { role: None, value: of_database });
    }
    for (role, here, everywhere) in found {
        let Some(role) = role else { continue };
        if here.as_ref().or(everywhere.as_ref()).is_some_and(|value| !is_on(value)) {
            settings.push(Setting { role: Some(role), value: here });
        }
    }
    Ok(settings)
}

/// Asks for the privilege to change them, before anything is changed.
pub(super) async fn may_change(session: &mut Session) -> Result<(), StepError> {
    let user = session.facts().user.clone();
    let (owns, roles): (bool, bool) = sqlx::query_as(
        "select pg_has_role(session_user, d.datdba, 'member'), r.rolsuper or r.rolcreaterole \
         from pg_database d, pg_roles r where d.datname = current_database() and r.rolname = session_user",
    )
    .fetch_one(session.connection())
    .await
    .doing(|| "reading the user's privileges".into())?;
    if !owns && !session.facts().superuser {
        return Err(StepError::permanent(format!("user {user} does not own the database and cannot stop its writes"))
            .with_hint(format!("`alter database … owner to {user}`, or connect as its owner")));
    }
    if !roles {
        let of_roles = to_stop(session.connection()).await?.into_iter().filter_map(|setting| setting.role);
        let of_roles: Vec<_> = of_roles.collect();
        if !of_roles.is_empty() {
            let roles = of_roles.join(", ");
            return Err(StepError::permanent(format!("roles with a setting of their own write on: {roles}"))
                .with_hint(
                    "connect as a superuser, or take it from them: `alter role … reset default_transaction_read_only`",
                ));
        }
    }
    Ok(())
}

/// Tells whether the place is still there: a role may have been dropped, its settings with it.
pub(super) async fn is_there(connection: &mut PgConnection, setting: &Setting) -> Result<bool, PostgresError> {
    let there = sqlx::query_scalar("select $1 is null or exists (select from pg_roles where rolname = $1)")
        .bind(&setting.role)
        .fetch_one(connection)
        .await;
    there.doing(|| format!("looking for {}", setting.subject()))
}

/// Reads what a place is set to now.
pub(super) async fn present(connection: &mut PgConnection, setting: &Setting) -> Result<Option<String>, PostgresError> {
    let value: Option<String> = sqlx::query_scalar(
        "select substr(entry, strpos(entry, '=') + 1) from pg_db_role_setting s, unnest(s.setconfig) as entry \
         where entry like 'default_transaction_read_only=%' \
           and s.setdatabase = (select oid from pg_database where datname = current_database()) \
           and s.setrole = case when $1 is null then 0 else (select oid from pg_roles where rolname = $1) end",
    )
    .bind(&setting.role)
    .fetch_optional(connection)
    .await
    .doing(|| format!("reading {}", setting.subject()))?;
    Ok(value)
}

/// Sets a place to a value, or to none.
pub(super) async fn set(
    connection: &mut PgConnection,
    setting: &Setting,
    value: Option<&str>,
) -> Result<(), PostgresError> {
    let database = database(&mut *connection).await?;
    let of = match &setting.role {
        Some(role) => {
            format!("role {} in database {database}", Identifier::new(role).expect("the catalog holds names"))
        }
        None => format!("database {database}"),
    };
    let sql = match value {
        Some(value) => format!("alter {of} set default_transaction_read_only = {}", literal(value)),
        None => format!("alter {of} reset default_transaction_read_only"),
    };
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.doing(|| format!("setting {}", setting.subject()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::is_on;

    #[test]
    fn a_boolean_is_read_as_the_server_does() {
        assert!(["on", "ON", "true", "t", "yes", "y", "1"].into_iter().all(is_on));
        assert!(!["off", "of", "false", "f", "no", "n", "0", "", "o"].into_iter().any(is_on));
    }
}
