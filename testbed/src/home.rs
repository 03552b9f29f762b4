//! Where servers live: a directory that the account they run under can reach.

use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Counted up when what is kept there between test processes changes its form.
const FORMAT: u32 = 2;

/// An account that servers run under in place of root, which PostgreSQL refuses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Account {
    user: u32,
    group: u32,
}

impl Account {
    fn instead_of_root() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let accounts = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        ["postgres", "nobody"].iter().find_map(|name| {
            let line = accounts.lines().find(|line| line.split(':').next() == Some(name))?;
            let mut fields = line.split(':').skip(2);
            Some(Self { user: fields.next()?.parse().ok()?, group: fields.next()?.parse().ok()? })
        })
    }
}

/// A directory for servers, and the account that they run under.
#[derive(Clone, Debug)]
pub(crate) struct Home {
    pub(crate) base: PathBuf,
    account: Option<Account>,
}

impl Home {
    /// The one that all processes of this user share.
    ///
    /// Not in the directory for temporary files, which `scripts/test` removes while a shared server
    /// may go on, and not in the cache, which another account cannot reach below root's home.
    pub(crate) fn of_this_user() -> Self {
        let user = rustix::process::geteuid().as_raw();
        Self::at(PathBuf::from(format!("/var/tmp/upgrade-testbed-{user}-{FORMAT}")))
    }

    /// One at a place of the caller's.
    pub(crate) fn at(base: PathBuf) -> Self {
        let _ = std::fs::DirBuilder::new().mode(0o755).create(&base);
        let found = std::fs::symlink_metadata(&base).unwrap_or_else(|error| panic!("{}: {error}", base.display()));
        // Anybody may make names in /var/tmp: what another user put there is not followed.
        assert!(
            found.is_dir() && found.uid() == rustix::process::geteuid().as_raw(),
            "{} is not a directory of this user's own: remove it",
            base.display()
        );
        Self { base, account: Account::instead_of_root() }
    }

    /// A program in a process group of its own, so that an interrupt at the terminal ends the tests
    /// and leaves the servers to those who clean up.
    pub(crate) fn apart(program: &str) -> Command {
        let mut command = Command::new(program);
        command.process_group(0).current_dir("/");
        command
    }

    /// A program of the server's, under the servers' account.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.process_group(0).current_dir("/").env_remove("PGDATA");
        if let Some(account) = self.account {
            command.uid(account.user).gid(account.group);
        }
        command
    }

    /// Makes a directory that only the servers' account and root can look into.
    pub(crate) fn directory(&self, path: &Path) {
        std::fs::DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(path)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        if let Some(account) = self.account {
            std::os::unix::fs::chown(path, Some(account.user), Some(account.group))
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        }
    }

    /// Writes a file that the servers' account can read.
    pub(crate) fn file(&self, path: &Path, text: &str) {
        let written = std::fs::write(path, text).and_then(|()| match self.account {
            Some(account) => std::os::unix::fs::chown(path, Some(account.user), Some(account.group)),
            None => Ok(()),
        });
        written.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    /// Whether the servers' account can reach a path.
    pub(crate) fn reaches(&self, path: &Path) -> bool {
        self.account.is_none()
            || path
                .ancestors()
                .all(|each| std::fs::metadata(each).is_ok_and(|found| found.permissions().mode() & 0o001 != 0))
    }
}

/// Where the scripts put what they fetch or build for the tests.
pub(crate) fn cache() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(named) = set("UPGRADE_CI_CACHE") {
        return named.into();
    }
    set("XDG_CACHE_HOME")
        .map_or_else(|| PathBuf::from(set("HOME").unwrap_or_default()).join(".cache"), PathBuf::from)
        .join("upgrade-ci")
}
