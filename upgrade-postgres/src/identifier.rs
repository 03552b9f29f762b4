//! Names of things in a database, as people write them and as they are put into statements.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Says why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a {what}: {reason}")]
pub struct IdentifierError {
    text: String,
    what: &'static str,
    reason: &'static str,
}

/// The longest name that a server keeps whole: NAMEDATALEN - 1 bytes.
pub const LONGEST: usize = 63;

/// Holds one name of the database, exactly as the catalog spells it: case matters.
///
/// Display quotes it, so that it can be put into a statement whatever it holds.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Identifier(String);

impl Identifier {
    /// Takes a name.
    ///
    /// # Errors
    /// It is empty, longer than 63 bytes, or holds a null character.
    pub fn new(name: impl Into<String>) -> Result<Self, IdentifierError> {
        let text = name.into();
        let reason = if text.is_empty() {
            "it is empty"
        } else if text.len() > LONGEST {
            "it is longer than 63 bytes, and the server would cut it"
        } else if text.contains('\0') {
            "it holds a null character"
        } else {
            return Ok(Self(text));
        };
        Err(IdentifierError { text: text.escape_debug().take(100).collect(), what: "name", reason })
    }

    /// Makes a name of our own from a start and a digest of `of`, short enough for the server.
    ///
    /// # Panics
    /// Never: what is kept of `start` leaves room for the digest.
    pub fn derived(start: &str, of: &str) -> Self {
        let digest = upgrade_core::sealed::sha256_hex(of.as_bytes());
        let kept: String = start
            .chars()
            .filter(|c| *c != '\0')
            .scan(0, |bytes, c| {
                *bytes += c.len_utf8();
                (*bytes <= LONGEST - 13).then_some(c)
            })
            .collect();
        Self(format!("{kept}_{}", &digest[..12]))
    }

    /// Returns the name without quotes.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Identifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.replace('"', "\"\""))
    }
}

impl TryFrom<String> for Identifier {
    type Error = IdentifierError;
    fn try_from(text: String) -> Result<Self, IdentifierError> {
        Self::new(text)
    }
}

impl FromStr for Identifier {
    type Err = IdentifierError;
    fn from_str(text: &str) -> Result<Self, IdentifierError> {
        Self::new(text)
    }
}

impl From<Identifier> for String {
    fn from(name: Identifier) -> String {
        name.0
    }
}

/// Holds the name of a table, view or index: `orders`, `shop.orders`, `"odd.schema"."odd table"`.
///
/// Without a schema it is looked up in `public`. Display quotes both parts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct TableName {
    /// The schema that holds it.
    pub schema: Identifier,
    /// Its name within the schema.
    pub name: Identifier,
}

impl TableName {
    /// Makes the name of a table in a schema.
    pub fn new(schema: Identifier, name: Identifier) -> Self {
        Self { schema, name }
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

impl FromStr for TableName {
    type Err = IdentifierError;
    fn from_str(text: &str) -> Result<Self, IdentifierError> {
        let wrong =
            |reason| IdentifierError { text: text.escape_debug().take(140).collect(), what: "table name", reason };
        let mut parts = Vec::new();
        let mut rest = text;
        loop {
            let (part, after) = match rest.strip_prefix('"') {
                Some(quoted) => unquote(quoted).ok_or_else(|| wrong("a quote is not closed"))?,
                None => {
                    let end = rest.find('.').unwrap_or(rest.len());
                    (rest[..end].to_owned(), &rest[end..])
                }
            };
            parts.push(Identifier::new(part)?);
            match after.strip_prefix('.') {
                Some(next) => rest = next,
                None if after.is_empty() => break,
                None => return Err(wrong("something follows the closing quote")),
            }
        }
        let mut parts = parts.into_iter();
        match (parts.next(), parts.next(), parts.next()) {
            (Some(schema), Some(name), None) => Ok(Self { schema, name }),
            (Some(name), None, None) => Ok(Self { schema: Identifier("public".into()), name }),
            _ => Err(wrong("it has more than a schema and a name")),
        }
    }
}

/// Reads up to the closing quote; what follows it is returned as well.
fn unquote(text: &str) -> Option<(String, &str)> {
    let mut name = String::new();
    let mut rest = text;
    loop {
        let end = rest.find('"')?;
        name.push_str(&rest[..end]);
        rest = &rest[end + 1..];
        match rest.strip_prefix('"') {
            Some(after) => {
                name.push('"');
                rest = after;
            }
            None => return Some((name, rest)),
        }
    }
}

impl TryFrom<String> for TableName {
    type Error = IdentifierError;
    fn try_from(text: String) -> Result<Self, IdentifierError> {
        text.parse()
    }
}

impl From<TableName> for String {
    fn from(table: TableName) -> String {
        let plain = |name: &Identifier| match name.as_str().contains(['.', '"']) {
            true => name.to_string(),
            false => name.as_str().to_owned(),
        };
        format!("{}.{}", plain(&table.schema), plain(&table.name))
    }
}

/// Writes a text as a literal of SQL, for the statements that take no parameters (DDL, `SET`).
pub(crate) fn literal(text: &str) -> String {
    // E'' is read alike whatever standard_conforming_strings says.
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_people_write_them() {
        let spelled = |text: &str| text.parse::<TableName>().map(|table| table.to_string());
        assert_eq!(spelled("orders").unwrap(), r#""public"."orders""#);
        assert_eq!(spelled("shop.Orders").unwrap(), r#""shop"."Orders""#);
        assert_eq!(spelled(r#""odd.schema"."odd ""table""""#).unwrap(), r#""odd.schema"."odd ""table""""#);
        for wrong in ["", ".", "a.", "a.b.c", "\"a", "\"a\"b", &"x".repeat(64), "a\0b"] {
            assert!(spelled(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_name_comes_back_from_its_text() {
        for text in ["orders", "shop.orders", r#""odd.schema"."odd ""table""""#] {
            let table: TableName = text.parse().unwrap();
            assert_eq!(String::from(table.clone()).parse::<TableName>().unwrap(), table);
        }
    }

    #[test]
    fn a_derived_name_is_short_and_its_own() {
        let long = "ü".repeat(80);
        let name = Identifier::derived(&long, "one");
        assert!(name.as_str().len() <= LONGEST);
        assert_ne!(name, Identifier::derived(&long, "two"));
    }

    #[test]
    fn a_literal_cannot_be_left() {
        assert_eq!(literal(r"a\'b"), r"E'a\\''b'");
    }
}
