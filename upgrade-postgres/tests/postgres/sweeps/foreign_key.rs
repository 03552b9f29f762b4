//! `postgres.foreign_key`: one of two columns, one within a table, one that was only to be validated.

#![cfg(test)]

use upgrade_testbed::postgres::{Database, Version};

use super::{Case, notices_every_seeded_defect, sweep};

fn constraints(database: &Database) -> String {
    database.text(
        "select format('%s %s %s: %s', conname, convalidated, obj_description(oid, 'pg_constraint'), pg_get_constraintdef(oid)) \
         from pg_constraint where connamespace = 'public'::regnamespace order by 1",
    )
}

const FOREIGN_KEYS: Case = Case {
    interfere: |database, step| {
        let name = match step {
            "shop" => "orders_shop",
            "validate" => "orders_customer",
            _ => return false,
        };
        database.execute(&format!(
            "alter table orders drop constraint if exists {name}, \
             add constraint {name} foreign key (customer) references customers on delete cascade"
        ));
        true
    },
    survived: |database, _| constraints(database).contains("ON DELETE CASCADE"),
    observe: constraints,
    ..Case::new(
        "create table customers (id int primary key); insert into customers select generate_series(1, 20); \
         create table shops (country text, number int, name text, primary key (country, number)); \
         insert into shops select 'at', n, 'shop ' || n from generate_series(1, 10) n; \
         create table orders (id int primary key, parent int, customer int, country text, shop int); \
         insert into orders select n, nullif(n / 2, 0), n % 20 + 1, 'at', n % 10 + 1 from generate_series(1, 300) n; \
         create index on orders (country, shop); \
         alter table orders add constraint orders_customer foreign key (customer) references customers not valid; \
         comment on constraint orders_customer on orders is 'since the merger';",
        r#"
upgrade: foreign-keys
steps:
  - id: shop
    uses: postgres.foreign_key
    with:
      target: db
      table: orders
      name: orders_shop
      columns: [shop, country]
      references: { table: shops, columns: [number, country] }
      on_delete: set_null
      unindexed: refuse
  - id: validate
    uses: postgres.foreign_key
    with: { target: db, table: orders, name: orders_customer, columns: [customer], references: { table: customers } }
  - id: within
    uses: postgres.foreign_key
    needs: []
    with:
      target: db
      table: orders
      name: orders_parent
      columns: [parent]
      references: { table: orders }
      deferrable: true
      initially_deferred: true
"#,
    )
};

#[test]
fn foreign_keys_are_all_added_or_none() {
    sweep(&FOREIGN_KEYS, Version::V15, 80);
}

const ONE: Case = Case {
    pipeline: r#"
upgrade: foreign-keys
steps:
  - id: shop
    uses: postgres.foreign_key
    with:
      target: db
      table: orders
      name: orders_shop
      columns: [country, shop]
      references: { table: shops }
      match_full: true
      on_update: cascade
"#,
    ..FOREIGN_KEYS
};

#[test]
fn a_foreign_key_is_added_or_not_on_the_newest_server() {
    sweep(&ONE, Version::V18, 25);
}

#[test]
fn every_seeded_defect_is_noticed() {
    notices_every_seeded_defect(&FOREIGN_KEYS);
}
