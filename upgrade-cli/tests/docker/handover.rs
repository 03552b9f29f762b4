//! Death at any point of a handover: of the driver, of the helper and the driver at once, of the
//! engine. Afterwards one container serves, the old one or the new one, and the run has an end.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use upgrade_testbed::docker::{self, Own};

use crate::service::Service;

/// Who dies.
#[derive(Debug, Clone, Copy)]
enum Dying {
    Driver,
    DriverAndHelper,
    /// The engine, as by a fault.
    EngineKilled,
    /// The engine, and its containers with it.
    EngineStopped,
}

impl Service {
    /// The processes of the command that was started in the container, as this machine numbers them.
    fn drivers(&self) -> Vec<String> {
        let id = self.engine.command(["inspect", "--format", "{{.Id}}", &self.name]).output().unwrap().stdout;
        let id = String::from_utf8_lossy(&id).trim().to_owned();
        let numbers = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let is_driver = |number: &String| {
            let line = fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
            let group = fs::read_to_string(format!("/proc/{number}/cgroup")).unwrap_or_default();
            line.starts_with(b"upgrade\0--state-dir\0/state\0") && !id.is_empty() && group.contains(&id)
        };
        numbers.filter(is_driver).collect()
    }

    fn processes_of_helpers(&self) -> Vec<String> {
        let number = |helper: String| {
            let asked = self.engine.command(["inspect", "--format", "{{.State.Pid}}", &helper]).output().unwrap();
            String::from_utf8_lossy(&asked.stdout).trim().to_owned()
        };
        self.helpers().into_iter().map(number).filter(|number| !matches!(number.as_str(), "" | "0")).collect()
    }

    /// Asks the command inside of the container; none where that does not run.
    fn ask(&self, arguments: &[&str]) -> Option<(Option<i32>, String)> {
        let words = ["exec", &self.name, "upgrade", "--state-dir", "/state"];
        let done = self.engine.command(words.iter().chain(arguments)).output().unwrap();
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        // 126 and more is what `docker` says of itself.
        done.status.code().filter(|code| *code < 126).map(|code| (Some(code), said))
    }

    /// The number of runs, and the state of the last one.
    fn last_run(&self) -> Option<(usize, String)> {
        let (_, said) = self.ask(&["history", "--output", "json"])?;
        // Of a container that has just stopped `docker exec` says so, and the command says nothing: not even
        // the first line, which names the format.
        if said.is_empty() {
            return None;
        }
        let runs = said.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()?.get("run").cloned());
        let runs: Vec<_> = runs.collect();
        let state = runs.last().and_then(|run| run["state"].as_str()).unwrap_or("none");
        Some((runs.len(), state.to_owned()))
    }

    /// Lives through one death in an upgrade to a version; says how it went.
    fn live(&self, version: &str, dying: Dying, after: Duration, own: Option<&Own>) -> String {
        let case = format!("{dying:?} {after:?} into the upgrade to {version}");
        let (id, runs) = (self.id(), self.last_run().unwrap().0);
        let said = self.upgrade_to(version, |service| {
            std::thread::sleep(after);
            let mut numbers = service.drivers();
            match dying {
                Dying::Driver => {}
                Dying::DriverAndHelper => numbers.extend(service.processes_of_helpers()),
                Dying::EngineKilled => own.unwrap().kill(),
                Dying::EngineStopped => own.unwrap().stop(),
            }
            match own {
                Some(own) => own.start(),
                None if numbers.is_empty() => {}
                None => drop(Command::new("kill").arg("-KILL").args(numbers).output().unwrap()),
            }
        });
        let (state, asked) = self.await_end(&case, &said, runs);
        let expected = match state.as_str() {
            "committed" => self.image_of(version),
            _ => {
                assert_eq!(self.id(), id, "{case}: {state}");
                self.inspect("{{.Config.Image}}")
            }
        };
        let seen = self.inspect("{{.Config.Image}} {{.State.Running}} {{.HostConfig.RestartPolicy.Name}}");
        assert_eq!(seen, format!("{expected} true always"), "{case}: {state}");
        let all = self.docker(&["ps", "--all", "--filter", &format!("name={}", self.name), "--format", "{{.Names}}"]);
        let ours: Vec<_> = all.lines().filter(|name| *name != self.name && !name.contains(".helper-")).collect();
        assert!(ours.is_empty(), "{case}: {state}: {ours:?}");
        format!("{case}: {state}, {asked} times resumed by hand")
    }

    /// Does what a person does who sees that nobody goes on, until the run has an end; says which, and
    /// how often that was needed.
    fn await_end(&self, case: &str, said: &str, runs: usize) -> (String, u32) {
        let began = Instant::now();
        let mut asked = 0;
        loop {
            if let Some((number, state)) = self.last_run() {
                match state.as_str() {
                    "committed" | "rolled_back" | "rejected" if number > runs => return (state, asked),
                    _ if number == runs && self.drivers().is_empty() => return ("never began".into(), asked),
                    _ if self.processes_of_helpers().is_empty() && self.drivers().is_empty() => {
                        self.ask(&["resume"]);
                        asked += 1;
                    }
                    _ => {}
                }
            }
            if began.elapsed() > Duration::from_secs(60) {
                let filter = format!("name={}", self.name);
                let all = self.docker(&["ps", "--all", "--no-trunc", "--filter", &filter]);
                let logs: Vec<_> = self.helpers().iter().map(|helper| self.docker(&["logs", helper])).collect();
                panic!("{case}: it has no end: {:?}\n{said}\n{all}\n{}", self.last_run(), logs.join("\n"));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Upgrades there and back again, somebody dying each time.
fn lives(service: &Service, cases: impl IntoIterator<Item = (Dying, u64)>, own: Option<&Own>) {
    let mut reached = 0;
    for (dying, after) in cases {
        let present = service.inspect("{{.Config.Image}}");
        let version = if present == service.image_of("1.0.0") { "2.0.0" } else { "1.0.0" };
        let said = service.live(version, dying, Duration::from_millis(after), own);
        reached += u32::from(!said.contains("never began"));
        println!("{said}");
    }
    assert!(reached > 0, "nobody lived to begin");
}

#[test]
fn a_driver_that_dies_in_the_handover_is_followed() {
    let Some(service) = Service::start("dies") else { return };
    let cases = [(Dying::Driver, 400), (Dying::DriverAndHelper, 900), (Dying::Driver, 1400)];
    lives(&service, cases, None);
}

#[test]
fn a_handover_outlives_the_engine() {
    let Some(own) = docker::own() else { return };
    let service = Service::start_on(own.engine().clone(), "engine", "none");
    lives(&service, [(Dying::EngineKilled, 700), (Dying::EngineStopped, 900)], Some(&own));
    drop(service);
}

/// `cargo nextest run -p upgrade-cli --features docker --run-ignored only campaign_a_handover`.
#[test]
#[ignore = "a campaign: scripts/test --full"]
fn campaign_a_handover_outlives_every_death() {
    let Some(service) = Service::start("handover") else { return };
    for after in (0..2400).step_by(80) {
        lives(&service, [(Dying::Driver, after), (Dying::DriverAndHelper, after)], None);
        // One that is never healthy: the old container comes back.
        println!("{}", service.live("2.1.0", Dying::Driver, Duration::from_millis(after * 2), None));
        println!("{}", service.live("2.1.0", Dying::DriverAndHelper, Duration::from_millis(after * 2), None));
    }
}

/// As the one above.
#[test]
#[ignore = "a campaign: scripts/test --full"]
fn campaign_a_handover_outlives_the_engine_at_every_instant() {
    let Some(own) = docker::own() else { return };
    let service = Service::start_on(own.engine().clone(), "engine", "none");
    for after in (0..2400).step_by(120) {
        lives(&service, [(Dying::EngineKilled, after), (Dying::EngineStopped, after)], Some(&own));
    }
}
