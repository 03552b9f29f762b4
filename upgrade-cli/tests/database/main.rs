//! The upgrades of the database example killed at random instants, then resumed or rolled back:
//! code, schema, data and configuration are all old or all new.

#![cfg(test)]

mod concurrent;
mod site;

use std::time::{Duration, Instant};

use site::{Site, Upgrade};

/// What a person does who finds the command dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Resume,
    RollBack,
}

/// Holds the site with what its upgrades lead to when nobody disturbs them.
struct Bench {
    site: Site,
    before: String,
    after: String,
    takes: Duration,
}

impl Bench {
    fn new() -> Option<Self> {
        let site = Site::new()?;
        site.reset();
        let before = site.observe();
        let began = Instant::now();
        let said = site.upgrade(&site.run(Upgrade::Good));
        assert_eq!(said.status.code(), Some(0), "{said:?}");
        let takes = began.elapsed();
        let after = site.observe();
        assert_ne!(before, after);
        Some(Self { site, before, after, takes })
    }

    /// Lives through one death; tells whether it came before the command had ended.
    fn live_through(&self, upgrade: Upgrade, thousandths: u32, then: Then) -> bool {
        let name = format!("{upgrade:?} killed at {thousandths} ‰, then {then:?}");
        let site = &self.site;
        site.reset();
        let mut child = site.command(&site.run(upgrade)).spawn().unwrap();
        std::thread::sleep(self.takes * thousandths / 1000);
        let died = child.try_wait().unwrap().is_none();
        child.kill().unwrap();
        child.wait().unwrap();
        let rolled_back = match site.state_of_the_run() {
            // It died before the run was made: nothing was changed.
            None => true,
            Some(state) if state == "committed" => false,
            Some(state) if state == "rolled_back" => true,
            Some(_) => {
                let arguments: &[&str] = match then {
                    Then::Resume => &["resume"],
                    Then::RollBack => &["rollback", "--yes"],
                };
                let said = site.upgrade(&arguments.iter().map(ToString::to_string).collect::<Vec<_>>());
                match (said.status.code(), site.state_of_the_run().as_deref()) {
                    (Some(0), Some("committed")) => false,
                    (Some(0 | 4), Some("rolled_back")) => true,
                    // It died while it was checking: there is nothing to roll back.
                    (Some(0), Some("rejected")) if then == Then::RollBack => true,
                    // Past the point of no return, a rollback is refused; only forward is left.
                    (Some(_), Some("committing")) => {
                        let said = site.upgrade(&["resume".to_owned()]);
                        assert_eq!(said.status.code(), Some(0), "{name}: {said:?}");
                        false
                    }
                    (code, state) => panic!("{name}: {code:?}, {state:?}: {said:?}"),
                }
            }
        };
        if upgrade == Upgrade::Bad {
            assert!(rolled_back, "{name}");
        }
        let expected = if rolled_back { &self.before } else { &self.after };
        let found = site.observe();
        assert!(found == *expected, "{name}: the world is\n{found}\nwhere it should be\n{expected}");
        assert_eq!(site.services(), 1, "{name}");
        died
    }

    fn campaign(&self, points: u32, seed: u32) {
        let mut deaths = 0;
        for point in 0..points {
            // Weyl's sequence: instants spread evenly, whatever their number.
            let thousandths = seed.wrapping_add(point).wrapping_mul(618) % 1000;
            let upgrade = if point % 3 == 2 { Upgrade::Bad } else { Upgrade::Good };
            let then = if point % 2 == 0 { Then::Resume } else { Then::RollBack };
            deaths += u32::from(self.live_through(upgrade, thousandths, then));
        }
        println!("campaign: {points} points, {deaths} deaths, 0 violations");
        assert!(deaths > 0);
    }
}

#[test]
fn killed_at_some_instants_it_is_all_old_or_all_new() {
    let Some(bench) = Bench::new() else { return };
    bench.campaign(9, std::process::id());
}

#[test]
#[ignore = "long: scripts/test --full"]
fn campaign_killed_at_random_instants_sharded() {
    let Some(bench) = Bench::new() else { return };
    let shard = std::env::var("UPGRADE_CAMPAIGN_SHARD").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    bench.campaign(60, shard * 1009);
}
