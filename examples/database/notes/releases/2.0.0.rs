//! Release 2.0.0: every note has its number of words; configuration of format 2.

use std::path::Path;
use std::process::ExitCode;

use database_notes::PostgresStore;
use notes::{Config, Release, Settings};

// Of a note without its number of words, the release could not say anything: all must have one.
const SELECT: &str = "select coalesce(json_agg(json_build_object('text', text, 'words', words) order by id), '[]')::text \
     from notes";
const INSERT: &str =
    "insert into notes (text, words) values ($1, cardinality(regexp_split_to_array(trim($1), '\\s+')))";

fn settings(config: &Config, _directory: &Path) -> Result<Settings, String> {
    config.expect_format(2)?;
    Ok(Settings {
        listen: config.address("server.listen")?,
        store: Box::new(PostgresStore::open(SELECT, INSERT)?),
        workers: config.number("server.workers")?,
    })
}

fn main() -> ExitCode {
    Release { version: "2.0.0", settings, health: |_| Ok(()) }.run()
}
