//! What a pipeline file says of a release.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use upgrade_core::units::Bytes;

use crate::archive::Limits;

/// Configures `host.release`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReleaseConfig {
    /// The directory that holds `releases/` and the link.
    pub root: PathBuf,
    /// The name of the release; the version that the pipeline leads to if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// A tar, plain or packed with gzip or zstd.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub archive: Option<PathBuf>,
    /// A directory that is copied, instead of an archive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<PathBuf>,
    /// The SHA-256 digest that the archive must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// A file as sha256sum writes it, with the archive's digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256_file: Option<PathBuf>,
    /// A minisign signature of the archive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<PathBuf>,
    /// The minisign public key that the signature must be of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public_key: Option<String>,
    /// Whether a release without a signature is refused.
    #[serde(default)]
    pub require_signature: bool,
    /// How many releases are kept after commit, the new one and the one before included.
    #[serde(default = "default_keep")]
    pub keep: usize,
    /// The name of the link below `root`.
    #[serde(default = "default_current")]
    pub current: String,
    /// How many leading components of each name in the archive are dropped.
    #[serde(default)]
    pub strip_components: usize,
    /// The most that the archive may unpack to.
    #[serde(default = "default_unpacked")]
    pub max_unpacked: Bytes,
}

fn default_keep() -> usize {
    3
}

fn default_current() -> String {
    "current".to_owned()
}

fn default_unpacked() -> Bytes {
    Bytes(Limits::default().unpacked)
}
