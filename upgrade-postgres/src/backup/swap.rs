//! A database in place of another one of its name: made alike, exchanged in one transaction.
//!
//! Which databases exist says how far it has come; no note beside them could contradict that.
//!
//! | target | `_upgrade_restore` | `_upgrade_ready` | `_upgrade_kept` | is |
//! |---|---|---|---|---|
//! | found | – | – | – | not begun, or undone |
//! | found | half filled | – | – | being filled |
//! | found | – | filled, verified | – | ready |
//! | filled | – | – | found | exchanged |
//!
//! Both renames are made in one transaction, so that there is no state between them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::AssertSqlSafe;
use upgrade_core::context::Context;
use upgrade_core::error::{Conflict, StepError};

use crate::error::{Doing, PostgresError};
use crate::identifier::{Identifier, literal};
use crate::session::Session;

/// Holds what a database is like, beside what is in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Like {
    /// What tells it from another one of its name.
    pub oid: i64,
    /// Its owner.
    pub owner: Identifier,
    /// What it is made with.
    locale: Vec<(String, String)>,
    /// Where it is.
    tablespace: Identifier,
    /// How many may connect; -1 is any number.
    pub connection_limit: i64,
    /// Whether anybody may connect.
    pub allow_connections: bool,
    /// Whether everybody may copy it.
    is_template: bool,
    /// What is said about it.
    pub comment: Option<String>,
    /// Who may do what, where that is not the default: grantee (none is everybody), privilege, and
    /// whether it may be passed on.
    privileges: Option<Vec<(Option<String>, String, bool)>>,
    /// Its settings, and those of a role in it.
    settings: Vec<(Option<String>, Vec<String>)>,
}

/// Reads what a database is like; nothing if there is none of that name.
pub(crate) async fn like(session: &mut Session, name: &str) -> Result<Option<Like>, PostgresError> {
    let row: Option<(Value, String, String, String, Option<String>)> = sqlx::query_as(
        "select to_jsonb(d), pg_get_userbyid(d.datdba)::text, pg_encoding_to_char(d.encoding)::text, \
         (select spcname::text from pg_tablespace t where t.oid = d.dattablespace), \
         shobj_description(d.oid, 'pg_database') from pg_database d where d.datname = $1",
    )
    .bind(name)
    .fetch_optional(session.connection())
    .await
    .doing(|| format!("looking for database {name}"))?;
    let Some((row, owner, encoding, tablespace, comment)) = row else { return Ok(None) };
    let text = |key: &str| row.get(key).and_then(Value::as_str).map(str::to_owned);
    let number = |key: &str| {
        row.get(key).map_or(0, |value| match value {
            Value::String(text) => text.parse().unwrap_or(0),
            other => other.as_i64().unwrap_or(0),
        })
    };
    let is = |key: &str| row.get(key).and_then(Value::as_bool).unwrap_or(false);
    let mut locale = vec![("encoding".to_owned(), encoding)];
    for (key, option) in [("datcollate", "lc_collate"), ("datctype", "lc_ctype")] {
        locale.extend(text(key).map(|value| (option.to_owned(), value)));
    }
    // Each version names the rest differently.
    let own = text("datlocale").or_else(|| text("daticulocale"));
    match text("datlocprovider").as_deref() {
        Some("i") => {
            locale.push(("locale_provider".into(), "icu".into()));
            locale.extend(own.map(|value| ("icu_locale".to_owned(), value)));
            locale.extend(text("daticurules").map(|value| ("icu_rules".to_owned(), value)));
        }
        Some("b") => {
            locale.push(("locale_provider".into(), "builtin".into()));
            locale.extend(own.map(|value| ("builtin_locale".to_owned(), value)));
        }
        Some(_) => locale.push(("locale_provider".into(), "libc".into())),
        None => {}
    }
    let oid = number("oid");
    let privileges = if row.get("datacl").is_none_or(Value::is_null) {
        None
    } else {
        let granted = sqlx::query_as(
            "select case when a.grantee = 0 then null else pg_get_userbyid(a.grantee)::text end, a.privilege_type, \
             bool_or(a.is_grantable) from pg_database d, aclexplode(d.datacl) a where d.oid = $1::int8::oid \
             group by 1, 2 order by 1 nulls first, 2",
        );
        Some(granted.bind(oid).fetch_all(session.connection()).await.doing(|| "reading its privileges".into())?)
    };
    let settings = sqlx::query_as(
        "select case when setrole = 0 then null else pg_get_userbyid(setrole)::text end, setconfig \
         from pg_db_role_setting where setdatabase = $1::int8::oid order by 1 nulls first",
    )
    .bind(oid)
    .fetch_all(session.connection())
    .await
    .doing(|| "reading its settings".into())?;
    let named = |text: String| Identifier::new(text).expect("the catalog holds names");
    Ok(Some(Like {
        oid,
        owner: named(owner),
        locale,
        tablespace: named(tablespace),
        connection_limit: number("datconnlimit"),
        allow_connections: is("datallowconn"),
        is_template: is("datistemplate"),
        comment,
        privileges,
        settings,
    }))
}

/// Makes an empty database that is like another one in all that cannot be changed later; or a copy
/// of `template`.
pub(crate) async fn create_like(
    session: &mut Session,
    name: &Identifier,
    like: &Like,
    template: Option<&Identifier>,
) -> Result<(), PostgresError> {
    let mut sql = format!("create database {name} owner {}", like.owner);
    match template {
        Some(template) => sql.push_str(&format!(" template {template}")),
        None => {
            sql.push_str(" template template0");
            for (option, value) in &like.locale {
                match option.as_str() {
                    "locale_provider" => sql.push_str(&format!(" {option} {value}")),
                    _ => sql.push_str(&format!(" {option} {}", literal(value))),
                }
            }
        }
    }
    if like.tablespace.as_str() != "pg_default" {
        sql.push_str(&format!(" tablespace {}", like.tablespace));
    }
    sqlx::raw_sql(AssertSqlSafe(sql))
        .execute(session.connection())
        .await
        .doing(|| format!("creating database {name}"))?;
    Ok(())
}

/// Drops a database that is ours, whoever is connected to it; one that is gone already is no error.
pub(crate) async fn drop_database(session: &mut Session, name: &Identifier) -> Result<(), PostgresError> {
    let sql = format!("drop database if exists {name} with (force)");
    sqlx::raw_sql(AssertSqlSafe(sql))
        .execute(session.connection())
        .await
        .doing(|| format!("dropping database {name}"))?;
    Ok(())
}

/// Writes the statements that make `name` like another database in all that can be changed.
fn dress(name: &Identifier, like: &Like) -> String {
    let mut sql = format!(
        "alter database {name} connection limit {} is_template {}; comment on database {name} is {};",
        like.connection_limit,
        like.is_template,
        like.comment.as_deref().map_or_else(|| "null".to_owned(), literal),
    );
    if let Some(privileges) = &like.privileges {
        sql.push_str(&format!(
            "revoke all on database {name} from public; revoke all on database {name} from {};",
            like.owner
        ));
        for (grantee, privilege, passed_on) in privileges {
            let grantee = grantee.clone().and_then(|name| Identifier::new(name).ok());
            let grantee = grantee.map_or_else(|| "public".to_owned(), |name| name.to_string());
            let option = if *passed_on { " with grant option" } else { "" };
            sql.push_str(&format!("grant {privilege} on database {name} to {grantee}{option};"));
        }
    }
    for (role, settings) in &like.settings {
        let whose = match role.clone().and_then(|name| Identifier::new(name).ok()) {
            Some(role) => format!("alter role {role} in database {name}"),
            None => format!("alter database {name}"),
        };
        for setting in settings {
            if let Some((key, value)) = setting.split_once('=') {
                sql.push_str(&format!("{whose} set {} to {};", setting_name(key), setting_value(key, value)));
            }
        }
    }
    sql
}

/// Quotes the name of a setting; one of an extension has a point in it.
fn setting_name(name: &str) -> String {
    name.split('.').map(|part| format!("\"{}\"", part.replace('"', "\"\""))).collect::<Vec<_>>().join(".")
}

/// Writes the value of a setting, which for lists of names is kept as a list of quoted names.
fn setting_value(name: &str, value: &str) -> String {
    const LISTS: [&str; 6] = [
        "local_preload_libraries",
        "search_path",
        "session_preload_libraries",
        "shared_preload_libraries",
        "temp_tablespaces",
        "unix_socket_directories",
    ];
    if !LISTS.contains(&name.to_ascii_lowercase().as_str()) {
        return literal(value);
    }
    let (mut items, mut item, mut quoted) = (Vec::new(), String::new(), false);
    let mut characters = value.chars().peekable();
    while let Some(c) = characters.next() {
        match c {
            '"' if quoted && characters.peek() == Some(&'"') => {
                characters.next();
                item.push('"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted => items.push(std::mem::take(&mut item)),
            c if !quoted && c.is_whitespace() => {}
            c => item.push(c),
        }
    }
    items.push(item);
    items.iter().map(|item| literal(item)).collect::<Vec<_>>().join(", ")
}

/// Names the databases that take part.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    pub(crate) target: Identifier,
    pub(crate) filling: Identifier,
    pub(crate) ready: Identifier,
    pub(crate) kept: Identifier,
}

impl Names {
    /// Derives the names of a step: the same in every call, in both directions.
    pub(crate) fn of(cx: &Context, target: &str) -> Result<Self, StepError> {
        let target = Identifier::new(target).map_err(|error| {
            StepError::permanent("the target's database has no name that can be used").with_cause(&error)
        })?;
        let derived = |start| Identifier::derived(start, &cx.marker());
        Ok(Self {
            target,
            filling: derived("_upgrade_restore"),
            ready: derived("_upgrade_ready"),
            kept: derived("_upgrade_kept"),
        })
    }

    /// Reads which of them exist.
    pub(crate) async fn present(&self, session: &mut Session) -> Result<Present, PostgresError> {
        let names = [&self.target, &self.filling, &self.ready, &self.kept];
        let rows: Vec<(String, i64, Option<String>)> = sqlx::query_as(
            "select datname::text, oid::int8, shobj_description(oid, 'pg_database') from pg_database where datname = any($1)",
        )
        .bind(names.map(|name| name.as_str().to_owned()))
        .fetch_all(session.connection())
        .await
        .doing(|| "looking which databases there are".into())?;
        let mut there: BTreeMap<String, (i64, Option<String>)> =
            rows.into_iter().map(|(name, oid, comment)| (name, (oid, comment))).collect();
        let mut take = |name: &Identifier| there.remove(name.as_str());
        Ok(Present {
            target: take(&self.target).map(|(oid, _)| oid),
            filling: take(&self.filling).is_some(),
            ready: take(&self.ready).is_some(),
            kept: take(&self.kept).map(|(oid, comment)| (oid, replaced_by(comment.as_deref()))),
        })
    }

    /// Puts the ready database in the target's place, which is kept; all at once.
    pub(crate) async fn exchange(&self, cx: &Context, session: &mut Session, ready: i64) -> Result<(), StepError> {
        let like = like(session, self.target.as_str()).await?.ok_or_else(|| gone(&self.target))?;
        let (target, kept) = (&self.target, &self.kept);
        let sql = format!(
            "alter database {target} rename to {kept}; alter database {} rename to {target}; {} \
             alter database {target} allow_connections {}; alter database {kept} allow_connections false is_template false; \
             comment on database {kept} is {};",
            self.ready,
            dress(target, &like),
            like.allow_connections,
            literal(&format!("{REPLACED}{ready}")),
        );
        rename(cx, session, &[target, &self.ready], sql).await
    }

    /// Puts the kept database back in its place; what was there is `filling` then, to be dropped.
    pub(crate) async fn exchange_back(
        &self,
        cx: &Context,
        session: &mut Session,
        found: &Like,
        present: &Present,
    ) -> Result<(), StepError> {
        let (target, kept) = (&self.target, &self.kept);
        let away = match present.target {
            Some(_) => format!("alter database {target} rename to {};", self.filling),
            None => String::new(),
        };
        let sql = format!(
            "{away} alter database {kept} rename to {target}; \
             alter database {target} allow_connections {} is_template {}; comment on database {target} is {};",
            found.allow_connections,
            found.is_template,
            found.comment.as_deref().map_or_else(|| "null".to_owned(), literal),
        );
        rename(cx, session, &[target], sql).await
    }

    /// Says that a filled database is whole and verified.
    pub(crate) async fn mark_ready(&self, cx: &Context, session: &mut Session) -> Result<(), StepError> {
        let sql = format!("alter database {} rename to {};", self.filling, self.ready);
        rename(cx, session, &[&self.filling], sql).await
    }

    /// Says that something is there that nobody of us put there.
    pub(crate) fn conflict(&self, found: i64, present: &Present) -> StepError {
        let spelled =
            |oid: Option<i64>| oid.map_or_else(|| "no database".to_owned(), |oid| format!("database oid {oid}"));
        StepError::conflict(Conflict {
            subject: format!("database {}", self.target),
            found: spelled(Some(found)),
            intended: "the restored database".into(),
            present: spelled(present.target),
        })
    }
}

const REPLACED: &str = "Kept until the upgrade is committed; replaced by database oid ";

fn replaced_by(comment: Option<&str>) -> Option<i64> {
    comment?.strip_prefix(REPLACED)?.parse().ok()
}

/// Says which of the databases exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Present {
    pub(crate) target: Option<i64>,
    pub(crate) filling: bool,
    pub(crate) ready: bool,
    /// The kept one, and which database it was replaced by.
    pub(crate) kept: Option<(i64, Option<i64>)>,
}

pub(crate) fn gone(name: &Identifier) -> StepError {
    StepError::permanent(format!("there is no database {name}"))
        .with_hint("somebody dropped or renamed it: put it back, then `upgrade resume`")
}

/// Runs renames in one transaction, and ends whoever is connected to the databases meanwhile.
///
/// The first rename keeps new sessions waiting at the door; those inside are told to go.
async fn rename(cx: &Context, session: &mut Session, emptied: &[&Identifier], sql: String) -> Result<(), StepError> {
    let mut aside = session.sibling(cx, "upgrade").await?;
    let names: Vec<String> = emptied.iter().map(|name| name.as_str().to_owned()).collect();
    let canceller = session.canceller();
    let connection = session.connection();
    let renaming = canceller.cancels(cx, async {
        let done = sqlx::raw_sql(AssertSqlSafe(format!("begin; {sql} commit"))).execute(&mut *connection).await;
        if done.is_err() {
            // On a broken connection the server does so by itself.
            let _ = sqlx::raw_sql("rollback").execute(&mut *connection).await;
        }
        done.doing(|| "exchanging the databases".into())
    });
    tokio::pin!(renaming);
    let renamed = loop {
        tokio::select! {
            biased;
            done = &mut renaming => break done,
            () = tokio::time::sleep(std::time::Duration::from_millis(10)) => end_sessions(&mut aside, &names).await?,
        }
    };
    aside.close().await;
    match renamed {
        Ok(_) => Ok(()),
        Err(error) if error.code() == Some("55006") => Err(StepError::from(error).with_hint(
            "somebody holds on to the database: roll back prepared transactions (pg_prepared_xacts), stop what \
             reconnects all the time, then `upgrade resume`",
        )),
        Err(error) => Err(error.into()),
    }
}

async fn end_sessions(aside: &mut Session, names: &[String]) -> Result<(), StepError> {
    let ended = sqlx::query(
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = any($1) and pid <> pg_backend_pid() \
         and backend_type in ('client backend', 'walsender')",
    )
    .bind(names)
    .execute(aside.connection())
    .await
    .doing(|| "ending the sessions on the database".into());
    match ended {
        Ok(_) => Ok(()),
        Err(error) if error.code() == Some("42501") => Err(StepError::from(error).with_hint(
            "grant the role pg_signal_backend to the user of the target's `url`, or connect as a superuser",
        )),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_names_are_written_one_by_one() {
        assert_eq!(setting_value("search_path", r#"shop, "a b", """""#), r#"E'shop', E'a b', E'"'"#);
        assert_eq!(setting_value("search_path", ""), "E''");
        assert_eq!(setting_value("work_mem", "64MB, no"), "E'64MB, no'");
        assert_eq!(setting_name("my.setting"), r#""my"."setting""#);
    }
}
