//! pg_dump at a snapshot, into a directory, compressed on the way.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio_util::sync::CancellationToken;
use upgrade_core::context::{Context, blocking};
use upgrade_core::error::StepError;

use super::compression::{self, Effort};
use super::manifest::{Archive, Compression, FileEntry, Layout, ManifestError, Scope, digest_of};
use super::storage;
use super::tools::Tool;
use crate::address::Address;
use crate::error::cancelled;
use crate::program::Program;
use crate::session::application_name;

/// Says how a dump is made.
#[derive(Debug)]
pub(crate) struct Dump<'a> {
    pub(crate) tool: &'a Tool,
    pub(crate) scope: &'a Scope,
    /// The snapshot that a session of ours has exported, and holds.
    pub(crate) snapshot: String,
    pub(crate) jobs: usize,
    pub(crate) level: i32,
}

impl Dump<'_> {
    /// Writes the dump into `backup`, which is ours alone, and says what it has become.
    pub(crate) async fn write(
        &self,
        cx: &Context,
        address: &Address,
        backup: &Path,
    ) -> Result<(Archive, Vec<FileEntry>), StepError> {
        let directory = super::dump_directory(backup);
        storage::fresh_directory(&directory)
            .map_err(|error| storage::failed(format!("{} cannot be made", directory.display()), &error))?;
        let native = self.tool.has_zstd(cx).await?;
        let program = self.program(cx, address, &directory, native)?;
        let ended = Arc::new(AtomicBool::new(false));
        let stop = cx.cancelled().child_token();
        // Whoever gives up this call gives up the compression as well.
        let _given_up = stop.clone().drop_guard();
        // pg_dump must not go on to fill a disk that nobody empties.
        let compression_failed = CancellationToken::new();
        let dumping = async {
            let done = tokio::select! {
                biased;
                done = program.succeed(cx) => done.map(|_| ()),
                () = compression_failed.cancelled() => Err(cancelled()),
            };
            if done.is_err() {
                stop.cancel();
            }
            ended.store(true, Ordering::Release);
            done
        };
        let following = async {
            if native {
                return Ok(Vec::new());
            }
            let (directory, ended, stopped) = (directory.clone(), ended.clone(), stop.clone());
            let effort = Effort { level: self.level, threads: self.jobs };
            let followed = blocking(move || {
                compression::follow(&directory, effort, &ended, &stopped).map_err(|error| {
                    match stopped.is_cancelled() {
                        true => cancelled(),
                        false => storage::failed("what pg_dump writes cannot be compressed", &error),
                    }
                })
            })
            .await;
            if followed.is_err() && !stop.is_cancelled() {
                compression_failed.cancel();
            }
            followed
        };
        let (dumped, followed) = tokio::join!(dumping, following);
        if !compression_failed.is_cancelled() {
            dumped?;
        }
        let compressed = followed?;
        let context = cx.clone();
        let files = blocking(move || Ok(entries(&directory, &compressed, &context)?)).await?;
        let compression = if native { Compression::PgDump } else { Compression::Upgrade };
        let layout = if self.tool.elsewhere { Layout::Custom } else { Layout::Directory };
        Ok((Archive { layout, compression, pg_dump: Some(self.tool.version.clone()), copy: None }, files))
    }

    fn program(&self, cx: &Context, address: &Address, directory: &Path, native: bool) -> Result<Program, StepError> {
        let mut program = self.tool.program().on(cx, address)?.with(["--no-password", "--snapshot", &self.snapshot]);
        program =
            program.with([if native { format!("--compress=zstd:{}", self.level) } else { "--compress=0".into() }]);
        program = match self.scope {
            Scope::Whole => program,
            Scope::Schemas(schemas) => {
                program.with(["--strict-names"]).with(schemas.iter().map(|schema| format!("--schema={schema}")))
            }
            Scope::Tables(tables) => {
                program.with(["--strict-names"]).with(tables.iter().map(|table| format!("--table={table}")))
            }
        };
        if self.tool.elsewhere {
            let conninfo = conninfo_elsewhere(cx, address)?;
            return Ok(program
                .with(["--format=custom".to_owned(), format!("--dbname={conninfo}")])
                .writing(directory.join("archive")));
        }
        Ok(program.with([
            "--no-sync".to_owned(),
            "--format=directory".to_owned(),
            format!("--jobs={}", self.jobs),
            format!("--file={}", directory.display()),
        ]))
    }
}

/// Says to a program that runs elsewhere what its environment would have said: all but the password
/// and the way.
pub(crate) fn conninfo_elsewhere(cx: &Context, address: &Address) -> Result<String, StepError> {
    let environment = address.environment().map_err(crate::PostgresError::from)?;
    let mut parts = vec![format!("application_name={}", quoted(&application_name(&cx.marker())))];
    for (name, key) in [("PGUSER", "user"), ("PGDATABASE", "dbname")] {
        if let Some((_, value)) = environment.iter().find(|(variable, _)| *variable == name) {
            parts.push(format!("{key}={}", quoted(value)));
        }
    }
    Ok(parts.join(" "))
}

/// Writes a value of a connection string.
pub(crate) fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\\', r"\\").replace('\'', r"\'"))
}

/// Describes every file of the dump, those that were compressed here with what was learnt then.
fn entries(directory: &Path, compressed: &[FileEntry], cx: &Context) -> Result<Vec<FileEntry>, ManifestError> {
    let io = |source| ManifestError::Io { path: directory.to_owned(), source };
    let mut compressed: BTreeMap<_, _> = compressed.iter().map(|entry| (&entry.path, entry)).collect();
    let mut entries = Vec::new();
    for path in storage::files_below(directory).map_err(io)? {
        let mut entry = match compressed.remove(&path) {
            Some(entry) => entry.clone(),
            None => {
                let (bytes, sha256) = digest_of(&directory.join(&path), cx)?;
                FileEntry { path, bytes, plain_bytes: None, sha256 }
            }
        };
        entry.path = Path::new("dump").join(&entry.path);
        entries.push(entry);
    }
    Ok(entries)
}
