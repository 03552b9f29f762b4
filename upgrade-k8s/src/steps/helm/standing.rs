//! How a release stands to what this step found and to what it intends, by what its last revision holds.
//!
//! ```text
//!               upgrade                    ready
//!   found ───────────────▶ broken off ───────────────▶ intended
//!     ▲    (or install)    a revision of ours that         │
//!     │                    is pending or has failed        │
//!     │                        │        ▲                  │
//!     └────────────────────────┘        └──────────────────┘
//!       rollback, or uninstall            rollback begins
//!       where nothing was found
//! ```
//!
//! A revision is pending for as long as its `helm` runs. When this step looks, its own does not run any
//! more: what is pending then, and holds what the step intends or found, was broken off. Helm refuses to
//! upgrade such a release, and rolls it back.
//!
//! A description of one's own is written only once an upgrade is complete, and one's own label is not known
//! to every Helm: revisions are told apart by their chart, their values and their manifest.

use serde::{Deserialize, Serialize};
use upgrade_core::error::StepError;

/// Holds what a revision consists of, in digests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseState {
    /// The chart and its version: `shop-1.4.0`.
    pub chart: String,
    /// The digest of the values that were given.
    pub values_sha256: String,
    /// The digest of the manifest that the chart makes of them.
    pub manifest_sha256: String,
}

impl ReleaseState {
    /// Says which state this is, for a conflict.
    pub(super) fn token(&self) -> String {
        let short = |digest: &str| digest.trim_start_matches("sha256:").chars().take(12).collect::<String>();
        format!("{} (values {}, manifest {})", self.chart, short(&self.values_sha256), short(&self.manifest_sha256))
    }

    /// Tells whether another revision is of the same chart and values; templates may make another
    /// manifest of them each time, of random passwords or the time of day.
    pub(super) fn is_of_same_making(&self, other: &Self) -> bool {
        self.chart == other.chart && self.values_sha256 == other.values_sha256
    }
}

/// Describes one revision of a release, as `helm history --output json` does.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Revision {
    pub(super) revision: u64,
    pub(super) status: String,
    pub(super) chart: String,
    #[serde(default)]
    pub(super) app_version: String,
    #[serde(default)]
    pub(super) description: String,
}

impl Revision {
    pub(super) fn is_pending(&self) -> bool {
        self.status.starts_with("pending-")
    }

    pub(super) fn is_deployed(&self) -> bool {
        self.status == "deployed"
    }
}

/// Reads the answer of `helm history`, the last revision last.
pub(super) fn read_history(answer: &[u8]) -> Result<Vec<Revision>, StepError> {
    let mut all: Vec<Revision> = serde_json::from_slice(answer).map_err(|error| {
        StepError::permanent("the answer of `helm history` cannot be read")
            .with_cause(&error)
            .with_hint("`helm history RELEASE --output json` shows it; take Helm 3.7 or later")
    })?;
    all.sort_by_key(|each| each.revision);
    Ok(all)
}

/// Says how a release stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// As it was found.
    Found,
    /// As this step intends.
    Intended,
    /// On the way from one to the other, and nobody goes on.
    BrokenOff,
    /// Somebody else's.
    Foreign,
}

/// Judges the last revision of a release; none if there is no such release.
pub(super) fn judge(
    last: Option<(&Revision, &ReleaseState)>,
    found: Option<&ReleaseState>,
    intended: &ReleaseState,
    description: &str,
) -> Standing {
    let Some((last, state)) = last else {
        return if found.is_none() { Standing::Found } else { Standing::Foreign };
    };
    let is_found = found == Some(state);
    let is_same = state.is_of_same_making(intended);
    let is_intended = is_same && (state.manifest_sha256 == intended.manifest_sha256 || last.description == description);
    match last.status.as_str() {
        "deployed" if is_found => Standing::Found,
        "deployed" if is_intended => Standing::Intended,
        "failed" if is_found || is_same => Standing::BrokenOff,
        _ if last.is_pending() && (is_found || is_same) => Standing::BrokenOff,
        // Removing what was not there before.
        "uninstalling" | "uninstalled" if found.is_none() && is_same => Standing::BrokenOff,
        _ => Standing::Foreign,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(chart: &str, values: &str, manifest: &str) -> ReleaseState {
        ReleaseState { chart: chart.into(), values_sha256: values.into(), manifest_sha256: manifest.into() }
    }

    fn revision(status: &str, description: &str) -> Revision {
        let (chart, app_version) = (String::new(), String::new());
        Revision { revision: 4, status: status.into(), chart, app_version, description: description.into() }
    }

    #[test]
    fn a_history_is_read() {
        let answer = br#"[{"revision":2,"updated":"2026-01-02T03:04:05.6Z","status":"pending-upgrade","chart":"shop-1.1.0",
            "app_version":"2","description":"Preparing upgrade"},
            {"revision":1,"updated":"2026-01-01T03:04:05.6Z","status":"deployed","chart":"shop-1.0.0","app_version":"1","description":"Install complete"}]"#;
        let history = read_history(answer).unwrap();
        assert_eq!((history[0].revision, history[0].is_deployed()), (1, true));
        assert!(history[1].is_pending());
        assert!(read_history(b"Error").unwrap_err().hint().is_some());
    }

    #[test]
    fn a_release_is_judged_by_what_it_holds() {
        use Standing::{BrokenOff, Foreign, Found, Intended};
        let (found, intended) = (state("shop-1", "v1", "m1"), state("shop-2", "v2", "m2"));
        for (status, description, state, standing) in [
            ("deployed", "Upgrade complete", found.clone(), Found),
            // Whoever rolled back: it is as it was.
            ("deployed", "Rollback to 1", found.clone(), Found),
            ("deployed", "ours", intended.clone(), Intended),
            ("deployed", "Upgrade complete", intended.clone(), Intended),
            // Templates may use chance.
            ("deployed", "ours", state("shop-2", "v2", "random"), Intended),
            ("deployed", "Upgrade complete", state("shop-2", "v2", "random"), Foreign),
            ("deployed", "ours", state("shop-3", "v2", "m3"), Foreign),
            ("pending-upgrade", "Preparing upgrade", state("shop-2", "v2", "random"), BrokenOff),
            ("pending-upgrade", "Preparing upgrade", state("shop-3", "v2", "m3"), Foreign),
            ("failed", "Upgrade \"shop\" failed: timed out", intended.clone(), BrokenOff),
            ("pending-rollback", "Rollback to 1", found.clone(), BrokenOff),
            ("failed", "Rollback \"shop\" failed", found.clone(), BrokenOff),
            ("uninstalling", "", intended.clone(), Foreign),
            ("superseded", "", found.clone(), Foreign),
        ] {
            let last = revision(status, description);
            assert_eq!(judge(Some((&last, &state)), Some(&found), &intended, "ours"), standing, "{last:?}");
        }
        assert_eq!(judge(None, Some(&found), &intended, "ours"), Foreign);
        assert_eq!(judge(None, None, &intended, "ours"), Found);
        for status in ["pending-install", "failed", "uninstalling", "uninstalled"] {
            let last = revision(status, "");
            assert_eq!(judge(Some((&last, &intended)), None, &intended, "ours"), BrokenOff, "{status}");
            assert_eq!(judge(Some((&last, &found)), None, &intended, "ours"), Foreign, "{status}");
        }
    }
}
