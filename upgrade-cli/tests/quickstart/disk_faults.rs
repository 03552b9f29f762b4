//! A state directory whose disk is full, or fails to write or to sync: the run halts, says so, and
//! goes on when the disk is well.

use std::path::PathBuf;
use std::process::Command;

use crate::faulty::{self, tampered};
use crate::site::{Said, Site, Upgrade, said};
use crate::world::{Worlds, journals_are_right, observe, same};

/// Goes on after a halt, on a disk that is well, to one of the two worlds.
fn goes_on(site: &Site, worlds: &Worlds) -> Result<(), String> {
    let found = site.latest()?;
    let arguments = match found.as_deref() {
        None => site.run(Upgrade::Good),
        // The disk had all of it, only the answer was an error.
        Some("committed") => return same(&worlds.after, &observe(site), "after"),
        Some("rolled_back") => return Err("it was rolled back on a guess".into()),
        Some(_) => vec!["resume".into()],
    };
    let went = site.upgrade(&arguments.iter().map(String::as_str).collect::<Vec<_>>())?;
    match (went.code, found.as_deref()) {
        (0, _) => same(&worlds.after, &observe(site), "after")?,
        // What a step found could not be kept: that step failed, and going back halted later.
        (4, Some("rolling_back")) => same(&worlds.before, &observe(site), "before")?,
        _ => return Err(format!("found {found:?}, it does not go on: {went:?}")),
    }
    journals_are_right(site)
}

/// Makes one call of the command fail; tells whether it halted for it.
fn halts(site: &Site, worlds: &Worlds, name: &str, error: &str, nth: u32) -> Result<bool, String> {
    site.reset("1.0.0");
    let under = tampered(name, &nth.to_string(), &format!("error={error}"));
    let Said { code, stderr, .. } = said(&mut site.command_under(&under, &site.run(Upgrade::Good)))?;
    match code {
        // This thread did not make so many calls.
        0 => same(&worlds.after, &observe(site), "after").map(|()| false),
        // It was a step's own file: the step failed, and all is put back.
        4 => same(&worlds.before, &observe(site), "before").map(|()| false),
        1 => {
            let text = if error == "EIO" { "Input/output error" } else { "No space left" };
            if !stderr.contains(text) || !stderr.contains("hint:") {
                return Err(format!("it does not say why it halts and what to do: {stderr}"));
            }
            goes_on(site, worlds).map(|()| true)
        }
        _ => Err(format!("it exits with {code}: {stderr}")),
    }
}

fn fails(numbers: &[u32]) {
    if !faulty::is_possible() {
        return;
    }
    let site = Site::new();
    let worlds = Worlds::of(&site, Upgrade::Good);
    for (name, error) in [("fdatasync", "EIO"), ("pwrite64", "ENOSPC")] {
        let (mut halted, mut faults) = (0, 0);
        for &nth in numbers {
            let result = halts(&site, &worlds, name, error, nth);
            halted += u32::from(result.unwrap_or_else(|why| panic!("{error} at call {nth} of {name}: {why}")));
            faults += 1;
        }
        println!("campaign: {error} on {name}: {faults} faults, {halted} halts, 0 violations");
        assert!(halted > 0, "{error} on {name} is never met");
    }
}

#[test]
fn a_call_that_fails_halts_the_run_until_the_disk_is_well() {
    fails(&[1, 3, 7, 9]);
}

#[test]
#[ignore = "a campaign: scripts/test --full"]
fn campaign_every_call_that_fails_halts_the_run() {
    fails(&(1..=45).collect::<Vec<_>>());
}

/// Holds a file system of 64 KiB, mounted, of which only some is free.
struct Small(PathBuf);

impl Small {
    /// Mounts it; without the right to, a test is skipped and says so.
    fn mount(at: PathBuf, free: usize) -> Option<Self> {
        std::fs::create_dir(&at).unwrap();
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs"]).arg(&at).output();
        if !mounted.is_ok_and(|output| output.status.success()) {
            eprintln!("skipped: no file system can be mounted here");
            return None;
        }
        std::fs::write(at.join("ballast"), vec![b'.'; (64 - free) << 10]).unwrap();
        Some(Self(at))
    }

    /// What a whole upgrade needs depends on how long the names of its targets are.
    fn make_space(&self) {
        std::fs::remove_file(self.0.join("ballast")).unwrap();
        let grown = Command::new("mount").args(["-o", "remount,size=1m"]).arg(&self.0).status().unwrap();
        assert!(grown.success());
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_halts_the_run_until_there_is_space() {
    let site = Site::new();
    let worlds = Worlds::of(&site, Upgrade::Good);
    let mut halts = 0;
    for free in (4..=60).step_by(4) {
        site.reset("1.0.0");
        let Some(disk) = Small::mount(site.state(), free) else { return };
        let ended = said(&mut site.command(&site.run(Upgrade::Good))).unwrap();
        println!("{free} KiB free: exit {}, the run is {:?}", ended.code, site.latest());
        if ended.code != 0 {
            assert!(ended.stderr.contains("No space left") && ended.stderr.contains("hint:"), "{ended:?}");
        }
        let right = match ended.code {
            0 => same(&worlds.after, &observe(&site), "after"),
            1 => {
                halts += 1;
                disk.make_space();
                goes_on(&site, &worlds)
            }
            // What a step found could not be kept: it changed nothing, and the steps before it are undone.
            4 => same(&worlds.before, &observe(&site), "before"),
            code => Err(format!("it exits with {code}: {}", ended.stderr)),
        };
        right.unwrap_or_else(|why| panic!("{free} KiB: {why}"));
    }
    assert!(halts > 0, "the disk was never full");
}
