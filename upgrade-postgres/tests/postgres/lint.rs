//! `postgres.lint`: scripts as they are pending, the rules, and what is accepted.

#![cfg(test)]

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};
use upgrade_core::testkit::TestContext;
use upgrade_core::verdict::{Status, Verdict};
use upgrade_postgres::lint::{Allowance, Finding, LintSettings, Severity, lint};
use upgrade_testbed::postgres::{Database, Version};

use crate::world;

fn found(text: &str, settings: &LintSettings) -> Vec<Finding> {
    lint(&[(PathBuf::from("migrations/7_x.sql"), text.to_owned())], settings)
}

fn rules(findings: &[Finding]) -> Vec<&str> {
    findings.iter().map(|finding| finding.rule.as_str()).collect()
}

#[test]
fn findings_name_line_rule_and_the_safe_alternative() {
    let text = "-- a comment\n\ncreate index by_name on people (name);\n\n\nalter table orders\n  add constraint c foreign key (p) references people (id);\n\
                alter table orders alter column total type bigint;\nalter table people rename column name to label;\n\
                alter table people drop column email;\n";
    let findings = found(text, &LintSettings::default());
    for (rule, line, step) in [
        ("require-concurrent-index-creation", 3, "postgres.index"),
        ("adding-foreign-key-constraint", 7, "postgres.foreign_key"),
        ("changing-column-type", 8, "postgres.expand"),
        ("renaming-column", 9, "postgres.expand"),
        ("ban-drop-column", 10, "postgres.expand"),
    ] {
        let finding =
            findings.iter().find(|finding| finding.rule == rule).unwrap_or_else(|| panic!("{rule}: {findings:#?}"));
        assert_eq!((finding.line, finding.severity), (line, Severity::Error), "{finding}");
        assert!(finding.help.as_ref().unwrap().contains(step), "{finding:?}");
        assert!(!finding.message.is_empty() && finding.allowed.is_none());
    }
    assert_eq!(
        findings[0].to_string(),
        format!("migrations/7_x.sql:3: error require-concurrent-index-creation: {}", findings[0].message)
    );
}

#[test]
fn a_script_outside_of_a_transaction_is_judged_as_such() {
    let concurrent = "create index concurrently by_name on people (name);";
    let inside = found(concurrent, &LintSettings::default());
    assert_eq!(rules(&inside), ["ban-concurrent-index-creation-in-transaction"]);
    assert!(inside[0].help.as_ref().unwrap().contains("postgres.index"));
    let outside = found(&format!("-- no-transaction\n{concurrent}"), &LintSettings::default());
    assert!(outside.is_empty(), "{outside:?}");
    assert_eq!(
        rules(&found("begin; select 1; commit;", &LintSettings::default())),
        ["transaction-nesting", "transaction-nesting"]
    );
}

#[test]
fn what_a_script_makes_itself_may_be_indexed() {
    let text = "create table people (id bigint generated always as identity primary key, name text not null);\n\
                create index by_name on people (name);";
    let findings = found(text, &LintSettings::default());
    assert!(findings.is_empty(), "{findings:?}");
}

#[test]
fn severity_allowances_and_comments_count() {
    let text = "alter table people drop column email;\nalter table people add column x char(3);";
    let settings = |severity: &[(&str, Severity)], allow: Vec<Allowance>| LintSettings {
        severity: severity.iter().map(|(rule, severity)| ((*rule).to_owned(), *severity)).collect(),
        allow,
        version: None,
    };
    let findings = found(text, &LintSettings::default());
    assert_eq!(rules(&findings), ["ban-drop-column", "ban-char-field"]);
    assert_eq!(findings[1].severity, Severity::Warn);
    let quiet = settings(&[("ban-drop-column", Severity::Warn), ("ban-char-field", Severity::Off)], Vec::new());
    let findings = found(text, &quiet);
    assert_eq!((rules(&findings), findings[0].severity), (vec!["ban-drop-column"], Severity::Warn));
    // An opt-in rule is asked where it is named, an alias stands for all that it means.
    let strict =
        settings(&[("ban-add-column", Severity::Error), ("require-timeout-settings", Severity::Warn)], Vec::new());
    let named = found(text, &strict);
    for rule in ["ban-add-column", "require-lock-timeout", "require-statement-timeout"] {
        assert!(rules(&named).contains(&rule), "{named:?}");
    }
    let allowance = |rule: &str, file: Option<&str>| Allowance {
        rule: rule.into(),
        file: file.map(Into::into),
        reason: "nobody reads it".into(),
    };
    for (file, accepted) in [
        (None, true),
        (Some("7_x.sql"), true),
        (Some("migrations/7_x.sql"), true),
        (Some("8_x.sql"), false),
        (Some("x.sql"), false),
    ] {
        let findings = found(text, &settings(&[], vec![allowance("ban-drop-column", file)]));
        assert_eq!(findings[0].allowed.is_some(), accepted, "{file:?}");
        assert!(findings[1].allowed.is_none());
    }
    let ignored = format!("-- squawk-ignore ban-drop-column\n{text}");
    assert_eq!(rules(&found(&ignored, &LintSettings::default())), ["ban-char-field"]);
    assert!(found(&format!("-- squawk-ignore-file\n{text}"), &LintSettings::default()).is_empty());
}

#[test]
fn the_servers_version_counts() {
    let text = "alter table people add column age bigint default 10;";
    let version = |version: &str| LintSettings { version: Some(version.into()), ..LintSettings::default() };
    assert_eq!(rules(&found(text, &version("10"))), ["adding-field-with-default"]);
    assert!(found(text, &version("15.18")).is_empty());
}

#[test]
fn what_the_parser_does_not_understand_is_said() {
    let findings = found("select 1;\nalter tabel people drop email;", &LintSettings::default());
    assert!(
        findings.iter().any(|f| f.rule == "syntax-error" && f.line == 2 && f.severity == Severity::Warn),
        "{findings:?}"
    );
    let settings =
        LintSettings { severity: [("syntax-error".into(), Severity::Off)].into(), ..LintSettings::default() };
    assert!(!rules(&found("alter tabel people drop email;", &settings)).contains(&"syntax-error"));
}

async fn check(database: &Database, with: Value) -> Verdict {
    let check = world::check(database, "postgres.lint", with).unwrap();
    check.check(&TestContext::new("lint").forward()).await.unwrap()
}

#[tokio::test]
async fn a_directory_is_judged_with_the_version_of_the_server() {
    for version in [Version::V15, Version::V18] {
        let Some(database) = world::database(version) else { continue };
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let with = |extra: Value| {
            let mut with = json!({ "target": "db", "directory": directory.path() });
            with.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            with
        };
        assert_eq!(check(&database, with(json!({}))).await.status, Status::Unknown);
        write("0001_a.up.sql", "alter table people drop column email;");
        write("0001_a.down.sql", "alter table people drop column label;");
        write("0002_b.up.sql", "alter table people add column code char(3);");
        write("0003_c/up.sql", "select 1;");
        let verdict = check(&database, with(json!({}))).await;
        assert_eq!(verdict.status, Status::Fail, "{verdict:?}");
        assert!(
            verdict
                .message
                .starts_with("3 scripts: 1 errors, 1 warnings, 0 accepted; 0001_a.up.sql:1: error ban-drop-column"),
            "{verdict:?}"
        );
        assert!(verdict.hint.as_ref().unwrap().contains("postgres.expand"), "{verdict:?}");
        assert!(verdict.facts["0001_a.up.sql:1 ban-drop-column"].starts_with("error: "), "{verdict:?}");
        assert_eq!(check(&database, with(json!({ "after": "0001" }))).await.status, Status::Warn);
        assert_eq!(check(&database, with(json!({ "after": "2" }))).await.status, Status::Pass);
        assert_eq!(check(&database, with(json!({ "after": "3" }))).await.status, Status::Pass);
        let accepted = with(json!({ "severity": { "ban-char-field": "off" },
            "allow": [{ "rule": "ban-drop-column", "file": "0001_a.up.sql", "reason": "never used" }] }));
        let verdict = check(&database, accepted).await;
        assert_eq!(verdict.status, Status::Pass);
        assert_eq!(verdict.facts["0001_a.up.sql:1 ban-drop-column"], "accepted: never used");
        let file = json!({ "version": "15", "files": [directory.path().join("0001_a.up.sql")] });
        assert_eq!(check(&database, file).await.status, Status::Fail);
    }
}

#[tokio::test]
async fn mistakes_name_their_key_and_what_cannot_be_read_is_no_pass() {
    let Some(database) = world::any_database() else { return };
    for (with, key) in [
        (json!({ "version": "15" }), "directory"),
        (json!({ "directory": "m" }), "version"),
        (json!({ "version": "new", "directory": "m" }), "version"),
        (json!({ "version": "15", "directory": "m", "severity": { "ban-everything": "warn" } }), "severity"),
        (json!({ "version": "15", "directory": "m", "after": "x" }), "after"),
        (
            json!({ "version": "15", "directory": "m", "allow": [{ "rule": "ban-everything", "reason": "x" }] }),
            "allow.0.rule",
        ),
        (
            json!({ "version": "15", "directory": "m", "allow": [{ "rule": "ban-drop-table", "reason": " " }] }),
            "allow.0.reason",
        ),
        (json!({ "version": "15", "directory": "m", "allow": [{ "rule": "ban-drop-table" }] }), "allow.0"),
    ] {
        let error = world::check(&database, "postgres.lint", with.clone()).err().unwrap();
        assert_eq!(error.key.as_deref(), Some(key), "{with}: {error}");
    }
    let check = world::check(&database, "postgres.lint", json!({ "version": "15", "directory": "/nowhere" })).unwrap();
    let error = check.check(&TestContext::new("lint").forward()).await.unwrap_err();
    assert!(error.message().contains("/nowhere") && error.hint().is_some(), "{error:?}");
}
