//! Release 1.2.0, the broken one: it starts and listens, and is not healthy without a key that
//! only its authors' own configuration has.

use std::process::ExitCode;

use notes::{Config, Release, Settings};

fn settings(config: &Config) -> Result<Settings, String> {
    config.expect_format(3)?;
    Ok(Settings {
        listen: config.address("server.listen")?,
        data: config.text("storage.notes")?.into(),
        workers: config.number("server.workers")?,
    })
}

fn health(config: &Config) -> Result<(), String> {
    config.text("signing.key").map(drop).map_err(|why| format!("notes cannot be signed: {why}"))
}

fn main() -> ExitCode {
    Release { version: "1.2.0", settings, health }.run()
}
