//! Docker Engines, a registry, and images that need none.

mod certificates;
mod engine;
mod image;
mod postgres;
mod registry;

use std::path::PathBuf;
use std::sync::Mutex;

pub use certificates::{Authority, Holder};
pub use engine::{Engine, Own};
pub use image::Image;
pub use registry::{PASSWORD, Registry, USER};

use crate::home::Home;
use crate::sharing::Share;

/// The engine that all test processes share; it ends when nobody has used it for some seconds.
///
/// Where `UPGRADE_TEST_DOCKER_HOST` names an engine, that one. None, with a printed reason, where
/// there is no engine.
///
/// # Panics
/// Under `CI=true` where there is no engine, and where it cannot be started.
pub fn shared() -> Option<Engine> {
    static SHARE: Mutex<Option<Share<Engine>>> = Mutex::new(None);
    if let Ok(host) = std::env::var("UPGRADE_TEST_DOCKER_HOST") {
        return Some(Engine::at(host));
    }
    let program = found()?;
    let mut share = SHARE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let share = share.get_or_insert_with(|| {
        let directory = Home::of_this_user().base.join("docker");
        Share::take(&directory, 20, engine::END, Engine::running, |server| Engine::start(&program, &server, true))
    });
    Some(share.service.clone())
}

/// An engine of the caller's own, to be stopped, killed and started; ended on drop.
///
/// None, with a printed reason, where there is no engine.
///
/// # Panics
/// As [`shared`].
pub fn own() -> Option<Own> {
    let program = found()?;
    Some(Own::create(&program, false, None))
}

/// The same, with so many MiB of disk for all that it keeps.
///
/// # Panics
/// As [`shared`].
pub fn own_with_disk(size: u32) -> Option<Own> {
    let program = found()?;
    Some(Own::create(&program, false, Some(size)))
}

/// An engine of the caller's own that is reached over TCP as well, with TLS and client certificates.
///
/// None, with a printed reason, where there is no engine.
///
/// # Panics
/// As [`shared`].
pub fn secured() -> Option<Own> {
    let program = found()?;
    required("openssl", "openssl")?;
    Some(Own::create(&program, true, None))
}

/// A registry on a free port of loopback, ended on drop; with `locked`, only [`USER`] may use it.
///
/// None, with a printed reason, where the program is missing.
///
/// # Panics
/// As [`shared`].
pub fn registry(locked: bool) -> Option<Registry> {
    let program = required("docker-registry", "docker-registry")?;
    Some(Registry::start(&program, locked))
}

/// The program `docker-compose`, version 1.
///
/// # Panics
/// Under `CI=true` where it is missing.
pub fn compose() -> Option<PathBuf> {
    required("docker-compose", "docker-compose")
}

fn found() -> Option<PathBuf> {
    if !rustix::process::geteuid().is_root() {
        return missing("an engine of the tests' own needs root; name one in UPGRADE_TEST_DOCKER_HOST");
    }
    required("dockerd", "docker.io")
}

fn required(program: &str, package: &str) -> Option<PathBuf> {
    let places = std::env::var_os("PATH").unwrap_or_default();
    let all = std::env::split_paths(&places).chain([PathBuf::from("/usr/bin"), PathBuf::from("/usr/sbin")]);
    match all.map(|directory| directory.join(program)).find(|path| path.is_file()) {
        Some(path) => Some(path),
        None => missing(&format!("there is no {program}; on Debian: apt-get install {package}")),
    }
}

fn missing(reason: &str) -> Option<PathBuf> {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "promised under CI, but {reason}");
    eprintln!("skipped: {reason}");
    None
}
