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

// The role is the server's, its setting the database's own.
const SETUP: &str = "create table notes (id int, note text); insert into notes values (1, 'one'); \
     do $$ begin create role sweep_writer; exception when duplicate_object or unique_violation then null; end $$; \
     do $$ begin execute format('alter database %I set work_mem = %L', current_database(), '5MB'); \
       execute format('alter role sweep_writer in database %I set default_transaction_read_only = %L', \
         current_database(), 'off'); \
       execute format('alter role sweep_writer in database %I set work_mem = %L', current_database(), '6MB'); end $$;";

/// Makes a case; as somebody else, it sets what the step `stop` works on.
const fn case(pipeline: &'static str) -> Case {
    Case {
        interfere: |database, step| {
            match step {
                "stop" => set(database, "no"),
                _ => return false,
            }
            true
        },
        survived: |database, _| database.text(SETTINGS).contains("default_transaction_read_only=no"),
        observe: |database| database.text(SETTINGS),
        ..Case::new(SETUP, pipeline)
    }
}

/// The run writes while others cannot, and a step allows their writes again.
const WRITTEN: Case = case(
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
"#,
);

/// Writes are stopped until the run is over, which allows them.
const UNTIL_THE_END: Case = case(
    r#"
upgrade: writes
steps:
  - id: stop
    uses: postgres.writes
    with: { target: db, state: stopped }
  - id: data
    uses: postgres.sql
    with: { target: db, statement: "update notes set note = note || '!'", undo: "update notes set note = rtrim(note, '!')" }
"#,
);

#[test]
fn writes_are_stopped_and_allowed_or_as_they_were() {
    sweep(&WRITTEN, Version::V15, 60);
}

#[test]
fn writes_that_no_step_allows_are_allowed_with_the_end_of_the_run() {
    sweep(&UNTIL_THE_END, Version::V18, 40);
}

#[test]
fn every_seeded_defect_is_noticed() {
    notices_every_seeded_defect(&UNTIL_THE_END);
}

#[test]
#[ignore = "takes minutes"]
fn campaign_on_every_other_version() {
    sweep(&WRITTEN, Version::V18, 60);
    sweep(&UNTIL_THE_END, Version::V16, 40);
}
