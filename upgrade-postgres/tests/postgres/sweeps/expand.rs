//! `postgres.expand`: every kind of change, on columns that much stands on.

#![cfg(test)]

use upgrade_testbed::postgres::Version;

use super::{Case, notices_every_seeded_defect, sweep};

/// Rows on several pages, NULLs among them, and of all that may stand on a column something.
const ORDERS: &str = "\
    create table customers (id int primary key); insert into customers select generate_series(1, 9); \
    create table orders (id int primary key, customer int not null default 1 references customers on delete cascade, \
      amount int default 0 check (amount >= 0), number serial, code text, note text, \
      unique (number) deferrable, constraint code_is_short check (length(code) < 20)); \
    create index by_amount on orders (amount desc, id) where amount > 10; \
    create unique index by_code on orders (lower(code)) where code is not null; \
    comment on column orders.amount is 'in cents'; \
    grant select (code), update (code) on orders to pg_monitor; grant select, insert on orders to pg_monitor; \
    insert into orders (id, customer, amount, code, note) \
      select n, 1 + n % 9, nullif(n % 50, 7), case when n % 3 > 0 then 'c' || n end, repeat('x', 200) \
      from generate_series(1, 300) n;";

const fn case(pipeline: &'static str) -> Case {
    Case {
        interfere: |database, step| {
            database.execute(match step {
                "added" => {
                    "do $$ begin alter table orders alter status set default 'somebody else'; \
                     exception when undefined_column then alter table orders add column status int; end $$"
                }
                "retyped" => "alter table orders alter column amount set default 7",
                "renamed" => "alter table orders alter column code set default 'somebody else'",
                "not_null" => "alter table orders alter column code type varchar(30)",
                _ => return false,
            });
            true
        },
        survived: |database, step| {
            let schema = database.schema();
            match step {
                "retyped" => schema.contains("amount integer DEFAULT 7"),
                "renamed" => schema.contains("code text DEFAULT 'somebody else'::text"),
                "not_null" => schema.contains("code character varying(30)"),
                _ => schema.contains("status integer") || schema.contains("status text DEFAULT 'somebody else'::text"),
            }
        },
        ..Case::new(ORDERS, pipeline)
    }
}

const ADDED: Case = case(
    "
upgrade: added
steps:
  - id: added
    uses: postgres.expand
    with:
      target: db
      table: orders
      add: { column: status, type: text, not_null: true, up: \"case when amount > 20 then 'large' else 'small' end\" }
      batch: 3
",
);

const RENAMED: Case = case(
    "
upgrade: renamed
steps:
  - id: renamed
    uses: postgres.expand
    with: { target: db, table: orders, rename: { column: code, to: reference }, batch: 3 }
",
);

const RETYPED: Case = case(
    "
upgrade: retyped
steps:
  - id: retyped
    uses: postgres.expand
    with:
      target: db
      table: public.orders
      retype: { column: amount, type: 'numeric(12, 2)', up: amount / 100.0, down: (amount * 100)::int, default: '0' }
      schema: v2
      batch: 3
",
);

const SERIAL: Case = case(
    "
upgrade: serial
steps:
  - id: serial
    uses: postgres.expand
    with: { target: db, table: orders, retype: { column: number, type: bigint }, schema: v2 }
",
);

const NOT_NULL: Case = case(
    "
upgrade: not_null
steps:
  - id: not_null
    uses: postgres.expand
    with:
      target: db
      table: orders
      not_null: { column: code, up: \"'none' || id\", down: \"nullif(code, 'none' || id)\" }
      schema: v2
      batch: 3
",
);

/// The order of undoing shows only where there are two steps.
const WITH_ANOTHER: Case = case(
    "
upgrade: with_another
steps:
  - id: renamed
    uses: postgres.expand
    with: { target: db, table: orders, rename: { column: note, to: remark } }
  - id: another
    uses: postgres.sql
    with: { target: db, statement: update orders set remark = 'x' where id = 1, undo: update orders set remark = null where id = 1 }
",
);

#[test]
fn an_added_column_is_there_or_not() {
    sweep(&ADDED, Version::V15, 20);
}

#[test]
fn a_renamed_column_has_one_name_or_the_other() {
    sweep(&RENAMED, Version::V15, 20);
}

#[test]
fn a_retyped_column_has_one_type_or_the_other() {
    sweep(&RETYPED, Version::V15, 20);
}

#[test]
fn a_column_is_not_null_or_as_it_was() {
    sweep(&NOT_NULL, Version::V18, 20);
}

#[test]
#[ignore = "a campaign"]
fn campaign_every_kind_on_every_version() {
    for version in Version::ALL {
        for case in [&ADDED, &RENAMED, &RETYPED, &SERIAL, &NOT_NULL] {
            sweep(case, version, 20);
        }
    }
}

#[test]
fn every_seeded_defect_is_noticed() {
    notices_every_seeded_defect(&WITH_ANOTHER);
}
