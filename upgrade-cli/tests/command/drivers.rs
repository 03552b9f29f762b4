//! Two processes, one run: requests to a living driver, signals, and a driver that dies.

use crate::world::World;

#[test]
fn a_living_driver_rolls_back_when_another_process_asks() {
    let world = World::new();
    world.pipeline("{ confirm_within: 1h }");
    let driver = world.start(&["run", "upgrade.yaml"]);
    world.reaches("probation");
    world.upgrade(&["rollback", "--reason", "orders fail"]).exits(0).says("orders fail");
    assert_eq!(driver.ends(), Some(4));
    world.is_old();
}

#[test]
fn a_living_driver_commits_when_another_process_confirms() {
    let world = World::new();
    world.pipeline("{ confirm_within: 1h }");
    let driver = world.start(&["run", "upgrade.yaml"]);
    world.reaches("probation");
    world.upgrade(&["commit", "--detach"]).exits(0);
    assert_eq!(driver.ends(), Some(0));
    world.is_new();
}

#[test]
fn a_living_driver_holds_when_another_process_stops_it() {
    let world = World::new();
    world.pipeline("{ confirm_within: 1h }");
    let driver = world.start(&["run", "upgrade.yaml"]);
    world.reaches("probation");
    world.upgrade(&["run", "upgrade.yaml"]).exits(7);
    world.upgrade(&["resume"]).exits(7);
    world.upgrade(&["stop", "--reason", "not now"]).exits(0).says("not now");
    assert_eq!(driver.ends(), Some(6));
    world.upgrade(&["status"]).exits(0).says("held");
    world.upgrade(&["resume", "--detach"]).exits(6);
    world.upgrade(&["commit"]).exits(0);
    world.is_new();
}

#[test]
fn one_interrupt_holds_and_two_roll_back() {
    let world = World::new();
    world.pipeline("{ confirm_within: 1h }");
    let driver = world.start(&["run", "upgrade.yaml"]);
    world.reaches("probation");
    driver.signal("-INT");
    assert_eq!(driver.ends(), Some(6));
    world.reaches("held");

    let world = World::new();
    world.pipeline("{ confirm_within: 1h }");
    let driver = world.start(&["run", "upgrade.yaml"]);
    world.reaches("probation");
    driver.signal("-TERM");
    assert_eq!(driver.ends(), Some(6));
    world.upgrade(&["rollback"]).exits(0);
    world.is_old();
}

#[test]
fn a_driver_that_dies_frees_its_run() {
    let world = World::new();
    world.pipeline("{ confirm_within: 1h }");
    let driver = world.start(&["run", "upgrade.yaml"]);
    let run = world.reaches("probation");
    driver.signal("-KILL");
    assert_eq!(driver.ends(), None);
    world.upgrade(&["status"]).exits(0).says("nobody watches it");
    world.upgrade(&["resume", &run, "--detach"]).exits(6);
    world.upgrade(&["commit"]).exits(0);
    world.is_new();
}

#[test]
fn status_follows_a_run_to_its_end() {
    let world = World::new();
    world.pipeline("{ after: 1s }");
    let driver = world.start(&["run", "upgrade.yaml"]);
    world.reaches("probation");
    let followed = world.upgrade(&["status", "--watch"]).exits(0).says("is committed");
    assert!(followed.stderr.contains("kept"), "{}", followed.stderr);
    assert_eq!(driver.ends(), Some(0));
}
