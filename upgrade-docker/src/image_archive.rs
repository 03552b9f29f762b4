//! Archives of images, as `docker save` writes them: looked into before an engine is given one.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read, Write};
use std::path::Path;
use std::rc::Rc;

use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::Builder;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::sealed::{hex, sha256_hex};

use crate::error::cancelled;
use crate::reference::ImageReference;
use crate::streams::GONE;
use crate::volumes::contents::watch;
use crate::volumes::members::{self, Members};
use crate::volumes::storage;

/// The member that lists the images.
const MANIFEST: &str = "manifest.json";
/// The same, of the other layout that newer archives have besides.
const INDEX: &str = "index.json";
/// The names of the oldest layout.
const REPOSITORIES: &str = "repositories";
/// The longest member that may be a list or a configuration, and how much of them is kept.
const LONGEST: u64 = 4 << 20;
const MOST: u64 = 64 << 20;
/// Where the other layout keeps names.
const NAMES: [&str; 2] = ["io.containerd.image.name", "org.opencontainers.image.ref.name"];

/// Describes an archive that was read to its last byte.
#[derive(Debug, Clone)]
pub(crate) struct Archive {
    /// SHA-256 of the file.
    pub(crate) sha256: String,
    pub(crate) images: Vec<Packed>,
}

/// Describes an image in an archive.
#[derive(Debug, Clone)]
pub(crate) struct Packed {
    /// The digest of its configuration, which is an image's id where the engine keeps images itself.
    pub(crate) id: String,
    pub(crate) names: Vec<String>,
    /// `linux/arm64/v8`
    pub(crate) platform: String,
    /// Its entry in the list.
    entry: Value,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Listed {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct Configuration {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: String,
}

impl Archive {
    /// Chooses an image: the one of that name, or the only one.
    ///
    /// # Errors
    /// It has no such image, or several of which none is named.
    pub(crate) fn choose(&self, named: Option<&ImageReference>, or: &ImageReference) -> Result<&Packed, StepError> {
        let of = |name: &ImageReference| {
            let name = name.to_string();
            self.images.iter().find(|image| image.names.iter().any(|other| is_same(other, &name)))
        };
        let names =
            self.images.iter().flat_map(|image| &image.names).map(String::as_str).collect::<Vec<_>>().join(", ");
        match (named, &self.images[..]) {
            (Some(name), _) => of(name).ok_or_else(|| {
                StepError::permanent(format!("the archive has no image {name}; it has {names}"))
                    .with_hint("name one of them as `load.name`")
            }),
            (None, [only]) => Ok(only),
            (None, _) => of(or).ok_or_else(|| {
                StepError::permanent(format!("the archive has several images, and none is {or}: {names}"))
                    .with_hint("name one of them as `load.name`")
            }),
        }
    }
}

/// Reads an archive to its last byte: its digest, and the images that it lists.
///
/// # Errors
/// It cannot be read, is damaged, or is not an archive of images.
pub(crate) fn inspect(path: &Path, cx: &Context) -> Result<Archive, StepError> {
    let (reader, tally) = open(path, cx).map_err(|error| unreadable(path, cx, &error))?;
    let mut members = Members::new(reader);
    let mut small: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut kept = 0;
    while let Some(member) = members.next().map_err(|error| unreadable(path, cx, &error))? {
        if !member.kind.is_file() || member.size > LONGEST {
            continue;
        }
        let bytes = members.read_all(LONGEST).map_err(|error| unreadable(path, cx, &error))?;
        if bytes.first() == Some(&b'{') || bytes.first() == Some(&b'[') {
            kept += member.size;
            if kept > MOST {
                return Err(unfit(path, "it has more lists and configurations than any tool writes"));
            }
            small.insert(String::from_utf8_lossy(&member.name).trim_start_matches("./").to_owned(), bytes);
        }
    }
    let manifest = small.get(MANIFEST).ok_or_else(|| unfit(path, "it has no manifest.json"))?;
    let listed: Vec<Value> =
        serde_json::from_slice(manifest).map_err(|_| unfit(path, "its manifest.json cannot be read"))?;
    let images = listed.into_iter().map(|entry| packed(&small, entry)).collect::<Result<Vec<_>, _>>();
    let images = images.map_err(|reason| unfit(path, reason))?;
    if images.is_empty() {
        return Err(unfit(path, "it lists no image"));
    }
    let tally = tally.borrow();
    Ok(Archive { sha256: hex(&tally.0.clone().finalize()), images })
}

fn packed(small: &BTreeMap<String, Vec<u8>>, entry: Value) -> Result<Packed, &'static str> {
    let listed: Listed = serde_json::from_value(entry.clone()).map_err(|_| "its manifest.json cannot be read")?;
    let bytes = small.get(&listed.config).ok_or("the configuration of an image that it lists is missing")?;
    let configuration: Configuration =
        serde_json::from_slice(bytes).map_err(|_| "the configuration of an image cannot be read")?;
    let digest = sha256_hex(bytes);
    let named = listed.config.rsplit('/').next().unwrap_or_default().trim_end_matches(".json");
    if named.len() == 64 && named != digest {
        return Err("the configuration of an image is not the one that it lists");
    }
    let parts = [configuration.os, configuration.architecture, configuration.variant];
    let platform = parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("/");
    Ok(Packed { id: format!("sha256:{digest}"), names: listed.repo_tags.unwrap_or_default(), platform, entry })
}

/// Writes an archive again, with one of its images and none of the names: an engine that loads it
/// moves no tag.
///
/// # Errors
/// It cannot be read, or the engine takes no more.
pub(crate) fn send_nameless(path: &Path, image: &Packed, to: &mut dyn Write, cx: &Context) -> Result<(), StepError> {
    let sending = || -> io::Result<()> {
        let (reader, _) = open(path, cx)?;
        let mut members = Members::new(reader);
        let mut onward = Builder::new(to);
        while let Some(mut member) = members.next()? {
            let changed = match std::str::from_utf8(&member.name).unwrap_or_default().trim_start_matches("./") {
                REPOSITORIES => continue,
                MANIFEST => {
                    members.read_all(LONGEST)?;
                    let mut entry = image.entry.clone();
                    entry["RepoTags"] = Value::Null;
                    json!([entry])
                }
                INDEX => without_names(&members.read_all(LONGEST)?, &image.names)?,
                _ => {
                    let (name, link) = (member.name.clone(), member.link.clone());
                    members::write(&mut onward, &member, &name, &link, &mut members)?;
                    continue;
                }
            };
            let bytes = changed.to_string().into_bytes();
            member.size = bytes.len() as u64;
            let name = member.name.clone();
            members::write(&mut onward, &member, &name, &[], &bytes[..])?;
        }
        onward.into_inner()?.flush()
    };
    sending().map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => StepError::unknown(GONE),
        _ => unreadable(path, cx, &error),
    })
}

/// Takes the names out of an index, and with them the images that have others.
fn without_names(index: &[u8], names: &[String]) -> io::Result<Value> {
    let mut index: Value = serde_json::from_slice(index)?;
    if let Some(Value::Array(manifests)) = index.get_mut("manifests") {
        let is_it = |manifest: &Value| {
            let name = manifest.pointer("/annotations/io.containerd.image.name").and_then(Value::as_str);
            name.is_some_and(|name| names.iter().any(|other| is_same(other, name)))
        };
        if manifests.iter().any(is_it) {
            manifests.retain(is_it);
        }
        for manifest in manifests {
            if let Some(Value::Object(annotations)) = manifest.get_mut("annotations") {
                annotations.retain(|key, _| !NAMES.contains(&key.as_str()));
            }
        }
    }
    Ok(index)
}

/// Tells whether two texts name the same image; one layout writes all of a name, the other its short form.
fn is_same(one: &str, other: &str) -> bool {
    let short = |text: &str| {
        let name = text.parse::<ImageReference>().ok()?.to_string();
        Some(name.strip_prefix("library/").map_or(name.clone(), str::to_owned))
    };
    matches!((short(one), short(other)), (Some(one), Some(other)) if one == other)
}

type Tally = Rc<RefCell<(Sha256, u64)>>;

/// Opens an archive, whatever it is compressed with, and counts and digests the bytes of the file.
fn open(path: &Path, cx: &Context) -> io::Result<(Box<dyn Read>, Tally)> {
    let file = File::open(path)?;
    let total = file.metadata()?.len();
    let tally: Tally = Rc::default();
    let reading = Reading { file, total, tally: tally.clone(), cx: cx.clone() };
    let mut buffered = BufReader::with_capacity(256 << 10, reading);
    let magic = buffered.fill_buf()?;
    let reader: Box<dyn Read> = if magic.starts_with(&[0x1f, 0x8b]) {
        Box::new(flate2::bufread::MultiGzDecoder::new(buffered))
    } else if magic.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        Box::new(zstd::Decoder::with_buffer(buffered)?)
    } else {
        Box::new(buffered)
    };
    Ok((reader, tally))
}

struct Reading {
    file: File,
    total: u64,
    tally: Tally,
    cx: Context,
}

impl Read for Reading {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        let mut tally = self.tally.borrow_mut();
        tally.0.update(&buffer[..read]);
        tally.1 += read as u64;
        watch(&self.cx, tally.1, Some(self.total), "reading the archive")?;
        Ok(read)
    }
}

fn unreadable(path: &Path, cx: &Context, error: &io::Error) -> StepError {
    if cx.cancelled().is_cancelled() {
        return cancelled();
    }
    // What does not come from the system comes from the decoder.
    match error.raw_os_error() {
        Some(_) => storage::failed(format!("cannot read {}", path.display()), error),
        None => unfit(path, "it is damaged, or no tar, tar.gz or tar.zst").with_cause(error),
    }
}

fn unfit(path: &Path, reason: &str) -> StepError {
    StepError::permanent(format!("{} is not an archive of images: {reason}", path.display()))
        .with_hint("name one that `docker save` or `docker buildx build --output type=docker` wrote")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_loses_its_names_and_other_images() {
        let index = json!({ "manifests": [
            { "digest": "a", "annotations": { "io.containerd.image.name": "docker.io/library/web:1", "x": "y" } },
            { "digest": "b", "annotations": { "io.containerd.image.name": "docker.io/library/other:1" } },
        ] });
        let left = without_names(index.to_string().as_bytes(), &["web:1".into()]).unwrap();
        assert_eq!(left, json!({ "manifests": [{ "digest": "a", "annotations": { "x": "y" } }] }));
        let left = without_names(index.to_string().as_bytes(), &[]).unwrap();
        assert_eq!(left["manifests"].as_array().unwrap().len(), 2);
    }
}
