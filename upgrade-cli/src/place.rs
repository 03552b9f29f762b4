//! Where the journal is: in a directory, or in a database.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use upgrade_core::journal::{FileJournal, Journal};

use crate::arguments::Global;
use crate::console::Console;
use crate::failure::{Failure, Result};

/// Names the place of the journal.
#[derive(Debug)]
pub(crate) enum Place {
    /// A directory of this machine.
    Directory(PathBuf),
    /// A database, and the directory for the copy of it.
    #[cfg(feature = "postgres")]
    Database(Box<upgrade_postgres::JournalAddress>, PathBuf),
}

impl Place {
    pub(crate) fn of(global: &Global) -> Result<Self> {
        let Some(url) = global.journal.as_deref().filter(|url| !url.is_empty()) else {
            return Ok(Self::Directory(global.state_dir.clone()));
        };
        match url.split_once(':') {
            Some(("file", path)) if !path.is_empty() => {
                Ok(Self::Directory(PathBuf::from(path.strip_prefix("//").unwrap_or(path))))
            }
            Some(("postgres" | "postgresql", _)) => Self::database(url, global),
            // Not the whole of it: whatever it is, it may hold a password.
            Some((scheme, _)) if scheme != "file" && !scheme.contains('@') => {
                Err(Failure::usage(format!("no adapter that keeps a journal at `{scheme}:` is built in"))
                    .with_hint("write it file:DIR or postgres://USER@HOST:PORT/DATABASE"))
            }
            _ => Err(Failure::usage("the journal's place is not a URL")
                .with_hint("write it file:DIR or postgres://USER@HOST:PORT/DATABASE")),
        }
    }

    #[cfg(feature = "postgres")]
    fn database(url: &str, global: &Global) -> Result<Self> {
        let address = upgrade_postgres::JournalAddress::parse(url)?;
        // What stands on a command line is seen by everybody on the machine.
        if address.has_password() && std::env::var("UPGRADE_JOURNAL").as_deref() != Ok(url) {
            return Err(Failure::usage("the journal's URL holds a password, which others on this machine can see")
                .with_hint("leave it out and set PGPASSWORD, or keep it in ~/.pgpass; or set UPGRADE_JOURNAL in place of --journal"));
        }
        Ok(Self::Database(Box::new(address), global.state_dir.join("copy")))
    }

    #[cfg(not(feature = "postgres"))]
    fn database(_url: &str, _global: &Global) -> Result<Self> {
        Err(Failure::usage("no adapter that keeps a journal at `postgres:` is built in")
            .with_hint("build the command with it: cargo install upgrade-cli --features postgres"))
    }

    /// Tells whether the journal is reached over a network.
    pub(crate) fn is_remote(&self) -> bool {
        !matches!(self, Self::Directory(_))
    }

    /// Spells the place as arguments of another call of this command.
    pub(crate) fn arguments(&self) -> Result<Vec<String>> {
        let absolute = |path: &PathBuf| Ok::<_, Failure>(std::path::absolute(path)?.display().to_string());
        Ok(match self {
            Self::Directory(directory) => vec!["--state-dir".into(), absolute(directory)?],
            #[cfg(feature = "postgres")]
            Self::Database(address, copy) => {
                let state = copy.parent().unwrap_or(copy).to_path_buf();
                vec!["--journal".into(), address.full_url(), "--state-dir".into(), absolute(&state)?]
            }
        })
    }

    /// Opens the journal, making it where there is none.
    pub(crate) async fn open(&self) -> Result<Arc<dyn Journal>> {
        match self {
            Self::Directory(directory) => {
                let journal = FileJournal::open(directory)?;
                Ok(match seal_key() {
                    Some(key) => Arc::new(journal.with_key(&key)?),
                    None => Arc::new(journal),
                })
            }
            #[cfg(feature = "postgres")]
            Self::Database(address, copy) => {
                let journal = upgrade_postgres::PostgresJournal::open((**address).clone()).await?;
                keyed(journal, copy)
            }
        }
    }

    /// Opens the journal if there is one.
    pub(crate) async fn open_existing(&self) -> Result<Option<Arc<dyn Journal>>> {
        match self {
            Self::Directory(directory) if directory.is_dir() => self.open().await.map(Some),
            Self::Directory(_) => Ok(None),
            #[cfg(feature = "postgres")]
            Self::Database(address, copy) => {
                let found = upgrade_postgres::PostgresJournal::open_existing((**address).clone()).await?;
                found.map(|journal| keyed(journal, copy)).transpose()
            }
        }
    }

    /// Opens the journal if there is one, or what there is to read of one whose server is away.
    pub(crate) async fn open_readable(&self, console: Console) -> Result<Option<Arc<dyn Journal>>> {
        #[cfg(feature = "postgres")]
        if let Self::Database(address, copy) = self {
            use upgrade_core::journal::JournalError;
            let found = upgrade_postgres::PostgresJournal::open_existing((**address).clone()).await;
            return match found {
                Err(error @ JournalError::Server { .. }) if copy.is_dir() => {
                    console.alarm(format_args!(
                        "{} {error}; this is what this machine last saw of it, in {}",
                        console.err().careful("!"),
                        copy.display()
                    ));
                    Ok(Some(Arc::new(crate::copy::Copy::new(copy))))
                }
                found => found?.map(|journal| keyed(journal, copy)).transpose(),
            };
        }
        let _ = console;
        self.open_existing().await
    }
}

#[cfg(feature = "postgres")]
fn keyed(journal: upgrade_postgres::PostgresJournal, copy: &std::path::Path) -> Result<Arc<dyn Journal>> {
    let journal = match seal_key() {
        Some(key) => journal.with_key(&key)?,
        None => journal,
    };
    Ok(Arc::new(crate::copy::Copied::new(Arc::new(journal), copy)))
}

/// Reads the key for found contents, where one is configured.
fn seal_key() -> Option<String> {
    std::env::var("UPGRADE_SEAL_KEY").ok().filter(|key| !key.is_empty())
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(directory) => write!(f, "{}", directory.display()),
            #[cfg(feature = "postgres")]
            Self::Database(address, _) => f.write_str(address.url()),
        }
    }
}
