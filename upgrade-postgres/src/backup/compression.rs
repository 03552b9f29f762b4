//! Compression of what pg_dump writes, while it writes it, for a pg_dump without zstd of its own.
//!
//! pg_dump writes each file from its start to its end. Whoever follows it needs no more time than
//! the dump itself; what was read is given back to the file system at once.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::FallocateFlags;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;
use zstd::stream::write::Encoder;

use super::manifest::{FileEntry, hex};

/// What a file grew by before it is worth looking at again.
const WORTHWHILE: u64 = 1 << 20;

/// How much is read of one file before another has its turn.
const TURN: u64 = 32 << 20;

/// How many files are held open while they grow.
const OPEN: usize = 128;

/// From how many files on no time is spent on looking for the largest.
const MANY: usize = 1000;

const POLL: Duration = Duration::from_millis(10);

/// The end of the name of a file that was compressed here.
pub(crate) const SUFFIX: &str = ".zst";

/// One file on its way.
#[derive(Default)]
struct Following {
    open: Option<(File, Encoder<'static, Digesting>)>,
    read: u64,
    size: u64,
    taken: bool,
}

#[derive(Default)]
struct State {
    following: BTreeMap<String, Following>,
    done: Vec<FileEntry>,
    scanned: Option<Instant>,
    failed: Option<io::Error>,
}

/// Writes on, and keeps count and digest of what passes.
struct Digesting {
    file: File,
    digest: Sha256,
    bytes: u64,
}

impl Write for Digesting {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.file.write(buffer)?;
        self.digest.update(&buffer[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Says how files are compressed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Effort {
    /// The level of zstd.
    pub(crate) level: i32,
    /// How many files are compressed at once.
    pub(crate) threads: usize,
}

/// Compresses the data files of a dump that is being written, until `ended` is set and all is read.
///
/// Each is replaced by one whose name ends in `.zst`; what the dump says about itself stays as it is.
///
/// # Errors
/// The file system refused it, or `stop` was signalled.
pub(crate) fn follow(
    directory: &Path,
    effort: Effort,
    ended: &AtomicBool,
    stop: &CancellationToken,
) -> io::Result<Vec<FileEntry>> {
    let state = Mutex::new(State::default());
    std::thread::scope(|scope| {
        for _ in 0..effort.threads.max(1) {
            scope.spawn(|| work(directory, effort, ended, stop, &state));
        }
    });
    let mut state = state.into_inner().unwrap_or_else(PoisonError::into_inner);
    match state.failed {
        Some(error) => Err(error),
        None => {
            state.done.sort();
            Ok(state.done)
        }
    }
}

fn work(directory: &Path, effort: Effort, ended: &AtomicBool, stop: &CancellationToken, state: &Mutex<State>) {
    let locked = || state.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        // Read before the sizes: what is seen after the end is all there is.
        let last = ended.load(Ordering::Acquire);
        let turn = {
            let mut state = locked();
            if state.failed.is_some() {
                return;
            }
            if stop.is_cancelled() {
                state.failed = Some(io::Error::other("cancelled"));
                return;
            }
            match state.choose(directory, last) {
                Ok(turn) => turn,
                Err(error) => {
                    state.failed = Some(error);
                    return;
                }
            }
        };
        let Some((name, mut following)) = turn else {
            if last && locked().following.values().all(|following| following.taken) {
                return;
            }
            std::thread::sleep(POLL);
            continue;
        };
        let done = following.advance(&directory.join(&name), effort.level, last);
        let mut state = locked();
        match done {
            Ok(Some(entry)) => {
                state.following.remove(&name);
                state.done.push(entry);
            }
            Ok(None) => {
                following.taken = false;
                state.following.insert(name, following);
            }
            Err(error) => state.failed = Some(error),
        }
    }
}

impl State {
    /// Takes the file with the most to read.
    fn choose(&mut self, directory: &Path, last: bool) -> io::Result<Option<(String, Following)>> {
        if self.scanned.is_none_or(|at| at.elapsed() > POLL * 5) || (last && self.following.is_empty()) {
            self.scanned = Some(Instant::now());
            for entry in fs::read_dir(directory)? {
                let entry = entry?;
                let Ok(name) = entry.file_name().into_string() else { continue };
                if !is_data(&name) {
                    continue;
                }
                let Ok(metadata) = entry.metadata() else { continue };
                self.following.entry(name).or_default().size = metadata.len();
            }
        }
        let open = self.following.values().filter(|following| following.open.is_some() || following.taken).count();
        if last && self.following.len() > MANY {
            // Of so many, each is small: large objects, as a rule.
            let first = self.following.iter_mut().find(|(_, following)| !following.taken);
            return Ok(first.map(|(name, following)| {
                let taken = std::mem::take(following);
                following.taken = true;
                (name.clone(), taken)
            }));
        }
        let chosen = self
            .following
            .iter()
            .filter(|(_, following)| !following.taken)
            .filter(|(_, following)| {
                last || (following.size.saturating_sub(following.read) >= WORTHWHILE
                    && (following.open.is_some() || open < OPEN))
            })
            .max_by_key(|(_, following)| following.size.saturating_sub(following.read))
            .map(|(name, _)| name.clone());
        Ok(chosen.map(|name| {
            let following = self.following.get_mut(&name).expect("it was just found");
            let taken = std::mem::take(following);
            following.taken = true;
            (name, taken)
        }))
    }
}

impl Following {
    /// Compresses what is there; all of it, to its end, if nothing more will come.
    fn advance(&mut self, path: &Path, level: i32, last: bool) -> io::Result<Option<FileEntry>> {
        let packed = named(path);
        let (source, encoder) = match &mut self.open {
            Some(open) => open,
            None => {
                let source = File::options().read(true).write(true).open(path)?;
                let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&packed)?;
                let encoder = Encoder::new(Digesting { file, digest: Sha256::new(), bytes: 0 }, level)?;
                self.open.insert((source, encoder))
            }
        };
        let (mut buffer, from) = (vec![0; 1 << 20], self.read);
        while last || self.read - from < TURN {
            let read = source.read_at(&mut buffer, self.read)?;
            if read == 0 {
                break;
            }
            encoder.write_all(&buffer[..read])?;
            self.read += read as u64;
        }
        let whole = self.read & !4095;
        if whole > 0 {
            // Where a file system cannot take back a part, the whole goes at the end.
            let _ = rustix::fs::fallocate(&*source, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, whole);
        }
        self.size = self.size.max(self.read);
        if !last {
            return Ok(None);
        }
        let Some((_, encoder)) = self.open.take() else { return Ok(None) };
        let done = encoder.finish()?;
        done.file.sync_all()?;
        fs::remove_file(path)?;
        Ok(Some(FileEntry {
            path: packed.file_name().unwrap_or_default().into(),
            bytes: done.bytes,
            plain_bytes: Some(self.read),
            sha256: hex(&done.digest.finalize()),
        }))
    }
}

fn named(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(SUFFIX);
    name.into()
}

/// Tells the files that hold data from those that say what there is.
fn is_data(name: &str) -> bool {
    name == "archive" || (name.ends_with(".dat") && name != "toc.dat")
}

/// Unpacks what was compressed here into a fresh directory, and copies what was not.
///
/// # Errors
/// The file system refused it, a file is not what was written, or `stop` was signalled.
pub(crate) fn unpack(
    from: &Path,
    files: &[FileEntry],
    to: &Path,
    threads: usize,
    stop: &CancellationToken,
) -> io::Result<()> {
    let waiting = Mutex::new(files.iter());
    let failed = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                loop {
                    let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
                    let Some(entry) = next else { return };
                    if let Err(error) = unpack_one(from, entry, to, stop) {
                        *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                        return;
                    }
                }
            });
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

fn unpack_one(from: &Path, entry: &FileEntry, to: &Path, stop: &CancellationToken) -> io::Result<()> {
    let name = entry.path.file_name().unwrap_or_default();
    let packed = File::open(from.join(name))?;
    let plain = match entry.plain_bytes {
        Some(_) => Path::new(name).with_extension(""),
        None => name.into(),
    };
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(to.join(plain))?;
    let mut source: Box<dyn Read> = match entry.plain_bytes {
        Some(_) => Box::new(zstd::stream::read::Decoder::new(packed)?),
        None => Box::new(packed),
    };
    let (mut buffer, mut written) = (vec![0; 1 << 20], 0);
    loop {
        if stop.is_cancelled() {
            return Err(io::Error::other("cancelled"));
        }
        let read = source.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        file.write_all(&buffer[..read])?;
        written += read as u64;
    }
    match entry.plain_bytes {
        Some(expected) if expected != written => {
            Err(io::Error::new(io::ErrorKind::InvalidData, format!("it holds {written} bytes, and held {expected}")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_grows_while_it_is_followed_comes_out_whole() {
        let directory = tempfile::tempdir().unwrap();
        let dump = directory.path().join("dump");
        fs::create_dir(&dump).unwrap();
        let ended = AtomicBool::new(false);
        let stop = CancellationToken::new();
        let content = |n: u32| (0..3_000_000_u32).map(|i| (i.wrapping_mul(n) >> 7) as u8).collect::<Vec<_>>();
        let entries = std::thread::scope(|scope| {
            let following = scope.spawn(|| follow(&dump, Effort { level: 3, threads: 2 }, &ended, &stop).unwrap());
            let mut files: Vec<_> = (1..5).map(|n| (n, File::create(dump.join(format!("{n}.dat"))).unwrap())).collect();
            for part in 0..6 {
                for (n, file) in &mut files {
                    file.write_all(&content(*n)[part * 500_000..(part + 1) * 500_000]).unwrap();
                }
                std::thread::sleep(Duration::from_millis(30));
            }
            fs::write(dump.join("9.dat"), "").unwrap();
            fs::write(dump.join("toc.dat"), "what there is").unwrap();
            ended.store(true, Ordering::Release);
            following.join().unwrap()
        });
        assert_eq!(entries.len(), 5, "{entries:?}");
        let mut names: Vec<_> =
            fs::read_dir(&dump).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, ["1.dat.zst", "2.dat.zst", "3.dat.zst", "4.dat.zst", "9.dat.zst", "toc.dat"]);
        let out = directory.path().join("out");
        fs::create_dir(&out).unwrap();
        unpack(&dump, &entries, &out, 2, &stop).unwrap();
        for n in 1..5 {
            assert!(fs::read(out.join(format!("{n}.dat"))).unwrap() == content(n), "file {n}");
        }
        let mut wrong = entries;
        wrong[0].plain_bytes = Some(1);
        let again = directory.path().join("again");
        fs::create_dir(&again).unwrap();
        assert!(unpack(&dump, &wrong, &again, 2, &stop).is_err());
    }

    #[test]
    fn a_cancelled_one_returns() {
        let directory = tempfile::tempdir().unwrap();
        let stop = CancellationToken::new();
        stop.cancel();
        assert!(follow(directory.path(), Effort { level: 3, threads: 2 }, &AtomicBool::new(false), &stop).is_err());
    }
}
