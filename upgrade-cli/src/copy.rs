//! A copy of a journal that is on a server: what this machine last saw of each run, for reading.
//!
//! One file a run with the records as `audit export` writes them, a line each. It is written as far
//! as it goes and nothing is decided by it: a run is driven, resumed and asked of on the server
//! alone. Whoever reads it when the server is away sees how far things had come.

#![cfg(feature = "postgres")]

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use upgrade_core::entry::{Entry, Header, Record, Request};
use upgrade_core::journal::{Fault, Journal, JournalError, Lease, RunSummary, chain};
use upgrade_core::names::{LockName, RunId, Seq};
use upgrade_core::sealed::SealedStorage;

/// Keeps a copy of what passes through: of runs that are appended to, and of runs that are loaded.
pub(crate) struct Copied {
    inner: Arc<dyn Journal>,
    directory: PathBuf,
}

impl Copied {
    pub(crate) fn new(inner: Arc<dyn Journal>, directory: &Path) -> Self {
        Self { inner, directory: directory.to_path_buf() }
    }

    /// Writes what it can: a disk that is full must not keep a run from its end.
    fn note(&self, run: &RunId, records: &[Record], all: bool) {
        if let Err(error) = self.write(run, records, all) {
            tracing::warn!(%run, %error, "the copy of the journal could not be written");
        }
    }

    fn write(&self, run: &RunId, records: &[Record], all: bool) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.directory)?;
        let path = path_of(&self.directory, run);
        let mut lines = Vec::new();
        for record in records {
            serde_json::to_writer(&mut lines, record)?;
            lines.push(b'\n');
        }
        if !all {
            // One that has a gap is not continued: the next load writes the whole.
            let follows = match records.first() {
                Some(first) if first.seq > 0 => last_digest(&path).is_some_and(|digest| digest == first.prev),
                _ => true,
            };
            if follows {
                let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(&path)?;
                file.write_all(&lines)?;
            }
            return Ok(());
        }
        if std::fs::read(&path).is_ok_and(|present| present == lines) {
            return Ok(());
        }
        let new = path.with_extension(format!("{}.new", std::process::id()));
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?.write_all(&lines)?;
        std::fs::rename(&new, &path)
    }
}

fn path_of(directory: &Path, run: &RunId) -> PathBuf {
    directory.join(format!("{run}.jsonl"))
}

/// Reads the digest that a file of records ends in.
fn last_digest(path: &Path) -> Option<String> {
    use std::io::{Read, Seek, SeekFrom};
    const END: i64 = 68;
    let mut file = File::open(path).ok()?;
    file.seek(SeekFrom::End(-END)).ok()?;
    let mut end = String::new();
    file.read_to_string(&mut end).ok()?;
    end.strip_prefix('"')?.strip_suffix("\"}\n").map(str::to_owned)
}

#[async_trait]
impl Journal for Copied {
    async fn acquire(&self, locks: &[LockName], patience: Duration) -> Result<Lease, JournalError> {
        self.inner.acquire(locks, patience).await
    }

    async fn append(
        &self,
        lease: &Lease,
        run: &RunId,
        at: Seq,
        entries: &[Entry],
    ) -> Result<Vec<Record>, JournalError> {
        let records = self.inner.append(lease, run, at, entries).await?;
        self.note(run, &records, false);
        Ok(records)
    }

    async fn load(&self, run: &RunId) -> Result<Vec<Record>, JournalError> {
        let records = self.inner.load(run).await?;
        self.note(run, &records, true);
        Ok(records)
    }

    async fn header(&self, run: &RunId) -> Result<Header, JournalError> {
        self.inner.header(run).await
    }

    async fn runs(&self) -> Result<Vec<RunSummary>, JournalError> {
        self.inner.runs().await
    }

    async fn post(&self, run: &RunId, request: &Request) -> Result<(), JournalError> {
        self.inner.post(run, request).await
    }

    async fn requests(&self, run: &RunId) -> Result<Vec<Request>, JournalError> {
        self.inner.requests(run).await
    }

    async fn withdraw(&self, run: &RunId, id: &str) -> Result<(), JournalError> {
        self.inner.withdraw(run, id).await
    }

    async fn sealed(&self, run: &RunId) -> Result<Arc<dyn SealedStorage>, JournalError> {
        self.inner.sealed(run).await
    }

    async fn verify(&self, run: &RunId) -> Result<Vec<Fault>, JournalError> {
        self.inner.verify(run).await
    }

    fn home(&self) -> Vec<LockName> {
        // The copy may be lost at any time: it is nothing that the journal lives in.
        self.inner.home()
    }
}

/// Reads the copy of a journal.
#[derive(Debug)]
pub(crate) struct Copy {
    directory: PathBuf,
}

impl Copy {
    pub(crate) fn new(directory: &Path) -> Self {
        Self { directory: directory.to_path_buf() }
    }

    fn read(&self, run: &RunId) -> Result<Vec<Record>, JournalError> {
        let path = path_of(&self.directory, run);
        let text = std::fs::read_to_string(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => JournalError::NoRun(run.clone()),
            _ => storage(&path)(error),
        })?;
        let (mut records, mut prev) = (Vec::<Record>::new(), String::new());
        // What is not terminated was being written.
        for (number, line) in (0..).zip(text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'))) {
            let record = chain::read(line.as_bytes())
                .and_then(|record| chain::verify(&record, number, &prev).map(|()| record))
                .map_err(|reason| JournalError::Damaged {
                    place: path.display().to_string(),
                    line: number + 1,
                    reason,
                })?;
            prev.clone_from(&record.digest);
            records.push(record);
        }
        Ok(records)
    }
}

fn storage(path: &Path) -> impl FnOnce(io::Error) -> JournalError {
    let path = path.to_path_buf();
    move |source| JournalError::Storage { action: "read", path, source }
}

fn for_reading<T>() -> Result<T, JournalError> {
    Err(JournalError::Unusable {
        reason: "this is a copy of it, for reading".into(),
        hint: "bring the journal's server back".into(),
    })
}

#[async_trait]
impl Journal for Copy {
    async fn acquire(&self, _locks: &[LockName], _patience: Duration) -> Result<Lease, JournalError> {
        for_reading()
    }

    async fn append(
        &self,
        _lease: &Lease,
        _run: &RunId,
        _at: Seq,
        _entries: &[Entry],
    ) -> Result<Vec<Record>, JournalError> {
        for_reading()
    }

    async fn load(&self, run: &RunId) -> Result<Vec<Record>, JournalError> {
        self.read(run)
    }

    async fn runs(&self) -> Result<Vec<RunSummary>, JournalError> {
        let mut runs = Vec::new();
        for entry in std::fs::read_dir(&self.directory).map_err(storage(&self.directory))? {
            let name = entry.map_err(storage(&self.directory))?.file_name();
            let name = name.to_str().and_then(|name| name.strip_suffix(".jsonl"));
            let Some(run) = name.and_then(|name| RunId::try_from(name).ok()) else { continue };
            runs.push(match self.read(&run) {
                Ok(records) => RunSummary::of(&run, &records),
                Err(error) => RunSummary { damage: Some(error.to_string()), ..RunSummary::of(&run, &[]) },
            });
        }
        runs.sort_by(|a, b| (a.created, &a.run).cmp(&(b.created, &b.run)));
        Ok(runs)
    }

    async fn post(&self, _run: &RunId, _request: &Request) -> Result<(), JournalError> {
        for_reading()
    }

    async fn requests(&self, _run: &RunId) -> Result<Vec<Request>, JournalError> {
        Ok(Vec::new())
    }

    async fn withdraw(&self, _run: &RunId, _id: &str) -> Result<(), JournalError> {
        for_reading()
    }

    async fn sealed(&self, _run: &RunId) -> Result<Arc<dyn SealedStorage>, JournalError> {
        for_reading()
    }

    fn home(&self) -> Vec<LockName> {
        Vec::new()
    }
}
