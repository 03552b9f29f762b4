//! Servers that all test processes of a user share.
//!
//! Who uses one holds a shared lock on its `users.lock` for as long as the process lives. A small
//! shell loop, which outlives the process that started it, ends the server when it could have that
//! lock for itself several times in a row. Starting and ending exclude each other by `start.lock`.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use super::cluster::{self, Place};
use super::home::Home;
use super::{Shares, Version};

/// A share in a server.
#[derive(Debug)]
pub(super) struct Shared {
    place: Place,
    _users: File,
    /// It outlives this process.
    _reaper: Option<Child>,
}

/// The shared server of a version; this process keeps it until it ends.
pub(super) fn of(version: Version, bin: &Path) -> Place {
    static SHARES: Shares = Mutex::new(std::collections::BTreeMap::new());
    let mut shares = SHARES.lock().unwrap_or_else(PoisonError::into_inner);
    let share = shares.entry(version).or_insert_with(|| Arc::new(Shared::of(&Home::of_this_user(), version, bin, 10)));
    share.place.clone()
}

impl Shared {
    /// Takes a share, starting the server where there is none.
    pub(super) fn of(home: &Home, version: Version, bin: &Path, idle_seconds: u32) -> Self {
        let directory = home.base.join(format!("shared-{version}"));
        let _ = std::fs::create_dir(&directory);
        let _starting = lock(&directory.join("start.lock"));
        let users = open(&directory.join("users.lock"));
        users.lock_shared().expect("a file of ours can be locked");
        let server = directory.join("server");
        let place = running(&directory, &server).unwrap_or_else(|| {
            let _ = std::fs::remove_dir_all(&server);
            home.directory(&server);
            cluster::lay_out(home, version, bin, &server.join("data"));
            let (_, place) = cluster::start_anywhere(home, bin, &server, &SETTINGS);
            std::fs::write(directory.join("port"), place.port.to_string()).expect("a file of ours can be written");
            place
        });
        Self { place, _users: users, _reaper: reap(&directory, idle_seconds) }
    }

    #[cfg(test)]
    pub(super) fn place(&self) -> &Place {
        &self.place
    }
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
fn running(directory: &Path, server: &Path) -> Option<Place> {
    let port = std::fs::read_to_string(directory.join("port")).ok()?;
    let place = Place::below(server, port.parse().ok()?);
    (place.data.join("postmaster.pid").is_file() && cluster::answers(&place)).then_some(place)
}

fn open(path: &Path) -> File {
    File::options().create(true).append(true).open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Waits for a lock, held until it is dropped.
pub(super) fn lock(path: &Path) -> File {
    let file = open(path);
    file.lock().expect("a file of ours can be locked");
    file
}

/// Starts the loop that ends the server, unless one runs.
fn reap(directory: &Path, idle_seconds: u32) -> Option<Child> {
    const SCRIPT: &str = r#"
        cd "$1" || exit 0
        exec 9>reaper.lock
        flock -n 9 || exit 0
        idle=0
        while sleep 1; do
            if flock -n -x users.lock true 9>&-; then idle=$((idle + 1)); else idle=0; fi
            [ "$idle" -ge "$2" ] || continue
            idle=0
            exec 8>start.lock 7>>users.lock
            if flock 8 && flock -n -x 7; then
                pid=$(head -n 1 server/data/postmaster.pid 2>/dev/null)
                # The number alone may be another process's by now, or of one that nobody waited for.
                runs() { [ -n "$pid" ] && [ "$(readlink "/proc/$pid/cwd")" = "$1/server/data" ]; }
                if runs "$1"; then
                    kill -QUIT "$pid"
                    while runs "$1"; do sleep 0.1; done
                fi
                rm -rf port server
                exit 0
            fi
            exec 8>&- 7>&-
        done
    "#;
    match open(&directory.join("reaper.lock")).try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return None,
        Err(TryLockError::Error(error)) => panic!("{}: {error}", directory.display()),
    }
    let reaper = Home::apart("sh")
        .args(["-c", SCRIPT, "sh"])
        .arg(directory)
        .arg(idle_seconds.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("sh can be started");
    Some(reaper)
}
