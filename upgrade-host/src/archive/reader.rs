//! Reads a tar, bounded in everything: size, ratio, length of names, number of headers.
//!
//! The headers are decoded with the tar crate; the stream is followed here, because that crate
//! reads a long name into memory whatever length it claims to have.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use sha2::{Digest, Sha256};
use tar::{EntryType, Header};
use upgrade_core::sealed::hex;

use super::{ArchiveError, Limits};

const BLOCK: usize = 512;
/// The longest extended header that is read: far above what any name needs.
const EXTENSION: u64 = 64 << 10;

/// Digests the packed bytes as they pass, so that what is unpacked is what is verified.
struct Tally {
    hasher: Sha256,
    bytes: u64,
}

struct Tracked {
    file: File,
    tally: Rc<RefCell<Tally>>,
}

impl Read for Tracked {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        let mut tally = self.tally.borrow_mut();
        tally.hasher.update(&buffer[..read]);
        tally.bytes += read as u64;
        Ok(read)
    }
}

/// Describes one member of a tar as its headers do.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) name: Vec<u8>,
    pub(crate) kind: EntryType,
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) mtime: i64,
    pub(crate) link: Vec<u8>,
}

/// Follows an archive from its first byte to its last.
pub(crate) struct Reader {
    archive: PathBuf,
    stream: Box<dyn Read>,
    tally: Rc<RefCell<Tally>>,
    length: u64,
    unpacked: u64,
    /// What is left of the present member: its content, and the padding after it.
    content: u64,
    padding: u64,
    limits: Limits,
}

impl Reader {
    /// Opens an archive; plain tar, gzip and zstd are told apart by their content.
    pub(crate) fn open(archive: &Path, limits: Limits) -> Result<Self, ArchiveError> {
        let file = File::open(archive).map_err(ArchiveError::io("open", archive))?;
        let metadata = file.metadata().map_err(ArchiveError::io("read", archive))?;
        if !metadata.is_file() {
            return Err(ArchiveError::Unfit { archive: archive.into(), reason: "it is not a regular file".into() });
        }
        let mut magic = [0; BLOCK];
        let read = file.read_at(&mut magic, 0).map_err(ArchiveError::io("read", archive))?;
        let tally = Rc::new(RefCell::new(Tally { hasher: Sha256::new(), bytes: 0 }));
        let buffered = BufReader::with_capacity(128 << 10, Tracked { file, tally: tally.clone() });
        let stream: Box<dyn Read> = if magic.starts_with(&[0x1f, 0x8b]) {
            Box::new(flate2::bufread::MultiGzDecoder::new(buffered))
        } else if magic.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
            let decoder = zstd::Decoder::with_buffer(buffered);
            Box::new(decoder.map_err(|source| ArchiveError::Damaged { archive: archive.into(), source })?)
        } else if read == BLOCK && checksum_holds(&magic) {
            Box::new(buffered)
        } else {
            let reason = "it is neither a tar nor a tar packed with gzip or zstd".into();
            return Err(ArchiveError::Unfit { archive: archive.into(), reason });
        };
        Ok(Self {
            archive: archive.into(),
            stream,
            tally,
            length: metadata.len(),
            unpacked: 0,
            content: 0,
            padding: 0,
            limits,
        })
    }

    pub(crate) fn archive(&self) -> &Path {
        &self.archive
    }

    /// Tells how much of the packed file has been read, and its length.
    pub(crate) fn position(&self) -> (u64, u64) {
        (self.tally.borrow().bytes.min(self.length), self.length)
    }

    /// Returns the next member; what is left of the one before is skipped. `None` is the end, and
    /// then the archive has been read to its last byte.
    pub(crate) fn next(&mut self) -> Result<Option<Member>, ArchiveError> {
        let (mut long_name, mut long_link, mut pax) = (None, None, Extended::default());
        for _ in 0..8 {
            self.skip()?;
            let mut block = [0; BLOCK];
            if !self.fill(&mut block)? {
                return Err(self.unfit("it ends without its end mark: it was cut off"));
            }
            if block.iter().all(|byte| *byte == 0) {
                self.expect_end()?;
                return Ok(None);
            }
            if !checksum_holds(&block) {
                return Err(self.unfit("the checksum of a header does not match"));
            }
            let header = Header::from_byte_slice(&block);
            let kind = header.entry_type();
            let size = header.entry_size().map_err(|e| self.damaged(e))?;
            // What a pax header says holds for the entry, not for other headers in between.
            let size = if is_extension(kind) { size } else { pax.size.unwrap_or(size) };
            self.content = if holds_content(kind) { size } else { 0 };
            self.padding = (BLOCK as u64 - self.content % BLOCK as u64) % BLOCK as u64;
            match kind {
                EntryType::GNULongName => long_name = Some(self.extension()?),
                EntryType::GNULongLink => long_link = Some(self.extension()?),
                EntryType::XHeader => pax = self.pax()?,
                EntryType::XGlobalHeader => {
                    // What a global header says about names and sizes would hold for all that
                    // follow: no tool writes that, so it is not guessed at.
                    let global = self.pax()?;
                    if global.path.is_some() || global.link.is_some() || global.size.is_some() {
                        return Err(self.unfit("a global header names paths or sizes"));
                    }
                }
                kind => {
                    let trimmed = |bytes: Vec<u8>| bytes.split(|b| *b == 0).next().unwrap_or_default().to_vec();
                    let link = pax.link.or(long_link.map(trimmed));
                    return Ok(Some(Member {
                        name: pax.path.or(long_name.map(trimmed)).unwrap_or_else(|| header.path_bytes().into_owned()),
                        kind,
                        mode: header.mode().map_err(|e| self.damaged(e))?,
                        owner: (
                            header.uid().unwrap_or(0).try_into().unwrap_or(u32::MAX),
                            header.gid().unwrap_or(0).try_into().unwrap_or(u32::MAX),
                        ),
                        mtime: pax.mtime.unwrap_or_else(|| header.mtime().unwrap_or(0).try_into().unwrap_or(0)),
                        link: link.unwrap_or_else(|| header.link_name_bytes().unwrap_or_default().into_owned()),
                    }));
                }
            }
        }
        Err(self.unfit("an entry has more headers than any tool writes"))
    }

    /// Reads content of the present member; zero at its end.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, ArchiveError> {
        let most = buffer.len().min(usize::try_from(self.content).unwrap_or(usize::MAX));
        if most == 0 {
            return Ok(0);
        }
        let read = self.raw(&mut buffer[..most])?;
        if read == 0 {
            return Err(self.unfit("it ends inside an entry: it was cut off"));
        }
        self.content -= read as u64;
        Ok(read)
    }

    /// Reads the content of the present member into memory, if it is not longer than `most`.
    pub(crate) fn read_all(&mut self, most: u64) -> Result<Vec<u8>, ArchiveError> {
        if self.content > most {
            return Err(self.unfit("an extended header or a manifest is too long"));
        }
        let mut bytes = vec![0; usize::try_from(self.content).unwrap_or(usize::MAX)];
        let mut at = 0;
        while at < bytes.len() {
            at += self.read(&mut bytes[at..])?;
        }
        Ok(bytes)
    }

    /// Returns the SHA-256 of the packed file; call it at the end.
    pub(crate) fn sha256(&self) -> String {
        hex(&self.tally.borrow().hasher.clone().finalize())
    }

    fn extension(&mut self) -> Result<Vec<u8>, ArchiveError> {
        self.read_all(EXTENSION)
    }

    fn pax(&mut self) -> Result<Extended, ArchiveError> {
        let bytes = self.extension()?;
        Extended::parse(&bytes).map_err(|reason| self.unfit(reason))
    }

    fn skip(&mut self) -> Result<(), ArchiveError> {
        let mut buffer = [0; 16 << 10];
        while self.read(&mut buffer)? > 0 {}
        let padding = usize::try_from(std::mem::take(&mut self.padding)).unwrap_or(0);
        if padding > 0 && !self.fill(&mut buffer[..padding])? {
            return Err(self.unfit("it ends inside an entry: it was cut off"));
        }
        Ok(())
    }

    fn expect_end(&mut self) -> Result<(), ArchiveError> {
        let mut buffer = [0; 16 << 10];
        loop {
            match self.raw(&mut buffer)? {
                0 => return Ok(()),
                read if buffer[..read].iter().any(|byte| *byte != 0) => {
                    return Err(self.unfit("there is something after its end mark"));
                }
                _ => {}
            }
        }
    }

    /// Fills the buffer; `false` if the stream ended first.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<bool, ArchiveError> {
        let mut at = 0;
        while at < buffer.len() {
            match self.raw(&mut buffer[at..])? {
                0 => return Ok(false),
                read => at += read,
            }
        }
        Ok(true)
    }

    fn raw(&mut self, buffer: &mut [u8]) -> Result<usize, ArchiveError> {
        let read = loop {
            match self.stream.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other.map_err(|error| self.damaged(error))?,
            }
        };
        self.unpacked += read as u64;
        if self.unpacked > self.limits.unpacked {
            return Err(self.unfit(&format!("it unpacks to more than {} bytes", self.limits.unpacked)));
        }
        let packed = self.tally.borrow().bytes.max(1);
        if self.unpacked > Limits::RATIO_FREE && self.unpacked / packed > self.limits.ratio {
            let ratio = self.limits.ratio;
            return Err(self.unfit(&format!("it unpacks to more than {ratio} times its size, as a bomb does")));
        }
        Ok(read)
    }

    fn damaged(&self, source: io::Error) -> ArchiveError {
        if source.raw_os_error().is_some() {
            return ArchiveError::Io { action: "read", path: self.archive.clone(), source };
        }
        ArchiveError::Damaged { archive: self.archive.clone(), source }
    }

    fn unfit(&self, reason: &str) -> ArchiveError {
        ArchiveError::Unfit { archive: self.archive.clone(), reason: reason.to_owned() }
    }
}

fn is_extension(kind: EntryType) -> bool {
    kind.is_gnu_longname()
        || kind.is_gnu_longlink()
        || kind.is_pax_local_extensions()
        || kind.is_pax_global_extensions()
}

fn holds_content(kind: EntryType) -> bool {
    !matches!(
        kind,
        EntryType::Link
            | EntryType::Symlink
            | EntryType::Char
            | EntryType::Block
            | EntryType::Directory
            | EntryType::Fifo
    )
}

fn checksum_holds(block: &[u8; BLOCK]) -> bool {
    let sum = block.iter().enumerate().map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u32::from(*byte) });
    Header::from_byte_slice(block).cksum().is_ok_and(|claimed| claimed == sum.sum::<u32>())
}

/// Holds what a pax header says about the entry after it.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    mtime: Option<i64>,
}

impl Extended {
    fn parse(mut rest: &[u8]) -> Result<Self, &'static str> {
        const MALFORMED: &str = "an extended header is malformed";
        let mut extended = Self::default();
        while !rest.is_empty() && rest[0] != 0 {
            let space = rest.iter().position(|byte| *byte == b' ').ok_or(MALFORMED)?;
            let length: usize = text(&rest[..space]).and_then(|digits| digits.parse().ok()).ok_or(MALFORMED)?;
            let record = rest.get(space + 1..length).and_then(|r| r.strip_suffix(b"\n")).ok_or(MALFORMED)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or(MALFORMED)?;
            let value = &record[equals + 1..];
            match &record[..equals] {
                b"path" => extended.path = Some(value.to_vec()),
                b"linkpath" => extended.link = Some(value.to_vec()),
                b"size" => extended.size = Some(text(value).and_then(|v| v.parse().ok()).ok_or(MALFORMED)?),
                b"mtime" => {
                    let seconds = text(value).and_then(|v| v.split('.').next()?.parse().ok());
                    extended.mtime = Some(seconds.ok_or(MALFORMED)?);
                }
                key if key.starts_with(b"GNU.sparse") => {
                    return Err("it holds sparse files: build it without --sparse");
                }
                _ => {}
            }
            rest = &rest[length..];
        }
        Ok(extended)
    }
}

fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}
