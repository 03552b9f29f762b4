//! Every row of the table of exit statuses.

use crate::world::World;

#[test]
fn zero_when_it_is_done() {
    let world = World::new();
    world.pipeline("now");
    world.upgrade(&["run", "upgrade.yaml"]).exits(0).says("is committed");
    world.is_new();
    world.upgrade(&["status"]).exits(0).says("committed");
}

#[test]
fn one_when_the_journal_cannot_be_written() {
    let world = World::new();
    world.pipeline("now");
    world.write("state", "a file, not a directory");
    world.upgrade(&["run", "upgrade.yaml", "--state-dir", "state"]).exits(1).says("hint:");
    world.is_old();
}

#[test]
fn two_for_wrong_usage_and_for_an_invalid_pipeline() {
    let world = World::new();
    world.upgrade(&["run"]).exits(2);
    world.upgrade(&["frobnicate"]).exits(2);
    world.upgrade(&["run", "missing.yaml"]).exits(2).says("missing.yaml");
    world.write("wrong.yaml", "upgrade: notes\nsteps:\n- { id: a, uses: host.fiel, with: {} }\n");
    for command in ["validate", "plan", "run"] {
        let ran = world.upgrade(&[command, "wrong.yaml"]).exits(2);
        for part in ["wrong.yaml:3", "host.fiel", "^", "host.file"] {
            assert!(ran.stderr.contains(part), "no `{part}` in {}", ran.stderr);
        }
    }
    world.pipeline("now");
    world.upgrade(&["run", "upgrade.yaml", "--journal", "mysql://db"]).exits(2).says("mysql");
    #[cfg(not(feature = "postgres"))]
    world.upgrade(&["run", "upgrade.yaml", "--journal", "postgres://db"]).exits(2).says("--features postgres");
    world.upgrade(&["run", "upgrade.yaml", "--var", "nothing"]).exits(2).says("NAME=VALUE");
    assert!(!world.path(".upgrade").exists());
}

#[test]
fn three_when_a_check_fails_before_anything_is_changed() {
    let world = World::new();
    world.pipeline("now");
    let text = world.read("upgrade.yaml").unwrap();
    let check = "checks:\n- { id: space, uses: host.disk, with: { path: ., free: 900000TiB } }\n";
    world.write("upgrade.yaml", &format!("{text}{check}"));
    world.upgrade(&["plan", "upgrade.yaml"]).exits(3).says("space");
    world.upgrade(&["run", "upgrade.yaml"]).exits(3).says("nothing was changed");
    world.is_old();
}

#[test]
fn four_when_a_step_fails_and_everything_is_back() {
    let world = World::new();
    world.pipeline("now");
    let text = world.read("upgrade.yaml").unwrap().replace("made.txt", "missing/made.txt");
    world.write("upgrade.yaml", &text);
    world
        .upgrade(&["run", "upgrade.yaml"])
        .exits(4)
        .says("everything is as it was")
        .says("because: step `made` failed");
    world.is_old();
}

#[test]
fn five_when_an_operator_must_decide_and_zero_when_it_is_decided() {
    let world = World::new();
    world.pipeline("{ confirm_within: 1h }");
    world.upgrade(&["run", "upgrade.yaml", "--detach"]).exits(6);
    world.write("kept.txt", "somebody else's\n");
    world.upgrade(&["rollback"]).exits(5).says("changed by somebody else").says("resolve");
    let run = world.reaches("stuck");
    world.upgrade(&["resume"]).exits(7);
    world.upgrade(&["resolve", &run, "made", "--skip", "--reason", "wrong step"]).exits(7);
    world.upgrade(&["resolve", &run, "kept", "--skip"]).exits(2);
    world.upgrade(&["resolve", &run, "kept", "--reason", "which way?"]).exits(2);
    world.upgrade(&["resolve", &run, "kept", "--retry", "--reason", "not mended"]).exits(5);
    world.write("kept.txt", "old\n");
    world.upgrade(&["resolve", &run, "kept", "--skip", "--reason", "put back by hand"]).exits(0);
    world.is_old();
}

#[test]
fn zero_when_a_stuck_step_is_abandoned_as_asked() {
    let world = World::new();
    world.pipeline("{ confirm_within: 1h }");
    world.upgrade(&["run", "upgrade.yaml", "--detach"]).exits(6);
    world.write("kept.txt", "somebody else's\n");
    world.upgrade(&["rollback"]).exits(5);
    let run = world.reaches("stuck");
    // Without a terminal nothing is asked, and nothing hangs.
    world.upgrade(&["resolve", &run, "kept", "--abandon", "--reason", "keep theirs"]).exits(0).says("kept");
    assert_eq!(world.read("kept.txt").as_deref(), Some("somebody else's\n"));
    assert_eq!(world.read("made.txt"), None);
}

#[test]
fn six_while_it_can_be_resumed_and_then_zero() {
    let world = World::new();
    world.pipeline("{ confirm_within: 1h }");
    world.upgrade(&["run", "upgrade.yaml", "--detach"]).exits(6).says("upgrade commit");
    world.is_new();
    world.upgrade(&["commit"]).exits(0);
    world.upgrade(&["rollback"]).exits(7).says("no run is open");
    world.is_new();
}

#[test]
fn seven_while_another_run_is_open_and_for_another_definition() {
    let world = World::new();
    world.pipeline("{ confirm_within: 1h }");
    world.upgrade(&["run", "upgrade.yaml", "--detach"]).exits(6);
    world.upgrade(&["run", "upgrade.yaml"]).exits(7).says("hint:");
    world.upgrade(&["plan", "upgrade.yaml"]).exits(7).says("would be refused");
    let changed = ["resume", "--file", "upgrade.yaml", "--var", "text=newer", "--detach"];
    world.upgrade(&changed).exits(7);
    world.upgrade(&["resume", "--var", "text=newer"]).exits(2).says("--file");
    world.upgrade(&["rollback"]).exits(0);
    world.is_old();
}

#[test]
fn ten_where_a_plan_has_something_to_do() {
    let world = World::new();
    world.pipeline("now");
    world.upgrade(&["plan", "upgrade.yaml"]).exits(0).says("2 of 2 steps");
    world.upgrade(&["plan", "upgrade.yaml", "--detailed-exitcode"]).exits(10);
    assert!(!world.path(".upgrade").exists(), "a plan leaves nothing behind");
    world.upgrade(&["run", "upgrade.yaml"]).exits(0);
    world.upgrade(&["plan", "upgrade.yaml", "--detailed-exitcode"]).exits(0).says("unchanged");
}
