//! PostgreSQL servers of several versions, and fresh databases on them.

mod binaries;
pub(crate) mod cluster;
mod database;
mod shared;
mod tests;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use sqlx::postgres::PgConnectOptions;

pub use database::Database;

use cluster::{Cluster, Place};

use crate::home::Home;
use crate::sharing::Share;

/// The superuser of every server that is started here.
pub const USER: &str = "tester";
/// Its password; what is started here listens on loopback only.
pub const PASSWORD: &str = "secret-of-tester";

/// The versions that the tests run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Version {
    /// Debian's.
    V15,
    /// From the wheel.
    V16,
    /// From the wheel.
    V18,
}

impl Version {
    /// Every version, oldest first.
    pub const ALL: [Self; 3] = [Self::V15, Self::V16, Self::V18];
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V15 => "15",
            Self::V16 => "16",
            Self::V18 => "18",
        })
    }
}

/// One server that all test processes share, with fsync off; it ends when nobody has used it for
/// some seconds.
///
/// None, with a printed reason, where the programs are missing.
///
/// # Panics
/// Under `CI=true` where the programs are missing, and where the server cannot be started.
pub fn shared(version: Version) -> Option<Server> {
    let bin = found(version)?;
    Some(Server { place: shared::of(version, &bin), kind: Kind::Shared, bin, version })
}

/// A server of the caller's own in a scratch directory, ended on drop; `settings` go to its
/// `postgresql.conf`.
///
/// None, with a printed reason, where the programs are missing.
///
/// # Panics
/// Under `CI=true` where the programs are missing, and where the server cannot be started.
pub fn own(version: Version, settings: &[(&str, &str)]) -> Option<Server> {
    let bin = found(version)?;
    let home = Home::of_this_user();
    let cluster = Cluster::create(&home, version, &bin, settings);
    Some(Server { place: cluster.place().clone(), kind: Kind::Own(Box::new(cluster)), bin, version })
}

fn found(version: Version) -> Option<PathBuf> {
    match binaries::of(version) {
        Ok(bin) => Some(bin),
        Err(reason) if std::env::var("CI").as_deref() == Ok("true") => {
            panic!("PostgreSQL {version} is promised under CI, but {reason}")
        }
        Err(reason) => {
            eprintln!("skipped: no PostgreSQL {version}: {reason}");
            None
        }
    }
}

/// A running server.
#[derive(Debug)]
pub struct Server {
    place: Place,
    kind: Kind,
    bin: PathBuf,
    version: Version,
}

#[derive(Debug)]
enum Kind {
    Shared,
    Own(Box<Cluster>),
}

impl Server {
    /// The port on loopback.
    pub fn port(&self) -> u16 {
        self.place.port
    }

    /// The address.
    pub fn host(&self) -> &str {
        cluster::HOST
    }

    /// The version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// A program of this version, such as `pg_dump`.
    pub fn bin(&self, program: &str) -> PathBuf {
        self.bin.join(program)
    }

    /// The data directory.
    pub fn directory(&self) -> &Path {
        &self.place.data
    }

    /// What the server wrote to its log so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.place.log).unwrap_or_default()).into_owned()
    }

    /// The URL of a database, with the superuser's name and password.
    pub fn url(&self, database: &str) -> String {
        url(self.place.port, database)
    }

    /// A fresh database, dropped when it is let go of.
    ///
    /// # Panics
    /// Where it cannot be created.
    pub fn database(&self) -> Database {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("test_{}_{number}", std::process::id());
        Database::create(&self.place, &self.bin, name)
    }

    /// Stops the server as a crash would: every process of it at once, nothing written back.
    ///
    /// # Panics
    /// On a shared server.
    pub fn stop_immediate(&self) {
        self.cluster().stop(rustix::process::Signal::QUIT);
    }

    /// Stops the server in order, ending its sessions.
    ///
    /// # Panics
    /// On a shared server.
    pub fn stop_fast(&self) {
        self.cluster().stop(rustix::process::Signal::INT);
    }

    /// Starts a stopped server again, on its port.
    ///
    /// # Panics
    /// On a shared server, and where it does not come up.
    pub fn start(&self) {
        self.cluster().start();
    }

    /// Tells whether the server was stopped and not started again.
    ///
    /// # Panics
    /// On a shared server.
    pub fn is_stopped(&self) -> bool {
        self.cluster().is_stopped()
    }

    /// A standby that follows this server; `settings` go to its `postgresql.conf`.
    ///
    /// # Panics
    /// On a shared server, and where it does not come up.
    pub fn standby(&self, settings: &[(&str, &str)]) -> Server {
        let cluster = self.cluster().standby(settings);
        let place = cluster.place().clone();
        Server { place, kind: Kind::Own(Box::new(cluster)), bin: self.bin.clone(), version: self.version }
    }

    fn cluster(&self) -> &Cluster {
        match &self.kind {
            Kind::Own(cluster) => cluster,
            Kind::Shared => panic!("a shared server is not one test's to stop or start"),
        }
    }
}

fn url(port: u16, database: &str) -> String {
    format!("postgres://{USER}:{PASSWORD}@{}:{port}/{database}", cluster::HOST)
}

/// How the testbed itself connects: by the socket where there is one, which spares the password's
/// four thousand rounds of hashing.
fn administer(place: &Place, database: &str) -> PgConnectOptions {
    let options = PgConnectOptions::new_without_pgpass()
        .username(USER)
        .password(PASSWORD)
        .port(place.port)
        .database(database)
        .application_name("upgrade-testbed");
    match &place.sockets {
        Some(directory) => options.socket(directory),
        None => options.host(cluster::HOST),
    }
}

/// What keeps a shared server alive while this process does.
type Shares = std::sync::Mutex<std::collections::BTreeMap<Version, Arc<Share<Place>>>>;
