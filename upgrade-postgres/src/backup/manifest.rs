//! What a backup says about itself, and whether it is true.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::sealed::sha256_hex;

use super::storage;
use crate::error::cancelled;
use crate::identifier::{Identifier, TableName};

/// The name of the file in a backup's directory.
pub const FILE: &str = "manifest.json";

/// The format that this code writes.
const FORMAT: u32 = 1;

/// The most that a manifest may hold: a few hundred bytes a table, and no endless file.
const LARGEST: u64 = 1 << 30;

/// Describes one backup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The format of the manifest.
    pub format: u32,
    /// Which kind of step made it.
    pub kind: String,
    /// The marker of the step that made it.
    pub made_by: String,
    /// The run.
    pub run: String,
    /// The step.
    pub step: String,
    /// When its snapshot was taken.
    pub taken: Timestamp,
    /// The database that it was taken from.
    pub source: Source,
    /// What of the database it holds.
    pub scope: Scope,
    /// How it holds it.
    pub archive: Archive,
    /// Every file beside the manifest.
    pub files: Vec<FileEntry>,
    /// Every table whose rows it holds.
    pub tables: Vec<TableEntry>,
    /// Where the sequences stood, if it was proven by a restore.
    #[serde(default)]
    pub sequences: Vec<SequenceEntry>,
    /// The large objects, if it was proven by a restore.
    #[serde(default)]
    pub large_objects: Option<LargeObjects>,
    /// How it was proven.
    pub proven: Prove,
    /// SHA-256 of all of the above.
    #[serde(default)]
    pub sha256: String,
}

/// Names the database that a backup was taken from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// The server's own identifier, drawn when it was made.
    pub system: String,
    /// The server's version as it numbers itself.
    pub version: i32,
    /// The name of the database.
    pub database: String,
    /// Its encoding.
    pub encoding: String,
    /// Its size, indexes included.
    pub bytes: i64,
}

/// Says what of a database is kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Everything.
    #[default]
    Whole,
    /// Some schemas.
    Schemas(Vec<Identifier>),
    /// Some tables, partitions included.
    Tables(Vec<TableName>),
}

/// Says how the data is laid out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Archive {
    /// What kind of thing it is.
    pub layout: Layout,
    /// Who compressed it.
    pub compression: Compression,
    /// The version of pg_dump; absent for a copy by the server.
    #[serde(default)]
    pub pg_dump: Option<String>,
    /// The name of the copy, for a copy by the server.
    #[serde(default)]
    pub copy: Option<Identifier>,
}

/// Names the layout of an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// pg_dump's directory format, in `dump/`.
    Directory,
    /// pg_dump's custom format, in the file `dump/archive.zst`.
    Custom,
    /// A database of the same server, made with `CREATE DATABASE … TEMPLATE`.
    Template,
}

/// Names who compressed an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// pg_dump, with zstd: pg_restore reads it as it is.
    PgDump,
    /// This program, with zstd: `zstd -d --rm dump/*.zst` before pg_restore.
    Upgrade,
    /// Nobody.
    None,
}

/// Describes one file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Where it is, from the backup's directory.
    pub path: PathBuf,
    /// How long it is.
    pub bytes: u64,
    /// How long it is when decompressed, if this program compressed it.
    #[serde(default)]
    pub plain_bytes: Option<u64>,
    /// SHA-256 of it as it is.
    pub sha256: String,
}

/// Describes one table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableEntry {
    /// Its name.
    pub table: TableName,
    /// About how many rows it has, as the server estimates.
    pub rows_estimate: i64,
    /// Its size on the server, without indexes.
    pub bytes: i64,
    /// What exactly it holds, if the backup was proven by a restore.
    #[serde(default)]
    pub fingerprint: Option<Contents>,
}

/// Holds what exactly a table holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contents {
    /// The number of rows.
    pub rows: i64,
    /// A digest of them that does not depend on their order.
    pub digest: String,
}

/// Tells where a sequence stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SequenceEntry {
    /// Its name.
    pub sequence: TableName,
    /// The value that it gave last; absent if it has not given one.
    pub last_value: Option<i64>,
}

/// Tells what the large objects hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LargeObjects {
    /// How many there are.
    pub count: i64,
    /// A digest of their contents.
    pub digest: String,
}

/// Says how far a backup is proven before it counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Prove {
    /// Its files are read back and compared with their digests, and pg_restore lists what it holds.
    #[default]
    List,
    /// It is restored into a scratch database on the same server, and what that holds compared, row
    /// for row, with what the snapshot of the backup held.
    Restore,
}

/// Says why what is there is not a whole backup.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// There is no manifest: the directory is no backup, or was never completed.
    #[error("{} is no backup: it has no manifest", .0.display())]
    Missing(PathBuf),
    /// The file system did not answer.
    #[error("{} cannot be read", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is not what was written.
    #[error("{}: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The call was cancelled.
    #[error("cancelled")]
    Cancelled,
}

impl From<ManifestError> for StepError {
    fn from(error: ManifestError) -> Self {
        let text = error.to_string();
        match &error {
            ManifestError::Missing(_) => StepError::permanent(text)
                .with_hint("name the directory that a `postgres.backup` step made: the one that holds manifest.json"),
            ManifestError::Io { source, .. } => {
                let class = match source.kind() {
                    io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => StepError::permanent,
                    _ => StepError::transient,
                };
                class(text).with_cause(source).with_hint("check the path, its permissions and the medium")
            }
            ManifestError::Damaged { .. } => StepError::permanent(text)
                .with_hint("this backup is damaged or was changed: use another one, and look at the medium it is on"),
            ManifestError::Cancelled => cancelled(),
        }
    }
}

impl Manifest {
    /// Starts the manifest of a backup that a step makes.
    pub(crate) fn new(cx: &Context, source: Source, scope: Scope, archive: Archive) -> Self {
        Self {
            format: FORMAT,
            kind: "postgres.backup".into(),
            made_by: cx.marker(),
            run: cx.run().to_string(),
            step: cx.subject().to_owned(),
            taken: Timestamp::now(),
            source,
            scope,
            archive,
            files: Vec::new(),
            tables: Vec::new(),
            sequences: Vec::new(),
            large_objects: None,
            proven: Prove::List,
            sha256: String::new(),
        }
    }

    fn digest(&self) -> Result<String, serde_json::Error> {
        let bare = Self { sha256: String::new(), ..self.clone() };
        Ok(sha256_hex(&serde_json::to_vec(&bare)?))
    }

    /// Writes it into the directory of a backup, durably and all at once.
    pub(crate) fn write(mut self, directory: &Path) -> io::Result<Self> {
        self.sha256 = self.digest()?;
        let temporary = directory.join(".manifest.json");
        let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        serde_json::to_writer_pretty(&mut file, &self)?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        fs::rename(&temporary, directory.join(FILE))?;
        storage::sync_directory(directory)?;
        Ok(self)
    }

    /// Reads the manifest of the backup in `directory`, and compares it with its own digest.
    ///
    /// # Errors
    /// There is none, or it is not what was written.
    pub fn read(directory: &Path) -> Result<Self, ManifestError> {
        let path = directory.join(FILE);
        let damaged = |reason: String| ManifestError::Damaged { path: path.clone(), reason };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ManifestError::Missing(directory.to_owned()));
            }
            Err(source) => return Err(ManifestError::Io { path, source }),
        };
        let mut text = Vec::new();
        file.take(LARGEST).read_to_end(&mut text).map_err(|source| ManifestError::Io { path: path.clone(), source })?;
        let value: serde_json::Value =
            serde_json::from_slice(&text).map_err(|error| damaged(format!("it is not JSON: {error}")))?;
        match value.get("format").and_then(serde_json::Value::as_u64) {
            Some(format) if format == u64::from(FORMAT) => {}
            Some(format) => {
                return Err(damaged(format!("it has format {format}; this program reads up to {FORMAT}")));
            }
            None => return Err(damaged("it does not say which format it has".into())),
        }
        let manifest: Self =
            serde_json::from_value(value).map_err(|error| damaged(format!("it is not a manifest: {error}")))?;
        let digest = manifest.digest().map_err(|error| damaged(error.to_string()))?;
        if digest != manifest.sha256 {
            return Err(damaged("it does not have the digest that was written into it".into()));
        }
        let inside = |path: &Path| path.components().all(|part| matches!(part, Component::Normal(_)));
        if let Some(file) = manifest.files.iter().find(|file| !inside(&file.path)) {
            return Err(damaged(format!("it names a file outside of the backup: {}", file.path.display())));
        }
        Ok(manifest)
    }

    /// Compares every file with its digest, and sees that there is none beside them.
    ///
    /// # Errors
    /// One is missing, too much, or not what was written; the call was cancelled.
    pub fn verify(&self, directory: &Path, cx: &Context) -> Result<(), ManifestError> {
        let total = self.bytes();
        let mut done = 0;
        for file in &self.files {
            let path = directory.join(&file.path);
            let (bytes, sha256) = digest_of(&path, cx)?;
            if bytes != file.bytes {
                let reason = format!("it has {bytes} bytes, and had {}", file.bytes);
                return Err(ManifestError::Damaged { path, reason });
            }
            if sha256 != file.sha256 {
                let reason = "it does not have the digest that the manifest names".into();
                return Err(ManifestError::Damaged { path, reason });
            }
            done += bytes;
            cx.progress(done, total, "comparing digests");
        }
        match self.foreign(directory).map_err(|source| ManifestError::Io { path: directory.to_owned(), source })? {
            Some(foreign) => Err(ManifestError::Damaged {
                path: directory.join(foreign),
                reason: "the manifest does not know it".into(),
            }),
            None => Ok(()),
        }
    }

    /// Finds a file in the backup's directory that is not part of the backup.
    pub(crate) fn foreign(&self, directory: &Path) -> io::Result<Option<PathBuf>> {
        let known: BTreeSet<&Path> =
            self.files.iter().map(|file| file.path.as_path()).chain([Path::new(FILE)]).collect();
        Ok(storage::files_below(directory)?.into_iter().find(|path| !known.contains(path.as_path())))
    }

    /// Returns how many bytes the files have.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

/// Reads a file to its end: its length and SHA-256.
pub(crate) fn digest_of(path: &Path, cx: &Context) -> Result<(u64, String), ManifestError> {
    let io = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => ManifestError::Damaged { path: path.to_owned(), reason: "it is missing".into() },
        _ => ManifestError::Io { path: path.to_owned(), source },
    };
    let mut file = File::open(path).map_err(io)?;
    let (mut digest, mut bytes, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 20]);
    loop {
        if cx.cancelled().is_cancelled() {
            return Err(ManifestError::Cancelled);
        }
        match file.read(&mut buffer) {
            Ok(0) => return Ok((bytes, hex(&digest.finalize()))),
            Ok(read) => {
                digest.update(&buffer[..read]);
                bytes += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(io(error)),
        }
    }
}

/// Spells bytes in hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
