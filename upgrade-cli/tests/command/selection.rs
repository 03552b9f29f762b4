//! Which run is meant, and what the journal tells of it.

use crate::world::World;

#[test]
fn ids_may_be_shortened_as_long_as_they_are_clear() {
    let world = World::new();
    world.pipeline("now");
    world.upgrade(&["run", "upgrade.yaml"]).exits(0);
    world.upgrade(&["run", "upgrade.yaml", "--var", "text=newer"]).exits(0);
    let runs = world.runs();
    let ids: Vec<&str> = runs.iter().map(|run| run["run"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), 2);
    world.upgrade(&["status", ids[0]]).exits(0).says(ids[0]);
    let ambiguous = world.upgrade(&["status", &ids[0][..2]]).exits(2);
    assert!(ids.iter().all(|id| ambiguous.stderr.contains(id)), "{}", ambiguous.stderr);
    world.upgrade(&["status", "ffff"]).exits(2).says("no run's id starts with `ffff`");
    // What history prints is enough to be given back.
    let history = world.upgrade(&["history"]).exits(0).stdout;
    for (line, id) in history.lines().skip(1).zip(&ids) {
        let short = line.split_whitespace().next().unwrap();
        world.upgrade(&["status", short]).exits(0).says(id);
    }
    world.upgrade(&["status"]).exits(0).says(ids[1]);
}

#[test]
fn a_journal_is_exported_and_verified_line_by_line() {
    let world = World::new();
    world.pipeline("now");
    world.upgrade(&["run", "upgrade.yaml"]).exits(0);
    let run = world.reaches("committed");
    let records = world.upgrade(&["audit", "export"]).exits(0).objects();
    assert!(records.len() > 5 && records.iter().all(|record| record["run"] == run.as_str()));
    world.upgrade(&["audit", "verify"]).exits(0).says("whole");

    let journal = world.journal(&run);
    let text = std::fs::read_to_string(&journal).unwrap();
    std::fs::write(&journal, text.replacen("step_applied", "step_applies", 1)).unwrap();
    let ran = world.upgrade(&["audit", "verify"]).exits(1);
    let line = text.lines().position(|line| line.contains("step_applied")).unwrap() + 1;
    assert!(ran.stdout.contains(&format!("line {line}:")), "{}", ran.stdout);
    world.upgrade(&["status"]).exits(1).says("hint:");
}

#[test]
fn looking_leaves_nothing_behind() {
    let world = World::new();
    world.upgrade(&["history"]).exits(0).says("no runs yet");
    world.upgrade(&["audit", "verify"]).exits(0);
    world.upgrade(&["status"]).exits(2).says("hint:");
    assert!(!world.path(".upgrade").exists());
}

#[test]
fn the_state_directory_may_be_named_three_ways() {
    let world = World::new();
    world.pipeline("now");
    world.upgrade(&["run", "upgrade.yaml", "--state-dir", "one"]).exits(0);
    world.upgrade_with(&["run", "upgrade.yaml"], &[("UPGRADE_STATE_DIR", "two")]).exits(0);
    world.upgrade(&["run", "upgrade.yaml", "--journal", "file:three"]).exits(0);
    for name in ["one", "two", "three"] {
        assert!(world.path(name).join("runs").is_dir(), "{name}");
    }
    assert!(!world.path(".upgrade").exists());
}
