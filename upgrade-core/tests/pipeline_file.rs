//! Pipeline files: what is wrong with them is shown well, and what is right loads.
#![cfg(feature = "file")]
#![cfg(test)]

mod toys;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};
use upgrade_core::entry::Definition;
use upgrade_core::file::{FileError, LoadOptions, load, parse, reload, schema};
use upgrade_core::pipeline::Pipeline;

const HERE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/file");

fn read_with(text: &str, options: &LoadOptions) -> Result<Pipeline, FileError> {
    parse(text, Path::new("pipeline.yaml"), Path::new("/srv"), options, &toys::registry())
}

fn read(text: &str) -> Result<Pipeline, FileError> {
    read_with(text, &LoadOptions::default())
}

fn defined(text: &str) -> Definition {
    read(text).unwrap_or_else(|error| panic!("{error}")).define().expect("no files are named")
}

fn options(environment: Option<&str>, to: Option<&str>, variables: &[(&str, &str)]) -> LoadOptions {
    LoadOptions {
        environment: environment.map(str::to_owned),
        to: to.map(str::to_owned),
        variables: variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
    }
}

/// `UPDATE_GOLDEN=1 cargo test` writes what is shown now; look at the difference.
#[test]
fn what_is_wrong_is_shown_as_the_golden_files_say() {
    let mut wrong = Vec::new();
    let mut files: Vec<_> = fs::read_dir(format!("{HERE}/wrong")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    for file in files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "yaml")) {
        let text = fs::read_to_string(file).unwrap();
        let shown = match read(&text) {
            Ok(_) => "nothing is wrong\n".to_owned(),
            Err(error) => format!("{error}\n"),
        };
        let golden = file.with_extension("stderr");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&golden, &shown).unwrap();
        } else if fs::read_to_string(&golden).unwrap_or_default() != shown {
            wrong.push(format!("{}\n{shown}", file.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_whole_file_loads() {
    let pipeline = load(&Path::new(HERE).join("notes.yaml"), &LoadOptions::default(), &toys::registry())
        .unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(pipeline.environment(), Some("staging"));
    assert_eq!(pipeline.to().unwrap().to_string(), "1.1.0");
    assert_eq!(pipeline.graph().order().len(), 3);
    let definition = pipeline.define().unwrap();
    let steps = &definition.shape["steps"];
    assert_eq!(steps["release"]["with"]["archive"], "notes-1.1.0.tar.gz");
    assert_eq!(steps["release"]["with"]["sha256"], "${steps.backup.output.sha256}");
    assert_eq!(steps["release"]["before"]["http.get"]["with"]["url"], "http://127.0.0.1:8080/ready");
    assert_eq!(definition.shape["verify"]["http.get"]["with"]["json"], json!({ "/version": "1.1.0" }));
    assert_eq!(definition.variables, BTreeMap::from([("root".into(), json!("./site")), ("port".into(), json!(8080))]));
    assert_eq!(definition.base_dir, Path::new(HERE));
}

#[test]
fn an_environment_is_laid_over_and_leaves_the_base_as_it_is() {
    let text = fs::read_to_string(format!("{HERE}/notes.yaml")).unwrap();
    let staging = read(&text).unwrap().define().unwrap();
    let production = read_with(&text, &options(Some("production"), None, &[])).unwrap().define().unwrap();
    assert_eq!(production.shape["checks"]["host.disk"]["with"]["path"], "/srv/notes");
    assert_eq!(production.document["require_committed_in"], "staging");
    assert_eq!(production.shape["environment"], "production");
    assert_ne!(staging.fingerprint, production.fingerprint);
    assert_eq!(staging.base_fingerprint, production.base_fingerprint);
    let newer = read_with(&text, &options(None, Some("v1.1.1"), &[])).unwrap().define().unwrap();
    assert_ne!(newer.base_fingerprint, staging.base_fingerprint);
    assert_eq!(newer.shape["to"], "1.1.1");
}

#[test]
fn lists_are_merged_by_id_and_null_takes_away() {
    let definition = defined(
        "
upgrade: notes
environment: production
steps:
  - { id: a, uses: host.release, with: { root: r, archive: a, keep: 3 }, timeout: 1m }
  - { id: b, uses: host.release, with: { root: r, archive: a, rules: [{ path: x, mode: 1 }] } }
verify:
  - { uses: http.get, with: { url: one } }
  - { uses: http.get, with: { url: two } }
environments:
  production:
    steps:
      - { id: b, with: { root: s, rules: [] } }
      - { id: a, with: { keep: null } }
      - { id: c, uses: host.release, with: { root: r, archive: c } }
    verify: [{ uses: http.get, with: { url: three } }]
",
    );
    let steps = &definition.shape["steps"];
    assert_eq!(steps.as_object().unwrap().keys().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(steps["a"]["with"]["keep"], Value::Null);
    assert_eq!(steps["b"]["with"], json!({ "root": "s", "archive": "a", "sha256": null, "keep": null, "rules": [] }));
    assert_eq!(definition.shape["verify"].as_object().unwrap().len(), 1);
}

#[test]
fn variables_keep_their_type_and_dollars_can_be_written() {
    let text = r#"
upgrade: notes
to: 2.0.0
vars: { keep: 3, version: 1.10, root: "${dir}/x", dir: site, secret: { env: TOKEN }, url: { deep: { er: here } } }
targets: { db: { uses: db, with: { url: "${secret}" } } }
steps:
  - id: a
    uses: host.release
    with: { root: "${root}", archive: "$${to} $5 $$ ${version}-${to}${url.deep.er}", keep: "${keep}" }
"#;
    let definition = defined(text);
    let with = &definition.shape["steps"]["a"]["with"];
    assert_eq!(with["archive"], "${to} $5 $$ 1.10-2.0.0here");
    assert_eq!((&with["keep"], &with["root"]), (&json!(3), &json!("site/x")));
    assert_eq!(definition.document["targets"]["db"]["with"]["url"], json!({ "env": "TOKEN" }));
    let given = options(None, None, &[("keep", "5"), ("dir", "${to}")]);
    let given = read_with(text, &given).unwrap().define().unwrap();
    assert_eq!(given.shape["steps"]["a"]["with"]["root"], "${to}/x");
    assert_eq!(given.shape["steps"]["a"]["with"]["keep"], 5);
    for (name, value, message) in [
        ("kep", "5", "there is no variable `kep` to set"),
        ("keep", "five", "variable `keep` is a number; it cannot be set to `five`"),
        (
            "secret",
            "x",
            "variable `secret` is a list or a mapping, which can be changed only in the file; it cannot be set to `x`",
        ),
    ] {
        assert_eq!(read_with(text, &options(None, None, &[(name, value)])).unwrap_err().message(), message);
    }
}

#[test]
fn what_is_asked_for_outside_is_named_when_it_is_not_there() {
    let error = read_with("upgrade: notes\nenvironments: { production: {} }", &options(Some("prodution"), None, &[]));
    let error = error.unwrap_err();
    assert_eq!((error.message(), error.line()), ("there is no environment `prodution`", None));
    assert_eq!(error.help(), Some("did you mean `production`?"));
    let error = read_with("upgrade: notes", &options(None, Some("soon"), &[])).unwrap_err();
    assert!(error.message().starts_with("`soon` is not a version"), "{error}");
    let error = load(Path::new("/nowhere/p.yaml"), &LoadOptions::default(), &toys::registry()).unwrap_err();
    assert!(error.message().starts_with("/nowhere/p.yaml cannot be read"), "{error}");
}

#[test]
fn an_irreversible_step_is_one_by_its_kind_or_by_the_file() {
    let pipeline = read(
        "
upgrade: notes
targets: { db: { uses: db, with: { url: { env: X } } } }
steps:
  - { id: first, uses: host.release, with: { root: r, archive: a } }
  - { id: kind, uses: db.migrate, with: { target: db, dir: \"${steps.first.output.dir}\", lossy: true } }
  - { id: word, uses: host.release, with: { root: r, archive: a }, irreversible: mail is sent }
",
    )
    .unwrap();
    assert_eq!(pipeline.graph().pivot().unwrap().as_str(), "kind");
    let shape = pipeline.define().unwrap().shape;
    assert_eq!(shape["steps"]["kind"]["irreversible"], "columns are dropped");
    assert_eq!(shape["steps"]["word"]["irreversible"], "mail is sent");
}

#[test]
fn what_the_journal_holds_loads_to_the_same() {
    let text = fs::read_to_string(format!("{HERE}/notes.yaml")).unwrap();
    let tricky = "
upgrade: notes
from: 1.10
required_stops: [1.5.0]
vars: { dollar: $, flag: true, text: \"\\u0085 \\u007f \\\"${dollar}{x}\\\" é😀\" }
steps:
  - { id: a, uses: host.release, with: { root: \"$${to}${text}\", archive: \"yes\" }, when: \"${flag}\" }
  - { id: b, uses: host.release, with: { root: \"${dollar}${steps.a.output.x}\", archive: \"1.0\" } }
";
    for (text, options) in [
        (text.as_str(), LoadOptions::default()),
        (text.as_str(), options(Some("production"), Some("1.1.7"), &[("port", "9")])),
        (tricky, LoadOptions::default()),
    ] {
        let first = read_with(text, &options).unwrap_or_else(|error| panic!("{error}")).define().unwrap();
        let kept: Definition = serde_json::from_str(&serde_json::to_string(&first).unwrap()).unwrap();
        let again = reload(&kept, &toys::registry()).unwrap_or_else(|error| panic!("{error}")).define().unwrap();
        assert_eq!(again.fingerprint, first.fingerprint);
        assert_eq!((again.document, again.variables), (first.document, first.variables));
    }
    let rust = Pipeline::builder("notes").build().unwrap().define().unwrap();
    assert!(reload(&rust, &toys::registry()).is_err());
}

#[test]
fn line_ends_and_marks_of_other_systems_are_taken() {
    let error = read("\u{feff}upgrade: notes\r\nstps: []\r\n").unwrap_err();
    assert_eq!((error.message(), error.line(), error.column()), ("unknown key `stps`", Some(2), Some(1)));
    assert!(error.to_string().contains("2 | stps: []\n  | ^^^^\n"), "{error}");
    let error = read("\u{feff}upgrad: 1\n").unwrap_err();
    assert!(error.to_string().contains("\n  | ^^^^^^\n"), "{error}");
}

#[test]
fn what_is_no_text_is_said_to_be_none() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("p.yaml");
    for (contents, message) in [(vec![0xff; 10], "not a text in UTF-8"), (vec![b'x'; 2 << 20], "larger than 1 MiB")] {
        fs::write(&path, contents).unwrap();
        let error = load(&path, &LoadOptions::default(), &toys::registry()).unwrap_err();
        assert!(error.message().ends_with(message), "{error}");
    }
}

#[test]
fn json_is_read_too() {
    assert_eq!(defined(r#"{ "upgrade": "notes", "to": "1.0.0", "steps": [] }"#).shape["to"], "1.0.0");
}

#[test]
fn bombs_are_refused_soon() {
    let deep = format!("upgrade: {}{}", "[".repeat(100_000), "]".repeat(100_000));
    let blocks: String = (0..5_000).map(|depth| format!("{}a:\n", " ".repeat(depth % 1000))).collect();
    let large = format!("upgrade: {}", "x".repeat(2 << 20));
    let mut doubling = "upgrade: notes\nvars:\n  v0: xxxxxxxxxx\n".to_owned();
    for n in 1..60 {
        doubling += &format!("  v{n}: \"${{v{}}}${{v{}}}\"\n", n - 1, n - 1);
    }
    let mut lists = "upgrade: notes\nvars:\n  v0: x\n".to_owned();
    for n in 1..60 {
        lists += &format!("  v{n}: [\"${{v{}}}\", \"${{v{}}}\"]\n", n - 1, n - 1);
    }
    let mut chain = "upgrade: notes\nvars:\n".to_owned();
    for n in 0..10_000 {
        chain += &format!("  v{n}: \"${{v{}}}\"\n", n + 1);
    }
    let dollars = format!("upgrade: \"{}\"", "${".repeat(400_000));
    let references = format!("upgrade: notes\nfrom: \"{}\"", "${a}".repeat(250_000));
    let unknown: String = (0..9_000).map(|n| format!("  - \"${{v{n}}} x\"\n")).collect();
    let known: String = (0..9_000).map(|n| format!("  w{n}: 1\n")).collect();
    let unknown = format!("upgrade: notes\nvars:\n{known}\nchecks:\n{unknown}");
    let steps: String =
        (0..1_900).map(|n| format!("  - {{ id: s{n}, uses: x, needs: [{}] }}\n", "q,".repeat(50))).collect();
    let steps = format!("upgrade: notes\nsteps:\n{steps}");
    let checks = format!("upgrade: notes\nchecks:\n{}", "  - { uses: http.gett }\n".repeat(9_000));
    let keys: String = (0..100_000).map(|n| format!("k{n}: 1\n")).collect();
    for bomb in [references, unknown, steps, checks, keys, deep, blocks, large, doubling, lists, chain, dollars] {
        let started = std::time::Instant::now();
        let error = read(&bomb).unwrap_err();
        assert!(started.elapsed().as_secs() < 60, "{:?}: {}", started.elapsed(), error.message());
        assert!(error.to_string().len() < 1 << 16, "{}", error.to_string().len());
    }
}

#[test]
fn nothing_reaches_the_terminal_raw() {
    let error = read("upgrade: \"a\u{9b}31m\"\n\"\\e[31mkey\": 1\n").unwrap_err();
    assert!(!error.to_string().chars().any(|c| c.is_control() && c != '\n'), "{error:?}");
}

#[test]
fn the_schema_takes_what_loads_and_refuses_what_does_not() {
    let schema = schema(&toys::registry());
    assert!(jsonschema::meta::is_valid(&schema));
    let validator = jsonschema::validator_for(&schema).unwrap();
    let value = |text: &str| serde_saphyr::from_str::<Value>(text).unwrap();
    let good = fs::read_to_string(format!("{HERE}/notes.yaml")).unwrap();
    let errors: Vec<_> = validator.iter_errors(&value(&good)).map(|error| error.to_string()).collect();
    assert!(errors.is_empty(), "{errors:#?}");
    assert!(validator.is_valid(&value(
        "{ upgrade: a, max_parallel: '${n}', steps: [{ id: a, uses: host.release, with: { root: r, archive: a, keep: '${k}' }, when: '${w}', needs: b }] }"
    )));
    for name in
        ["unknown-key", "unknown-top-key", "unknown-kind", "unknown-with-key", "missing-with-key", "wrong-types"]
    {
        let bad = fs::read_to_string(format!("{HERE}/wrong/{name}.yaml")).unwrap();
        assert!(!validator.is_valid(&value(&bad)), "{name}");
    }
}

/// Every key that a file can have is described where people look it up.
#[test]
fn the_reference_names_every_key_and_its_example_loads() {
    let reference = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/pipeline-file.md")).unwrap();
    let schema = schema(&toys::registry());
    let items =
        ["CheckItem", "GuardItem", "StepItem", "TargetItem", "PresentItem", "RequiresItem", "RetryItem", "Limit"];
    let objects = items.iter().map(|item| &schema["$defs"][item]).chain([&schema]);
    for key in objects.flat_map(|object| object["properties"].as_object().unwrap().keys()) {
        let named = reference.contains(&format!("`{key}`")) || reference.contains(&format!("{key}:"));
        assert!(named || reference.contains(&format!("{key},")), "`{key}` is not in docs/pipeline-file.md");
    }
    let example = reference.split("```yaml").find(|block| block.contains("upgrade: notes")).unwrap();
    read(example.split("```").next().unwrap()).unwrap_or_else(|error| panic!("{error}"));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_text_makes_it_panic(text in any::<String>()) {
        let _ = read(&text);
    }

    #[test]
    fn no_yaml_makes_it_panic(text in "([a-z]{1,3}|upgrade|steps|vars|uses|with|id|needs|host.release|[:{}\\[\\],\"'&*<$!|>#~-]|: |- |\n|\n  |\n    |\\$\\{[a-z.]{0,9}\\}|[0-9.]{1,4}|é){0,60}") {
        let _ = read(&text);
    }

    #[test]
    fn a_wrong_line_never_makes_it_panic(at in 0usize..1500, cut in 0usize..40, put in "[a-z:{}\\[\\]\" \n$-]{0,4}") {
        let mut text = fs::read_to_string(format!("{HERE}/notes.yaml")).unwrap();
        let at = at.min(text.len());
        let end = (at + cut).min(text.len());
        text.replace_range(at..end, &put);
        let _ = read(&text).map_err(|error| error.render(true));
    }
}
