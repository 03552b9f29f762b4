//! `upgrade watch`.

use crate::world::{Driver, World};

#[test]
fn it_sees_a_probation_through_to_its_commit() {
    let world = World::new();
    world.pipeline("{ after: 1s }");
    world.upgrade(&["run", "upgrade.yaml", "--detach"]).exits(6);
    world.upgrade(&["watch", "--once"]).exits(0).says("is committed");
    world.is_new();
}

#[test]
fn it_rolls_back_what_nobody_confirmed() {
    let world = World::new();
    world.pipeline("{ confirm_within: 1s }");
    world.upgrade(&["run", "upgrade.yaml", "--detach"]).exits(6);
    world.upgrade(&["watch", "--once"]).exits(4).says("not confirmed");
    world.is_old();
}

#[test]
fn it_leaves_to_the_operator_what_is_held() {
    let world = World::new();
    world.pipeline("{ confirm_within: 1h }");
    world.upgrade(&["run", "upgrade.yaml", "--detach"]).exits(6);
    world.upgrade(&["stop", "--reason", "wait"]).exits(0);
    world.upgrade(&["watch", "--once"]).exits(0);
    world.reaches("held");
}

#[test]
fn it_leaves_to_its_driver_what_is_driven_and_takes_it_up_when_that_dies() {
    let world = World::new();
    world.pipeline("{ after: 2s }");
    let driver = world.start(&["run", "upgrade.yaml"]);
    world.reaches("probation");
    let watch = world.start(&["watch", "--every", "100ms", "--on-interrupted", "rollback"]);
    driver.signal("-KILL");
    driver.ends();
    world.reaches("committed");
    world.is_new();
    watch.signal("-TERM");
    assert_eq!(watch.ends(), Some(0));
}

#[test]
fn it_can_be_stopped_without_holding_what_it_drives() {
    let world = World::new();
    world.pipeline("{ confirm_within: 1h }");
    world.upgrade(&["run", "upgrade.yaml", "--detach"]).exits(6);
    let watch = world.start(&["watch", "--every", "50ms"]);
    // The watch has it when another process is refused.
    while world.upgrade(&["resume", "--detach"]).code != 7 {}
    watch.signal("-TERM");
    assert_eq!(watch.ends(), Some(0));
    world.reaches("probation");
    world.upgrade(&["commit"]).exits(0);
}

#[test]
fn its_unit_names_this_program_and_this_state() {
    let world = World::new();
    let unit = world.upgrade(&["watch", "--unit", "--state-dir", "my state"]).exits(0).stdout;
    let start = unit.lines().find(|line| line.starts_with("ExecStart=")).unwrap();
    assert!(start.contains("upgrade") && start.contains("my state\" watch"), "{start}");
}

/// Writes a pipeline whose third step takes two seconds, and starts it.
fn started_slowly(world: &World) -> Driver {
    world.pipeline("now");
    let text = world.read("upgrade.yaml").unwrap();
    let slow = "- { id: slow, uses: host.command, with: { run: [sleep, \"2\"], undo: [\"true\"] } }\ncommit:";
    world.write("upgrade.yaml", &text.replace("commit:", slow));
    let driver = world.start(&["run", "upgrade.yaml"]);
    while world.read("made.txt").is_none() {}
    world.reaches("applying");
    driver
}

#[test]
fn it_takes_nothing_from_a_driver_that_lives() {
    let world = World::new();
    let driver = started_slowly(&world);
    let watched = world.upgrade(&["watch", "--once", "--on-interrupted", "rollback", "--output", "json"]).exits(0);
    assert_eq!(watched.objects().len(), 2, "{}", watched.stdout);
    assert_eq!(driver.ends(), Some(0));
    world.is_new();
}

#[test]
fn it_does_with_what_a_crash_cut_off_as_it_is_told() {
    for (what, code) in [("rollback", 4), ("leave", 0), ("resume", 0)] {
        let world = World::new();
        let driver = started_slowly(&world);
        driver.signal("-KILL");
        driver.ends();
        world.upgrade(&["watch", "--once", "--on-interrupted", what]).exits(code);
        match what {
            "rollback" => world.is_old(),
            "leave" => drop(world.reaches("applying")),
            _ => {
                world.reaches("committed");
                world.is_new();
            }
        }
    }
}
