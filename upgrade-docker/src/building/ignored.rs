//! The rule of `.dockerignore`, as the `docker` command reads it (Moby's `patternmatcher`).
//!
//! Each line is a pattern of the whole path from the context's directory on: `*` and `?` stop at a
//! slash, `**` does not, and what matches a directory matches all below it. A line that begins with
//! `!` takes back what lines before it left out; the last line that matches decides.

/// Holds the lines of a `.dockerignore`.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ignored {
    lines: Vec<Line>,
}

#[derive(Debug, Clone)]
struct Line {
    takes_back: bool,
    pattern: Vec<Token>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Literal(char),
    /// `?`
    One,
    /// `*`
    Within,
    /// `**` at the end
    Rest,
    /// `**` before more: any directories, or none
    Directories,
    /// `[a-z]`, `[^a]`
    Class {
        negated: bool,
        ranges: Vec<(char, char)>,
    },
}

impl Ignored {
    /// Reads the lines. `needed` are files that the engine itself reads, so that they are always sent.
    ///
    /// # Errors
    /// The line that is no pattern, and why.
    pub(crate) fn parse(text: &str, needed: &[&str]) -> Result<Self, String> {
        let mut ignored = Self::default();
        for line in text.trim_start_matches('\u{feff}').lines() {
            // Before it is trimmed: a `#` after a blank is a name.
            if line.starts_with('#') || line.trim().is_empty() {
                continue;
            }
            let (takes_back, pattern) = match line.trim().strip_prefix('!') {
                Some(pattern) => (true, pattern.trim()),
                None => (false, line.trim()),
            };
            if pattern.is_empty() {
                return Err(format!("`{line}` takes nothing back"));
            }
            let pattern = tokens(&cleaned(pattern)).ok_or_else(|| format!("`{line}` is not a pattern"))?;
            ignored.lines.push(Line { takes_back, pattern });
        }
        for file in needed.iter().filter(|file| ignored.leaves_out(file)).collect::<Vec<_>>() {
            let pattern = cleaned(file).chars().map(Token::Literal).collect();
            ignored.lines.push(Line { takes_back: true, pattern });
        }
        Ok(ignored)
    }

    /// Tells whether a path, from the context's directory on, is not sent.
    pub(crate) fn leaves_out(&self, path: &str) -> bool {
        let ends = path.char_indices().filter(|(_, letter)| *letter == '/').map(|(at, _)| at).chain([path.len()]);
        let above: Vec<Vec<char>> = ends.map(|end| path[..end].chars().collect()).collect();
        let decides = self.lines.iter().rev().find(|line| above.iter().any(|path| matches(&line.pattern, path)));
        decides.is_some_and(|line| !line.takes_back)
    }

    /// Tells whether something below a directory that is left out may be sent all the same.
    pub(crate) fn takes_back(&self) -> bool {
        self.lines.iter().any(|line| line.takes_back)
    }
}

/// Writes a path without empty parts, `.` and `..`, as Go's `filepath.Clean` does, and from the
/// context's directory on.
fn cleaned(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|last| *last != "..") => drop(parts.pop()),
            ".." if path.starts_with('/') => {}
            part => parts.push(part),
        }
    }
    if parts.is_empty() { ".".to_owned() } else { parts.join("/") }
}

fn tokens(pattern: &str) -> Option<Vec<Token>> {
    let mut letters = pattern.chars().peekable();
    let mut tokens = Vec::new();
    while let Some(letter) = letters.next() {
        tokens.push(match letter {
            '*' if letters.next_if_eq(&'*').is_some() => {
                letters.next_if_eq(&'/');
                if letters.peek().is_none() { Token::Rest } else { Token::Directories }
            }
            '*' => Token::Within,
            '?' => Token::One,
            '\\' => Token::Literal(letters.next()?),
            '[' => {
                let negated = letters.next_if_eq(&'^').is_some();
                let mut ranges = Vec::new();
                loop {
                    let from = match letters.next()? {
                        ']' if !ranges.is_empty() => break,
                        ']' | '-' => return None,
                        '\\' => letters.next()?,
                        letter => letter,
                    };
                    let to = match letters.next_if_eq(&'-') {
                        Some(_) => letters.next().filter(|to| *to != ']')?,
                        None => from,
                    };
                    ranges.push((from, to));
                }
                Token::Class { negated, ranges }
            }
            letter => Token::Literal(letter),
        });
    }
    Some(tokens)
}

/// Tells whether a pattern matches a whole path. The places that the pattern so far can have led to
/// are followed at once, so that no pattern takes long.
fn matches(pattern: &[Token], path: &[char]) -> bool {
    let mut at = vec![false; path.len() + 1];
    at[0] = true;
    for token in pattern {
        let mut next = vec![false; path.len() + 1];
        for from in (0..=path.len()).filter(|from| at[*from]) {
            let rest = &path[from..];
            match token {
                Token::Rest => next[from..].fill(true),
                Token::Within => {
                    let end = rest.iter().position(|letter| *letter == '/').unwrap_or(rest.len());
                    next[from..=from + end].fill(true);
                }
                Token::Directories => {
                    next[from] = true;
                    let slashes = rest.iter().enumerate().filter(|(_, letter)| **letter == '/');
                    slashes.for_each(|(slash, _)| next[from + slash + 1] = true);
                }
                Token::One => next[(from + 1).min(path.len())] |= rest.first().is_some_and(|letter| *letter != '/'),
                Token::Literal(wanted) => next[(from + 1).min(path.len())] |= rest.first() == Some(wanted),
                Token::Class { negated, ranges } => {
                    let is_in = |letter: &char| ranges.iter().any(|(from, to)| (from..=to).contains(&letter));
                    next[(from + 1).min(path.len())] |= rest.first().is_some_and(|letter| is_in(letter) != *negated);
                }
            }
        }
        at = next;
    }
    at[path.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_left_out_as_docker_leaves_them_out() {
        for (lines, path, left_out) in [
            ("", "a", false),
            ("a", "a", true),
            ("a", "a/b/c", true),
            ("a", "b/a", false),
            ("/a", "a", true),
            ("a/", "a/b", true),
            ("./a/../b", "b", true),
            ("*.log", "x.log", true),
            ("*.log", "below/x.log", false),
            ("*/*.log", "below/x.log", true),
            ("**/*.log", "x.log", true),
            ("**/*.log", "a/b/x.log", true),
            ("**", "a/b", true),
            ("a/**", "a/b/c", true),
            ("a/**", "ab", false),
            ("a/**/c", "a/c", true),
            ("a/**/c", "a/x/y/c", true),
            ("a/**/c", "a/xc", false),
            ("a?c", "abc", true),
            ("a?c", "a/c", false),
            ("[a-c]x", "bx", true),
            ("[^a-c]x", "bx", false),
            ("a.c", "abc", false),
            ("\\*", "*", true),
            ("\\*", "a", false),
            ("# a", "# a", false),
            ("*\n!a", "a", false),
            ("*\n!a", "a/b", false),
            ("*\n!a\na/b", "a/b", true),
            ("!a\n*", "a", true),
            ("*.md\n!README*.md\nREADME-secret.md", "README-secret.md", true),
            ("*.md\n!README*.md\nREADME-secret.md", "README.md", false),
            ("node_modules\n!node_modules/kept", "node_modules/kept", false),
            (" a ", "a", true),
            ("\u{feff}a", "a", true),
        ] {
            let ignored = Ignored::parse(lines, &[]).unwrap();
            assert_eq!(ignored.leaves_out(path), left_out, "{lines:?} on {path}");
        }
        for wrong in ["!", "[", "[]", "a\\", "[a-]"] {
            assert!(Ignored::parse(wrong, &[]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_the_engine_reads_is_sent_all_the_same() {
        let ignored = Ignored::parse("**", &["Dockerfile", ".dockerignore"]).unwrap();
        assert!(!ignored.leaves_out("Dockerfile") && !ignored.leaves_out(".dockerignore") && ignored.leaves_out("a"));
        assert!(ignored.takes_back() && !Ignored::parse("a", &["Dockerfile"]).unwrap().takes_back());
    }
}
