//! What the tests share: a database, the kinds of this crate on it, and contexts to call them with.

#![cfg(test)]

use std::sync::Arc;

use serde_json::{Value, json};
use upgrade_core::AnyStep;
use upgrade_core::check::Check;
use upgrade_core::registry::{AnyTarget, BuildContext, BuildError, Registry};
use upgrade_postgres::{Database, DatabaseConfig};
use upgrade_testbed::postgres::{self, Version};

/// Gives a fresh database on the shared server of that version; `None` where there is no such server.
pub(crate) fn database(version: Version) -> Option<postgres::Database> {
    Some(postgres::shared(version)?.database())
}

/// Gives a fresh database on Debian's version.
pub(crate) fn any_database() -> Option<postgres::Database> {
    database(Version::V15)
}

pub(crate) fn registry() -> Registry {
    let mut registry = Registry::new();
    upgrade_postgres::register(&mut registry);
    registry
}

/// Takes a URL, the password of the tests in it, apart as a pipeline would have to.
pub(crate) fn target(url: &str) -> Database {
    target_with(url, |_| {})
}

pub(crate) fn target_with(url: &str, adjust: impl FnOnce(&mut DatabaseConfig)) -> Database {
    let (config, cx) = config(url);
    let mut config = config;
    adjust(&mut config);
    Database::from_config(config, &cx).unwrap()
}

/// Writes the URL to a file, as a secret: what a pipeline says does not hold it.
fn config(url: &str) -> (DatabaseConfig, BuildContext) {
    let directory = std::env::temp_dir().join("upgrade-postgres-urls");
    std::fs::create_dir_all(&directory).unwrap();
    let path = directory.join(upgrade_core::sealed::sha256_hex(url.as_bytes()));
    if !path.exists() {
        let own = path.with_extension(format!("{}-{:?}", std::process::id(), std::thread::current().id()));
        std::fs::write(&own, url).unwrap();
        std::fs::rename(own, &path).unwrap();
    }
    let reference = upgrade_core::secret::SecretRef::file(path.to_str().unwrap());
    (DatabaseConfig::new(reference), BuildContext::new("/"))
}

/// Returns what stands in a pipeline file for that database.
pub(crate) fn target_yaml(url: &str) -> Value {
    json!({ "uses": "postgres", "with": config(url).0 })
}

/// Gives the context in which kinds are made, the database known as `db`.
pub(crate) fn build_context(url: &str) -> BuildContext {
    build_context_with(target(url))
}

pub(crate) fn build_context_with(database: Database) -> BuildContext {
    BuildContext::new("/").with_target("db", AnyTarget::new("postgres", database))
}

/// Makes a step as a pipeline file does.
pub(crate) fn step(database: &postgres::Database, kind: &str, with: Value) -> Result<AnyStep, BuildError> {
    registry().make_step(kind, with, &build_context(&database.url()))
}

/// Makes a check as a pipeline file does.
pub(crate) fn check(database: &postgres::Database, kind: &str, with: Value) -> Result<Arc<dyn Check>, BuildError> {
    registry().make_check(kind, with, &build_context(&database.url()))
}
