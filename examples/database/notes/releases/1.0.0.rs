//! Release 1.0.0: notes are texts; configuration of format 1.

use std::path::Path;
use std::process::ExitCode;

use database_notes::PostgresStore;
use notes::{Config, Release, Settings};

const SELECT: &str = "select coalesce(json_agg(text order by id), '[]')::text from notes";
const INSERT: &str = "insert into notes (text) values ($1)";

fn settings(config: &Config, _directory: &Path) -> Result<Settings, String> {
    config.expect_format(1)?;
    Ok(Settings {
        listen: config.address("listen")?,
        store: Box::new(PostgresStore::open(SELECT, INSERT)?),
        workers: 1,
    })
}

fn main() -> ExitCode {
    Release { version: "1.0.0", settings, health: |_| Ok(()) }.run()
}
