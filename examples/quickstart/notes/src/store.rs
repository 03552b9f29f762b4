//! The notes, wherever they are kept; here, a JSON array of strings in a file that is never half
//! written.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Keeps the notes of a service.
pub trait Store: Send {
    /// Returns all notes as JSON.
    ///
    /// # Errors
    /// They cannot be read.
    fn json(&mut self) -> Result<String, String>;

    /// Adds a note; it is durable when this returns.
    ///
    /// # Errors
    /// It could not be written.
    fn add(&mut self, note: &str) -> Result<(), String>;
}

/// Keeps notes in a file.
pub struct FileStore {
    path: PathBuf,
    notes: Vec<String>,
}

impl FileStore {
    /// Opens the file.
    ///
    /// # Errors
    /// It cannot be read, or holds something else.
    pub fn open(path: PathBuf) -> Result<Self, String> {
        let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let notes = parse(&text).ok_or_else(|| format!("{}: this is not a JSON array of strings", path.display()))?;
        Ok(Self { path, notes })
    }

    fn text(&self) -> String {
        let notes: Vec<_> = self.notes.iter().map(|note| quoted(note)).collect();
        format!("[{}]", notes.join(","))
    }
}

impl Store for FileStore {
    fn json(&mut self) -> Result<String, String> {
        Ok(self.text())
    }

    fn add(&mut self, note: &str) -> Result<(), String> {
        self.notes.push(note.to_owned());
        let written = replace(&self.path, &self.text());
        if written.is_err() {
            self.notes.pop();
        }
        written.map_err(|e| format!("{}: {e}", self.path.display()))
    }
}

fn replace(path: &Path, text: &str) -> std::io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    match path.parent() {
        Some(directory) => File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}

/// Writes a text as a string of JSON.
pub fn quoted(text: &str) -> String {
    let mut json = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => json.extend(['\\', c]),
            c if c.is_control() => json.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => json.push(c),
        }
    }
    json.push('"');
    json
}

fn parse(text: &str) -> Option<Vec<String>> {
    let mut rest = text.trim().strip_prefix('[')?.strip_suffix(']')?.trim();
    let mut notes = Vec::new();
    while !rest.is_empty() {
        let (note, after) = parse_string(rest.strip_prefix('"')?)?;
        notes.push(note);
        rest = match after.trim_start() {
            "" => "",
            more => more.strip_prefix(',').map(str::trim_start).filter(|more| !more.is_empty())?,
        };
    }
    Some(notes)
}

/// Reads up to the closing quote; returns the string and what follows it.
fn parse_string(text: &str) -> Option<(String, &str)> {
    let mut string = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((string, &text[at + 1..])),
            '\\' => match chars.next()?.1 {
                'n' => string.push('\n'),
                't' => string.push('\t'),
                'r' => string.push('\r'),
                'u' => {
                    let digits: String = chars.by_ref().take(4).map(|(_, digit)| digit).collect();
                    string.push(char::from_u32(u32::from_str_radix(&digits, 16).ok()?)?);
                }
                plain => string.push(plain),
            },
            c => string.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_can_be_read() {
        let notes = ["plain", "a \"quote\", a \\ and\na line", ""];
        let json = format!("[{}]", notes.map(quoted).join(" ,\n"));
        assert_eq!(parse(&json), Some(notes.map(str::to_owned).to_vec()));
        assert_eq!(parse("[]"), Some(Vec::new()));
        for damaged in ["", "[", "[\"a\",]", "[\"a\" \"b\"]", "[\"a]", "[1]"] {
            assert_eq!(parse(damaged), None, "{damaged}");
        }
    }
}
