//! `host.config` on real files: every rule in every format, comments and order kept.

#![cfg(test)]

mod random;
mod texts;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use upgrade_core::check::Check;
use upgrade_core::context::OnConflict;
use upgrade_core::registry::{BuildContext, Registry};
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::testkit::TestContext;
use upgrade_core::verdict::Status;
use upgrade_host::checks::ConfigCheck;
use upgrade_host::steps::FileUndo;
use upgrade_host::steps::{Config, ConfigConfig, ConfigOutput};

fn step(path: &Path, rules: Value) -> Config {
    let mut config = json!({ "path": path });
    config["rules"] = rules;
    with(config)
}

fn with(config: Value) -> Config {
    Config::from_config(serde_json::from_value::<ConfigConfig>(config).unwrap(), &BuildContext::default()).unwrap()
}

fn file(directory: &Path, name: &str, text: &str) -> PathBuf {
    let path = directory.join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    path
}

async fn prepared(step: &Config, test: &TestContext) -> Prepared<FileUndo, ConfigOutput> {
    step.prepare(&test.forward()).await.unwrap()
}

/// Migrates a text; everything that must hold of any migration is asked on the way.
async fn migrate(name: &str, text: &str, rules: &Value) -> Result<String, String> {
    let directory = tempfile::tempdir().unwrap();
    let path = file(directory.path(), name, text);
    let before = fs::metadata(&path).unwrap();
    let step = step(&path, rules.clone());
    let test = TestContext::new("config");
    let (undo, changes) = match step.prepare(&test.forward()).await {
        Ok(Prepared::Change { undo, changes }) => (undo, changes),
        Ok(_) => return Ok(text.to_owned()),
        Err(error) => {
            assert!(error.hint().is_some(), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
            return Err(error.to_string());
        }
    };
    assert!(changes[0].diff.is_some());
    for _ in 0..2 {
        step.apply(&test.forward(), &undo).await.unwrap();
    }
    let migrated = fs::read_to_string(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode(), before.mode());
    for _ in 0..2 {
        step.rollback(&test.back(), &undo, None).await.unwrap();
        let after = fs::metadata(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
        assert_eq!(
            (after.mode(), after.mtime(), after.mtime_nsec()),
            (before.mode(), before.mtime(), before.mtime_nsec())
        );
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
    Ok(migrated)
}

const JSON: &str = r#"{
  // the service
  "server": {
    "listen": "0.0.0.0:80", // where
    "workers": "4"
  },
  "models": [
    { "name": "a" },
    { "name": "b", "timeout": 9 } // slow
  ],
  /* gone soon */
  "old": true,
  "last": 1.5
}
"#;

const YAML: &str = "# the service
server:
  listen: 0.0.0.0:80 # where
  workers: \"4\"

models:
  - name: a
  # slow
  - name: b
    timeout: 9
old: true # gone soon
last: 1.5
";

const TOML: &str = "# the service
old = true # gone soon
last = 1.5

[server] # section
listen = \"0.0.0.0:80\" # where
workers = \"4\"

# first
[[models]]
name = \"a\"

# slow
[[models]]
name = \"b\"
timeout = 9
";

const ENV: &str = "# the service
LISTEN=0.0.0.0:80 # where
export WORKERS='4'

OLD=true
LAST=\"1.5\"
";

/// Each rule in each format; what is not named in `expected` stays byte for byte.
#[tokio::test]
async fn every_rule_in_every_format() {
    let rules = [
        json!({ "set": { "path": "server.workers", "value": 8 } }),
        json!({ "set": { "path": "server.tls.port", "value": 443 } }),
        json!({ "default": { "path": "models[*].timeout", "value": 30 } }),
        json!({ "rename": { "path": "server.listen", "to": "address" } }),
        json!({ "move": { "from": "last", "to": "server.ratio" } }),
        json!({ "remove": { "path": "old" } }),
        json!({ "retype": { "path": "server.workers", "to": "integer" } }),
        json!({ "set": { "path": "models[1].name", "value": "c" } }),
        json!({ "remove": { "path": "models[0]" } }),
        json!({ "set": { "path": "old", "value": ["x", "y: z"] } }),
        json!({ "remove": { "path": "models[*].name" } }),
    ];
    let mut report = String::new();
    for (name, text) in [("c.json", JSON), ("c.yaml", YAML), ("c.toml", TOML)] {
        for rule in &rules {
            let migrated = migrate(name, text, &json!([rule])).await;
            report.push_str(&difference(name, rule, text, migrated));
        }
        let everything = json!([rules[0], rules[1], rules[2], rules[3], rules[4], rules[5], rules[7]]);
        report.push_str(&difference(name, &json!("all of them"), text, migrate(name, text, &everything).await));
    }
    for rule in [
        json!({ "set": { "path": "WORKERS", "value": 8 } }),
        json!({ "set": { "path": "NEW", "value": "it's $new" } }),
        json!({ "default": { "path": "LISTEN", "value": "x" } }),
        json!({ "rename": { "path": "WORKERS", "to": "SERVER_WORKERS" } }),
        json!({ "move": { "from": "LAST", "to": "RATIO" } }),
        json!({ "remove": { "path": "OLD" } }),
        json!({ "retype": { "path": "OLD", "to": "boolean" } }),
        json!({ "set": { "path": "OLD", "value": [1] } }),
    ] {
        report.push_str(&difference(".env", &rule, ENV, migrate(".env", ENV, &json!([rule])).await));
    }
    golden("host.config.rules.txt", &report);
}

fn difference(name: &str, rule: &Value, text: &str, migrated: Result<String, String>) -> String {
    let mut report = format!("## {name}: {rule}\n");
    match migrated {
        Err(error) => report.push_str(&format!("error: {}\n", error.split_once(", ").unwrap_or(("", &error)).1)),
        Ok(migrated) => {
            let diff = similar::TextDiff::from_lines(text, &migrated);
            for change in diff.iter_all_changes().filter(|change| change.tag() != similar::ChangeTag::Equal) {
                report.push_str(&format!("{}{}", change.tag(), change.value()));
            }
        }
    }
    report.push('\n');
    report
}

/// Compares with a golden file; `UPDATE_GOLDEN=1` writes it.
fn golden(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, text).unwrap();
    }
    assert_eq!(fs::read_to_string(&path).unwrap_or_default(), text, "differs from {}", path.display());
}

#[tokio::test]
async fn what_is_satisfied_is_unchanged() {
    let directory = tempfile::tempdir().unwrap();
    let path = file(directory.path(), "c.yaml", YAML);
    let rules = json!([
        { "set": { "path": "old", "value": true } },
        { "default": { "path": "server.listen", "value": "x" } },
        { "rename": { "path": "server.host", "to": "listen" } },
        { "move": { "from": "nowhere", "to": "server.listen" } },
        { "remove": { "path": "nothing.here" } },
        { "retype": { "path": "server.workers", "to": "string" } },
        { "default": { "path": "absent[*].x", "value": 1 } }
    ]);
    let answer = prepared(&step(&path, rules), &TestContext::new("config")).await;
    assert!(matches!(answer, Prepared::Unchanged { .. }), "{answer:?}");
}

#[tokio::test]
async fn rules_that_cannot_be_meant_are_errors() {
    for (text, rule, says) in [
        (YAML, json!({ "set": { "path": "models[7].name", "value": 1 } }), "none at index 7"),
        (YAML, json!({ "set": { "path": "old.deep", "value": 1 } }), "a boolean stands on the way"),
        (YAML, json!({ "rename": { "path": "old", "to": "last" } }), "both it and last are there"),
        (YAML, json!({ "move": { "from": "old", "to": "last" } }), "both it and last are there"),
        (YAML, json!({ "retype": { "path": "server.listen", "to": "integer" } }), "does not read as an integer"),
        (YAML, json!({ "retype": { "path": "server", "to": "integer" } }), "cannot be turned"),
        ("a: &x 1\nb: *x\n", json!({ "set": { "path": "a", "value": 2 } }), "cannot be made in place"),
        ("a: &x {k: 1}\nb: *x\n", json!({ "set": { "path": "b.k", "value": 2 } }), "cannot be made in place"),
    ] {
        let error = migrate("c.yaml", text, &json!([rule])).await.unwrap_err();
        assert!(error.contains(says), "{rule}: {error}");
    }
    for (name, text, says) in [
        ("c.json", "{\n  \"a\": hunter2\n}", "line 2, column 8"),
        ("c.json", "{ \"a\": 1, \"a\": 2 }", "line 1"),
        ("c.yaml", "a: 1\nb: [hunter2\n", "line"),
        ("c.toml", "a = 1\nb = hunter2\n", "line 2, column 5"),
        (".env", "A=1\nhunter2\n", "line 2"),
        (".env", "A='hunter2\n", "line 1"),
    ] {
        let error = migrate(name, text, &json!([{ "remove": { "path": "a" } }])).await.unwrap_err();
        assert!(error.contains(says) && error.contains(name) && !error.contains("hunter2"), "{name}: {error}");
    }
}

#[tokio::test]
async fn what_is_missing_or_of_another_type_is_named_with_its_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = file(directory.path(), "c.yaml", YAML);
    let validate = json!({
        "required": ["models[*].timeout"], "types": { "server.workers": "integer" },
        "deprecated": ["last", { "path": "old", "message": "use `new`" }]
    });
    let rule = json!({ "set": { "path": "server.tls", "value": true } });
    let error = with(json!({ "path": path, "rules": [rule], "validate": validate }))
        .prepare(&TestContext::new("config").forward())
        .await
        .unwrap_err();
    assert!(error.message().contains("models[0].timeout: required, and not there (line 8)"), "{error}");
    assert!(
        error.message().contains("server.workers: it is a string, and must be of type integer (line 4)"),
        "{error}"
    );
    let rules = json!([
        { "default": { "path": "models[*].timeout", "value": 30 } },
        { "retype": { "path": "server.workers", "to": "integer" } }
    ]);
    let config = json!({ "path": path, "rules": rules, "validate": validate });
    let Prepared::Change { changes, .. } = prepared(&with(config.clone()), &TestContext::new("config")).await else {
        panic!()
    };
    let summary = changes[0].summary.clone().unwrap();
    assert!(summary.contains("warning: old: deprecated: use `new` (line"), "{summary}");
    assert_eq!(changes[0].diff.as_deref(), Some("~ server.workers: ••• → •••\n+ models[0].timeout: 30\n"));
    let mut before = config;
    before["validate_before"] = true.into();
    assert!(with(before).prepare(&TestContext::new("config").forward()).await.is_err());

    let check = |validate: Value| {
        ConfigCheck::from_config(
            serde_json::from_value(json!({ "path": path, "validate": validate })).unwrap(),
            &BuildContext::default(),
        )
        .unwrap()
    };
    let cx = TestContext::new("check").forward();
    assert_eq!(check(validate).check(&cx).await.unwrap().status, Status::Fail);
    assert_eq!(check(json!({ "deprecated": ["old"] })).check(&cx).await.unwrap().status, Status::Warn);
    assert_eq!(check(json!({ "required": ["server.listen"] })).check(&cx).await.unwrap().status, Status::Pass);
    fs::write(&path, "a: [\n").unwrap();
    assert_eq!(check(json!({ "required": ["a"] })).check(&cx).await.unwrap().status, Status::Fail);
}

#[tokio::test]
async fn a_foreign_change_is_a_conflict_and_a_leftover_is_none() {
    let directory = tempfile::tempdir().unwrap();
    let path = file(directory.path(), "c.toml", TOML);
    let step = step(&path, json!([{ "remove": { "path": "old" } }]));
    let test = TestContext::new("config");
    let Prepared::Change { undo, .. } = prepared(&step, &test).await else { panic!() };
    let digest = upgrade_core::sealed::sha256_hex(test.forward().marker().as_bytes());
    let temporary = directory.path().join(format!(".c.toml.upgrade-{}", &digest[..12]));
    fs::write(&temporary, "half").unwrap();
    step.apply(&test.forward(), &undo).await.unwrap();
    let applied = fs::read_to_string(&path).unwrap();
    fs::write(&temporary, "half").unwrap();
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), TOML);
    assert!(!temporary.exists());
    fs::write(&path, "theirs = 1\n").unwrap();
    assert!(step.apply(&test.forward(), &undo).await.unwrap_err().as_conflict().is_some());
    assert!(step.rollback(&test.back(), &undo, None).await.unwrap_err().as_conflict().is_some());
    assert_eq!(fs::read_to_string(&path).unwrap(), "theirs = 1\n");
    let overwrite = test.on_conflict(OnConflict::Overwrite);
    step.apply(&overwrite.forward(), &undo).await.unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), applied);
    fs::write(&path, "theirs = 1\n").unwrap();
    step.rollback(&overwrite.back(), &undo, None).await.unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), TOML);
}

const CANARY: &str = "canary-5ecret-v4lue";

#[tokio::test]
async fn a_secret_in_an_old_env_file_is_shown_nowhere() {
    let directory = tempfile::tempdir().unwrap();
    let secret = file(directory.path(), "secret", &format!("{CANARY}-new\n"));
    let text = format!("DB_PASSWORD={CANARY}\nTOKEN='{CANARY}'\nDROP={CANARY}\nCOUNT={CANARY}\nPORT=1\n");
    let path = file(directory.path(), ".env", &text);
    let step = step(
        &path,
        json!([
            { "rename": { "path": "DB_PASSWORD", "to": "DATABASE_PASSWORD" } },
            { "move": { "from": "TOKEN", "to": "API_TOKEN" } },
            { "remove": { "path": "DROP" } },
            { "set": { "path": "KEY", "value": { "file": secret } } },
            { "set": { "path": "PORT", "value": 2 } }
        ]),
    );
    let test = TestContext::new("config");
    let Prepared::Change { undo, changes } = prepared(&step, &test).await else { panic!() };
    let output = step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!(
        fs::read_to_string(&path).unwrap(),
        format!("DATABASE_PASSWORD={CANARY}\nCOUNT={CANARY}\nPORT=2\nAPI_TOKEN={CANARY}\nKEY={CANARY}-new\n")
    );
    let diff = changes[0].diff.clone().unwrap();
    assert_eq!(
        diff,
        "- DROP: •••\n~ PORT: ••• → \"2\"\n~ DATABASE_PASSWORD: ••• (was DB_PASSWORD)\n~ API_TOKEN: ••• (was TOKEN)\n+ KEY: •••\n"
    );
    step.rollback(&test.back(), &undo, Some(&output)).await.unwrap();
    let typed = with(json!({ "path": path, "validate": { "types": { "COUNT": "integer" } } }));
    let invalid = typed.prepare(&test.forward()).await.unwrap_err();
    let retype = with(json!({ "path": path, "rules": [{ "retype": { "path": "COUNT", "to": "integer" } }] }));
    let wrong = retype.prepare(&test.forward()).await.unwrap_err();
    fs::write(&path, format!("{CANARY}\n")).unwrap();
    let conflict = step.apply(&test.forward(), &undo).await.unwrap_err();
    let malformed = step.prepare(&test.forward()).await.unwrap_err();
    let seen = format!(
        "{undo:?} {changes:?} {output:?} {conflict:?} {malformed:?} {invalid:?} {wrong:?} {step:?} {} {} {} {}",
        serde_json::to_string(&undo).unwrap(),
        serde_json::to_string(&changes).unwrap(),
        serde_json::to_string(&output).unwrap(),
        step.definition()
    );
    assert!(!seen.contains(CANARY), "{seen}");
}

#[test]
fn a_wrong_configuration_is_refused_when_it_is_read() {
    let mut registry = Registry::new();
    upgrade_host::register(&mut registry);
    let cx = BuildContext::new("/srv");
    let rules = |rule: Value| json!({ "path": "c.yaml", "rules": [rule] });
    for with in [
        json!({ "path": "c.yaml" }),
        json!({ "path": "c.conf", "rules": [{ "remove": { "path": "a" } }] }),
        json!({ "path": ".env", "rules": [{ "set": { "path": "a.b", "value": 1 } }] }),
        json!({ "path": "c.yaml", "validate": { "types": { "a..b": "string" } } }),
        rules(json!({ "remove": { "path": "" } })),
        rules(json!({ "remove": { "path": "a", "extra": 1 } })),
        rules(json!({ "rename": { "path": "a[0]", "to": "b" } })),
        rules(json!({ "rename": { "path": "a", "to": "" } })),
        rules(json!({ "move": { "from": "a[*]", "to": "b" } })),
        rules(json!({ "retype": { "path": "a", "to": "date" } })),
    ] {
        assert!(registry.make_step("host.config", with.clone(), &cx).is_err(), "{with}");
    }
    assert!(registry.make_step("host.config", rules(json!({ "remove": { "path": "a" } })), &cx).is_ok());
    assert!(registry.make_check("host.config", json!({ "path": "c.yaml" }), &cx).is_ok());
}

#[tokio::test]
async fn a_plan_does_not_fail_because_the_file_is_not_there_yet() {
    let step = step(Path::new("/no/such/c.yaml"), json!([{ "remove": { "path": "a" } }]));
    assert!(step.prepare(&TestContext::new("config").dry_run().forward()).await.is_ok());
    assert!(step.prepare(&TestContext::new("config").forward()).await.is_err());
}

/// Records of format 1 in the journals of users: they must be read for ever.
#[test]
fn undo_records_of_format_1_are_read() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/host.config.undo.v1.json");
    let golden: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let undo = Config::read_undo(1, golden.clone()).unwrap();
    assert_eq!(serde_json::to_value(undo).unwrap(), golden);
}
