//! `host.release`, `host.backup` and `host.restore`, as pipeline files name them.

#![cfg(test)]

use std::fs;

use super::{Case, notices_every_seeded_defect, pack, sweep, write};

#[test]
fn a_release_is_the_old_or_the_new_one() {
    let case = Case {
        interfere: |root, step| {
            // Somebody else deploys at the same time.
            let link = root.join("site/current");
            step == "release" && {
                let _ = fs::remove_file(&link);
                std::os::unix::fs::symlink("releases/0.9.0", &link).unwrap();
                true
            }
        },
        survived: |root, _| fs::read_link(root.join("site/current")).is_ok_and(|to| to.ends_with("0.9.0")),
        ..Case::new(
            |root| {
                for version in ["0.8.0", "0.9.0", "1.0.0"] {
                    write(&root.join(format!("site/releases/{version}/bin/app")), version);
                }
                std::os::unix::fs::symlink("releases/1.0.0", root.join("site/current")).unwrap();
                pack(root, "app-1.1.0", &[("bin/app", "1.1.0"), ("share/text", "text")]);
            },
            r#"
upgrade: release
to: 1.1.0
steps:
  - { id: release, uses: host.release, with: { root: site, archive: "app-${to}.tar.gz", keep: 2 } }
"#,
        )
    };
    sweep(&case, 30);
}

#[test]
fn a_first_release_is_there_or_not() {
    let case = Case::new(
        |root| pack(root, "app-1.0.0", &[("bin/app", "1.0.0")]),
        r#"
upgrade: release
to: 1.0.0
steps:
  - { id: release, uses: host.release, with: { root: site, archive: "app-${to}.tar.gz" } }
"#,
    );
    sweep(&case, 30);
}

const BACKUP: Case = Case {
    // The archive holds times and owners: that it is there is what counts.
    observe: |root| format!("backups: {}\n", fs::read_dir(root.join("backups")).map_or(0, Iterator::count)),
    ..Case::new(
        |root| {
            write(&root.join("site/data/notes"), "notes");
            write(&root.join("site/data/deep/more"), "more");
            write(&root.join("site/config"), "config");
        },
        r#"
upgrade: backup
steps:
  - { id: backup, uses: host.backup, with: { paths: [site/data, site/config], to: backups } }
  - { id: spoil, uses: host.file, with: { path: site/config, content: "spoilt" } }
  - { id: restore, uses: host.restore, with: { backup: "${steps.backup.output.path}", to: site/again } }
"#,
    )
};

#[test]
fn a_backup_and_what_is_restored_from_it_come_and_go_as_a_whole() {
    sweep(&BACKUP, 90);
}

#[test]
fn every_seeded_defect_is_noticed() {
    notices_every_seeded_defect(&BACKUP);
}
