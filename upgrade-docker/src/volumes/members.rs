//! The members of a tar, one after the other, bounded in what is read into memory.
//!
//! The headers are decoded with the tar crate; the stream is followed here, because that crate
//! takes an end in the middle for the end of the archive, and reads a long name into memory
//! whatever length it claims to have.

use std::io::{self, Read, Write};

use tar::{Builder, EntryType, Header};

const BLOCK: usize = 512;
/// The longest extended header that is read: names, and attributes of at most 64 KiB.
const EXTENSION: u64 = 256 << 10;
const XATTR: &str = "SCHILY.xattr.";

/// Describes one member as its headers do.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    pub(crate) name: Vec<u8>,
    pub(crate) kind: EntryType,
    pub(crate) mode: u32,
    pub(crate) owner: (u64, u64),
    /// Whole seconds, and none before 1970: what an engine keeps.
    pub(crate) mtime: u64,
    pub(crate) size: u64,
    pub(crate) link: Vec<u8>,
    pub(crate) device: Option<(u32, u32)>,
    /// Extended attributes, as far as the engine gives them: capabilities of programs.
    pub(crate) xattrs: Vec<(String, Vec<u8>)>,
}

/// Follows a tar from its first byte to its end mark.
pub(crate) struct Members<R> {
    stream: R,
    content: u64,
    padding: u64,
}

impl<R: Read> Members<R> {
    pub(crate) fn new(stream: R) -> Self {
        Self { stream, content: 0, padding: 0 }
    }

    /// Returns the next member; what is left of the one before is skipped. `None` is the end mark,
    /// and then the stream has been read to its last byte.
    pub(crate) fn next(&mut self) -> io::Result<Option<Member>> {
        let (mut long_name, mut long_link, mut pax) = (None, None, Extended::default());
        for _ in 0..8 {
            self.skip()?;
            let mut block = [0; BLOCK];
            self.stream.read_exact(&mut block)?;
            if block.iter().all(|byte| *byte == 0) {
                self.expect_end()?;
                return Ok(None);
            }
            let header = Header::from_byte_slice(&block);
            if !checksum_holds(&block, header) {
                return Err(malformed("the checksum of a header does not match"));
            }
            let kind = header.entry_type();
            let extension = kind.is_gnu_longname()
                || kind.is_gnu_longlink()
                || kind.is_pax_local_extensions()
                || kind.is_pax_global_extensions();
            // What a pax header says holds for the member, not for other headers in between.
            let unread = |_: io::Error| malformed("a number in a header cannot be read");
            let stated = header.entry_size().map_err(unread)?;
            let size = if extension { stated } else { pax.size.unwrap_or(stated) };
            self.content = if extension || kind.is_file() || kind.is_contiguous() { size } else { 0 };
            self.padding = (BLOCK as u64 - self.content % BLOCK as u64) % BLOCK as u64;
            match kind {
                EntryType::GNULongName => long_name = Some(until_nul(&self.read_all(EXTENSION)?)),
                EntryType::GNULongLink => long_link = Some(until_nul(&self.read_all(EXTENSION)?)),
                EntryType::XHeader => pax = Extended::parse(&self.read_all(EXTENSION)?)?,
                EntryType::XGlobalHeader => return Err(malformed("it has a global header")),
                EntryType::GNUSparse => return Err(malformed("it holds a sparse file")),
                kind => {
                    let name = pax.path.or(long_name).unwrap_or_else(|| header.path_bytes().into_owned());
                    let link = pax.link.or(long_link);
                    let device = matches!(kind, EntryType::Char | EntryType::Block);
                    let number = |found: io::Result<Option<u32>>| found.map(Option::unwrap_or_default).map_err(unread);
                    return Ok(Some(Member {
                        name,
                        kind,
                        mode: header.mode().map_err(unread)? & 0o7777,
                        owner: (
                            pax.uid.map_or_else(|| header.uid(), Ok).map_err(unread)?,
                            pax.gid.map_or_else(|| header.gid(), Ok).map_err(unread)?,
                        ),
                        mtime: pax.mtime.unwrap_or_else(|| header.mtime().unwrap_or(0)),
                        size: self.content,
                        link: link.unwrap_or_else(|| header.link_name_bytes().unwrap_or_default().into_owned()),
                        device: match device {
                            true => Some((number(header.device_major())?, number(header.device_minor())?)),
                            false => None,
                        },
                        xattrs: pax.xattrs,
                    }));
                }
            }
        }
        Err(malformed("a member has more headers than any tool writes"))
    }

    /// Reads the content of the present member into memory, if it is not longer than `most`.
    pub(crate) fn read_all(&mut self, most: u64) -> io::Result<Vec<u8>> {
        if self.content > most {
            return Err(malformed("a header or a manifest is too long"));
        }
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn skip(&mut self) -> io::Result<()> {
        let mut buffer = [0; 16 << 10];
        while self.read(&mut buffer)? > 0 {}
        let padding = usize::try_from(std::mem::take(&mut self.padding)).unwrap_or(0);
        self.stream.read_exact(&mut buffer[..padding])
    }

    fn expect_end(&mut self) -> io::Result<()> {
        let mut buffer = [0; 16 << 10];
        loop {
            match self.stream.read(&mut buffer)? {
                0 => return Ok(()),
                read if buffer[..read].iter().any(|byte| *byte != 0) => {
                    return Err(malformed("there is something after its end mark"));
                }
                _ => {}
            }
        }
    }
}

/// Reads the content of the present member; an archive that ends within is an error.
impl<R: Read> Read for Members<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(usize::try_from(self.content).unwrap_or(usize::MAX));
        if most == 0 {
            return Ok(0);
        }
        let read = self.stream.read(&mut buffer[..most])?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.content -= read as u64;
        Ok(read)
    }
}

/// Writes a member under another name, as every tar reads it: what does not fit into the plain
/// header goes into a pax header before it.
pub(crate) fn write<W: Write>(
    to: &mut Builder<W>,
    member: &Member,
    name: &[u8],
    link: &[u8],
    content: impl Read,
) -> io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_entry_type(member.kind);
    header.set_mode(member.mode);
    header.set_uid(member.owner.0);
    header.set_gid(member.owner.1);
    header.set_mtime(member.mtime);
    header.set_size(member.size);
    if let Some((major, minor)) = member.device {
        header.set_device_major(major)?;
        header.set_device_minor(minor)?;
    }
    let mut records: Vec<(String, &[u8])> = Vec::new();
    let old = header.as_old_mut();
    for (key, text, field) in [("path", name, &mut old.name), ("linkpath", link, &mut old.linkname)] {
        let fits = text.len().min(field.len());
        field[..fits].copy_from_slice(&text[..fits]);
        if fits < text.len() {
            records.push((key.to_owned(), text));
        }
    }
    records.extend(member.xattrs.iter().map(|(key, value)| (format!("{XATTR}{key}"), &**value)));
    if !records.is_empty() {
        to.append_pax_extensions(records.iter().map(|(key, value)| (key.as_str(), *value)))?;
    }
    header.set_cksum();
    to.append(&header, content)
}

fn checksum_holds(block: &[u8; BLOCK], header: &Header) -> bool {
    let sum = block.iter().enumerate().map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u32::from(*byte) });
    header.cksum().is_ok_and(|claimed| claimed == sum.sum::<u32>())
}

fn until_nul(bytes: &[u8]) -> Vec<u8> {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default().to_vec()
}

fn malformed(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

/// Holds what a pax header says about the member after it.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<u64>,
    xattrs: Vec<(String, Vec<u8>)>,
}

impl Extended {
    fn parse(mut rest: &[u8]) -> io::Result<Self> {
        let wrong = || malformed("an extended header is malformed");
        let text = |bytes: &[u8]| std::str::from_utf8(bytes).ok().map(str::to_owned);
        let number = |bytes: &[u8]| text(bytes).and_then(|digits| digits.parse().ok()).ok_or_else(wrong);
        let mut extended = Self::default();
        while !rest.is_empty() && rest[0] != 0 {
            let space = rest.iter().position(|byte| *byte == b' ').ok_or_else(wrong)?;
            let length = usize::try_from(number(&rest[..space])?).unwrap_or(usize::MAX);
            let record = rest.get(space + 1..length).and_then(|record| record.strip_suffix(b"\n")).ok_or_else(wrong)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(wrong)?;
            let value = &record[equals + 1..];
            match text(&record[..equals]).ok_or_else(wrong)?.as_str() {
                "path" => extended.path = Some(value.to_vec()),
                "linkpath" => extended.link = Some(value.to_vec()),
                "size" => extended.size = Some(number(value)?),
                "uid" => extended.uid = Some(number(value)?),
                "gid" => extended.gid = Some(number(value)?),
                "mtime" => {
                    let seconds = text(value).and_then(|text| text.split('.').next()?.parse::<i64>().ok());
                    extended.mtime = Some(seconds.ok_or_else(wrong)?.try_into().unwrap_or(0));
                }
                key if key.starts_with("GNU.sparse") => return Err(malformed("it holds a sparse file")),
                key => {
                    if let Some(name) = key.strip_prefix(XATTR) {
                        extended.xattrs.push((name.to_owned(), value.to_vec()));
                    }
                }
            }
            rest = &rest[length..];
        }
        extended.xattrs.sort();
        Ok(extended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, content: &[u8]) -> Member {
        Member {
            name: name.into(),
            kind: EntryType::Regular,
            mode: 0o4640,
            owner: (70, 3_000_000_000),
            mtime: 9,
            size: content.len() as u64,
            link: Vec::new(),
            device: None,
            xattrs: vec![("security.capability".into(), vec![1, 0, 255, b'\n'])],
        }
    }

    fn tar(name: &str) -> Vec<u8> {
        let mut builder = Builder::new(Vec::new());
        write(&mut builder, &member(name, b"content"), name.as_bytes(), b"", &b"content"[..]).unwrap();
        builder.into_inner().unwrap()
    }

    #[test]
    fn what_is_written_is_read_again() {
        for name in ["files/a".to_owned(), format!("files/{}", "long".repeat(300))] {
            let bytes = tar(&name);
            let mut members = Members::new(&bytes[..]);
            let found = members.next().unwrap().unwrap();
            let expected = member(&name, b"content");
            assert_eq!((found.name, found.mode, found.owner), (expected.name, expected.mode, expected.owner));
            assert_eq!((found.mtime, found.xattrs), (expected.mtime, expected.xattrs));
            assert_eq!(members.read_all(7).unwrap(), b"content");
            assert!(members.next().unwrap().is_none());
        }
    }

    #[test]
    fn what_is_cut_off_or_damaged_is_an_error() {
        let bytes = tar("files/a");
        let read = |bytes: &[u8]| -> io::Result<usize> {
            let mut members = Members::new(bytes);
            let mut count = 0;
            while members.next()?.is_some() {
                count += 1;
            }
            Ok(count)
        };
        assert_eq!(read(&bytes).unwrap(), 1);
        for length in 0..bytes.len() - 1024 {
            assert!(read(&bytes[..length]).is_err(), "{length}");
        }
        let mut damaged = bytes.clone();
        damaged[1024] ^= 1;
        assert!(read(&damaged).is_err());
        assert!(read(&[bytes, vec![1; 512]].concat()).is_err());
    }
}
