//! Reads a backup back: whole, to prove it, or only its beginning.

use std::path::{Path, PathBuf};

use upgrade_core::context::Context;

use super::manifest::{Entry, Kind, Manifest, RawPath};
use super::name::Names;
use super::pack::{BackupManifest, FILES, MANIFEST, ROOTS};
use super::reader::Reader;
use super::unpack::{Contents, Rules, unpack};
use super::{ArchiveError, Limits};

/// Holds a backup that was read to its last byte and is what its manifest says.
#[derive(Debug)]
pub(crate) struct Proven {
    pub(crate) manifest: BackupManifest,
    /// SHA-256 of the packed file.
    pub(crate) sha256: String,
}

/// Accepts what a backup may hold; its size is what was there, so only the entries are bounded.
pub(crate) fn rules() -> Rules {
    Rules {
        limits: Limits { unpacked: u64::MAX, entries: 50_000_000, ratio: u64::MAX },
        names: Names::Any,
        faithful: true,
        strip: 1,
        only: vec![FILES.as_bytes().to_vec()],
        aside: Some(MANIFEST),
    }
}

/// Reads a backup back and compares every entry with its manifest.
///
/// # Errors
/// It is damaged, or an entry is not what the manifest says.
pub(crate) fn prove(archive: &Path, cx: &Context) -> Result<Proven, ArchiveError> {
    let contents = unpack(archive, &rules(), None, cx)?;
    let manifest = manifest_of(archive, &contents)?;
    let wrong = |reason: String| ArchiveError::Unfit { archive: archive.into(), reason };
    // Implied directories are the ones above a root: they are not part of the backup.
    let comparison = essence(&manifest.tree, &manifest.roots).compare(&essence(&contents.manifest, &manifest.roots));
    match comparison.altered {
        Some(path) => Err(wrong(format!("`{}` is not what its manifest says", path.display()))),
        None if comparison.added > 0 => {
            Err(wrong(format!("it holds {} entries that its manifest does not name", comparison.added)))
        }
        None => Ok(Proven { manifest, sha256: contents.sha256 }),
    }
}

/// Reads which paths a backup holds, from its beginning alone: nothing of it is proven.
pub(crate) fn roots(archive: &Path) -> Option<Vec<PathBuf>> {
    let mut reader = Reader::open(archive, rules().limits).ok()?;
    let first = reader.next().ok()??;
    let text = (first.name == ROOTS.as_bytes()).then(|| reader.read_all(1 << 20).ok())??;
    let roots: Vec<RawPath> = serde_json::from_slice(&text).ok()?;
    Some(roots.iter().map(RawPath::to_path).collect())
}

fn manifest_of(archive: &Path, contents: &Contents) -> Result<BackupManifest, ArchiveError> {
    let wrong = |reason: &str| ArchiveError::Unfit { archive: archive.into(), reason: reason.to_owned() };
    let text =
        contents.aside.as_ref().ok_or_else(|| wrong("it has no manifest.json: `host.backup` did not make it"))?;
    let manifest: BackupManifest = serde_json::from_slice(text).map_err(|_| wrong("its manifest cannot be read"))?;
    if manifest.format != 1 {
        return Err(wrong("its manifest is of a format that this program does not know"));
    }
    Ok(manifest)
}

/// Reduces a tree to what a tar header can say, so that members and manifest can be compared.
fn essence(tree: &Manifest, roots: &[RawPath]) -> Manifest {
    let below =
        |entry: &&Entry| roots.iter().any(|root| Path::new("/").join(entry.path.as_path()).starts_with(root.as_path()));
    let entries = tree.entries.iter().filter(below).cloned().map(|entry| Entry {
        mtime: entry.mtime.map(|(seconds, _)| (seconds.max(0), 0)),
        mode: if entry.kind == Kind::Symlink { 0o777 } else { entry.mode },
        // The tar writer spells `a//b` as `a/b`; the manifest keeps the link's own text.
        target: entry.target.map(|target| RawPath::of(&target.as_path().components().collect::<PathBuf>())),
        ..entry
    });
    Manifest::new(entries.collect())
}
