//! Where a release comes from: verified first, then read, then laid down.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use minisign_verify::{PublicKey, Signature};
use sha2::{Digest, Sha256};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::sealed::hex;

use super::ReleaseConfig;
use crate::archive::manifest::{Kind, Manifest};
use crate::archive::name::{self, Names};
use crate::archive::unpack::{Rules, unpack};
use crate::archive::{ArchiveError, Limits, is_sha256, tree, watch};

/// Names what a release is made from and what vouches for it.
#[derive(Debug, Clone)]
pub(super) enum Source {
    Archive {
        path: PathBuf,
        digest: Option<Expected>,
        signature: Option<(PathBuf, PublicKey)>,
        limits: Limits,
        strip: usize,
    },
    Directory {
        path: PathBuf,
    },
}

/// Says which digest an archive must have.
#[derive(Debug, Clone)]
pub(super) enum Expected {
    Sha256(String),
    /// A file as `sha256sum` writes it.
    File(PathBuf),
}

/// Holds what was verified: nothing else may be laid down.
pub(super) struct Verified {
    pub(super) manifest: Manifest,
    /// SHA-256 of the archive; a directory has none.
    pub(super) sha256: Option<String>,
    /// What vouched for it, in a few words.
    pub(super) by: &'static str,
}

impl Source {
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Archive { path, .. } | Self::Directory { path } => path,
        }
    }

    /// Verifies digest and signature, and only then reads what is inside; writes nothing.
    pub(super) fn verify(&self, cx: &Context) -> Result<Verified, StepError> {
        match self {
            Self::Archive { path, digest, signature, limits, strip } => {
                let expected = digest.as_ref().map(|expected| expected.read(path)).transpose()?;
                let sha256 = vouch(path, expected.as_deref(), signature.as_ref(), cx)?;
                let contents = unpack(path, &Rules::release(*limits, *strip), None, cx)?;
                if contents.sha256 != sha256 {
                    return Err(changed(path));
                }
                let manifest = contents.manifest.contents();
                if manifest.files() == 0 {
                    return Err(StepError::permanent(format!("{} holds no file", path.display()))
                        .with_hint("look at `strip_components`, or have the archive built again"));
                }
                let by = match (expected.is_some(), signature.is_some()) {
                    (true, true) => "digest and signature verified",
                    (true, false) => "digest verified",
                    (false, true) => "signature verified",
                    (false, false) => "NOT verified: neither a digest nor a signature is given",
                };
                Ok(Verified { manifest, sha256: Some(sha256), by })
            }
            Self::Directory { path } => {
                if !path.is_dir() {
                    return Err(StepError::permanent(format!("{} is not a directory", path.display()))
                        .with_hint("check `directory`"));
                }
                let manifest = tree::survey(path, None, cx)?.contents();
                for entry in &manifest.entries {
                    if let Some(reason) = unfit(entry) {
                        return Err(ArchiveError::Refused {
                            archive: path.clone(),
                            entry: entry.path.as_path().display().to_string(),
                            reason: reason.to_owned(),
                        }
                        .into());
                    }
                }
                Ok(Verified { manifest, sha256: None, by: "copied from a directory" })
            }
        }
    }

    /// Lays the release down in an empty directory, exactly as it was verified.
    pub(super) fn lay_down(&self, into: &Path, verified: &Verified, cx: &Context) -> Result<(), StepError> {
        match self {
            Self::Archive { path, limits, strip, .. } => {
                let contents = unpack(path, &Rules::release(*limits, *strip), Some(into), cx)?;
                if Some(&contents.sha256) != verified.sha256.as_ref() {
                    return Err(changed(path));
                }
            }
            Self::Directory { path } => copy(path, into, &verified.manifest, cx)?,
        }
        fs::set_permissions(into, fs::Permissions::from_mode(0o755))
            .map_err(ArchiveError::io("give its mode to", into))?;
        Ok(())
    }
}

/// Reads what a configuration says of the source.
///
/// # Errors
/// It contradicts itself.
pub(super) fn source_of(config: &ReleaseConfig, cx: &BuildContext) -> Result<Source, BuildError> {
    let vouched = [config.sha256.is_some(), config.sha256_file.is_some(), config.signature.is_some()];
    let path = match (&config.archive, &config.directory) {
        (Some(path), None) => cx.path(path),
        (None, Some(_)) if vouched.contains(&true) || config.require_signature || config.strip_components > 0 => {
            return Err(BuildError::new("digest, signature and `strip_components` are for an archive").at("directory"));
        }
        (None, Some(path)) => return Ok(Source::Directory { path: cx.path(path) }),
        _ => return Err(BuildError::new("give either `archive` or `directory`").at("archive")),
    };
    let digest = match (&config.sha256, &config.sha256_file) {
        (Some(_), Some(_)) => return Err(BuildError::new("give either `sha256` or `sha256_file`").at("sha256_file")),
        (Some(digest), None) if !is_sha256(digest) => {
            return Err(BuildError::new("a SHA-256 digest has 64 hexadecimal digits").at("sha256"));
        }
        (Some(digest), None) => Some(Expected::Sha256(digest.clone())),
        (None, file) => file.as_ref().map(|file| Expected::File(cx.path(file))),
    };
    let signature = match (&config.signature, &config.public_key) {
        (Some(file), Some(key)) => {
            let unreadable = || {
                BuildError::new("this is not a minisign public key")
                    .at("public_key")
                    .with_hint("give the last line of minisign.pub: it starts with RW")
            };
            Some((cx.path(file), public_key(key).ok_or_else(unreadable)?))
        }
        (None, None) if config.require_signature => {
            return Err(BuildError::new("the release must be signed")
                .at("require_signature")
                .with_hint("give `signature` and `public_key`"));
        }
        (None, None) => None,
        _ => return Err(BuildError::new("`signature` and `public_key` belong together").at("signature")),
    };
    let limits = Limits { unpacked: config.max_unpacked.0, ..Limits::default() };
    Ok(Source::Archive { path, digest, signature, limits, strip: config.strip_components })
}

fn changed(path: &Path) -> StepError {
    StepError::permanent(format!("{} is not what was verified: it was changed meanwhile", path.display()))
        .with_hint("find out who changed it, put the verified file back and try again")
}

fn unfit(entry: &crate::archive::manifest::Entry) -> Option<&'static str> {
    let parts = match name::components(&entry.path.0, Names::Plain) {
        Ok(parts) => parts,
        Err(reason) => return Some(reason),
    };
    match (entry.kind, &entry.target) {
        (Kind::Special, _) => Some("it is a socket, a pipe or a device"),
        (Kind::Symlink, Some(target)) => name::link_leaves(&target.0, parts.len() - 1),
        _ => None,
    }
}

fn copy(from: &Path, into: &Path, manifest: &Manifest, cx: &Context) -> Result<(), StepError> {
    let (mut done, total) = (0, manifest.bytes());
    // In order of their paths a directory comes before what is in it.
    for entry in &manifest.entries {
        let to = into.join(entry.path.as_path());
        watch(cx, done, total, "copying")?;
        match entry.kind {
            Kind::Directory => {
                fs::DirBuilder::new().mode(0o700).create(&to).map_err(ArchiveError::io("make", &to))?;
            }
            Kind::Symlink => {
                let target = entry.target.as_ref().map(|target| target.to_path()).unwrap_or_default();
                std::os::unix::fs::symlink(target, &to).map_err(ArchiveError::io("make", &to))?;
            }
            Kind::File | Kind::Special => {
                let path = from.join(entry.path.as_path());
                let mut source = File::open(&path).map_err(ArchiveError::io("open", &path))?;
                let mut target = fs::OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(&to)
                    .map_err(ArchiveError::io("make", &to))?;
                let (mut hasher, mut buffer) = (Sha256::new(), vec![0; 128 << 10]);
                loop {
                    let read = source.read(&mut buffer).map_err(ArchiveError::io("read", &path))?;
                    if read == 0 {
                        break;
                    }
                    hasher.update(&buffer[..read]);
                    target.write_all(&buffer[..read]).map_err(ArchiveError::io("write", &to))?;
                    done += read as u64;
                    watch(cx, done, total, "copying")?;
                }
                if Some(hex(&hasher.finalize())) != entry.sha256 {
                    return Err(changed(&path));
                }
            }
        }
    }
    tree::dress(into, manifest)?;
    Ok(())
}

impl Expected {
    fn read(&self, archive: &Path) -> Result<String, StepError> {
        let path = match self {
            Self::Sha256(digest) => return Ok(digest.to_ascii_lowercase()),
            Self::File(path) => path,
        };
        let text = fs::read_to_string(path).map_err(ArchiveError::io("read", path))?;
        digest_of(&text, &archive.file_name().unwrap_or_default().to_string_lossy()).ok_or_else(|| {
            StepError::permanent(format!("{} holds no SHA-256 digest of {}", path.display(), archive.display()))
                .with_hint("it must have a line `DIGEST  NAME` as sha256sum writes it, or one digest alone")
        })
    }
}

/// Finds a file's digest in the output of `sha256sum`, or takes the one digest that stands alone.
fn digest_of(text: &str, name: &str) -> Option<String> {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let named = lines.clone().find_map(|line| {
        let (digest, path) = line.split_once(char::is_whitespace)?;
        let path = path.trim_start().trim_start_matches('*');
        (path.rsplit('/').next() == Some(name) && is_sha256(digest)).then(|| digest.to_ascii_lowercase())
    });
    let alone = lines.next().filter(|line| is_sha256(line) && lines.next().is_none());
    named.or_else(|| alone.map(str::to_ascii_lowercase))
}

/// Reads a public key: the key alone, or the text of a `.pub` file.
fn public_key(text: &str) -> Option<PublicKey> {
    if text.trim().contains('\n') { PublicKey::decode(text).ok() } else { PublicKey::from_base64(text.trim()).ok() }
}

/// Reads the archive once, holds it to digest and signature, and returns its SHA-256.
fn vouch(
    path: &Path,
    expected: Option<&str>,
    signature: Option<&(PathBuf, PublicKey)>,
    cx: &Context,
) -> Result<String, StepError> {
    let signature = match signature {
        Some((file, key)) => {
            let text = fs::read_to_string(file).map_err(ArchiveError::io("read", file))?;
            let unreadable = |error: minisign_verify::Error| bad_signature(path, file).with_cause(&error);
            Some((file, key, Signature::decode(&text).map_err(unreadable)?))
        }
        None => None,
    };
    let mut verifier = match &signature {
        Some((file, key, signature)) => {
            Some((file, key.verify_stream(signature).map_err(|error| bad_signature(path, file).with_cause(&error))?))
        }
        None => None,
    };
    let mut file = File::open(path).map_err(ArchiveError::io("open", path))?;
    let total = file.metadata().map_err(ArchiveError::io("read", path))?.len();
    let (mut hasher, mut buffer, mut done) = (Sha256::new(), vec![0; 256 << 10], 0);
    loop {
        let read = file.read(&mut buffer).map_err(ArchiveError::io("read", path))?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
        if let Some((_, verifier)) = &mut verifier {
            verifier.update(&buffer[..read]);
        }
        done += read as u64;
        watch(cx, done, total, "verifying")?;
    }
    let sha256 = hex(&hasher.finalize());
    if let Some(expected) = expected.filter(|expected| *expected != sha256) {
        return Err(StepError::permanent(format!(
            "{} has the SHA-256 digest {sha256}, not {expected}",
            path.display()
        ))
        .with_hint("fetch the archive again; if the digest still differs, do not use it and ask who published it"));
    }
    if let Some((file, verifier)) = &mut verifier {
        verifier.finalize().map_err(|error| bad_signature(path, file).with_cause(&error))?;
    }
    Ok(sha256)
}

fn bad_signature(archive: &Path, signature: &Path) -> StepError {
    StepError::permanent(format!("the signature {} does not vouch for {}", signature.display(), archive.display()))
        .with_hint(
            "check that signature, archive and `public_key` belong together (signed by minisign 0.10 or newer); \
             if they do, do not use the archive and ask who published it",
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_digest_of_the_archive() {
        let (a, b) = ("a".repeat(64), "B".repeat(64));
        let listing = format!("{a}  other.tar.gz\n{b} *dist/app.tar.gz\n");
        assert_eq!(digest_of(&listing, "app.tar.gz"), Some(b.to_ascii_lowercase()));
        assert_eq!(digest_of(&listing, "none.tar.gz"), None);
        assert_eq!(digest_of(&format!("{a}\n"), "app.tar.gz"), Some(a.clone()));
        assert_eq!(digest_of(&format!("{a}\n{a}\n"), "app.tar.gz"), None);
        assert_eq!(digest_of("", "app.tar.gz"), None);
    }
}
