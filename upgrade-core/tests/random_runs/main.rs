//! Random pipelines with random faults, crashes and demands, against a small model of how any run
//! may end.
//!
//! `UPGRADE_SEED=N` lives through one seed; `UPGRADE_CAMPAIGN_SEEDS=N` and
//! `UPGRADE_CAMPAIGN_SHARD=I/N` bound the campaign.

#![cfg(test)]
#![cfg(feature = "testkit")]

mod case;
mod faulty;
mod world;

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

const SEEDS: u64 = 10_000;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// Lives through seeds on every processor; fails with the first that broke a promise.
fn live_through(seeds: impl Iterator<Item = u64> + Send) {
    let seeds = Mutex::new(seeds);
    let failure: Mutex<Option<(u64, String)>> = Mutex::new(None);
    let ends: Mutex<BTreeMap<&str, u64>> = Mutex::default();
    let worker = || {
        while failure.lock().unwrap_or_else(PoisonError::into_inner).is_none() {
            let Some(seed) = seeds.lock().unwrap_or_else(PoisonError::into_inner).next() else { return };
            let result = std::panic::catch_unwind(|| case::live(seed));
            let result = result.unwrap_or_else(|_| Err("it panicked".into()));
            match result {
                Ok(end) => *ends.lock().unwrap_or_else(PoisonError::into_inner).entry(end).or_insert(0) += 1,
                Err(message) => {
                    failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert((seed, message));
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(worker);
        }
    });
    if let Some((seed, message)) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        panic!("UPGRADE_SEED={seed}\n{message}");
    }
    let ends = ends.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!("{ends:?}");
    // A model that only ever sees one end proves nothing about the others.
    let rare = ["committed", "rolled back", "abandoned"].into_iter().find(|end| !ends.contains_key(end));
    assert!(ends.values().sum::<u64>() < 1000 || rare.is_none(), "no run ended {rare:?}");
}

#[test]
fn random_runs_end_as_they_may() {
    match number("UPGRADE_SEED") {
        Some(seed) => live_through(std::iter::once(seed)),
        None => live_through(0..SEEDS),
    }
}

#[test]
#[ignore = "a million seeds: hours; scripts/test --full runs it in shards"]
fn campaign_random_runs() {
    let seeds = number("UPGRADE_CAMPAIGN_SEEDS").unwrap_or(1_000_000);
    let shard = std::env::var("UPGRADE_CAMPAIGN_SHARD").unwrap_or_else(|_| "0/1".into());
    let (at, of) = shard.split_once('/').expect("UPGRADE_CAMPAIGN_SHARD is written I/N, from 0");
    let (at, of): (u64, u64) = (at.parse().unwrap(), of.parse().unwrap());
    assert!(at < of, "shards are counted from 0");
    live_through((SEEDS..SEEDS + seeds).filter(move |seed| seed % of == at));
}
