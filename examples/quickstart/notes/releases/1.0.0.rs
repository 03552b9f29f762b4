//! Release 1.0.0: reads configuration of format 1 and answers one request at a time.

use std::path::Path;
use std::process::ExitCode;

use notes::{Config, FileStore, Release, Settings};

fn settings(config: &Config, directory: &Path) -> Result<Settings, String> {
    config.expect_format(1)?;
    Ok(Settings {
        listen: config.address("listen")?,
        store: Box::new(FileStore::open(directory.join(config.text("data")?))?),
        workers: 1,
    })
}

fn main() -> ExitCode {
    Release { version: "1.0.0", settings, health: |_| Ok(()) }.run()
}
