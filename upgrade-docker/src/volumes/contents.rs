//! What a volume holds, entry by entry: the token by which one state is told from another.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType};
use upgrade_core::context::Context;
use upgrade_core::sealed::{hex, sha256_hex};

use super::members::{self, Member, Members};

/// Sorts entries by what they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    File,
    Directory,
    Symlink,
    HardLink,
    CharacterDevice,
    BlockDevice,
    Pipe,
}

/// Describes one entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// From the volume's root on; the root itself is empty. What is not plain text is escaped.
    pub(crate) path: String,
    pub(crate) kind: Kind,
    pub(crate) mode: u32,
    pub(crate) owner: (u64, u64),
    /// In whole seconds, as the engine gives it.
    pub(crate) mtime: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) size: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sha256: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) target: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) device: Option<(u32, u32)>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) attributes: BTreeMap<String, String>,
}

/// Lists all that a volume holds, in order of the paths.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Contents(Vec<Entry>);

impl Contents {
    fn new(mut entries: Vec<Entry>) -> Self {
        entries.sort_by(|a, b| a.path.cmp(&b.path));
        Self(entries)
    }

    /// Returns the SHA-256 of the canonical text.
    pub(crate) fn token(&self) -> String {
        sha256_hex(&serde_json::to_vec(self).expect("an entry holds nothing that JSON cannot"))
    }

    pub(crate) fn files(&self) -> u64 {
        self.0.iter().filter(|entry| entry.kind == Kind::File).count() as u64
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.0.iter().filter_map(|entry| entry.size).sum()
    }

    /// Tells whether there is nothing below the root.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.iter().all(|entry| entry.path.is_empty())
    }

    /// Names the first entry that differs from another volume's.
    pub(crate) fn difference(&self, other: &Self) -> Option<String> {
        let there: BTreeMap<_, _> = other.0.iter().map(|entry| (&entry.path, entry)).collect();
        let here: BTreeMap<_, _> = self.0.iter().map(|entry| (&entry.path, entry)).collect();
        let paths = here.keys().chain(there.keys());
        let different = paths.filter(|path| here.get(*path) != there.get(*path)).min();
        different.map(|path| if path.is_empty() { "its root directory".into() } else { format!("`{path}`") })
    }
}

/// Bounds how many entries are kept in memory.
const MOST: usize = 50_000_000;

/// Reads the rest of a tar and notes what it holds; on the way, writes it below another directory
/// `to` of another tar. A member `aside` beside the directory `from` is read into memory instead.
pub(crate) fn pass<R: Read, W: Write>(
    from: &mut Members<R>,
    from_top: &str,
    to: &mut Builder<W>,
    to_top: &str,
    aside: Option<&str>,
    report: &mut dyn FnMut(u64) -> io::Result<()>,
) -> io::Result<(Contents, Option<Vec<u8>>)> {
    let (mut entries, mut found, mut done) = (Vec::new(), None, 0);
    while let Some(member) = from.next()? {
        report(done)?;
        if aside.is_some_and(|aside| member.name == aside.as_bytes()) {
            if found.is_some() {
                return Err(unfit("its manifest is there twice"));
            }
            found = Some(from.read_all(2 << 30)?);
            continue;
        }
        let path = below(from_top, &member.name)?;
        let link = if member.kind.is_hard_link() { below(from_top, &member.link)? } else { member.link.clone() };
        let mut entry = describe(&member, &path, &link)?;
        let name = joined(to_top, &path, entry.kind == Kind::Directory);
        let link = if entry.kind == Kind::HardLink { joined(to_top, &link, false) } else { link };
        let mut tally = Tally { content: &mut *from, hasher: Sha256::new(), done: &mut done, report };
        members::write(to, &member, &name, &link, &mut tally)?;
        let digest = hex(&tally.hasher.finalize());
        if entry.kind == Kind::File {
            (entry.size, entry.sha256) = (Some(member.size), Some(digest));
        }
        entries.push(entry);
        if entries.len() > MOST {
            return Err(unfit("it has more entries than can be listed"));
        }
    }
    let contents = Contents::new(entries);
    if contents.0.windows(2).any(|pair| pair[0].path == pair[1].path) {
        return Err(unfit("an entry is there twice"));
    }
    Ok((contents, found))
}

/// Reads a tar and notes what it holds.
pub(crate) fn survey<R: Read>(stream: R, top: &str, cx: &Context) -> io::Result<Contents> {
    let mut report = |done| watch(cx, done, None, "reading what the volume holds");
    let mut nowhere = Builder::new(io::sink());
    Ok(pass(&mut Members::new(stream), top, &mut nowhere, top, None, &mut report)?.0)
}

/// Reports progress, and ends the work when the call is cancelled.
pub(crate) fn watch(cx: &Context, done: u64, total: Option<u64>, message: &str) -> io::Result<()> {
    if cx.cancelled().is_cancelled() {
        return Err(io::Error::other("cancelled"));
    }
    cx.progress(done, total, message);
    Ok(())
}

struct Tally<'a, R> {
    content: &'a mut Members<R>,
    hasher: Sha256,
    done: &'a mut u64,
    report: &'a mut dyn FnMut(u64) -> io::Result<()>,
}

impl<R: Read> Read for Tally<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.content.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        let before = *self.done >> 20;
        *self.done += read as u64;
        if *self.done >> 20 != before {
            (self.report)(*self.done)?;
        }
        Ok(read)
    }
}

fn describe(member: &Member, path: &[u8], link: &[u8]) -> io::Result<Entry> {
    let kind = match member.kind {
        EntryType::Regular | EntryType::Continuous => Kind::File,
        EntryType::Directory => Kind::Directory,
        EntryType::Symlink => Kind::Symlink,
        EntryType::Link => Kind::HardLink,
        EntryType::Char => Kind::CharacterDevice,
        EntryType::Block => Kind::BlockDevice,
        EntryType::Fifo => Kind::Pipe,
        _ => return Err(unfit("an entry is of a type that is not known")),
    };
    let attributes = member.xattrs.iter().map(|(name, value)| (name.clone(), hex(value))).collect();
    Ok(Entry {
        path: spelled(path),
        kind,
        mode: member.mode,
        owner: member.owner,
        mtime: member.mtime,
        size: None,
        sha256: None,
        target: matches!(kind, Kind::Symlink | Kind::HardLink).then(|| spelled(link)),
        device: member.device,
        attributes,
    })
}

/// Returns the rest of a name below a directory; empty for the directory itself.
fn below(top: &str, name: &[u8]) -> io::Result<Vec<u8>> {
    let rest = name.strip_prefix(top.as_bytes()).filter(|rest| rest.is_empty() || rest.starts_with(b"/"));
    let rest = rest.ok_or_else(|| unfit("an entry is outside of it"))?;
    let parts: Vec<&[u8]> = rest.split(|byte| *byte == b'/').filter(|part| !part.is_empty()).collect();
    if parts.iter().any(|part| matches!(*part, b"." | b"..") || part.contains(&0)) {
        return Err(unfit("the name of an entry leads elsewhere"));
    }
    Ok(parts.join(&b'/'))
}

fn joined(top: &str, path: &[u8], directory: bool) -> Vec<u8> {
    let mut name = top.as_bytes().to_vec();
    if !path.is_empty() {
        name.push(b'/');
        name.extend_from_slice(path);
    }
    if directory {
        name.push(b'/');
    }
    name
}

/// Spells a path so that two different ones differ: as it is, or escaped.
fn spelled(path: &[u8]) -> String {
    match std::str::from_utf8(path) {
        Ok(text) if !text.contains('\\') && !text.contains(char::is_control) => text.to_owned(),
        _ => path.escape_ascii().to_string(),
    }
}

fn unfit(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_below() {
        assert_eq!(below("volume", b"volume/a//b/").unwrap(), b"a/b");
        assert!(below("volume", b"volume/").unwrap().is_empty());
        for name in [&b"a"[..], b"volumes/a", b"/volume/a", b"volume/../a", b"volume/a\0", b""] {
            assert!(below("volume", name).is_err(), "{name:?}");
        }
        assert_ne!(spelled(b"a\\x0a"), spelled(b"a\n"));
        assert_ne!(spelled(b"\xff"), spelled(b"\\xff"));
    }
}
