//! Services that all test processes of a user share.
//!
//! Who uses one holds a shared lock on its `users.lock` for as long as the process lives. A small
//! shell loop, which outlives the process that started it, ends the service when it could have that
//! lock for itself several times in a row. Starting and ending exclude each other by `start.lock`.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use crate::home::Home;

/// A share in a service, kept until the process ends.
#[derive(Debug)]
pub(crate) struct Share<T> {
    pub(crate) service: T,
    _users: File,
    /// It outlives this process.
    _reaper: Option<Child>,
}

impl<T> Share<T> {
    /// Takes a share in the service whose files are in `server` below `directory`.
    ///
    /// `running` finds one that answers, `start` makes one; `end` is a shell script that ends what
    /// runs in the directory `$1`.
    pub(crate) fn take(
        directory: &Path,
        idle_seconds: u32,
        end: &str,
        running: impl FnOnce(&Path) -> Option<T>,
        start: impl FnOnce(PathBuf) -> T,
    ) -> Self {
        let _ = std::fs::create_dir(directory);
        let _starting = lock(&directory.join("start.lock"));
        let users = open(&directory.join("users.lock"));
        users.lock_shared().expect("a file of ours can be locked");
        let server = directory.join("server");
        let service = running(&server).unwrap_or_else(|| start(server));
        Self { service, _users: users, _reaper: reap(directory, idle_seconds, end) }
    }
}

fn open(path: &Path) -> File {
    File::options().create(true).append(true).open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Waits for a lock, held until it is dropped.
pub(crate) fn lock(path: &Path) -> File {
    let file = open(path);
    file.lock().expect("a file of ours can be locked");
    file
}

/// Starts the loop that ends the service, unless one runs.
fn reap(directory: &Path, idle_seconds: u32, end: &str) -> Option<Child> {
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
                sh -c "$3" sh "$1/server" 7>&- 8>&- 9>&-
                rm -rf server
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
        .arg(end)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("sh can be started");
    Some(reaper)
}
