//! Release 2.1.0, the broken one: it starts and listens, and is not healthy without a key that only
//! its authors' own configuration has.

use std::path::Path;
use std::process::ExitCode;

use database_notes::PostgresStore;
use notes::{Config, Release, Settings};

const SELECT: &str =
    "select coalesce(json_agg(json_build_object('text', text, 'digest', digest) order by id), '[]')::text from notes";
const INSERT: &str = "insert into notes (text, words, digest) values ($1, 0, md5($1))";

fn settings(config: &Config, _directory: &Path) -> Result<Settings, String> {
    config.expect_format(3)?;
    Ok(Settings {
        listen: config.address("server.listen")?,
        store: Box::new(PostgresStore::open(SELECT, INSERT)?),
        workers: config.number("server.workers")?,
    })
}

fn health(config: &Config) -> Result<(), String> {
    config.text("signing.key").map(drop).map_err(|why| format!("notes cannot be signed: {why}"))
}

fn main() -> ExitCode {
    Release { version: "2.1.0", settings, health }.run()
}
