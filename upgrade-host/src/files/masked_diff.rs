//! Diffs of files whose found lines may be secret.

use similar::{ChangeTag, TextDiff};

/// Stands for what is not shown.
pub(crate) const MASK: &str = "•••";

/// Contents above this length are not compared line by line.
const LONGEST: usize = 256 * 1024;

/// Says how much of the content intended may be shown. Not `Debug`: it may hold secrets.
pub(crate) enum Shown {
    /// All of it: the pipeline spells it out, its secrets replaced.
    Clear(String),
    /// Nothing but keys: it comes from elsewhere.
    Masked(String),
}

/// Compares the content found with the one intended (`bytes`, shown as `shown`), line by line.
///
/// A line is shown only where the pipeline itself spells it out; of others, at most the key.
/// Returns nothing where the contents are not text, too long, or unknown.
pub(crate) fn masked_diff(found: Option<&[u8]>, shown: Option<&Shown>, bytes: &[u8]) -> Option<String> {
    let found = std::str::from_utf8(found?).ok()?;
    let (intended, clear) = match shown? {
        Shown::Clear(clear) => (std::str::from_utf8(bytes).ok()?, Some(clear)),
        Shown::Masked(text) => (text.as_str(), None),
    };
    if found.len().max(intended.len()) > LONGEST || found.contains('\0') || intended.contains('\0') {
        return None;
    }
    // A secret of several lines shifts those after it: then none can be trusted to be clear.
    let clear: Option<Vec<&str>> =
        clear.map(|clear| clear.lines().collect()).filter(|lines: &Vec<_>| lines.len() == intended.lines().count());
    let mut text = String::new();
    for change in TextDiff::from_lines(found, intended).iter_all_changes() {
        let line = change.value().trim_end_matches(['\n', '\r']);
        let spelled = change.new_index().and_then(|at| clear.as_ref()?.get(at).copied());
        let line = spelled.map_or_else(|| masked_line(line), str::to_owned);
        let sign = match change.tag() {
            ChangeTag::Equal => ' ',
            ChangeTag::Delete => '-',
            ChangeTag::Insert => '+',
        };
        text.push_str(&format!("{sign} {line}\n"));
    }
    Some(text)
}

/// Masks a line, keeping its key where it plainly has one.
pub(crate) fn masked_line(line: &str) -> String {
    if line.trim().is_empty() {
        return String::new();
    }
    match line.find(['=', ':']) {
        Some(at) if is_key(line.get(..at).unwrap_or_default()) && separates(line, at) => {
            let separator = if line.get(at..).is_some_and(|rest| rest.starts_with('=')) { "=" } else { ": " };
            format!("{}{separator}{MASK}", line.get(..at).unwrap_or_default())
        }
        _ => format!("{MASK} ({} bytes)", line.len()),
    }
}

/// Tells a key from the beginning of something encoded: words of one case.
fn is_key(text: &str) -> bool {
    let name = text.trim().trim_start_matches("export ").trim();
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    let one_case =
        !(name.contains(|c: char| c.is_ascii_uppercase()) && name.contains(|c: char| c.is_ascii_lowercase()));
    let digits = name.chars().filter(char::is_ascii_digit).count();
    !name.is_empty()
        && name.len() <= 40
        && name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(allowed)
        && one_case
        && digits <= 2
}

/// An encoded text may end in `=`, an address has a `:` without a blank behind it.
fn separates(line: &str, at: usize) -> bool {
    let rest = line.get(at..).unwrap_or_default();
    match rest.strip_prefix('=') {
        Some(value) => !value.trim().is_empty() && !value.trim().chars().all(|c| c == '='),
        None => rest == ":" || rest.starts_with(": "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_keys_are_kept() {
        for (line, masked) in [
            ("DB_PASSWORD=hunter2", "DB_PASSWORD=•••"),
            ("  password: hunter2", "  password: •••"),
            ("export TOKEN=abc", "export TOKEN=•••"),
            ("c2VjcmV0Cg==", "••• (12 bytes)"),
            ("abcdefgh==", "••• (10 bytes)"),
            ("alice:hunter2", "••• (13 bytes)"),
            ("postgres://alice:hunter2@db", "••• (27 bytes)"),
            ("hunter2", "••• (7 bytes)"),
        ] {
            assert_eq!(masked_line(line), masked);
        }
    }

    #[test]
    fn found_lines_are_masked_and_spelled_ones_shown() {
        let diff = masked_diff(Some(b"A=1\nB=old\n"), Some(&Shown::Clear("A=1\nB=•••\n".into())), b"A=1\nB=new\n");
        assert_eq!(diff.unwrap(), "  A=1\n- B=•••\n+ B=•••\n");
    }
}
