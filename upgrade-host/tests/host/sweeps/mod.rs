//! Every step of this crate lived through crashes, failures, repetitions and foreign changes, on
//! real files and real processes; and the seeded defects that the sweeps must notice.

#![cfg(test)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;
use upgrade_core::file::{LoadOptions, parse};
use upgrade_core::names::StepId;
use upgrade_core::pipeline::Pipeline;
use upgrade_core::registry::Registry;
use upgrade_core::testkit::{Mutation, Scenario, Sweep, tree};

/// Describes one sweep: a directory as it is before, the pipeline file that changes it, and what
/// somebody else may do to it meanwhile.
struct Case {
    /// Makes the world before.
    setup: fn(&Path),
    pipeline: &'static str,
    /// Changes what a step works on, as somebody else; a step that is not named is left alone.
    interfere: fn(&Path, &str) -> bool,
    /// Tells whether that change is still there.
    survived: fn(&Path, &str) -> bool,
    /// Writes down more than the tree of the directory.
    observe: fn(&Path) -> String,
}

impl Case {
    const fn new(setup: fn(&Path), pipeline: &'static str) -> Self {
        Self { setup, pipeline, interfere: |_, _| false, survived: |_, _| true, observe: |_| String::new() }
    }
}

/// Ends what a case has started when its world goes.
struct World(TempDir);

impl Drop for World {
    fn drop(&mut self) {
        if let Ok(pid) = fs::read_to_string(self.0.path().join("run/pid")) {
            let _ = Command::new("kill").arg(pid.trim()).status();
        }
    }
}

impl Scenario for Case {
    type World = World;

    fn fresh(&self) -> World {
        let world = World(tempfile::tempdir().unwrap());
        fs::create_dir(world.0.path().join("site")).unwrap();
        (self.setup)(world.0.path());
        world
    }

    fn pipeline(&self, world: &World) -> Pipeline {
        let mut registry = Registry::new();
        upgrade_host::register(&mut registry);
        let name = world.0.path().join("pipeline.yaml");
        parse(self.pipeline, &name, world.0.path(), &LoadOptions::default(), &registry)
            .unwrap_or_else(|e| panic!("{e}"))
    }

    fn observe(&self, world: &World) -> String {
        let text = format!("{}{}", tree(&world.0.path().join("site")), (self.observe)(world.0.path()));
        // Each world has a directory of its own; its name is all that two of them may differ in.
        text.replace(world.0.path().file_name().unwrap().to_str().unwrap(), "WORLD")
    }

    fn interfere(&self, world: &World, step: &StepId) -> bool {
        (self.interfere)(world.0.path(), step.as_str())
    }

    fn survived(&self, world: &World, step: &StepId) -> bool {
        (self.survived)(world.0.path(), step.as_str())
    }
}

fn sweep(case: &Case, at_least: usize) {
    let report = Sweep::new(case).run().unwrap_or_else(|failure| panic!("{failure}"));
    println!("{report:?}");
    assert!(report.cases >= at_least, "{report:?}");
}

fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn reads(path: &Path, text: &str) -> bool {
    fs::read_to_string(path).is_ok_and(|found| found == text)
}

/// Packs a release into `DIR/NAME.tar.gz`.
fn pack(directory: &Path, name: &str, files: &[(&str, &str)]) {
    let source = directory.join(name);
    for (path, text) in files {
        write(&source.join(path), text);
    }
    let archive = directory.join(format!("{name}.tar.gz"));
    let done = Command::new("tar").arg("-czf").arg(archive).arg("-C").arg(&source).arg(".").status().unwrap();
    assert!(done.success());
    fs::remove_dir_all(source).unwrap();
}

const FILES: Case = Case {
    interfere: |root, step| {
        let path = match step {
            "write" => "site/app.conf",
            "make" => "site/new/deep/file",
            "remove" => "site/old.conf",
            "copy" => "site/copy",
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
        },
        r#"
upgrade: files
steps:
  - { id: write, uses: host.file, with: { path: site/app.conf, content: "password=new\n", mode: "0640" } }
  - { id: make, uses: host.file, with: { path: site/new/deep/file, content: "made\n", create_directories: true } }
  - { id: remove, uses: host.file, needs: [write], with: { path: site/old.conf, state: absent } }
  - { id: copy, uses: host.file, needs: [write], with: { path: site/copy, source: source } }
  - { id: same, uses: host.file, with: { path: site/same.conf, content: "same=1\n" } }
"#,
    )
};

#[test]
fn files_are_all_old_or_all_new() {
    sweep(&FILES, 150);
}

#[test]
fn configuration_is_all_old_or_all_new() {
    let case = Case {
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
    sweep(&case, 130);
}

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
    sweep(&case, 40);
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
    sweep(&case, 40);
}

#[test]
fn a_backup_and_what_is_restored_from_it_come_and_go_as_a_whole() {
    let case = Case {
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
    sweep(&case, 120);
}

#[test]
fn a_service_runs_as_it_did_and_a_command_leaves_nothing_behind() {
    let case = Case {
        observe: |root| {
            let pid = fs::read_to_string(root.join("run/pid")).unwrap_or_default();
            let runs = Command::new("kill").args(["-0", pid.trim()]).output().is_ok_and(|out| out.status.success());
            format!("runs: {runs}\n")
        },
        ..Case::new(
            |root| {
                fs::create_dir(root.join("run")).unwrap();
                write(
                    &root.join("start"),
                    "kill -0 $(cat run/pid) 2>/dev/null && exit 0; setsid sleep 600 >/dev/null 2>&1 & echo $! > run/pid\n",
                );
                write(&root.join("stop"), "kill $(cat run/pid) 2>/dev/null; rm -f run/pid\n");
                write(&root.join("status"), "kill -0 $(cat run/pid) 2>/dev/null\n");
                let started = Command::new("sh").arg("start").current_dir(root).status().unwrap();
                assert!(started.success());
            },
            r#"
upgrade: service
vars: { control: { start: [sh, start], stop: [sh, stop], status: [sh, status] } }
steps:
  - { id: stop, uses: host.service, with: { action: stop, start: [sh, start], stop: [sh, stop], status: [sh, status] } }
  - id: convert
    uses: host.command
    with:
      shell: true
      script: "echo half > site/converted; sleep 0.1; echo whole > site/converted"
      undo: [rm, -f, site/converted]
  - { id: start, uses: host.service, with: { action: start, start: [sh, start], stop: [sh, stop], status: [sh, status] } }
"#,
        )
    };
    // Each of its cases waits for real processes; the appends in between are those of the others.
    let report = Sweep::new(&case).every(2).run().unwrap_or_else(|failure| panic!("{failure}"));
    assert!(report.cases > 80, "{report:?}");
}

#[test]
fn the_sweep_of_files_notices_every_seeded_defect() {
    for mutation in Mutation::ALL {
        let failure = Sweep::new(&FILES).with_mutation(mutation).run();
        let failure = failure.expect_err(&format!("{mutation:?} was not noticed"));
        println!("{mutation:?}: {failure}");
    }
}
