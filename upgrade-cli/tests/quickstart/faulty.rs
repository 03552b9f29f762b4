//! System calls of the command made to fail, or to be its last, with strace.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Says whether system calls can be tampered with here; without, a test is skipped and says so.
pub(crate) fn is_possible() -> bool {
    let traced = Command::new("strace").args(["-qq", "-o", "/dev/null", "-e", "trace=none", "true"]).output();
    let possible = traced.is_ok_and(|output| output.status.success());
    assert!(possible || std::env::var("CI").is_err(), "promised under CI, but strace does not work here");
    if !possible {
        eprintln!("skipped: strace is not installed, or may not trace here");
    }
    possible
}

/// Returns the words that run a command whose `nth` call of `name`, in any thread, does `what`.
pub(crate) fn tampered(name: &str, nth: &str, what: &str) -> Vec<String> {
    let trace = format!("trace={name}");
    let inject = format!("inject={name}:{what}:when={nth}");
    // Children are let go when they become another program: their calls are not the command's.
    let words = ["strace", "-f", "-b", "execve", "-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject];
    words.map(str::to_owned).to_vec()
}

/// Counts, in a command that nobody disturbs, how often its busiest thread makes each of these calls.
/// `run` is given the words that it is to be run under.
pub(crate) fn count(
    log: &Path,
    names: &'static [&'static str],
    run: impl FnOnce(&[String]),
) -> BTreeMap<&'static str, u32> {
    let trace = format!("trace={}", names.join(","));
    let words = ["strace", "-f", "-b", "execve", "-qq", "-o", log.to_str().unwrap(), "-e", &trace];
    run(&words.map(str::to_owned));
    let mut calls: BTreeMap<(&str, &'static str), u32> = BTreeMap::new();
    let log = fs::read_to_string(log).unwrap();
    for line in log.lines() {
        let mut words = line.splitn(2, ' ');
        let (Some(thread), Some(call)) = (words.next(), words.next()) else { continue };
        let name = call.trim_start().split('(').next().unwrap_or_default();
        if let Some(name) = names.iter().find(|known| **known == name) {
            *calls.entry((thread, name)).or_default() += 1;
        }
    }
    let mut most = BTreeMap::new();
    for ((_, name), times) in calls {
        let most = most.entry(name).or_default();
        *most = times.max(*most);
    }
    most
}
