//! The version of a migration: a number, or numbers with dots between them.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Holds a version as its tool spells it; two versions compare number by number.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "Spelled", into = "String")]
#[schemars(with = "Spelled")]
pub struct MigrationVersion {
    text: String,
    /// Without trailing zeros: `1.0` is `1`.
    parts: Vec<u64>,
}

/// Reads a version that a file may write as a number.
#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
enum Spelled {
    Number(u64),
    Text(String),
}

/// Says that a text is not a version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a version: digits, with dots between them")]
pub struct VersionError(String);

impl MigrationVersion {
    /// Makes the version of a whole number.
    pub fn number(number: u64) -> Self {
        Self { text: number.to_string(), parts: if number == 0 { Vec::new() } else { vec![number] } }
    }

    /// Returns the version as it is spelled.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Returns the version as sqlx and golang-migrate number theirs.
    pub fn as_number(&self) -> Option<i64> {
        match self.parts.as_slice() {
            [] => Some(0),
            [number] => i64::try_from(*number).ok(),
            _ => None,
        }
    }

    /// Tells whether it is the version before the first: 0.
    pub fn is_zero(&self) -> bool {
        self.parts.is_empty()
    }
}

impl FromStr for MigrationVersion {
    type Err = VersionError;
    fn from_str(text: &str) -> Result<Self, VersionError> {
        let parts: Result<Vec<u64>, _> = text
            .split('.')
            .map(|part| part.bytes().all(|b| b.is_ascii_digit()).then(|| part.parse().ok()).flatten().ok_or(()))
            .collect();
        let mut parts = parts.map_err(|()| VersionError(text.chars().take(60).collect()))?;
        while parts.last() == Some(&0) {
            parts.pop();
        }
        Ok(Self { text: text.to_owned(), parts })
    }
}

impl TryFrom<Spelled> for MigrationVersion {
    type Error = VersionError;
    fn try_from(spelled: Spelled) -> Result<Self, VersionError> {
        match spelled {
            Spelled::Number(number) => Ok(Self::number(number)),
            Spelled::Text(text) => text.parse(),
        }
    }
}

impl From<MigrationVersion> for String {
    fn from(version: MigrationVersion) -> String {
        version.text
    }
}

impl fmt::Display for MigrationVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl PartialEq for MigrationVersion {
    fn eq(&self, other: &Self) -> bool {
        self.parts == other.parts
    }
}

impl Eq for MigrationVersion {}

impl PartialOrd for MigrationVersion {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for MigrationVersion {
    fn cmp(&self, other: &Self) -> Ordering {
        self.parts.cmp(&other.parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_number_by_number() {
        let version = |text: &str| text.parse::<MigrationVersion>().unwrap();
        assert!(version("2") < version("10"));
        assert!(version("1.2") < version("1.10"));
        assert!(version("1") < version("1.0.1"));
        assert_eq!(version("1.0"), version("1"));
        assert_eq!(version("0007").as_number(), Some(7));
        assert_eq!(version("0007").as_str(), "0007");
        assert!(version("0").is_zero() && version("0000").is_zero());
        for wrong in ["", "1.", ".1", "a", "1a", "-1", "1..2", "99999999999999999999999"] {
            assert!(wrong.parse::<MigrationVersion>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_file_may_write_it_as_a_number_or_a_text() {
        let read = |text: &str| serde_json::from_str::<MigrationVersion>(text).unwrap();
        assert_eq!(read("12"), read("\"12\""));
        assert_eq!(serde_json::to_string(&read("\"1.2\"")).unwrap(), "\"1.2\"");
    }
}
