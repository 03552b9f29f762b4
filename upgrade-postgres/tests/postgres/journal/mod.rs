//! The journal in a database.

mod keeping;
mod leases;
mod places;
mod restarts;

use upgrade_postgres::{JournalAddress, PostgresJournal};

/// A key for found contents.
pub(crate) const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

pub(crate) fn address(url: &str) -> JournalAddress {
    JournalAddress::parse(url).unwrap()
}

pub(crate) async fn open(url: &str) -> PostgresJournal {
    PostgresJournal::open(address(url)).await.unwrap().with_key(KEY).unwrap()
}
