//! Which old releases are removed once an upgrade is confirmed.

use std::time::SystemTime;

use semver::Version;

/// Describes one release directory.
#[derive(Debug, Clone)]
pub(super) struct Candidate {
    pub(super) name: String,
    pub(super) modified: SystemTime,
}

/// Chooses the releases beyond the newest `keep`, never one of `spared`.
///
/// The newest are told by version if every name is one, else by when they were laid down: a mix
/// of the two orders would be neither.
pub(super) fn beyond(mut candidates: Vec<Candidate>, keep: usize, spared: &[String]) -> Vec<String> {
    let version = |name: &str| Version::parse(name.strip_prefix('v').unwrap_or(name)).ok();
    if candidates.iter().all(|candidate| version(&candidate.name).is_some()) {
        candidates.sort_by_key(|candidate| version(&candidate.name));
    } else {
        candidates.sort_by_key(|candidate| candidate.modified);
    }
    let (kept, others): (Vec<_>, Vec<_>) = candidates.into_iter().partition(|c| spared.contains(&c.name));
    let excess = others.len().saturating_sub(keep.saturating_sub(kept.len()));
    others.into_iter().take(excess).map(|candidate| candidate.name).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn candidates(names: &[&str]) -> Vec<Candidate> {
        let at = |age: usize| SystemTime::UNIX_EPOCH + Duration::from_secs(age as u64);
        names.iter().enumerate().map(|(age, name)| Candidate { name: (*name).into(), modified: at(age) }).collect()
    }

    #[test]
    fn versions_go_oldest_first() {
        let there = candidates(&["1.10.0", "1.2.0", "v1.1.0", "2.0.0", "1.9.0"]);
        assert_eq!(beyond(there.clone(), 3, &[]), ["v1.1.0", "1.2.0"]);
        assert_eq!(beyond(there.clone(), 3, &["v1.1.0".into(), "1.2.0".into()]), ["1.9.0", "1.10.0"]);
        assert!(beyond(there, 9, &[]).is_empty());
    }

    #[test]
    fn other_names_go_by_time() {
        assert_eq!(beyond(candidates(&["zebra", "1.0.0", "ant"]), 2, &[]), ["zebra"]);
    }
}
