//! `docker.run`: commands that add to what is there, so that doing one twice shows.

#![cfg(test)]

use upgrade_testbed::docker::Image;

use super::{Base, Case, notices_every_seeded_defect, sweep};
use crate::world::Corner;

/// The image of all cases, built once.
static BASE: Base = Base::new();

/// A volume with one line in it, and a container that was never started, through which it is seen.
fn setup(corner: &Corner) {
    let (image, data, eye) = (corner.name("image:1"), corner.name("data"), corner.name("eye"));
    BASE.tag(corner, || Image::shell("true"));
    corner.engine.docker(["volume", "create", &data]);
    corner.engine.docker(["create", "--network", "none", "--name", &eye, "--volume", &format!("{data}:/data"), &image]);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "one\n").unwrap();
    corner.engine.docker(["cp", file.path().to_str().unwrap(), &format!("{eye}:/data/log")]);
}

fn observe(corner: &Corner) -> String {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    corner.engine.docker(["cp", &format!("{}:/data/log", corner.name("eye")), log.to_str().unwrap()]);
    let volume = format!("volume={}", corner.name("data"));
    let containers = corner.engine.docker(["ps", "--all", "--filter", &volume, "--format", "{{.Names}}"]);
    format!("{}{containers}", std::fs::read_to_string(log).unwrap())
}

/// The first step, of both cases.
macro_rules! second {
    () => {
        r#"
upgrade: commands
steps:
  - id: second
    uses: docker.run
    with:
      target: engine
      image: PREFIX-image:1
      pull: never
      networks: [none]
      volumes: ["PREFIX-data:/data"]
      command: [sh, -c, "echo two >>/data/log"]
      undo: { command: [sh, -c, "grep -v two /data/log >/data/new; mv /data/new /data/log"] }
"#
    };
}

const ONE: Case = Case { setup, pipeline: second!(), observe, interfere: |_, _| false, survived: |_: &Corner, _| true };

const TWO: Case = Case {
    pipeline: concat!(
        second!(),
        r#"  - id: third
    uses: docker.run
    with:
      target: engine
      image: PREFIX-image:1
      pull: never
      networks: [none]
      volumes: ["PREFIX-data:/data"]
      # Fails where the second line is not there yet, or there twice.
      command: [sh, -c, "test $(wc -l </data/log) = 2 && echo three >>/data/log"]
      undo:
        command:
          - sh
          - -c
          - |
            grep -v three /data/log >/data/new; mv /data/new /data/log
            test $(grep -c two /data/log) = 1 || echo out of order >>/data/log
"#
    ),
    ..ONE
};

#[test]
fn a_command_is_done_or_undone() {
    sweep(&ONE, 3, 25);
    BASE.clear();
}

#[test]
fn every_seeded_defect_of_commands_is_noticed() {
    notices_every_seeded_defect(&TWO);
    BASE.clear();
}

#[test]
#[ignore = "long: two steps, every append"]
fn campaign_commands_are_all_done_or_none() {
    sweep(&TWO, 1, 70);
    BASE.clear();
}
