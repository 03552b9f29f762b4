//! Release 1.0.0: reads configuration of format 1 and answers one request at a time.

use std::process::ExitCode;

use notes::{Config, Release, Settings};

fn settings(config: &Config) -> Result<Settings, String> {
    config.expect_format(1)?;
    Ok(Settings { listen: config.address("listen")?, data: config.text("data")?.into(), workers: 1 })
}

fn main() -> ExitCode {
    Release { version: "1.0.0", settings, health: |_| Ok(()) }.run()
}
