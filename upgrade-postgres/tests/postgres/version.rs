//! `postgres.version` on servers of several versions.

#![cfg(test)]

use serde_json::json;
use upgrade_core::error::Class;
use upgrade_core::testkit::TestContext;
use upgrade_core::verdict::Status;
use upgrade_testbed::postgres::Version;

use crate::world;

#[tokio::test]
async fn each_server_is_known_by_its_version() {
    for (version, range) in [(Version::V15, "~15"), (Version::V16, ">=16.0, <17"), (Version::V18, "^18")] {
        let Some(database) = world::database(version) else { continue };
        let cx = TestContext::new("version").forward();
        for (asked, status) in [(range, Status::Pass), ("<15", Status::Fail), (">=19", Status::Fail)] {
            let check =
                world::check(&database, "postgres.version", json!({ "target": "db", "version": asked })).unwrap();
            let verdict = check.check(&cx).await.unwrap();
            assert_eq!(verdict.status, status, "{asked}: {verdict:?}");
            assert_eq!(verdict.hint.is_some(), status == Status::Fail);
            assert!(verdict.facts["version"].starts_with(&format!("{version}.")), "{verdict:?}");
            assert!(verdict.facts["server"].starts_with("PostgreSQL ") && verdict.facts["role"] == "primary");
            assert_eq!(verdict.measurements["major"].to_string(), version.to_string());
        }
    }
}

#[tokio::test]
async fn a_server_that_is_not_there_is_unknown_and_a_range_that_is_none_is_refused() {
    let Some(database) = world::any_database() else { return };
    let error =
        world::check(&database, "postgres.version", json!({ "target": "db", "version": "fifteen" })).err().unwrap();
    assert_eq!(error.key.as_deref(), Some("version"));
    let nowhere = database.url().replacen(database.name(), "no_such_database", 1);
    let cx = world::build_context(&nowhere);
    let check =
        world::registry().make_check("postgres.version", json!({ "target": "db", "version": "15" }), &cx).unwrap();
    let error = check.check(&TestContext::new("version").forward()).await.unwrap_err();
    assert_eq!(error.class(), Class::Permanent);
    assert!(error.message().contains("no_such_database"), "{error}");
}
