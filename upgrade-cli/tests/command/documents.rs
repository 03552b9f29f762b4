//! What the command prints about itself.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::world::World;

const COMMANDS: [&str; 16] = [
    "init",
    "validate",
    "plan",
    "run",
    "resume",
    "watch",
    "commit",
    "rollback",
    "resolve",
    "stop",
    "status",
    "history",
    "audit",
    "schema",
    "completions",
    "man",
];

#[test]
fn every_command_has_help_with_examples() {
    let world = World::new();
    let help = world.upgrade(&["--help"]).exits(0).stdout;
    for command in COMMANDS {
        assert!(help.contains(&format!("\n  {command} ")), "{command} in {help}");
        let help = world.upgrade(&[command, "--help"]).exits(0).stdout;
        assert!(help.contains("Examples:\n  upgrade"), "{command}: {help}");
        assert!(help.contains("--state-dir"), "{command}: {help}");
    }
    for status in 0..=7 {
        assert!(help.contains(&format!("\n  {status}  ")), "{status} in {help}");
    }
}

#[test]
fn the_version_is_told() {
    let told = World::new().upgrade(&["--version"]).exits(0).stdout;
    assert_eq!(told.trim(), format!("upgrade {}", env!("CARGO_PKG_VERSION")));
}

#[test]
fn man_pages_and_completions_are_printed_whatever_the_output() {
    let world = World::new();
    let page = world.upgrade(&["man", "--output", "json"]).exits(0).stdout;
    assert!(page.contains(".TH upgrade 1") && page.contains("rollback"), "{page}");
    for command in COMMANDS {
        let page = world.upgrade(&["man", command]).exits(0).stdout;
        assert!(page.contains(&format!("upgrade\\-{command}")), "{command}: {page}");
    }
    world.upgrade(&["man", "frobnicate"]).exits(2);
    for shell in ["bash", "zsh", "fish"] {
        let script = world.upgrade(&["completions", shell]).exits(0).stdout;
        assert!(script.contains("rollback") && script.contains("state-dir"), "{shell}");
    }
}

#[test]
fn init_writes_a_file_that_validates_and_never_over_another() {
    let world = World::new();
    world.upgrade(&["init"]).exits(0).says("upgrade plan upgrade.yaml");
    world.upgrade(&["validate", "upgrade.yaml"]).exits(0);
    world.upgrade(&["plan", "upgrade.yaml", "--detailed-exitcode"]).exits(10);
    world.upgrade(&["run", "upgrade.yaml"]).exits(0);
    assert_eq!(world.read("site/VERSION").as_deref(), Some("1.1.0\n"));
    let before = world.read("upgrade.yaml");
    world.upgrade(&["init"]).exits(7).says("already there");
    assert_eq!(world.read("upgrade.yaml"), before);
    world.upgrade(&["init", "missing/upgrade.yaml"]).exits(1);
}

#[test]
fn the_schema_takes_what_the_command_takes_and_refuses_what_it_refuses() {
    let world = World::new();
    let schema: Value = serde_json::from_str(&world.upgrade(&["schema"]).exits(0).stdout).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let shipped = examples(&PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../examples")));
    assert!(!shipped.is_empty());
    for file in shipped.iter().chain([&PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src/commands/init.yaml"))]) {
        let example = yaml(&std::fs::read_to_string(file).unwrap());
        let errors: Vec<String> =
            validator.iter_errors(&example).map(|error| format!("{}: {error}", error.instance_path())).collect();
        assert!(errors.is_empty(), "{}: {errors:#?}", file.display());
    }
    for wrong in [
        "{ upgrade: notes, setps: [] }",
        "{ upgrade: notes, steps: [{ id: a, uses: host.fiel, with: {} }] }",
        "{ upgrade: notes, steps: [{ id: a, uses: host.file, with: { path: a, contents: b } }] }",
    ] {
        assert!(!validator.is_valid(&yaml(wrong)), "{wrong}");
    }
}

/// Lists the pipeline files below a directory.
fn examples(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let below = |path: PathBuf| if path.is_dir() { examples(&path) } else { vec![path] };
    let is_pipeline = |path: &PathBuf| {
        path.extension().is_some_and(|extension| extension == "yaml")
            && std::fs::read_to_string(path).unwrap().lines().any(|line| line.starts_with("upgrade:"))
    };
    entries.flat_map(below).filter(is_pipeline).collect()
}

fn yaml(text: &str) -> Value {
    serde_saphyr::from_str(text).unwrap()
}
