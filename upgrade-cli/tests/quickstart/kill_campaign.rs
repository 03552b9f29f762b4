//! The command killed at every call that changes a file, and at random instants, forward and on
//! the way back; then resumed or rolled back: the world is one of the two.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::faulty::{self, tampered};
use crate::site::{Site, Upgrade, ends};
use crate::world::{Worlds, found_contents_are_kept, journals_are_right, observe, same};

/// All system calls that change a file.
const WRITING: &[&str] = &[
    "mkdir",
    "write",
    "pwrite64",
    "fsync",
    "fdatasync",
    "rename",
    "renameat2",
    "unlink",
    "unlinkat",
    "rmdir",
    "ftruncate",
    "fallocate",
    "symlink",
    "chmod",
    "fchmod",
    "fchown",
];

/// When the command dies.
#[derive(Debug, Clone, Copy)]
enum Death {
    /// At the n-th call of this name that a thread makes.
    Call(&'static str, u32),
    /// When so much of its ordinary time, in thousandths, is over.
    At(u32),
}

/// Which command dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Dying {
    Run(Upgrade),
    /// The rollback of an upgrade that is applied and not yet committed.
    Rollback,
}

/// What a person does about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Resume,
    RollBack,
    /// Resumes; that dies as well, and the next one goes on.
    ResumeTwice,
}

#[derive(Debug, Clone, Copy)]
struct Point {
    dying: Dying,
    death: Death,
    then: Then,
}

impl Dying {
    const ALL: [Self; 3] = [Self::Run(Upgrade::Good), Self::Run(Upgrade::Bad), Self::Rollback];

    fn upgrade(self) -> Upgrade {
        match self {
            Self::Run(upgrade) => upgrade,
            Self::Rollback => Upgrade::Unconfirmed,
        }
    }

    /// Brings the site to where the command that dies begins; returns its arguments.
    fn begin(self, site: &Site) -> Result<Vec<String>, String> {
        site.reset(self.upgrade().versions().0);
        let mut run = site.run(self.upgrade());
        if self != Self::Rollback {
            return Ok(run);
        }
        run.push("--detach".into());
        let code = ends(&mut site.command(&run).spawn().map_err(|error| error.to_string())?)?.code();
        if code != Some(6) {
            return Err(format!("the upgrade that is to be rolled back ended with {code:?}"));
        }
        Ok(["rollback", "--yes"].map(str::to_owned).to_vec())
    }
}

/// Holds a site with what its upgrades lead to when nobody disturbs them.
struct Bench {
    site: Site,
    good: Worlds,
    bad: Worlds,
    /// How long each command takes that nobody kills.
    takes: BTreeMap<Dying, Duration>,
}

impl Bench {
    fn new() -> Self {
        let site = Site::new();
        let takes = Dying::ALL.map(|dying| {
            let arguments = dying.begin(&site).unwrap();
            let began = Instant::now();
            ends(&mut site.command(&arguments).spawn().unwrap()).unwrap();
            (dying, began.elapsed())
        });
        let (good, bad) = (Worlds::of(&site, Upgrade::Good), Worlds::of(&site, Upgrade::Bad));
        Self { site, good, bad, takes: takes.into() }
    }

    /// Finds every call at which the command can die.
    fn calls(&self) -> Vec<(Dying, Death)> {
        let mut calls = Vec::new();
        for dying in Dying::ALL {
            let arguments = dying.begin(&self.site).unwrap();
            let counted = faulty::count(&self.site.root().join("strace.log"), WRITING, |under| {
                self.site.command_under(under, &arguments).status().unwrap();
            });
            println!("{dying:?}: {counted:?}");
            for name in WRITING {
                let times = counted.get(name).copied().unwrap_or_default();
                calls.extend((1..=times).map(|nth| (dying, Death::Call(name, nth))));
            }
        }
        calls
    }

    /// Lives through one death; tells whether it came before the command had ended.
    fn live_through(&self, point: Point) -> Result<bool, String> {
        let site = &self.site;
        let arguments = point.dying.begin(site)?;
        let died = match point.death {
            Death::Call(name, nth) => {
                let mut command = site.command_under(&tampered(name, &nth.to_string(), "signal=KILL"), &arguments);
                let status = ends(&mut command.spawn().map_err(|error| error.to_string())?)?;
                if status.signal().is_none() {
                    self.ended_by_itself(point.dying, status.code())?;
                }
                status.signal().is_some()
            }
            Death::At(thousandths) => {
                let child = site.command(&arguments).spawn().map_err(|error| error.to_string())?;
                kill_after(child, self.takes[&point.dying] * thousandths / 1000)?
            }
        };
        self.goes_on(point)?;
        journals_are_right(site)?;
        Ok(died)
    }

    fn ended_by_itself(&self, dying: Dying, code: Option<i32>) -> Result<(), String> {
        let expected = if dying == Dying::Run(Upgrade::Bad) { 4 } else { 0 };
        if code == Some(expected) { Ok(()) } else { Err(format!("nobody killed it, and it ended with {code:?}")) }
    }

    /// Does what a person does who finds the command dead, and looks at the world.
    fn goes_on(&self, point: Point) -> Result<(), String> {
        let site = &self.site;
        let worlds = if point.dying.upgrade() == Upgrade::Bad { &self.bad } else { &self.good };
        let Some(found) = site.latest()? else {
            // Nothing had begun: nothing may have changed, and nothing stands in the way.
            same(&worlds.before, &observe(site), "before")?;
            let code = ends(&mut site.command(&site.run(point.dying.upgrade())).spawn().unwrap())?.code();
            self.ended_by_itself(point.dying, code)?;
            return same(&worlds.after, &observe(site), "after");
        };
        match found.as_str() {
            "committed" => same(&worlds.after, &observe(site), "after")?,
            "rolled_back" => same(&worlds.before, &observe(site), "before")?,
            _ => {
                if point.then == Then::ResumeTwice {
                    let child = site.command(&["resume", "--detach"]).spawn().map_err(|error| error.to_string())?;
                    kill_after(child, self.takes[&point.dying] / 3)?;
                }
                self.ends_well(point, &found, worlds)?;
            }
        }
        // Whatever it was, it is over, and there is nothing to go on with.
        self.expect(&["resume", "--detach"], &[7])?;
        let died_at_its_end = matches!(found.as_str(), "committed" | "rolled_back");
        if (died_at_its_end || point.then == Then::ResumeTwice) && found_contents_are_kept(site) {
            // The next run removes what such a death left.
            self.expect(&["run", &site.run_nothing()], &[0])?;
        }
        Ok(())
    }

    fn ends_well(&self, point: Point, found: &str, worlds: &Worlds) -> Result<(), String> {
        let site = &self.site;
        if point.then == Then::RollBack {
            let said = site.upgrade(&["rollback", "--yes"])?;
            return match said.code {
                // Before anything was changed there is nothing to put back, and it says so.
                0 => same(&worlds.before, &observe(site), "before"),
                7 if found == "committing" => {
                    self.expect(&["resume"], &[0])?;
                    same(&worlds.after, &observe(site), "after")
                }
                _ => Err(format!("found {found}; `upgrade rollback` said {said:?}")),
            };
        }
        let said = site.upgrade(&["resume", "--detach"])?;
        match (said.code, point.dying) {
            (0, Dying::Run(Upgrade::Good)) => same(&worlds.after, &observe(site), "after"),
            (4, Dying::Run(Upgrade::Bad) | Dying::Rollback) => same(&worlds.before, &observe(site), "before"),
            // The demand to roll back had not become durable: it is asked again.
            (6, Dying::Rollback) => {
                same(&worlds.after, &observe(site), "after")?;
                self.expect(&["rollback", "--yes"], &[0])?;
                same(&worlds.before, &observe(site), "before")
            }
            // The run had ended meanwhile, in the resume that died.
            (7, _) if point.then == Then::ResumeTwice => match (site.latest()?.as_deref(), point.dying) {
                (Some("committed"), Dying::Run(Upgrade::Good)) => same(&worlds.after, &observe(site), "after"),
                (Some("rolled_back"), Dying::Run(Upgrade::Bad) | Dying::Rollback) => {
                    same(&worlds.before, &observe(site), "before")
                }
                (state, _) => Err(format!("refused, and the run is {state:?}: {said:?}")),
            },
            _ => Err(format!("found {found}; `upgrade resume` said {said:?}")),
        }
    }

    fn expect(&self, arguments: &[&str], codes: &[i32]) -> Result<(), String> {
        let said = self.site.upgrade(arguments)?;
        if codes.contains(&said.code) { Ok(()) } else { Err(format!("`{}` said {said:?}", arguments.join(" "))) }
    }
}

/// Kills a child after a while; tells whether it still ran.
fn kill_after(mut child: Child, delay: Duration) -> Result<bool, String> {
    std::thread::sleep(delay);
    // A child that is over is not waited for yet: its number is still its own.
    let _ = child.kill();
    Ok(ends(&mut child)?.signal().is_some())
}

/// Lives through points, two at a time; prints and returns how many deaths there were.
fn live_through(points: &[Point], label: &str) -> usize {
    let next = AtomicUsize::new(0);
    let deaths = AtomicUsize::new(0);
    let violations = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let bench = Bench::new();
                while let Some(point) = points.get(next.fetch_add(1, Ordering::Relaxed)) {
                    match bench.live_through(*point) {
                        Ok(died) => drop(deaths.fetch_add(usize::from(died), Ordering::Relaxed)),
                        Err(why) => {
                            println!("VIOLATION {point:?}: {why}");
                            violations.lock().unwrap().push(format!("{point:?}: {why}"));
                        }
                    }
                }
            });
        }
    });
    let violations = violations.into_inner().unwrap();
    let deaths = deaths.into_inner();
    println!("campaign: {label}: {} points, {deaths} deaths, {} violations", points.len(), violations.len());
    assert!(violations.is_empty(), "{}", violations.join("\n"));
    deaths
}

/// Makes numbers that look random and are the same for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % end as u64).unwrap()
    }
}

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is not a number")))
}

fn shard<T: Copy>(all: &[T]) -> Vec<T> {
    let (shard, shards) = (number("UPGRADE_CAMPAIGN_SHARD", 0), number("UPGRADE_CAMPAIGN_SHARDS", 1));
    all.iter().copied().skip(shard).step_by(shards).collect()
}

fn at_random(random: &mut Random, count: usize) -> Vec<Point> {
    let thens = [Then::Resume, Then::RollBack, Then::ResumeTwice];
    (0..count)
        .map(|_| Point {
            dying: Dying::ALL[random.below(3)],
            death: Death::At(u32::try_from(random.below(1000)).unwrap()),
            then: thens[random.below(3)],
        })
        .collect()
}

#[test]
fn killed_at_a_sample_of_instants_it_ends_in_one_of_two_worlds() {
    let seed = number("UPGRADE_SEED", std::process::id() as usize);
    println!("UPGRADE_SEED={seed}");
    let mut random = Random(seed as u64);
    let mut points = at_random(&mut random, 6);
    if faulty::is_possible() {
        let calls = Bench::new().calls();
        for then in [Then::Resume, Then::RollBack].into_iter().cycle().take(12) {
            let (dying, death) = calls[random.below(calls.len())];
            points.push(Point { dying, death, then });
        }
    }
    live_through(&points, "a sample");
}

#[test]
#[ignore = "a campaign: scripts/test --full"]
fn campaign_killed_at_every_call_sharded() {
    if !faulty::is_possible() {
        return;
    }
    let mut points = Vec::new();
    for (dying, death) in Bench::new().calls() {
        for then in [Then::Resume, Then::RollBack] {
            points.push(Point { dying, death, then });
        }
    }
    live_through(&shard(&points), "killed at calls");
}

#[test]
#[ignore = "a campaign: scripts/test --full"]
fn campaign_killed_at_random_instants_sharded() {
    let seed = number("UPGRADE_SEED", 1);
    let points = at_random(&mut Random(seed as u64), number("UPGRADE_KILLS", 300));
    live_through(&shard(&points), "killed at random instants");
}
