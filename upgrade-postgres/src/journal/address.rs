//! Where a journal is: a connection URL, with what only a journal needs.

use upgrade_core::error::StepError;
use upgrade_core::names::LockName;
use url::Url;

use crate::address::Address;
use crate::identifier::Identifier;

/// The schema of a journal whose URL names none.
const SCHEMA: &str = "upgrade_journal";

/// Holds where a journal is: `postgres://USER@HOST:PORT/DATABASE?schema=NAME&lives_in=LOCK`.
///
/// `schema` names the schema of its tables, by default `upgrade_journal`; `lives_in`, which may be
/// given several times, names what else it lives in: the lock name of a target that no pipeline
/// kept there may change, `service:postgresql` for one.
#[derive(Debug, Clone)]
pub struct JournalAddress {
    pub(super) address: Address,
    pub(super) schema: Identifier,
    pub(super) lives_in: Vec<LockName>,
}

impl JournalAddress {
    /// Reads the URL of a journal.
    ///
    /// # Errors
    /// It is not the URL of a database, or `schema` or `lives_in` is not a name. The error does not
    /// repeat the URL.
    pub fn parse(text: &str) -> Result<Self, StepError> {
        let mut schema = Identifier::new(SCHEMA).expect("the default is a name");
        let mut lives_in = Vec::new();
        let Ok(mut url) = Url::parse(text) else {
            // It says what is wrong without the password that may be in it.
            return Address::parse(text).map(|address| Self { address, schema, lives_in });
        };
        let mut others = Vec::new();
        for (name, value) in url.query_pairs() {
            let wrong = |error: &dyn std::error::Error, hint: &str| {
                StepError::permanent(format!("`{name}` in the journal's URL: {error}")).with_hint(hint)
            };
            match &*name {
                "schema" => {
                    schema = Identifier::new(value.as_ref())
                        .map_err(|error| wrong(&error, "write the name of a schema: `?schema=upgrade_journal`"))?;
                }
                "lives_in" => {
                    let lock = LockName::try_from(value.as_ref().to_owned()).map_err(|error| {
                        wrong(&error, "write it as a target is locked: `lives_in=service:postgresql`")
                    })?;
                    lives_in.push(lock);
                }
                _ => others.push((name.into_owned(), value.into_owned())),
            }
        }
        url.set_query(None);
        if !others.is_empty() {
            url.query_pairs_mut().extend_pairs(others);
        }
        Ok(Self { address: Address::parse(url.as_str())?, schema, lives_in })
    }

    /// Tells whether the URL itself holds a password.
    pub fn has_password(&self) -> bool {
        self.address.password().is_some()
    }

    /// Returns the URL without its password, as people are shown it.
    pub fn url(&self) -> &str {
        self.address.url()
    }

    /// Returns the URL without its password, with what only a journal needs.
    pub fn full_url(&self) -> String {
        let Ok(mut url) = Url::parse(self.url()) else { return self.url().to_owned() };
        if self.schema.as_str() != SCHEMA {
            url.query_pairs_mut().append_pair("schema", self.schema.as_str());
        }
        for lock in &self.lives_in {
            url.query_pairs_mut().append_pair("lives_in", lock.as_str());
        }
        url.into()
    }

    /// Spells the journal in messages and in the keys of its locks.
    pub(super) fn place(&self) -> String {
        let address = &self.address;
        format!("{}:{}/{} schema {}", address.host(), address.port(), address.database_name(), self.schema)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_a_journal_needs_is_taken_out() {
        let text = "postgres://ann:p%40ss@db/x?sslmode=require&schema=ops&lives_in=service:pg&lives_in=path:/data";
        let journal = JournalAddress::parse(text).unwrap();
        assert_eq!(journal.url(), "postgres://ann@db/x?sslmode=require");
        assert!(journal.has_password());
        assert_eq!(journal.schema.as_str(), "ops");
        assert_eq!(JournalAddress::parse(&journal.full_url()).unwrap().place(), journal.place());
        assert_eq!(journal.lives_in.iter().map(LockName::as_str).collect::<Vec<_>>(), ["service:pg", "path:/data"]);
        let plain = JournalAddress::parse("postgresql://ann@db/x").unwrap();
        assert_eq!((plain.schema.as_str(), plain.lives_in.len(), plain.has_password()), (SCHEMA, 0, false));
        assert_eq!(plain.url(), "postgresql://ann@db/x");
    }

    #[test]
    fn a_wrong_part_is_named_with_a_remedy_and_no_password() {
        for (text, named) in [
            ("postgres://a:hunter2@b/c?schema=", "schema"),
            ("postgres://a:hunter2@b/c?lives_in=postgresql", "lives_in"),
            ("mysql://a:hunter2@b/c", "mysql"),
            ("postgres://a:hunter2@b:port/c", "URL"),
        ] {
            let error = JournalAddress::parse(text).unwrap_err();
            let told = format!("{error} {:?} {:?}", error.causes(), error.hint());
            assert!(told.contains(named) && error.hint().is_some() && !told.contains("hunter2"), "{told}");
        }
    }
}
