//! Release 1.2.0, the broken one: it starts and listens, and is not healthy without a key that
//! only its authors' own configuration has.

use std::path::Path;
use std::process::ExitCode;

use notes::{Config, FileStore, Release, Settings};

fn settings(config: &Config, directory: &Path) -> Result<Settings, String> {
    config.expect_format(3)?;
    Ok(Settings {
        listen: config.address("server.listen")?,
        store: Box::new(FileStore::open(directory.join(config.text("storage.notes")?))?),
        workers: config.number("server.workers")?,
    })
}

fn health(config: &Config) -> Result<(), String> {
    config.text("signing.key").map(drop).map_err(|why| format!("notes cannot be signed: {why}"))
}

fn main() -> ExitCode {
    Release { version: "1.2.0", settings, health }.run()
}
