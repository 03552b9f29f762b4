//! Servers that all test processes of a user share.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::cluster::{self, END, Place};
use super::{Shares, Version};
use crate::home::Home;
use crate::sharing::Share;

/// The shared server of a version; this process keeps it until it ends.
pub(super) fn of(version: Version, bin: &Path) -> Place {
    static SHARES: Shares = Mutex::new(std::collections::BTreeMap::new());
    let mut shares = SHARES.lock().unwrap_or_else(PoisonError::into_inner);
    let share = shares.entry(version).or_insert_with(|| Arc::new(take(&Home::of_this_user(), version, bin, 10)));
    share.service.clone()
}

/// Takes a share, starting the server where there is none.
pub(super) fn take(home: &Home, version: Version, bin: &Path, idle_seconds: u32) -> Share<Place> {
    Share::take(&home.base.join(format!("shared-{version}")), idle_seconds, END, running, |server| {
        let _ = std::fs::remove_dir_all(&server);
        home.directory(&server);
        cluster::lay_out(home, version, bin, &server.join("data"));
        let (_, place) = cluster::start_anywhere(home, bin, &server, &SETTINGS);
        std::fs::write(server.join("port"), place.port.to_string()).expect("a file of ours can be written");
        place
    })
}

/// Nothing of a test's has to outlive the machine.
const SETTINGS: [(&str, &str); 7] = [
    ("fsync", "off"),
    ("full_page_writes", "off"),
    ("synchronous_commit", "off"),
    ("max_connections", "300"),
    ("shared_buffers", "128MB"),
    ("max_wal_size", "2GB"),
    ("autovacuum_naptime", "10min"),
];

/// The server that an earlier process started, if it answers.
fn running(server: &Path) -> Option<Place> {
    let port = std::fs::read_to_string(server.join("port")).ok()?;
    let place = Place::below(server, port.parse().ok()?);
    (place.data.join("postmaster.pid").is_file() && cluster::answers(&place)).then_some(place)
}
