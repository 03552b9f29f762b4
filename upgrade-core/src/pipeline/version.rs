//! The rules about versions: from where an upgrade may start, what it must pass, what it needs.

use std::sync::Arc;

use semver::{Prerelease, Version, VersionReq};
use serde::{Deserialize, Serialize};

use crate::check::Check;

/// Reads the version that is running: a check's fact.
#[derive(Clone)]
pub struct PresentVersion {
    /// The check that reads it.
    pub check: Arc<dyn Check>,
    /// The name of the fact that holds the version.
    pub fact: String,
}

/// Demands a version of something else: one row of the compatibility matrix.
#[derive(Clone)]
pub struct Requirement {
    /// What must have the version.
    pub name: String,
    /// How its version is read.
    pub present: PresentVersion,
    /// The versions that will do.
    pub version: VersionReq,
}

/// Says how finished a version must be to be upgraded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "file", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Channel {
    /// Releases only: `1.2.0`.
    Stable,
    /// Releases and candidates: `1.2.0-beta.1`, `1.2.0-rc.1`.
    Beta,
    /// Anything.
    Development,
}

/// Says why an upgrade may not lead from one version to another.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VersionError {
    /// The present version is outside the range that the pipeline upgrades from.
    #[error("the present version is {present}; this upgrade starts from {from}")]
    OutOfRange {
        /// The version found.
        present: Version,
        /// The range.
        from: VersionReq,
    },
    /// Versions on the way must not be skipped.
    #[error("{present} → {to} must not skip {}: upgrade {}", join(.stops, ", "), path(.present, .stops, .to))]
    SkipsStops {
        /// The version found.
        present: Version,
        /// The version asked for.
        to: Version,
        /// The stops between them, in order.
        stops: Vec<Version>,
    },
    /// The version asked for is older than the present one.
    #[error("the present version is {present}, newer than {to}")]
    Downgrade {
        /// The version found.
        present: Version,
        /// The version asked for.
        to: Version,
    },
    /// The version asked for is not of the channel.
    #[error("{to} is not a version of the {channel} channel")]
    Channel {
        /// The version asked for.
        to: Version,
        /// The channel's name.
        channel: &'static str,
    },
}

fn join(versions: &[Version], between: &str) -> String {
    versions.iter().map(Version::to_string).collect::<Vec<_>>().join(between)
}

fn path(present: &Version, stops: &[Version], to: &Version) -> String {
    format!("{present} → {} → {to}", join(stops, " → "))
}

/// Checks the way from `present` to `to` against a range, required stops and a channel.
///
/// An upgrade from a version to itself is allowed: its steps find that they are done. Ranges
/// follow Cargo's rules (<https://docs.rs/semver>), except that a pre-release matches by its
/// release where the range names no pre-release of its own.
///
/// # Errors
/// The first rule that is broken.
pub fn check_path(
    present: Option<&Version>,
    to: Option<&Version>,
    from: Option<&VersionReq>,
    stops: &[Version],
    channel: Option<Channel>,
) -> Result<(), VersionError> {
    if let (Some(to), Some(channel)) = (to, channel) {
        check_channel(to, channel)?;
    }
    let Some(present) = present else { return Ok(()) };
    if let Some(from) = from
        && !matches(from, present)
        && Some(present) != to
    {
        return Err(VersionError::OutOfRange { present: present.clone(), from: from.clone() });
    }
    let Some(to) = to else { return Ok(()) };
    if to < present {
        return Err(VersionError::Downgrade { present: present.clone(), to: to.clone() });
    }
    let mut between: Vec<Version> = stops.iter().filter(|stop| present < *stop && *stop < to).cloned().collect();
    if between.is_empty() {
        return Ok(());
    }
    between.sort();
    Err(VersionError::SkipsStops { present: present.clone(), to: to.clone(), stops: between })
}

fn matches(range: &VersionReq, version: &Version) -> bool {
    if range.matches(version) {
        return true;
    }
    let names_prerelease = range.comparators.iter().any(|c| !c.pre.is_empty());
    !version.pre.is_empty()
        && !names_prerelease
        && range.matches(&Version { pre: Prerelease::EMPTY, ..version.clone() })
}

fn check_channel(to: &Version, channel: Channel) -> Result<(), VersionError> {
    let label = to.pre.split(['.', '-']).next().unwrap_or_default();
    let (fits, name) = match channel {
        Channel::Stable => (to.pre.is_empty(), "stable"),
        Channel::Beta => (label.is_empty() || label.starts_with("beta") || label.starts_with("rc"), "beta"),
        Channel::Development => (true, "development"),
    };
    if fits { Ok(()) } else { Err(VersionError::Channel { to: to.clone(), channel: name }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v(text: &str) -> Version {
        Version::parse(text).unwrap()
    }

    fn way(present: &str, to: &str, from: &str, stops: &[&str]) -> Result<(), VersionError> {
        let stops: Vec<_> = stops.iter().map(|s| v(s)).collect();
        check_path(Some(&v(present)), Some(&v(to)), Some(&VersionReq::parse(from).unwrap()), &stops, None)
    }

    #[test]
    fn a_required_stop_is_named_with_the_path() {
        let error = way("1.2.0", "3.0.0", ">=1.0.0", &["2.5.0", "2.0.0", "1.1.0", "3.0.0"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "1.2.0 → 3.0.0 must not skip 2.0.0, 2.5.0: upgrade 1.2.0 → 2.0.0 → 2.5.0 → 3.0.0"
        );
        assert!(way("2.5.0", "3.0.0", ">=1.0.0", &["2.0.0", "2.5.0"]).is_ok());
    }

    #[test]
    fn the_range_holds_and_the_same_version_is_allowed() {
        assert!(matches!(way("0.9.0", "1.1.0", ">=1.0.0, <1.1.0", &[]), Err(VersionError::OutOfRange { .. })));
        assert!(way("1.1.0", "1.1.0", ">=1.0.0, <1.1.0", &[]).is_ok());
        assert!(way("1.0.5-beta.1", "1.1.0", ">=1.0.0, <1.1.0", &[]).is_ok());
        assert!(matches!(way("1.2.0", "1.1.0", ">=1.0.0", &[]), Err(VersionError::Downgrade { .. })));
    }

    #[test]
    fn channels_hold_back_what_is_not_finished() {
        for (to, channel, fits) in [
            ("1.0.0", Channel::Stable, true),
            ("1.0.0-rc.1", Channel::Stable, false),
            ("1.0.0-rc.1", Channel::Beta, true),
            ("1.0.0-beta.2", Channel::Beta, true),
            ("1.0.0-dev.2", Channel::Beta, false),
            ("1.0.0-dev.2", Channel::Development, true),
        ] {
            assert_eq!(check_path(None, Some(&v(to)), None, &[], Some(channel)).is_ok(), fits, "{to}");
        }
    }
}
