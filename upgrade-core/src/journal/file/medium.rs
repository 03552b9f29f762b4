//! Writes the end of a file so that it is durable when the write returns.
//!
//! The block that the end lies in is kept in memory and written whole, past the page cache and
//! synced by the write itself: one request to the disk. Through the page cache, the same takes a
//! copy, a walk over the dirty pages and a second call; a third of the time where the disk is
//! fast. File systems that cannot do that get a write and an `fdatasync`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

/// What every file system and disk in use takes as aligned.
const BLOCK: usize = 4096;

/// Appends to a file whose space is allocated ahead and filled with zeros.
#[derive(Debug)]
pub(super) struct Medium {
    direct: Option<File>,
    /// The bytes of the block that the end lies in, up to the end.
    tail: Vec<u8>,
    end: u64,
}

impl Medium {
    /// Appends to `file` at `end`; what stands before is read from it.
    pub(super) fn new(file: &File, path: &Path, end: u64) -> io::Result<Self> {
        let mut tail = vec![0; (end % BLOCK as u64) as usize];
        file.read_exact_at(&mut tail, end - end % BLOCK as u64)?;
        let flags = OFlags::DIRECT | OFlags::DSYNC;
        // A file system that knows no direct writes refuses the flag.
        let direct = OpenOptions::new().write(true).custom_flags(flags.bits() as i32).open(path).ok();
        Ok(Self { direct, tail, end })
    }

    /// Returns where the file ends.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Writes bytes at the end, durable when it returns. After an error, what stands there is not
    /// known.
    pub(super) fn append(&mut self, file: &File, bytes: &[u8]) -> io::Result<()> {
        let start = self.end - self.tail.len() as u64;
        self.tail.extend_from_slice(bytes);
        if !self.append_direct(start)? {
            file.write_all_at(bytes, self.end)?;
            file.sync_data()?;
        }
        self.end += bytes.len() as u64;
        self.tail.drain(..self.tail.len() / BLOCK * BLOCK);
        Ok(())
    }

    /// Writes the tail in whole blocks; answers false where that is not possible.
    fn append_direct(&mut self, start: u64) -> io::Result<bool> {
        let Some(direct) = &self.direct else { return Ok(false) };
        let length = self.tail.len().next_multiple_of(BLOCK);
        let mut buffer = vec![0; length + BLOCK];
        let offset = buffer.as_ptr().align_offset(BLOCK);
        let Some(aligned) = buffer.get_mut(offset..offset + length) else { return Ok(false) };
        aligned[..self.tail.len()].copy_from_slice(&self.tail);
        match direct.write_at(aligned, start) {
            Ok(written) if written == length => Ok(true),
            // A part was written: a full disk, or a limit. What is missing tells which.
            Ok(written) => direct.write_all_at(&aligned[written..], start + written as u64).map(|()| true),
            // Refused before anything was written: the alignment is not the disk's.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                self.direct = None;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}
