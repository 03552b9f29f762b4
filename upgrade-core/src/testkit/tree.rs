//! A directory written down, so that two of them can be compared.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use crate::sealed::sha256_hex;

/// Writes down what is below `root`: each path with its kind, permissions, owner, and the digest
/// of its content or the target of its link. Times are left out.
///
/// What cannot be read is written down as such: it is part of the world as well.
pub fn tree(root: &Path) -> String {
    let mut text = String::new();
    walk(root, root, &mut text);
    text
}

fn walk(root: &Path, at: &Path, text: &mut String) {
    let mut entries: Vec<_> = match fs::read_dir(at) {
        Ok(entries) => entries.filter_map(Result::ok).collect(),
        Err(error) => {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{}: {error}", at.display());
            return;
        }
    };
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let name = path.strip_prefix(root).unwrap_or(&path).display().to_string();
        let Ok(meta) = fs::symlink_metadata(&path) else { continue };
        let owner = format!("{}:{}", meta.uid(), meta.gid());
        let mode = meta.permissions().mode() & 0o7777;
        let _ = if meta.is_symlink() {
            let target = fs::read_link(&path).unwrap_or_default();
            writeln!(text, "{name} -> {}", target.display())
        } else if meta.is_dir() {
            writeln!(text, "{name}/ {mode:04o} {owner}")
        } else {
            let content =
                fs::read(&path).map_or_else(|error| error.to_string(), |bytes| sha256_hex(&bytes)[..16].to_owned());
            writeln!(text, "{name} {mode:04o} {owner} {} bytes {content}", meta.len())
        };
        if meta.is_dir() {
            walk(root, &path, text);
        }
    }
}
