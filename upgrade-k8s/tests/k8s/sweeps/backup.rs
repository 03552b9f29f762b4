//! `k8s.backup` and `k8s.restore`: a backup that is made, and one from before that is restored.

#![cfg(test)]

use std::fs;

use serde_json::{Value, json};

use super::{Case, notices_every_seeded_defect, sweep};
use crate::backup::{KEY, kept, key, make, test};
use crate::world::Corner;

pub(crate) const CASE: Case = Case {
    setup: |corner| {
        let directory = corner.directory();
        let map = |name: &str, data: &str| {
            format!("---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{ name: {name} }}\ndata: {data}\n")
        };
        let secret = "---\napiVersion: v1\nkind: Secret\nmetadata: { name: keys }\nstringData: { TOKEN: t }\n";
        corner.namespace.apply(&(map("shop", "{ MODE: \"on\" }") + &map("gone", "{ A: \"1\" }") + secret));
        let step = make(corner, &directory.join("before.yaml.sealed"), &json!({ "key": key(&directory, KEY) }));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(kept(&step, &test("before")));
        corner.namespace.apply(&(map("shop", "{ MODE: \"off\", MORE: \"1\" }") + &map("since", "{ B: \"1\" }")));
        corner.namespace.kubectl(&["delete", "configmap/gone"]);
    },
    pipeline: "upgrade: shop\nsteps:\n  \
               - id: keep\n    uses: k8s.backup\n    with: { target: cluster, to: \"DIRECTORY/made/kept.yaml.sealed\", key: { file: \"DIRECTORY/00.key\" } }\n  \
               - id: restore\n    uses: k8s.restore\n    with: { target: cluster, backup: \"DIRECTORY/before.yaml.sealed\", key: { file: \"DIRECTORY/00.key\" } }\n",
    observe: |corner| format!("{}\n{}", files(corner), corner.written("configmaps,secrets")),
    interfere: |corner, step| {
        if step == "keep" {
            fs::create_dir_all(corner.directory().join("made")).unwrap();
            fs::write(corner.directory().join("made/kept.yaml.sealed"), "theirs").unwrap();
        } else {
            let theirs = r#"{"data":{"MODE":"foreign"}}"#;
            corner.namespace.kubectl(&["patch", "configmap/shop", "--type", "merge", "--patch", theirs]);
        }
        true
    },
    survived: |corner, step| match step {
        "keep" => fs::read(corner.directory().join("made/kept.yaml.sealed")).is_ok_and(|kept| kept == b"theirs"),
        _ => corner.get("configmap/shop").text("/data/MODE") == "foreign",
    },
};

/// Every file, and how many objects a backup says it holds.
fn files(corner: &Corner) -> String {
    let mut all = Vec::new();
    for directory in [corner.directory(), corner.directory().join("made")] {
        for entry in fs::read_dir(directory).into_iter().flatten() {
            let path = entry.unwrap().path();
            let contents = fs::read(&path).unwrap_or_default();
            let line = contents.split(|byte| *byte == b'\n').next().unwrap_or_default();
            let header: Value = line
                .strip_prefix(b"# k8s.backup ")
                .map(|json| serde_json::from_slice(json).unwrap())
                .unwrap_or_default();
            let name = path.strip_prefix(corner.directory()).unwrap().display().to_string();
            all.push(format!("{name}: {} objects", header["objects"]));
        }
    }
    all.sort();
    all.join("\n")
}

#[test]
fn a_backup_is_whole_or_not_there_and_a_restore_too() {
    sweep(&CASE, 9, 5);
}

#[test]
#[ignore = "all appends of all directions, minutes: cargo test -p upgrade-k8s -- --ignored campaign_backups"]
fn campaign_backups_survive_every_crash() {
    sweep(&CASE, 1, 40);
}

#[test]
fn every_seeded_defect_of_backups_is_noticed() {
    notices_every_seeded_defect(&CASE);
}
