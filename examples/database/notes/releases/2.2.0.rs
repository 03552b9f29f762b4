//! Release 2.2.0: every note has its digest, too; configuration of format 2. What 2.1.0 was to be.

use std::path::Path;
use std::process::ExitCode;

use database_notes::PostgresStore;
use notes::{Config, Release, Settings};

const SELECT: &str = "select coalesce(json_agg(json_build_object('text', text, 'words', words, 'digest', digest) \
     order by id), '[]')::text from notes";
const INSERT: &str = "insert into notes (text, words, digest) \
     values ($1, cardinality(regexp_split_to_array(trim($1), '\\s+')), md5($1))";

fn settings(config: &Config, _directory: &Path) -> Result<Settings, String> {
    config.expect_format(2)?;
    Ok(Settings {
        listen: config.address("server.listen")?,
        store: Box::new(PostgresStore::open(SELECT, INSERT)?),
        workers: config.number("server.workers")?,
    })
}

fn main() -> ExitCode {
    Release { version: "2.2.0", settings, health: |_| Ok(()) }.run()
}
