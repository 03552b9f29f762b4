//! `host.file`: contents, templates with secrets, modes, owners, links.

#![cfg(test)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use super::{Case, notices_every_seeded_defect, reads, sweep, write};

const FILES: Case = Case {
    interfere: |root, step| {
        let path = match step {
            "write" => "site/app.conf",
            "make" => "site/new/deep/file",
            "remove" => "site/old.conf",
            "copy" => "site/copy",
            "template" => "site/secret.conf",
            "linked" => "site/shared/linked.conf",
            _ => return false,
        };
        write(&root.join(path), "somebody else's\n");
        true
    },
    survived: |root, step| {
        let path = match step {
            "write" => "site/app.conf",
            "make" => "site/new/deep/file",
            "remove" => "site/old.conf",
            "template" => "site/secret.conf",
            "linked" => "site/shared/linked.conf",
            _ => "site/copy",
        };
        reads(&root.join(path), "somebody else's\n")
    },
    ..Case::new(
        |root| {
            write(&root.join("site/app.conf"), "password=found\n");
            fs::set_permissions(root.join("site/app.conf"), fs::Permissions::from_mode(0o600)).unwrap();
            write(&root.join("site/old.conf"), "old=1\n");
            write(&root.join("site/same.conf"), "same=1\n");
            write(&root.join("source"), "copied\n");
            write(&root.join("site/tool"), "#!/bin/sh\n");
            write(&root.join("site/shared/linked.conf"), "linked=1\n");
            symlink("shared/linked.conf", root.join("site/linked.conf")).unwrap();
            symlink("shared/linked.conf", root.join("site/replaced.conf")).unwrap();
        },
        r#"
upgrade: files
steps:
  - { id: write, uses: host.file, with: { path: site/app.conf, content: "password=new\n", mode: "0640" } }
  - { id: make, uses: host.file, with: { path: site/new/deep/file, content: "made\n", create_directories: true } }
  - { id: remove, uses: host.file, needs: [write], with: { path: site/old.conf, state: absent } }
  - { id: copy, uses: host.file, needs: [write], with: { path: site/copy, source: source } }
  - id: template
    uses: host.file
    needs: []
    with:
      path: site/secret.conf
      template: { text: "path={{ secrets.path }}\nport={{ port }}\n", vars: { port: 80 }, secrets: { path: { env: PATH } } }
  - { id: mode, uses: host.file, needs: [], with: { path: site/tool, mode: "0750" } }
  - { id: linked, uses: host.file, needs: [], with: { path: site/linked.conf, follow: true, content: "linked=2\n" } }
  - { id: replaced, uses: host.file, needs: [], with: { path: site/replaced.conf, content: "no link\n", owner: "0:0" } }
  - { id: same, uses: host.file, with: { path: site/same.conf, content: "same=1\n" } }
"#,
    )
};

#[test]
fn files_are_all_old_or_all_new() {
    sweep(&FILES, 200);
}

#[test]
fn every_seeded_defect_is_noticed() {
    notices_every_seeded_defect(&FILES);
}
