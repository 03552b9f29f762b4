//! `docker.exec`: commands that write into a container, which somebody may make anew meanwhile.

#![cfg(test)]

use upgrade_testbed::docker::Image;

use super::{Base, Case, notices_every_seeded_defect, sweep};
use crate::world::Corner;

/// The image of all cases, built once.
static BASE: Base = Base::new();

fn setup(corner: &Corner) {
    BASE.tag(corner, || Image::shell("echo one >/data/log; sleep 1000"));
    start(corner, "ours");
    // Its first line is there when it has been seen.
    corner.engine.docker(["exec", &corner.name("web"), "sh", "-c", "until test -s /data/log; do sleep 0.01; done"]);
}

fn start(corner: &Corner, who: &str) {
    let (name, image, label) = (corner.name("web"), corner.name("image:1"), format!("who={who}"));
    corner.engine.docker(["run", "--detach", "--network", "none", "--name", &name, "--label", &label, &image]);
}

fn interfere(corner: &Corner, _: &str) -> bool {
    corner.engine.docker(["rm", "--force", &corner.name("web")]);
    start(corner, "another");
    true
}

fn survived(corner: &Corner, _: &str) -> bool {
    corner.engine.docker(["inspect", "--format", "{{.Config.Labels.who}}", &corner.name("web")]) == "another"
}

fn observe(corner: &Corner) -> String {
    corner.engine.docker(["exec", &corner.name("web"), "sh", "-c", "rm -f /data/new; cat /data/log; ls /data"])
}

/// The first step, of both cases.
macro_rules! second {
    () => {
        r#"
upgrade: commands
steps:
  - id: second
    uses: docker.exec
    with:
      target: engine
      container: PREFIX-web
      command: [sh, -c, "grep -q two /data/log || echo two >>/data/log"]
      undo: [sh, -c, "grep -v two /data/log >/data/new; mv /data/new /data/log"]
"#
    };
}

const ONE: Case = Case { setup, pipeline: second!(), observe, interfere, survived };

const TWO: Case = Case {
    pipeline: concat!(
        second!(),
        r#"  - id: third
    uses: docker.exec
    with:
      target: engine
      container: PREFIX-web
      command: [sh, -c, "grep -q two /data/log && { grep -q three /data/log || echo three >>/data/log; }"]
      undo:
        - sh
        - -c
        - |
          grep -v three /data/log >/data/new; mv /data/new /data/log
          grep -q two /data/log || echo out of order >>/data/log
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
