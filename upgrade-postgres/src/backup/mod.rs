//! Backups: a directory that holds what pg_dump wrote, and a manifest that tells whether it is whole.
//!
//! ```text
//! shop-20261121T101500Z-1a2b3c4d/      0700, under this name only when all of it is durable
//! ├── manifest.json                    digests, versions, tables; written last
//! └── dump/                            pg_dump's directory format (or `archive.zst`), each file zstd
//! ```
//!
//! - [`manifest`]: what a backup says about itself;
//! - [`tools`]: which pg_dump and pg_restore are used;
//! - [`prove`]: a backup restored, and compared with what it was taken from;
//! - [`replace`]: a backup put in the place of a database.

pub(crate) mod compression;
pub(crate) mod contents;
pub(crate) mod dump;
pub mod manifest;
pub mod prove;
pub(crate) mod reload;
pub mod replace;
pub(crate) mod storage;
pub(crate) mod swap;
pub(crate) mod template;
pub mod tools;

use std::path::{Path, PathBuf};

/// The directory of pg_dump's files within a backup.
pub(crate) fn dump_directory(backup: &Path) -> PathBuf {
    backup.join("dump")
}
