//! `postgres.sql`: statements that add to what is there, so that doing one twice shows.

#![cfg(test)]

use upgrade_testbed::postgres::Version;

use super::{Case, notices_every_seeded_defect, sweep, sweep_behind_a_pooler};

const STATEMENTS: Case = Case {
    interfere: |database, step| {
        match step {
            "watched" => database.execute("update settings set value = 'somebody else' where name = 'mode'"),
            _ => return false,
        }
        true
    },
    survived: |database, _| database.text("select value from settings where name = 'mode'") == "somebody else",
    ..Case::new(
        "create table accounts (id int primary key, balance numeric not null); \
         insert into accounts select n, 100 from generate_series(1, 5) n; \
         create table settings (name text primary key, value text); insert into settings values ('mode', 'old');",
        r#"
upgrade: statements
steps:
  - id: interest
    uses: postgres.sql
    with:
      target: db
      statement: update accounts set balance = balance + $1 where id <= $2
      parameters: [7, 3]
      rows: 3
      undo: update accounts set balance = balance - $1 where id <= $2
      undo_parameters: [7, 3]
      undo_rows: 3
  - id: watched
    uses: postgres.sql
    with:
      target: db
      statement: update settings set value = 'new' where name = 'mode'
      undo: update settings set value = 'old' where name = 'mode'
      state: select value from settings where name = 'mode'
  - id: table
    uses: postgres.sql
    needs: []
    with: { target: db, statement: create table made (id int), undo: drop table made }
"#,
    )
};

#[test]
fn statements_are_all_done_or_none() {
    sweep(&STATEMENTS, Version::V15, 60);
    sweep(&STATEMENTS, Version::V18, 60);
}

#[test]
fn statements_are_all_done_or_none_behind_a_pooler_in_session_mode() {
    sweep_behind_a_pooler(&STATEMENTS, Version::V15, 10);
}

#[test]
fn every_seeded_defect_is_noticed() {
    notices_every_seeded_defect(&STATEMENTS);
}
