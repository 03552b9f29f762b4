//! What the tests of archives, releases and backups share: tars written byte by byte, and a
//! picture of a directory to compare with.

#![cfg(test)]

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Builds a tar that no library would write.
#[derive(Clone, Default)]
pub(crate) struct Tar(pub(crate) Vec<u8>);

impl Tar {
    pub(crate) fn entry(mut self, name: &[u8], kind: u8, mode: u32, link: &[u8], content: &[u8]) -> Self {
        self.header(name, kind, mode, link, content.len() as u64);
        self.0.extend(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn file(self, name: &str, content: &[u8]) -> Self {
        self.entry(name.as_bytes(), b'0', 0o644, b"", content)
    }

    pub(crate) fn link(self, name: &str, target: &str) -> Self {
        self.entry(name.as_bytes(), b'2', 0o777, target.as_bytes(), b"")
    }

    pub(crate) fn header(&mut self, name: &[u8], kind: u8, mode: u32, link: &[u8], size: u64) {
        let mut block = [0u8; 512];
        block[..name.len().min(100)].copy_from_slice(&name[..name.len().min(100)]);
        block[100..108].copy_from_slice(format!("{mode:07o}\0").as_bytes());
        block[108..116].copy_from_slice(b"0000000\0");
        block[116..124].copy_from_slice(b"0000000\0");
        block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
        block[136..148].copy_from_slice(b"14000000000\0");
        block[156] = kind;
        block[157..157 + link.len()].copy_from_slice(link);
        block[257..265].copy_from_slice(b"ustar  \0");
        block[148..156].copy_from_slice(b"        ");
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend(block);
    }

    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

pub(crate) fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn zst(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).unwrap()
}

pub(crate) type Picture = BTreeMap<PathBuf, String>;

/// Describes all below a directory: kind, mode, owner, content, target.
pub(crate) fn picture(root: &Path) -> Picture {
    draw(root, false)
}

/// As [`picture`], with times of modification.
pub(crate) fn picture_with_times(root: &Path) -> Picture {
    draw(root, true)
}

fn draw(root: &Path, times: bool) -> Picture {
    let mut picture = Picture::new();
    let mut waiting = vec![root.to_path_buf()];
    while let Some(path) = waiting.pop() {
        let Ok(metadata) = path.symlink_metadata() else { continue };
        let what = if metadata.is_dir() {
            waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            "directory".to_owned()
        } else if metadata.is_symlink() {
            format!("link {}", fs::read_link(&path).unwrap().display())
        } else if metadata.is_file() {
            format!("file {:?}", upgrade_core::sealed::sha256_hex(&fs::read(&path).unwrap()))
        } else {
            "special".to_owned()
        };
        let time = if times { format!(" {}.{}", metadata.mtime(), metadata.mtime_nsec()) } else { String::new() };
        let owner = (metadata.uid(), metadata.gid());
        picture.insert(
            path.strip_prefix(root).unwrap().to_path_buf(),
            format!("{what} {:o} {owner:?}{time}", metadata.permissions().mode()),
        );
    }
    picture
}

/// Compares an undo record with its golden file and returns what that holds; `UPDATE_GOLDEN=1` writes it.
pub(crate) fn golden(name: &str, undo: &impl serde::Serialize, replace: &[(&str, &str)]) -> serde_json::Value {
    let mut text = serde_json::to_string_pretty(undo).unwrap() + "\n";
    for (from, to) in replace {
        text = text.replace(from, to);
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, &text).unwrap();
    }
    assert_eq!(text, fs::read_to_string(&path).unwrap(), "{}", path.display());
    serde_json::from_str(&text).unwrap()
}
