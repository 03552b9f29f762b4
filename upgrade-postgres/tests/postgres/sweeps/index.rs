//! `postgres.index`: one that is new, one in place of an INVALID one, one in place of another, one
//! that is dropped.

#![cfg(test)]

use upgrade_testbed::postgres::{Database, Version};

use super::{Case, notices_every_seeded_defect, sweep};

/// Lists every index with what a dump of the schema does not show.
pub(crate) fn indexes(database: &Database) -> String {
    database.text(
        "select format('%s %s %s %s: %s', c.relname, i.indisvalid, i.indisready, obj_description(c.oid, 'pg_class'), \
           pg_get_indexdef(c.oid)) \
         from pg_index i join pg_class c on c.oid = i.indexrelid \
         where c.relnamespace = 'public'::regnamespace order by 1",
    )
}

const INDEXES: Case = Case {
    interfere: |database, step| {
        let name = match step {
            "new" => "orders_number",
            "leftover" => "orders_open",
            "drop" => "orders_old",
            _ => return false,
        };
        database.execute(&format!("drop index if exists {name}; create index {name} on orders (note)"));
        true
    },
    survived: |database, step| {
        let name = if step == "new" { "orders_number" } else { "orders_o" };
        indexes(database).lines().any(|line| line.starts_with(name) && line.ends_with("btree (note)"))
    },
    observe: indexes,
    ..Case::new(
        "create table orders (id int primary key, number int not null, customer int, open bool, note text); \
         insert into orders select n, n, n % 7, n % 2 = 0, 'note ' || n from generate_series(1, 500) n; \
         create index orders_open on orders (customer) where open; \
         update pg_index set indisvalid = false where indexrelid = 'orders_open'::regclass; \
         create index orders_old on orders (customer, lower(note)) with (fillfactor = 80) where not open; \
         comment on index orders_old is 'kept for the report'; \
         alter index orders_old alter column 2 set statistics 500; \
         create index orders_customer on orders (customer);",
        r#"
upgrade: indexes
steps:
  - id: new
    uses: postgres.index
    with: { target: db, table: orders, name: orders_number, columns: [number], unique: true, include: [customer] }
  - id: leftover
    uses: postgres.index
    with: { target: db, table: orders, name: orders_open, columns: [customer], where: open }
  - id: other
    uses: postgres.index
    on_conflict: overwrite
    with:
      target: db
      table: orders
      name: orders_customer
      columns: [customer, { expression: lower(note), order: desc, nulls: last }]
  - id: drop
    uses: postgres.index
    with: { target: db, table: orders, name: orders_old, state: absent }
"#,
    )
};

#[test]
fn indexes_are_all_changed_or_none() {
    sweep(&INDEXES, Version::V15, 100);
}

const TWO: Case = Case {
    pipeline: r#"
upgrade: two-indexes
steps:
  - id: new
    uses: postgres.index
    with: { target: db, table: orders, name: orders_number, columns: [number], unique: true, nulls_not_distinct: true }
  - id: drop
    uses: postgres.index
    with: { target: db, table: orders, name: orders_old, state: absent }
"#,
    ..INDEXES
};

#[test]
fn indexes_are_all_changed_or_none_on_the_newest_server() {
    sweep(&TWO, Version::V18, 50);
}

#[test]
fn every_seeded_defect_is_noticed() {
    notices_every_seeded_defect(&INDEXES);
}
