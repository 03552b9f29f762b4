//! `postgres.migrate`: migrations of two layouts, one of them partly outside of transactions.

#![cfg(test)]

use upgrade_testbed::postgres::{Database, Version};

use super::{Case, notices_every_seeded_defect, sweep};

const SHOP: Case = Case {
    interfere: |database, step| {
        match step {
            // Somebody applies a newer migration by hand, history and all.
            "shop" => database.execute(
                "create table if not exists _sqlx_migrations (version bigint primary key, description text not null, \
                 installed_on timestamptz not null default now(), success boolean not null, checksum bytea not null, \
                 execution_time bigint not null); \
                 insert into _sqlx_migrations values (99, 'by hand', '2026-01-01', true, 'x', 0) on conflict do nothing",
            ),
            _ => return false,
        }
        true
    },
    survived: |database, _| database.text("select description from _sqlx_migrations where version = 99") == "by hand",
    contents,
    ..Case::new(
        "create table customers (id int primary key, name text not null, balance numeric not null); \
         insert into customers values (1, 'Ann', 100), (2, 'Bob', 50), (3, 'Cy', 7);",
        concat!(
            "upgrade: shop\nsteps:\n",
            "  - { id: shop, uses: postgres.migrate, with: { target: db, directory: \"",
            env!("CARGO_MANIFEST_DIR"),
            "/tests/migrations/shop\" } }\n",
            "  - { id: stock, uses: postgres.migrate, with: { target: db, layout: flyway, ",
            "history_table: stock_history, directory: \"",
            env!("CARGO_MANIFEST_DIR"),
            "/tests/migrations/flyway\" } }\n",
        ),
    )
};

/// Leaves out of the histories when a row was written, and how long its script took.
fn contents(database: &Database) -> String {
    let mut kept = String::new();
    let mut leave_out = false;
    for line in database.contents().lines() {
        if !line.starts_with(' ') {
            leave_out = matches!(line, "public._sqlx_migrations" | "public.stock_history");
        }
        if !leave_out {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    for (table, columns) in [
        ("_sqlx_migrations", "version, description, success, checksum"),
        ("stock_history", "version, description, checksum, down"),
    ] {
        if database.text(&format!("select to_regclass('{table}') is not null")) == "t" {
            kept.push_str(&database.text(&format!("select ({columns})::text from {table} order by version")));
        }
    }
    kept
}

#[test]
fn migrations_are_all_applied_or_none() {
    sweep(&SHOP, Version::V15, 40);
}

#[test]
fn migrations_are_all_applied_or_none_on_a_new_server() {
    sweep(&SHOP, Version::V18, 40);
}

#[test]
fn every_seeded_defect_is_noticed() {
    notices_every_seeded_defect(&SHOP);
}
