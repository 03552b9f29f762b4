//! `postgres.writes`: settings that are put back as they were, while the run itself writes on.

#![cfg(test)]

use upgrade_testbed::postgres::{Database, Version};

use super::{Case, notices_every_seeded_defect, sweep};

const SETTINGS: &str = "select coalesce(rolname, 'database') || ': ' || setconfig::text from pg_db_role_setting \
     left join pg_roles r on r.oid = setrole \
     where setdatabase = (select oid from pg_database where datname = current_database()) order by 1";

/// Sets it as somebody would who does not care who else has.
fn set(database: &Database, value: &str) {
    database.execute(&format!(
        "begin read write; alter database \"{}\" set default_transaction_read_only = '{value}'; commit",
        database.name()
    ));
}

const STOP: Case = Case {
    interfere: |database, step| {
        match step {
            "stop" => set(database, "no"),
            _ => return false,
        }
        true
    },
    survived: |database, _| database.text(SETTINGS).contains("default_transaction_read_only=no"),
    observe: |database| database.text(SETTINGS),
    ..Case::new(
        // The role is the server's, its setting the database's own.
        "create table notes (id int, note text); insert into notes values (1, 'one'); \
         do $$ begin create role sweep_writer; exception when duplicate_object or unique_violation then null; end $$; \
         do $$ begin execute format('alter database %I set work_mem = %L', current_database(), '5MB'); \
           execute format('alter role sweep_writer in database %I set default_transaction_read_only = %L', \
             current_database(), 'off'); \
           execute format('alter role sweep_writer in database %I set work_mem = %L', current_database(), '6MB'); end $$;",
        r#"
upgrade: writes
steps:
  - id: stop
    uses: postgres.writes
    with: { target: db, state: stopped }
  - id: data
    uses: postgres.sql
    with: { target: db, statement: "update notes set note = note || '!'", undo: "update notes set note = rtrim(note, '!')" }
  - id: allow
    uses: postgres.writes
    with: { target: db, state: allowed }
  - id: more
    uses: postgres.sql
    with: { target: db, statement: "insert into notes values (2, 'two')", undo: delete from notes where id = 2 }
"#,
    )
};

#[test]
fn writes_are_stopped_and_allowed_or_as_they_were() {
    sweep(&STOP, Version::V15, 80);
    sweep(&STOP, Version::V18, 80);
}

#[test]
fn every_seeded_defect_is_noticed() {
    notices_every_seeded_defect(&STOP);
}
