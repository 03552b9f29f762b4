//! What a tree holds, entry by entry: the token by which one tree is told from another.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use upgrade_core::sealed::{hex, sha256_hex};

/// Holds a path as the file system spells it, UTF-8 or not.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Spelled", into = "Spelled")]
pub(crate) struct RawPath(pub(crate) Vec<u8>);

/// Writes a path as text where it is text, else in hexadecimal.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Spelled {
    Text(String),
    Bytes { hex: String },
}

impl From<RawPath> for Spelled {
    fn from(path: RawPath) -> Self {
        match String::from_utf8(path.0) {
            Ok(text) => Self::Text(text),
            Err(error) => Self::Bytes { hex: hex(error.as_bytes()) },
        }
    }
}

impl TryFrom<Spelled> for RawPath {
    type Error = &'static str;
    fn try_from(spelled: Spelled) -> Result<Self, &'static str> {
        match spelled {
            Spelled::Text(text) => Ok(Self(text.into_bytes())),
            Spelled::Bytes { hex } if hex.is_ascii() && hex.len() % 2 == 0 => (0..hex.len())
                .step_by(2)
                .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).map_err(|_| "not hexadecimal"))
                .collect::<Result<_, _>>()
                .map(Self),
            Spelled::Bytes { .. } => Err("not hexadecimal"),
        }
    }
}

impl RawPath {
    pub(crate) fn of(path: &Path) -> Self {
        Self(path.as_os_str().as_bytes().to_vec())
    }

    pub(crate) fn as_path(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.0))
    }

    pub(crate) fn to_path(&self) -> PathBuf {
        self.as_path().to_path_buf()
    }
}

/// Sorts entries by what they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    File,
    Directory,
    Symlink,
    /// A socket, a pipe or a device.
    Special,
}

/// Describes one entry of a tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) path: RawPath,
    pub(crate) kind: Kind,
    pub(crate) mode: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) size: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sha256: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) target: Option<RawPath>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) owner: Option<(u32, u32)>,
    /// Seconds and nanoseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mtime: Option<(i64, u32)>,
}

/// Lists the entries of a tree in order of their paths.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) format: u32,
    pub(crate) entries: Vec<Entry>,
}

impl Manifest {
    pub(crate) fn new(mut entries: Vec<Entry>) -> Self {
        entries.sort_by(|a, b| a.path.cmp(&b.path));
        Self { format: 1, entries }
    }

    /// Leaves out what differs between two places that hold the same: owners and times.
    pub(crate) fn contents(&self) -> Self {
        let entries = self.entries.iter().cloned().map(|entry| Entry {
            owner: None,
            mtime: None,
            mode: if entry.kind == Kind::Symlink { 0o777 } else { entry.mode & 0o777 },
            ..entry
        });
        Self::new(entries.collect())
    }

    /// Returns the canonical text, whose SHA-256 is the tree's token.
    pub(crate) fn canonical(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a manifest holds nothing that JSON cannot")
    }

    pub(crate) fn token(&self) -> String {
        sha256_hex(&self.canonical())
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.entries.iter().filter_map(|entry| entry.size).sum()
    }

    pub(crate) fn files(&self) -> u64 {
        self.entries.iter().filter(|entry| entry.kind == Kind::File).count() as u64
    }

    /// Compares with what is there now: the first entry of this manifest that is gone or another,
    /// and how many entries came in addition.
    pub(crate) fn compare(&self, present: &Manifest) -> Comparison {
        let mut there: BTreeMap<_, _> = present.entries.iter().map(|entry| (&entry.path, entry)).collect();
        let mut altered = None;
        for entry in &self.entries {
            let same = there.remove(&entry.path) == Some(entry);
            if !same && altered.is_none() {
                altered = Some(entry.path.to_path());
            }
        }
        Comparison { altered, added: there.len() }
    }
}

/// Tells how a tree differs from its manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Comparison {
    pub(crate) altered: Option<PathBuf>,
    pub(crate) added: usize,
}
