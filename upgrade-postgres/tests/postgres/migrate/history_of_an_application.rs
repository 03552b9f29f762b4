//! The whole history of an application, up and down: views, triggers, enums, partitions, extensions.

#![cfg(test)]

use std::path::{Path, PathBuf};

use serde_json::json;
use upgrade_core::testkit::TestContext;
use upgrade_testbed::postgres::Version;

use super::directory::{apply, migrate, undo};
use crate::world::database;

fn forum() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/migrations/forum")
}

fn versions() -> Vec<u64> {
    let mut versions: Vec<u64> = std::fs::read_dir(forum())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".up.sql"))
        .map(|name| name.split('_').next().unwrap().parse().unwrap())
        .collect();
    versions.sort_unstable();
    versions
}

async fn up_and_back(version: Version) {
    let Some(database) = database(version) else { return };
    let versions = versions();
    assert!(versions.len() > 100);
    let empty = database.schema();
    // From nothing, from the middle, from the last: each time all that is left.
    for from in [0, versions.len() / 3, versions.len() / 2, versions.len() - 1] {
        if from > 0 {
            let step = migrate(&database, &forum(), json!({ "to": versions[from - 1] }));
            super::directory::apply_and_commit(&step).await;
        }
        let before = database.schema();
        let step = migrate(&database, &forum(), json!({}));
        let test = TestContext::new("schema");
        let (record, output) = apply(&step, &test).await.unwrap_or_else(|e| panic!("{}", super::directory::said(&e)));
        assert_eq!(output.migrations, versions.len() - from);
        assert_ne!(database.schema(), before);
        undo(&step, &test, &record).await;
        assert_eq!(database.schema(), before, "from {from}");
    }
    assert_ne!(database.schema(), empty);
}

#[tokio::test]
async fn is_applied_and_rolled_back_on_debians_server() {
    up_and_back(Version::V15).await;
}

#[tokio::test]
async fn is_applied_and_rolled_back_on_the_newest_server() {
    up_and_back(Version::V18).await;
}
