//! The names that an archive gives to its entries, and where its links may lead.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// Says which names an entry may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Names {
    /// Without control characters: a terminal or a log may show them.
    Plain,
    /// Any that a file system takes: a backup keeps what it found.
    Any,
}

/// Splits an entry's name into components that stay below the directory it is unpacked into.
///
/// Empty components and `.` are dropped, as every tar does; the root itself has no components.
pub(crate) fn components(raw: &[u8], names: Names) -> Result<Vec<Vec<u8>>, &'static str> {
    if raw.is_empty() {
        return Err("its name is empty");
    }
    if raw.starts_with(b"/") {
        return Err("its name is an absolute path");
    }
    if raw.contains(&0) {
        return Err("its name holds a NUL");
    }
    if names == Names::Plain && raw.iter().any(u8::is_ascii_control) {
        return Err("its name holds a control character");
    }
    if raw.len() > 4096 {
        return Err("its name is longer than 4096 bytes");
    }
    let mut parts = Vec::new();
    for part in raw.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err("its name leads upwards (`..`)"),
            part if part.len() > 255 => return Err("a part of its name is longer than 255 bytes"),
            part => parts.push(part.to_vec()),
        }
    }
    Ok(parts)
}

/// Tells why a symbolic link at depth `depth` (the number of directories above it) may not point
/// to `target`.
///
/// `..` is allowed only at the front: there it starts from the link's own directory, which is
/// known to be a real one. After a name it would start from wherever that name leads, which may be
/// another link.
pub(crate) fn link_leaves(target: &[u8], depth: usize) -> Option<&'static str> {
    if target.is_empty() || target.contains(&0) {
        return Some("it is a link without a target");
    }
    if target.starts_with(b"/") {
        return Some("it is a symbolic link to an absolute path");
    }
    let mut up = 0;
    let mut named = false;
    for part in target.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." if named => return Some("it is a symbolic link with `..` after a name"),
            b".." => up += 1,
            _ => named = true,
        }
    }
    (up > depth).then_some("it is a symbolic link that leads outside")
}

/// Joins components to a relative path.
pub(crate) fn join(parts: &[Vec<u8>]) -> PathBuf {
    parts.iter().map(|part| OsStr::from_bytes(part)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_below() {
        assert_eq!(components(b"./a//b/", Names::Plain).unwrap(), [b"a".to_vec(), b"b".to_vec()]);
        assert!(components(b"./", Names::Plain).unwrap().is_empty());
        for raw in [&b""[..], b"/a", b"a/../b", b"..", b"a\0b", b"a\nb", &[b'x'; 256], &[b'/'; 5000]] {
            assert!(components(raw, Names::Plain).is_err(), "{raw:?}");
        }
        assert!(components(b"a\nb", Names::Any).is_ok());
    }

    #[test]
    fn links_stay_below() {
        assert_eq!(link_leaves(b"../b", 1), None);
        assert_eq!(link_leaves(b"./b/c", 0), None);
        for (target, depth) in [(&b"../b"[..], 0), (b"/b", 3), (b"b/../../c", 5), (b"", 1), (b"../../..", 2)] {
            assert!(link_leaves(target, depth).is_some(), "{target:?}");
        }
    }
}
