//! Several commands started at once on one state directory.

use std::fs;
use std::time::{Duration, Instant};

use upgrade_core::entry::Entry;
use upgrade_core::journal::{FileJournal, Journal};

use crate::site::{Site, Upgrade, ends};
use crate::world::{Worlds, journals_are_right, observe, same};

/// Starts so many upgrades at once, round after round: one drives, and the others are refused.
fn one_drives(rounds: usize) {
    let site = Site::new();
    let worlds = Worlds::of(&site, Upgrade::Good);
    let mut refusals = 0;
    for round in 0..rounds {
        for count in [2, 3, 16] {
            site.reset("1.0.0");
            let mut arguments = site.run(Upgrade::Unconfirmed);
            let mut children: Vec<_> = (0..count).map(|_| site.command(&arguments).spawn().unwrap()).collect();
            // The one that drives waits to be confirmed; all the others end.
            let mut refused = 0;
            let end = Instant::now() + Duration::from_secs(60);
            while children.len() > 1 {
                assert!(Instant::now() < end, "round {round}: {} of {count} do not end", children.len());
                children.retain_mut(|child| match child.try_wait().unwrap() {
                    Some(status) => {
                        assert_eq!(status.code(), Some(7), "round {round}");
                        refused += 1;
                        false
                    }
                    None => true,
                });
                std::thread::sleep(Duration::from_millis(3));
            }
            assert_eq!(refused, count - 1);
            // Applied and not committed, it stands in the way of the next as well.
            arguments.push("--detach".into());
            assert_eq!(ends(&mut site.command(&arguments).spawn().unwrap()).unwrap().code(), Some(7));
            while site.latest().unwrap().as_deref() != Some("probation") {
                assert!(Instant::now() < end, "round {round}: it is not applied");
            }
            assert_eq!(site.upgrade(&["commit"]).unwrap().code, 0);
            assert_eq!(ends(&mut children[0]).unwrap().code(), Some(0));
            same(&worlds.after, &observe(&site), "after").unwrap_or_else(|why| panic!("round {round}: {why}"));
            journals_are_right(&site).unwrap_or_else(|why| panic!("round {round}: {why}"));
            assert_eq!(fs::read_dir(site.state().join("runs")).unwrap().count(), 1, "who is refused leaves no run");
            refusals += count - 1;
        }
    }
    println!("campaign: 2, 3 and 16 at once: {rounds} rounds, {refusals} refusals, 0 violations");
}

#[test]
fn of_several_at_once_one_drives_and_the_others_are_refused() {
    one_drives(3);
}

#[test]
#[ignore = "a campaign: scripts/test --full"]
fn campaign_of_several_at_once_one_drives() {
    one_drives(100);
}

/// Writes a pipeline and returns the arguments that carry it out.
fn pipeline(site: &Site, name: &str, steps: &str) -> [String; 2] {
    let file = site.root().join(format!("{name}.yaml"));
    fs::write(&file, format!("upgrade: {name}\nsteps:\n{steps}")).unwrap();
    ["run".into(), file.display().to_string()]
}

#[test]
fn who_waits_drives_when_the_others_have_ended() {
    let site = Site::new();
    site.reset("1.0.0");
    // A second driver would find the directory there.
    let steps = "- { id: enter, uses: host.command, with: { run: [mkdir, driving], undo: [rmdir, driving] } }\n\
                 - { id: work, uses: host.command, with: { run: [sleep, '0.05'], undo: ['true'] } }\n\
                 - { id: leave, uses: host.command, with: { run: [rmdir, driving], undo: [mkdir, driving] } }\n";
    let mut arguments = pipeline(&site, "shared", steps).to_vec();
    arguments.extend(["--wait".into(), "50s".into()]);
    let mut children: Vec<_> = (0..8).map(|_| site.command(&arguments).spawn().unwrap()).collect();
    let codes: Vec<_> = children.iter_mut().map(|child| ends(child).unwrap().code()).collect();
    assert_eq!(codes, [Some(0); 8]);
    journals_are_right(&site).unwrap();
}

#[test]
fn a_killed_run_frees_its_lease_and_blocks_its_name_and_its_targets() {
    let site = Site::new();
    site.reset("1.0.0");
    let file = site.path("shared.txt").display().to_string();
    let write = |path: &str| format!("- {{ id: file, uses: host.file, with: {{ path: '{path}', content: 'new' }} }}\n");
    let slow = "- { id: slow, uses: host.command, with: { run: [sleep, '30'], undo: ['true'] } }\n";
    let killed = pipeline(&site, "killed", &(write(&file) + slow));
    let mut child = site.command(&killed).spawn().unwrap();
    let end = Instant::now() + Duration::from_secs(30);
    while !fs::read_to_string(&file).is_ok_and(|text| text == "new") {
        assert!(Instant::now() < end, "the first step is not applied");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(ends(&mut site.command(&killed).spawn().unwrap()).unwrap().code(), Some(7), "its driver lives");
    child.kill().unwrap();
    let died = jiff::Timestamp::now();
    child.wait().unwrap();

    let run = |name: &str, steps: &str| {
        ends(&mut site.command(&pipeline(&site, name, steps)).spawn().unwrap()).unwrap().code()
    };
    // The next driver comes first: the lease is what it needs.
    let said = site.upgrade(&["rollback", "--yes"]).unwrap();
    assert_eq!(said.code, 0, "{said:?}");
    let journal = FileJournal::open(site.state()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let runs = runtime.block_on(journal.runs()).unwrap();
    let records = runtime.block_on(journal.load(&runs[0].run)).unwrap();
    let mut attached = records.iter().filter(|record| matches!(record.entry, Entry::DriverAttached { .. }));
    let freed = attached.next_back().unwrap().at.duration_since(died);
    assert!(freed.as_millis() < 1000, "the lease was free after {freed:?}");

    // Left open again, it blocks whoever has its name or its targets, and nobody else.
    let mut child = site.command(&killed).spawn().unwrap();
    let end = Instant::now() + Duration::from_secs(30);
    while !fs::read_to_string(&file).is_ok_and(|text| text == "new") {
        assert!(Instant::now() < end, "the first step is not applied");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let elsewhere = site.path("elsewhere.txt").display().to_string();
    assert_eq!(run("killed", &write(&elsewhere)), Some(7), "its name");
    assert_eq!(run("another", &write(&file)), Some(7), "its target");
    assert_eq!(run("stranger", &write(&elsewhere)), Some(0));
    // The strangers' run is the latest; the open one is meant.
    assert_eq!(site.upgrade(&["rollback", "--yes"]).unwrap().code, 0);
    assert!(!site.path("shared.txt").exists());
    journals_are_right(&site).unwrap();
}
