//! `docker.volume_restore`, into a volume that a container uses and into one that is not there.
//!
//! Consumers are paused here, which takes no time; stopped ones are with the deaths in the middle.

#![cfg(test)]

use std::sync::OnceLock;

use super::{Case, notices_every_seeded_defect, sweep};
use crate::volumes::{backup_of, picture, standing, with_app, write};
use crate::world::Corner;

fn set_up(corner: &Corner) {
    // Its making says nothing about the step: once for all worlds.
    static BACKUP: OnceLock<Vec<u8>> = OnceLock::new();
    with_app(corner);
    std::fs::create_dir_all(corner.directory()).unwrap();
    let path = corner.directory().join("backup.tar.zst");
    let bytes = BACKUP.get_or_init(|| {
        backup_of(corner, "two", &path);
        std::fs::read(&path).unwrap()
    });
    std::fs::write(path, bytes).unwrap();
}

const RESTORE: Case = Case {
    setup: set_up,
    pipeline: r#"
upgrade: restore
steps:
  - id: there
    uses: docker.volume_restore
    with: { target: engine, volume: PREFIX-data, backup: /tmp/PREFIX/backup.tar.zst, consumers: pause }
"#,
    observe: |corner| format!("{}\n{}", standing(corner), picture(corner, &corner.name("app"))),
    interfere: |corner, step| {
        if step == "there" {
            write(corner, &corner.name("app"), "foreign", "text");
        }
        step == "there"
    },
    survived: |corner, step| step != "there" || picture(corner, &corner.name("app")).contains("data/foreign"),
};

#[test]
fn a_volume_is_replaced_as_a_whole_or_not_at_all() {
    sweep(&RESTORE, 100, 25);
}

const TWO: Case = Case {
    pipeline: r#"
upgrade: restore
steps:
  - id: there
    uses: docker.volume_restore
    with: { target: engine, volume: PREFIX-data, backup: /tmp/PREFIX/backup.tar.zst, consumers: pause }
  - id: new
    uses: docker.volume_restore
    with: { target: engine, volume: PREFIX-new, backup: /tmp/PREFIX/backup.tar.zst, image: "PREFIX-image:1" }
"#,
    ..RESTORE
};

#[test]
fn every_seeded_defect_is_noticed() {
    notices_every_seeded_defect(&TWO);
}
