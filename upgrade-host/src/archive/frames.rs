//! A file of zstd frames, any of which can be taken back.

use std::fs::File;
use std::io::{self, Seek, Write};

/// Writes a file as zstd frames, any of which can be taken back.
pub(super) struct Frames {
    encoder: Option<zstd::Encoder<'static, File>>,
    level: i32,
}

impl Frames {
    pub(super) fn new(file: File, level: i32) -> io::Result<Self> {
        let mut encoder = zstd::Encoder::new(file, level)?;
        encoder.include_checksum(true)?;
        Ok(Self { encoder: Some(encoder), level })
    }

    /// Ends the present frame and starts another; returns where it starts.
    pub(super) fn cut(&mut self) -> io::Result<u64> {
        let mut file = self.end()?;
        let at = file.stream_position()?;
        *self = Self::new(file, self.level)?;
        Ok(at)
    }

    /// Takes back everything since a frame's start.
    pub(super) fn back_to(&mut self, at: u64) -> io::Result<()> {
        let mut file = self.end()?;
        file.set_len(at)?;
        file.seek(io::SeekFrom::Start(at))?;
        *self = Self::new(file, self.level)?;
        Ok(())
    }

    pub(super) fn finish(mut self) -> io::Result<File> {
        self.end()
    }

    fn end(&mut self) -> io::Result<File> {
        self.encoder.take().ok_or_else(|| io::Error::other("an earlier write failed"))?.finish()
    }
}

impl Write for Frames {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match &mut self.encoder {
            Some(encoder) => encoder.write(buffer),
            None => Err(io::Error::other("an earlier write failed")),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.encoder.as_mut().map_or(Ok(()), |encoder| encoder.flush())
    }
}
