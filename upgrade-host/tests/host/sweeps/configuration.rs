//! `host.config`: one file of each format.

#![cfg(test)]

use super::{Case, notices_every_seeded_defect, reads, sweep, write};

const CONFIGURATION: Case = Case {
    interfere: |root, step| {
        let path = match step {
            "toml" => "site/app.toml",
            "env" => "site/.env",
            _ => return false,
        };
        write(&root.join(path), "other = 1\n");
        true
    },
    survived: |root, step| {
        let path = if step == "toml" { "site/app.toml" } else { "site/.env" };
        reads(&root.join(path), "other = 1\n")
    },
    ..Case::new(
        |root| {
            write(&root.join("site/app.toml"), "# kept\nlisten = \"127.0.0.1:80\"\n");
            write(&root.join("site/app.json"), "{ \"old\": 1 }\n");
            write(&root.join("site/app.yaml"), "# kept\nold: 1\n");
            write(&root.join("site/.env"), "SECRET=found\nOLD=1\n");
        },
        r#"
upgrade: configuration
steps:
  - id: toml
    uses: host.config
    with: { path: site/app.toml, rules: [{ move: { from: listen, to: server.listen } }, { set: { path: server.workers, value: 4 } }] }
  - { id: json, uses: host.config, needs: [], with: { path: site/app.json, rules: [{ rename: { path: old, to: new } }] } }
  - { id: yaml, uses: host.config, needs: [], with: { path: site/app.yaml, rules: [{ set: { path: new, value: 2 } }] } }
  - { id: env, uses: host.config, with: { path: site/.env, rules: [{ remove: { path: OLD } }] } }
"#,
    )
};

#[test]
fn configuration_is_all_old_or_all_new() {
    sweep(&CONFIGURATION, 100);
}

#[test]
fn every_seeded_defect_is_noticed() {
    notices_every_seeded_defect(&CONFIGURATION);
}
