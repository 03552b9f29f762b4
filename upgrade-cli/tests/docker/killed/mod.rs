//! The command killed in the middle of steps on an engine, at random instants and at its writing
//! calls, forward and on the way back; then resumed or rolled back: the engine is as before or as after.

mod scene;

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use scene::{Scene, Upgrade, What};

use crate::faulty;

/// The calls by which the command writes to its journal, to files and to the engine's socket.
const WRITING: &[&str] = &["pwrite64", "fdatasync", "rename", "write", "writev", "sendto"];

/// When the command dies.
#[derive(Debug, Clone, Copy)]
enum Death {
    /// When so much of its ordinary time, in thousandths, is over.
    At(u32),
    /// At the n-th call of this name that a thread makes.
    Call(&'static str, u32),
}

/// What a person does who finds it dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Resume,
    RollBack,
}

/// Which command dies: a run, or with [`Upgrade::Unconfirmed`] the rollback of one that was applied.
#[derive(Debug, Clone, Copy)]
struct Point {
    dying: Upgrade,
    death: Death,
    then: Then,
}

/// Holds a scene with what its upgrade leads to when nobody disturbs it.
struct Bench {
    scene: Scene,
    before: String,
    after: String,
    /// How long each command takes that nobody kills.
    takes: BTreeMap<Upgrade, Duration>,
}

impl Bench {
    fn new(what: What) -> Option<Self> {
        let scene = Scene::new(what)?;
        scene.reset();
        let before = scene.observe();
        let mut bench = Self { scene, before, after: String::new(), takes: BTreeMap::new() };
        for dying in [Upgrade::Good, Upgrade::Bad, Upgrade::Unconfirmed] {
            bench.scene.reset();
            let arguments = bench.begin(dying);
            let began = Instant::now();
            let said = bench.scene.upgrade(&arguments);
            bench.takes.insert(dying, began.elapsed());
            let expected = if dying == Upgrade::Bad { 4 } else { 0 };
            assert_eq!(said.status.code(), Some(expected), "{}", String::from_utf8_lossy(&said.stderr));
            let found = bench.scene.observe();
            match dying {
                Upgrade::Good => bench.after = found,
                Upgrade::Bad | Upgrade::Unconfirmed => assert_eq!(found, bench.before, "{dying:?}"),
            }
        }
        assert_ne!(bench.before, bench.after);
        Some(bench)
    }

    /// Brings the scene to where the command that dies begins; returns its arguments.
    fn begin(&self, dying: Upgrade) -> Vec<String> {
        let run = ["run".to_owned(), self.scene.pipeline(dying)];
        if dying != Upgrade::Unconfirmed {
            return run.to_vec();
        }
        let said = self.scene.upgrade(&["run", &run[1], "--detach"]);
        assert_eq!(said.status.code(), Some(6), "{}", String::from_utf8_lossy(&said.stderr));
        ["rollback", "--yes"].map(str::to_owned).to_vec()
    }

    /// Finds every call at which the command can die.
    fn calls(&self) -> Vec<(Upgrade, Death)> {
        let mut all = Vec::new();
        for dying in [Upgrade::Good, Upgrade::Bad, Upgrade::Unconfirmed] {
            self.scene.reset();
            let arguments = self.begin(dying);
            let counted = faulty::count(&self.scene.path("strace.log"), WRITING, |under| {
                self.scene.command(under, &arguments).status().unwrap();
            });
            println!("{:?} {dying:?}: {counted:?}", self.scene.what);
            for (name, times) in counted {
                all.extend((1..=times).map(|nth| (dying, Death::Call(name, nth))));
            }
        }
        all
    }

    /// Lives through one death; tells whether it came before the command had ended.
    fn live_through(&self, point: Point) -> Result<bool, String> {
        let scene = &self.scene;
        scene.reset();
        let found = scene.serving();
        let arguments = self.begin(point.dying);
        let status = match point.death {
            Death::At(thousandths) => {
                let mut child = scene.command(&[], &arguments).spawn().unwrap();
                std::thread::sleep(self.takes[&point.dying] * thousandths / 1000);
                // A child that is over is not waited for yet: its number is still its own.
                child.kill().unwrap();
                child.wait().unwrap()
            }
            Death::Call(name, nth) => {
                let under = faulty::tampered(name, &nth.to_string(), "signal=KILL");
                scene.command(&under, &arguments).status().unwrap()
            }
        };
        let is_after = self.goes_on(point)?;
        let present = scene.observe();
        let expected = if is_after { &self.after } else { &self.before };
        if present != *expected {
            return Err(format!("the engine is\n{present}\nwhere it should be\n{expected}"));
        }
        if found.is_some() && (scene.serving() == found) == is_after {
            return Err(format!("{found:?} served, and now it is {:?}", scene.serving()));
        }
        let verified = scene.upgrade(&["audit", "verify"]);
        if scene.state().exists() && !verified.status.success() {
            return Err(format!("the journal is not whole: {verified:?}"));
        }
        Ok(status.signal().is_some())
    }

    /// Does what a person does who finds the command dead; tells whether the engine is now as after.
    fn goes_on(&self, point: Point) -> Result<bool, String> {
        let scene = &self.scene;
        let state = scene.state_of_the_run();
        match state.as_deref() {
            None | Some("rolled_back") => return Ok(false),
            Some("committed") => return Ok(true),
            Some(_) => {}
        }
        let asked: &[&str] = match point.then {
            Then::Resume => &["resume", "--detach"],
            Then::RollBack => &["rollback", "--yes"],
        };
        let said = scene.upgrade(asked);
        let code = said.status.code().unwrap_or(-1);
        match (code, scene.state_of_the_run().as_deref(), point.then, point.dying) {
            (0, Some("committed"), Then::Resume, Upgrade::Good) => Ok(true),
            (4, Some("rolled_back"), Then::Resume, Upgrade::Bad | Upgrade::Unconfirmed) => Ok(false),
            // It died while it was checking: there is nothing to roll back.
            (0, Some("rolled_back" | "rejected"), Then::RollBack, _) => Ok(false),
            // The demand to roll back had not become durable: it is asked again.
            (6, Some("probation"), Then::Resume, Upgrade::Unconfirmed) => {
                let said = scene.upgrade(&["rollback", "--yes"]);
                if said.status.success() { Ok(false) } else { Err(format!("asked again: {said:?}")) }
            }
            // Past the point of no return only forward is left.
            (7, Some("committing"), Then::RollBack, Upgrade::Good) => {
                let said = scene.upgrade(&["resume"]);
                if said.status.success() { Ok(true) } else { Err(format!("after a refusal: {said:?}")) }
            }
            (code, now, ..) => Err(format!(
                "found {state:?}; `upgrade {}` exits with {code}, and it is {now:?}: {}{}",
                asked.join(" "),
                String::from_utf8_lossy(&said.stdout),
                String::from_utf8_lossy(&said.stderr)
            )),
        }
    }

    /// Lives through points; prints and returns how many deaths there were.
    fn campaign(&self, points: &[Point]) -> usize {
        let (mut deaths, mut violations) = (0, Vec::new());
        for point in points {
            match self.live_through(*point) {
                Ok(died) => deaths += usize::from(died),
                Err(why) => {
                    println!("VIOLATION {point:?}: {why}");
                    violations.push(format!("{point:?}: {why}"));
                }
            }
        }
        let what = self.scene.what;
        println!("campaign: {what:?}: {} points, {deaths} deaths, {} violations", points.len(), violations.len());
        assert!(violations.is_empty(), "{}", violations.join("\n"));
        deaths
    }
}

fn number(name: &str, default: u32) -> u32 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is not a number")))
}

/// Instants spread evenly over all three commands, whatever their number.
fn at_random(count: u32, seed: u32) -> Vec<Point> {
    let one = |point: u32| Point {
        dying: [Upgrade::Good, Upgrade::Bad, Upgrade::Unconfirmed][(seed.wrapping_add(point) % 3) as usize],
        death: Death::At(seed.wrapping_add(point).wrapping_mul(618) % 1000),
        then: if (point / 3).is_multiple_of(2) { Then::Resume } else { Then::RollBack },
    };
    (0..count).map(one).collect()
}

fn a_sample(what: What, points: u32) {
    let Some(bench) = Bench::new(what) else { return };
    let seed = number("UPGRADE_SEED", std::process::id());
    println!("UPGRADE_SEED={seed}");
    let mut points = at_random(points, seed);
    if faulty::is_possible() {
        // In the middle of the work: the last of this thread's requests to the engine.
        let death = Death::Call("sendto", 3 + seed % 8);
        points.push(Point { dying: Upgrade::Good, death, then: Then::RollBack });
    }
    bench.campaign(&points);
}

#[test]
fn killed_among_containers_it_ends_in_one_of_two_worlds() {
    a_sample(What::Containers, 3);
}

#[test]
fn killed_in_a_project_it_ends_in_one_of_two_worlds() {
    a_sample(What::Project, 2);
}

/// `scripts/test --full`, or `cargo nextest run -p upgrade-cli --features docker --run-ignored only killed`.
#[test]
#[ignore = "a campaign: scripts/test --full"]
fn campaign_killed_on_an_engine_at_random_instants_sharded() {
    let (shard, count) = (number("UPGRADE_CAMPAIGN_SHARD", 0), number("UPGRADE_KILLS", 30));
    for what in [What::Containers, What::Project] {
        let Some(bench) = Bench::new(what) else { return };
        assert!(bench.campaign(&at_random(count, shard * 1009 + number("UPGRADE_SEED", 0))) > 0);
    }
}

/// As the one above.
#[test]
#[ignore = "a campaign: scripts/test --full"]
fn campaign_killed_on_an_engine_at_every_call_sharded() {
    if !faulty::is_possible() {
        return;
    }
    let (shard, shards) = (number("UPGRADE_CAMPAIGN_SHARD", 0), number("UPGRADE_CAMPAIGN_SHARDS", 1));
    for what in [What::Containers, What::Project] {
        let Some(bench) = Bench::new(what) else { return };
        let both = |(dying, death)| [Then::Resume, Then::RollBack].map(|then| Point { dying, death, then });
        let points: Vec<_> = bench.calls().into_iter().flat_map(both).collect();
        let mine: Vec<_> = points.into_iter().skip(shard as usize).step_by(shards as usize).collect();
        assert!(bench.campaign(&mine) > 0);
    }
}
