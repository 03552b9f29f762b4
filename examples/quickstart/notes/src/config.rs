//! The service's configuration: the part of TOML that it needs.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;

/// Holds the configuration's values by dotted key, strings without their quotes.
pub struct Config {
    values: BTreeMap<String, String>,
}

impl Config {
    pub(crate) fn read(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
        Self::parse(&text).map_err(|why| format!("{}: {why}", path.display()))
    }

    /// Reads tables and `key = value` lines with strings, numbers and booleans.
    fn parse(text: &str) -> Result<Self, String> {
        let mut values = BTreeMap::new();
        let mut table = String::new();
        for (number, line) in text.lines().enumerate() {
            let line = without_comment(line).trim();
            if line.is_empty() {
                continue;
            }
            if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                table = format!("{}.", name.trim());
                continue;
            }
            let (key, value) = line.split_once('=').ok_or_else(|| format!("line {}: no `=`", number + 1))?;
            values.insert(format!("{table}{}", key.trim()), value.trim().trim_matches('"').to_owned());
        }
        Ok(Self { values })
    }

    /// Returns a value.
    ///
    /// # Errors
    /// It is not set.
    pub fn text(&self, key: &str) -> Result<&str, String> {
        self.values.get(key).map(String::as_str).ok_or_else(|| format!("`{key}` is not set"))
    }

    /// Returns a value that is a number.
    ///
    /// # Errors
    /// It is not set, or not a number.
    pub fn number(&self, key: &str) -> Result<usize, String> {
        self.text(key)?.parse().map_err(|_| format!("`{key}` is not a number"))
    }

    /// Returns a value that is an address with a port.
    ///
    /// # Errors
    /// It is not set, or not an address.
    pub fn address(&self, key: &str) -> Result<SocketAddr, String> {
        self.text(key)?.parse().map_err(|_| format!("`{key}` is not an address such as 127.0.0.1:7878"))
    }

    /// Passes if the configuration has the format that a release reads.
    ///
    /// # Errors
    /// It has another one.
    pub fn expect_format(&self, format: usize) -> Result<(), String> {
        match self.number("format")? {
            found if found == format => Ok(()),
            found => Err(format!("the configuration has format {found}; this release reads format {format}")),
        }
    }

    /// Passes if the configuration does not set a key that a release no longer knows.
    ///
    /// # Errors
    /// It does.
    pub fn expect_absent(&self, key: &str) -> Result<(), String> {
        if self.values.contains_key(key) { Err(format!("`{key}` is no longer known")) } else { Ok(()) }
    }
}

fn without_comment(line: &str) -> &str {
    let mut quoted = false;
    let end = line.find(|c| {
        quoted ^= c == '"';
        c == '#' && !quoted
    });
    &line[..end.unwrap_or(line.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_tables_and_comments() {
        let config = Config::parse("format = 2 # now\ndata = \"a#b\"\n[server]\nworkers = 4\n").unwrap();
        assert_eq!(config.text("data"), Ok("a#b"));
        assert_eq!(config.number("server.workers"), Ok(4));
        assert!(config.expect_format(2).is_ok());
        assert!(config.expect_format(1).is_err());
    }
}
