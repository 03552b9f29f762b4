//! Files and links on the disk: what stands at a path, and writes that survive a crash.

pub(crate) mod durable;
pub(crate) mod masked_diff;
pub(crate) mod ownership;
pub(crate) mod path_state;
pub(crate) mod swap;
pub(crate) mod template;

use std::path::{Path, PathBuf};

/// Makes a path of a configuration absolute: what is run may change its working directory.
pub(crate) fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}
