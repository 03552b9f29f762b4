//! The world written down, and what must hold after any fault.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;

use upgrade_core::entry::{Entry, Record};
use upgrade_core::executor::state::Run;
use upgrade_core::file;
use upgrade_core::journal::{FileJournal, Journal};
use upgrade_core::registry::Registry;
use upgrade_core::testkit::{order_violations, tree};

use crate::site::{Site, Upgrade};

/// Holds the two worlds that an upgrade may end in.
pub(crate) struct Worlds {
    pub(crate) before: String,
    pub(crate) after: String,
}

impl Worlds {
    /// Lives through an upgrade undisturbed.
    pub(crate) fn of(site: &Site, upgrade: Upgrade) -> Self {
        site.reset(upgrade.versions().0);
        let before = observe(site);
        let code = site.command(&site.run(upgrade)).status().unwrap().code();
        let after = observe(site);
        match upgrade {
            Upgrade::Good => assert!(code == Some(0) && before != after, "{code:?}: {after}"),
            Upgrade::Unconfirmed => unreachable!("it waits for an hour"),
            Upgrade::Bad => assert_eq!((code, &before), (Some(4), &after)),
        }
        Self { before, after }
    }
}

/// Writes down all that must be right: files, links, who serves, and what it answers.
pub(crate) fn observe(site: &Site) -> String {
    let mut text = String::new();
    for line in tree(&site.directory().join("site")).lines() {
        // The log tells of every start, the pid file of the last, and a backup of when it was made.
        match line.split_once(' ') {
            Some((path, _)) if path.starts_with("logs/") || path.starts_with("run/") => {}
            Some((path, _)) if path.starts_with("backups/") && !path.ends_with('/') => {
                writeln!(text, "a backup").unwrap();
            }
            _ => writeln!(text, "{line}").unwrap(),
        }
    }
    for (_, program) in site.services() {
        writeln!(text, "serving: {program}").unwrap();
    }
    for what in ["version", "health", "notes"] {
        writeln!(text, "{what}: {}", site.get(what).trim()).unwrap();
    }
    text
}

/// Fails unless the world is the one that was expected.
pub(crate) fn same(expected: &str, present: &str, which: &str) -> Result<(), String> {
    if expected == present {
        return Ok(());
    }
    let mut text = format!("the world is not the one {which}");
    for line in expected.lines().filter(|line| !present.lines().any(|other| other == *line)) {
        write!(text, "\n  missing {line}").unwrap();
    }
    for line in present.lines().filter(|line| !expected.lines().any(|other| other == *line)) {
        write!(text, "\n  foreign {line}").unwrap();
    }
    if present.matches("serving:").count() != 1 {
        write!(text, "\n  the service runs {} times", present.matches("serving:").count()).unwrap();
    }
    Err(text)
}

/// Fails unless every run's journal is whole and in order, with nothing done twice and nothing
/// left behind.
pub(crate) fn journals_are_right(site: &Site) -> Result<(), String> {
    if !site.state().join("runs").exists() {
        return Ok(());
    }
    let verified = site.upgrade(&["audit", "verify"])?;
    if verified.code != 0 {
        return Err(format!("the journal is not whole: {verified:?}"));
    }
    let journal = FileJournal::open(site.state()).map_err(|error| error.to_string())?;
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut registry = Registry::new();
    upgrade_host::register(&mut registry);
    for run in runtime.block_on(journal.runs()).map_err(|error| error.to_string())? {
        let records = runtime.block_on(journal.load(&run.run)).map_err(|error| error.to_string())?;
        let state = Run::replay(&records).map_err(|error| error.to_string())?;
        let pipeline = file::reload(state.definition(), &registry).map_err(|error| error.to_string())?;
        let mut wrong = order_violations(pipeline.graph(), &records);
        wrong.extend(repetitions(&records));
        if state.state().is_final() && found_contents_are_kept(site) {
            wrong.push("what only an undo needed is still kept".into());
        }
        if !wrong.is_empty() {
            return Err(wrong.join("\n"));
        }
    }
    Ok(())
}

/// Tells whether contents that a run found are still kept for its undo.
pub(crate) fn found_contents_are_kept(site: &Site) -> bool {
    fs::read_dir(site.state().join("sealed")).is_ok_and(|mut runs| runs.next().is_some())
}

/// Lists what a journal says was done twice.
fn repetitions(records: &[Record]) -> Vec<String> {
    let mut done: BTreeMap<String, u32> = BTreeMap::new();
    for record in records {
        let what = match &record.entry {
            Entry::StepPrepared { step, .. } => format!("`{step}` was prepared"),
            Entry::StepApplied { step, .. } => format!("`{step}` was applied"),
            Entry::StepUndone { step, .. } => format!("`{step}` was undone"),
            Entry::StepCommitted { step } => format!("`{step}` was committed"),
            _ => continue,
        };
        *done.entry(what).or_default() += 1;
    }
    done.into_iter().filter(|(_, times)| *times > 1).map(|(what, times)| format!("{what} {times} times")).collect()
}
