//! Finds a version in what a program or a file says.

use semver::Version;

/// Returns the first word that is a semantic version, `v` before it or not: `notes 1.2.3 (x86_64)`.
pub(crate) fn version_in(text: &str) -> Option<String> {
    text.split(|c: char| c.is_whitespace() || matches!(c, ',' | ';' | '(' | ')' | '"' | '=' | '/'))
        .map(|word| word.strip_prefix('v').unwrap_or(word))
        .find_map(|word| Version::parse(word).ok())
        .map(|version| version.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_version_is_found() {
        for (text, version) in [
            ("notes 1.2.3 (x86_64)", Some("1.2.3")),
            ("v2.0.0-rc.1\n", Some("2.0.0-rc.1")),
            ("nginx/1.25.3", Some("1.25.3")),
            ("version=\"3.1.4\"", Some("3.1.4")),
            ("no version, only 12", None),
        ] {
            assert_eq!(version_in(text).as_deref(), version, "{text}");
        }
    }
}
