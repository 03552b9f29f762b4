//! Release 1.1.0: reads configuration of format 2, answers several requests at a time, and no
//! longer knows `legacy_paths`.

use std::path::Path;
use std::process::ExitCode;

use notes::{Config, FileStore, Release, Settings};

fn settings(config: &Config, directory: &Path) -> Result<Settings, String> {
    config.expect_format(2)?;
    config.expect_absent("legacy_paths")?;
    Ok(Settings {
        listen: config.address("server.listen")?,
        store: Box::new(FileStore::open(directory.join(config.text("data")?))?),
        workers: config.number("server.workers")?,
    })
}

fn main() -> ExitCode {
    Release { version: "1.1.0", settings, health: |_| Ok(()) }.run()
}
