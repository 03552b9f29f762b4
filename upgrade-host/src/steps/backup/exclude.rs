//! Which paths a backup leaves out.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Tells whether a pattern names this path of a tree that is backed up.
///
/// A pattern without `/` is compared with the name, one that starts with `/` with the whole path,
/// any other with the path from the tree's top on. `*` and `?` stop at a `/`, `**` does not.
pub(super) fn names(pattern: &str, roots: &[PathBuf], path: &Path) -> bool {
    let wanted = pattern.trim_end_matches('/').as_bytes();
    if pattern.starts_with('/') {
        return matches(wanted, path.as_os_str().as_bytes());
    }
    if !wanted.contains(&b'/') {
        return path.file_name().is_some_and(|name| matches(wanted, name.as_bytes()));
    }
    roots
        .iter()
        .filter_map(|root| path.strip_prefix(root).ok())
        .any(|relative| matches(wanted, relative.as_os_str().as_bytes()))
}

fn matches(pattern: &[u8], text: &[u8]) -> bool {
    match pattern {
        [] => text.is_empty(),
        [b'*', b'*', b'/', rest @ ..] if matches(rest, text) => true,
        [b'*', b'*', rest @ ..] => (0..=text.len()).any(|at| matches(rest, &text[at..])),
        [b'*', rest @ ..] => {
            let end = text.iter().position(|byte| *byte == b'/').unwrap_or(text.len());
            (0..=end).any(|at| matches(rest, &text[at..]))
        }
        [b'?', rest @ ..] => matches!(text, [byte, after @ ..] if *byte != b'/' && matches(rest, after)),
        [byte, rest @ ..] => matches!(text, [first, after @ ..] if first == byte && matches(rest, after)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_name_paths() {
        let roots = [PathBuf::from("/srv/app")];
        for (pattern, path, named) in [
            ("*.log", "/srv/app/var/x.log", true),
            ("*.log", "/srv/app/var/x.txt", false),
            ("cache", "/srv/app/var/cache", true),
            ("var/*", "/srv/app/var/x", true),
            ("var/*", "/srv/app/var/x/y", false),
            ("var/**", "/srv/app/var/x/y", true),
            ("**/tmp", "/srv/app/tmp", true),
            ("**/tmp", "/srv/app/a/b/tmp", true),
            ("/srv/app/tmp/", "/srv/app/tmp", true),
            ("/srv/app/tm?", "/srv/app/tmp", true),
        ] {
            assert_eq!(names(pattern, &roots, Path::new(path)), named, "{pattern} {path}");
        }
    }
}
