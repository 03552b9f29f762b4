//! `docker.volume_backup`, with a container that is stopped or paused meanwhile.

#![cfg(test)]

use super::{Case, notices_every_seeded_defect, sweep};
use crate::volumes::{standing, with_app};
use crate::world::Corner;

fn kept(corner: &Corner) -> String {
    let listed = std::fs::read_dir(corner.directory()).map(|all| {
        let mut names: Vec<_> = all.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names.join(" ")
    });
    listed.unwrap_or_else(|_| "no directory".into())
}

const BACKUP: Case = Case {
    setup: |corner| {
        with_app(corner);
    },
    pipeline: r#"
upgrade: keep
steps:
  - id: stopping
    uses: docker.volume_backup
    with: { target: engine, volume: PREFIX-data, to: /tmp/PREFIX/stopping.tar.zst, consumers: stop, prove: restore }
"#,
    observe: |corner| format!("{}\n{}", standing(corner), kept(corner)),
    interfere: |corner, step| {
        std::fs::create_dir_all(corner.directory()).unwrap();
        std::fs::write(corner.directory().join(format!("{step}.tar.zst")), "of somebody else").unwrap();
        true
    },
    survived: |corner, step| {
        let found = std::fs::read(corner.directory().join(format!("{step}.tar.zst")));
        found.is_ok_and(|text| text == b"of somebody else")
    },
};

#[test]
fn backups_are_all_made_or_none_and_who_waited_goes_on() {
    sweep(&BACKUP, 100, 25);
}

const TWO: Case = Case {
    pipeline: r#"
upgrade: keep
steps:
  - id: stopping
    uses: docker.volume_backup
    with: { target: engine, volume: PREFIX-data, to: /tmp/PREFIX/stopping.tar.zst }
  - id: pausing
    uses: docker.volume_backup
    with: { target: engine, volume: PREFIX-data, to: /tmp/PREFIX/pausing.tar.zst, consumers: pause }
"#,
    ..BACKUP
};

#[test]
fn every_seeded_defect_is_noticed() {
    notices_every_seeded_defect(&TWO);
}
