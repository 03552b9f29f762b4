//! Two processes, one run: requests to a living driver, signals, and a driver that dies.

use std::time::{Duration, Instant};

use upgrade_core::journal::Journal;
use upgrade_core::journal::file::FileJournal;

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

/// Writes a pipeline whose second step is slow.
fn slow(world: &World) {
    world.pipeline("now");
    let text = world.read("upgrade.yaml").unwrap();
    let slow = "- { id: slow, uses: host.command, with: { run: [sleep, \"60\"], undo: [\"true\"] } }\ncommit:";
    world.write("upgrade.yaml", &text.replace("commit:", slow));
}

/// Waits until the slow step has begun.
fn reaches_slow_step(world: &World) {
    let begun = |world: &World| {
        let records = world.upgrade(&["audit", "export"]).exits(0).objects();
        let prepared = |record: &serde_json::Value| {
            record["entry"]["type"] == "step_prepared" && record["entry"]["step"] == "slow"
        };
        records.iter().any(prepared)
    };
    world.reaches("applying");
    while !begun(world) {}
}

#[test]
fn a_second_interrupt_cancels_the_step_and_rolls_back() {
    let world = World::new();
    slow(&world);
    let driver = world.start(&["run", "upgrade.yaml"]);
    reaches_slow_step(&world);
    driver.signal("-INT");
    // Signals of one kind that come together are one.
    std::thread::sleep(Duration::from_millis(300));
    driver.signal("-INT");
    assert_eq!(driver.ends(), Some(4));
    world.is_old();
}

#[test]
fn a_third_interrupt_is_a_crash_that_can_be_rolled_back() {
    let world = World::new();
    slow(&world);
    let text = world.read("upgrade.yaml").unwrap();
    // Its undo is slow as well, so that the rollback of the second interrupt is still going on.
    world.write("upgrade.yaml", &text.replace("undo: [\"true\"]", "undo: [sleep, \"2\"]"));
    let driver = world.start(&["run", "upgrade.yaml"]);
    reaches_slow_step(&world);
    for _ in 0..3 {
        driver.signal("-INT");
        std::thread::sleep(Duration::from_millis(300));
    }
    assert_eq!(driver.ends(), None);
    world.upgrade(&["status"]).exits(0).says("nobody drives it");
    world.upgrade(&["resume"]).exits(4);
    world.is_old();
}

#[test]
fn a_driver_that_dies_while_it_is_followed_is_told_of() {
    let world = World::new();
    slow(&world);
    let driver = world.start(&["run", "upgrade.yaml"]);
    reaches_slow_step(&world);
    let id = world.reaches("applying");
    std::thread::scope(|scope| {
        let stop = scope.spawn(|| world.upgrade(&["stop", &id]));
        while !world.upgrade(&["audit", "export"]).exits(0).stdout.contains("request_answered") {}
        driver.signal("-KILL");
        stop.join().unwrap().exits(1).says("is gone").says("upgrade resume");
    });
    world.upgrade(&["rollback"]).exits(0);
    world.is_old();
}

#[test]
fn a_request_that_was_answered_before_a_crash_is_not_taken_up_again() {
    let world = World::new();
    world.pipeline("{ confirm_within: 1h }");
    world.upgrade(&["run", "upgrade.yaml", "--detach"]).exits(6);
    world.upgrade(&["stop"]).exits(0);
    let run = world.reaches("held");
    // The crash came after the answer was durable and before the request was removed.
    let records = world.upgrade(&["audit", "export"]).exits(0).objects();
    let received = records.iter().find(|record| record["entry"]["type"] == "request_received").unwrap();
    let request = serde_json::from_value(received["entry"]["request"].clone()).unwrap();
    let journal = FileJournal::open(world.path(".upgrade")).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let run = run.parse().unwrap();
    runtime.block_on(journal.post(&run, &request)).unwrap();

    let driver = world.start(&["resume"]);
    let end = Instant::now() + Duration::from_secs(30);
    while !runtime.block_on(journal.requests(&run)).unwrap().is_empty() {
        assert!(Instant::now() < end, "it is never removed");
    }
    world.reaches("probation");
    world.upgrade(&["rollback"]).exits(0);
    assert_eq!(driver.ends(), Some(4));
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
