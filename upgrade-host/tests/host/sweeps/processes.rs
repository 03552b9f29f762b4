//! `host.command` and `host.service`, with real processes.

#![cfg(test)]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use upgrade_core::testkit::Sweep;

use super::{Case, notices_every_seeded_defect, write};

/// Each of these cases waits for real processes; the appends in between are those of the others.
fn sweep_every(case: &Case, stride: u64, at_least: usize) {
    let report = Sweep::new(case).every(stride).run().unwrap_or_else(|failure| panic!("{failure}"));
    assert!(report.cases >= at_least, "{report:?}");
}

const SERVICE: Case = Case {
    observe: |root| {
        let pid = fs::read_to_string(root.join("run/pid")).unwrap_or_default();
        let runs = Command::new("kill").args(["-0", pid.trim()]).output().is_ok_and(|out| out.status.success());
        format!("runs: {runs}\n")
    },
    ..Case::new(
        start_service,
        r#"
upgrade: service
steps:
  - { id: stop, uses: host.service, with: { action: stop, start: [sh, start], stop: [sh, stop], status: [sh, status] } }
  - id: convert
    uses: host.command
    with:
      shell: true
      script: "echo half > site/converted; sleep 0.1; echo whole > site/converted"
      undo: [rm, -f, site/converted]
  - id: once
    uses: host.command
    with: { run: [mkdir, site/once], creates: site/once, undo: [rm, -rf, site/once] }
  - id: mark
    uses: host.command
    with: { run: [sh, -c, "echo marked >> site/marks"], unless: [grep, -qs, marked, site/marks], undo: [rm, -f, site/marks] }
  - { id: start, uses: host.service, with: { action: start, start: [sh, start], stop: [sh, stop], status: [sh, status] } }
"#,
    )
};

#[test]
fn a_service_runs_as_it_did_and_a_command_leaves_nothing_behind() {
    sweep_every(&SERVICE, 3, 80);
}

#[test]
fn every_seeded_defect_is_noticed() {
    notices_every_seeded_defect(&SERVICE);
}

fn start_service(root: &Path) {
    fs::create_dir(root.join("run")).unwrap();
    write(&root.join("site/app.conf"), "old");
    write(
        &root.join("start"),
        "kill -0 $(cat run/pid) 2>/dev/null && exit 0; cp site/app.conf run/loaded; \
         setsid sleep 600 >/dev/null 2>&1 & echo $! > run/pid\n",
    );
    write(&root.join("stop"), "kill $(cat run/pid) 2>/dev/null; rm -f run/pid\n");
    write(&root.join("status"), "kill -0 $(cat run/pid) 2>/dev/null\n");
    assert!(Command::new("sh").arg("start").current_dir(root).status().unwrap().success());
}

/// The service shows what it was started with.
const RESTART: Case = Case {
    observe: |root| fs::read_to_string(root.join("run/loaded")).unwrap_or_default(),
    ..Case::new(
        start_service,
        r#"
upgrade: restart
steps:
  - { id: undone, uses: host.service, with: { action: restart_on_undo, start: [sh, start], stop: [sh, stop], status: [sh, status] } }
  - { id: settings, uses: host.file, with: { path: site/app.conf, content: "new" } }
  - { id: restart, uses: host.service, with: { action: restart, start: [sh, start], stop: [sh, stop], status: [sh, status] } }
"#,
    )
};

#[test]
fn a_service_has_loaded_what_its_file_says() {
    sweep_every(&RESTART, 3, 45);
}

#[test]
fn every_defect_seeded_in_a_restart_is_noticed() {
    notices_every_seeded_defect(&RESTART);
}

/// Whoever is cut off after a crash would still change the world 300 ms later.
const SLOW: Case = Case {
    observe: |_| {
        std::thread::sleep(Duration::from_millis(400));
        String::new()
    },
    ..Case::new(
        |_| {},
        r#"
upgrade: slow
steps:
  - id: slow
    uses: host.command
    with: { shell: true, script: "sleep 0.3; echo late >> site/late", creates: site/late, undo: [rm, -f, site/late] }
"#,
    )
};

#[test]
fn a_slow_child_is_ended_before_the_undo() {
    sweep_every(&SLOW, 6, 20);
}
