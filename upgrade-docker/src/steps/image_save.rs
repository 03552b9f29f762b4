//! `docker.image_save`: an image in a file, for machines that no registry reaches.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use async_trait::async_trait;
use bollard::Docker;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use upgrade_core::context::{Context, OnConflict, blocking};
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::sealed::hex;
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;

use crate::error::cancelled;
use crate::image_archive::{self, Archive};
use crate::images::{self, id_of};
use crate::naming::mark;
use crate::reference::ImageReference;
use crate::streams;
use crate::target::Engine;
use crate::volumes::contents::watch;
use crate::volumes::storage;

/// What the names of archives end with.
const SUFFIXES: [&str; 3] = [".tar", ".tar.gz", ".tar.zst"];

/// Configures `docker.image_save`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageSaveConfig {
    /// The engine that has the image. Default: the one that the `docker` command would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The image, by the name that it also has in the archive.
    pub image: ImageReference,
    /// The file: its name ends in `.tar`, `.tar.gz` or `.tar.zst`, and says how it is packed.
    pub to: PathBuf,
}

/// Writes an image to a file that `docker load` and `docker.image` read.
///
/// # Guarantees
/// The file appears under its name only when it is durable and was read back: it holds that image.
/// A file that was there before is kept beside it until commit. It is readable by its owner alone.
#[derive(Debug, Clone)]
pub struct ImageSave {
    config: ImageSaveConfig,
    engine: Arc<Engine>,
    to: PathBuf,
}

/// Holds what putting a file back needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSaveUndo {
    /// The file.
    pub path: PathBuf,
    /// The id of the image.
    pub image_id: String,
    /// The SHA-256 of the file that was there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found: Option<String>,
    /// The topmost directory that was not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made: Option<PathBuf>,
}

/// Tells later steps where the image is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSaveOutput {
    /// The file.
    pub path: PathBuf,
    /// Its SHA-256.
    pub sha256: String,
    /// How long it is.
    pub bytes: u64,
    /// The id of the image.
    pub image_id: String,
}

impl ImageSave {
    /// Makes the step from its configuration; a relative path starts from the context's directory.
    ///
    /// # Errors
    /// There is no such target, or the file's name does not say how it is packed.
    pub fn from_config(config: ImageSaveConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let to = cx.path(&config.to);
        let to = std::path::absolute(&to).unwrap_or(to);
        if !SUFFIXES.iter().any(|suffix| to.to_string_lossy().ends_with(suffix)) {
            return Err(BuildError::new("the name of the file does not say how it is packed")
                .at("to")
                .with_hint("let it end in `.tar`, `.tar.gz` or `.tar.zst`"));
        }
        let engine = Engine::named(config.target.as_deref(), cx)?;
        Ok(Self { config, engine, to })
    }

    async fn image(&self, client: &Docker) -> Result<(String, bool), StepError> {
        let name = &self.config.image;
        let image = images::local(client, &name.to_string()).await?.ok_or_else(|| {
            StepError::permanent(format!("image {name} is not on the engine"))
                .with_hint("bring it there under this name first: a step `docker.image`")
        })?;
        // An engine that leaves its images to containerd knows them by another digest than archives do.
        Ok((id_of(&image)?, image.descriptor.is_some()))
    }

    fn output(&self, undo: &ImageSaveUndo, sha256: String) -> Result<ImageSaveOutput, StepError> {
        let bytes = fs::metadata(&undo.path).map_err(|error| cannot("read", &undo.path, &error))?.len();
        Ok(ImageSaveOutput { path: undo.path.clone(), sha256, bytes, image_id: undo.image_id.clone() })
    }

    /// Puts the file that was written in place of the one that was found.
    fn place(&self, cx: &Context, undo: &ImageSaveUndo, written: &Archive) -> Result<ImageSaveOutput, StepError> {
        let files = Files::of(cx, &undo.path);
        let present = digest(cx, &undo.path)?;
        if present != undo.found && present.as_ref() != Some(&written.sha256) && cx.on_conflict() == OnConflict::Stop {
            return Err(conflict(undo, Some(&written.sha256), present.as_ref()));
        }
        // The first: by it, undo knows the file as the step's own.
        write_private(&files.ours, written.sha256.as_bytes()).map_err(|error| cannot("write", &files.ours, &error))?;
        if present.is_some() && present == undo.found && files.kept.symlink_metadata().is_err() {
            // Beside its name, so that it is never away from it; where there are no links, for an instant.
            fs::hard_link(&undo.path, &files.kept)
                .or_else(|_| fs::rename(&undo.path, &files.kept))
                .and_then(|()| storage::sync_directory(&storage::parent(&undo.path)))
                .map_err(|error| cannot("keep", &undo.path, &error))?;
        }
        fs::rename(&files.incoming, &undo.path)
            .and_then(|()| storage::sync_directory(&storage::parent(&undo.path)))
            .map_err(|error| cannot("write", &undo.path, &error))?;
        self.output(undo, written.sha256.clone())
    }

    fn put_back(&self, cx: &Context, undo: &ImageSaveUndo) -> Result<(), StepError> {
        let files = Files::of(cx, &undo.path);
        storage::remove(&files.incoming).map_err(|error| cannot("remove", &files.incoming, &error))?;
        let present = digest(cx, &undo.path)?;
        if present != undo.found {
            let ours = files.written()?;
            // Away for an instant, or ours.
            let known = present.is_none() && ours.is_some() || present.is_some() && present == ours;
            if !known && cx.on_conflict() == OnConflict::Stop {
                return Err(conflict(undo, ours.as_ref(), present.as_ref()));
            }
            let put = match &undo.found {
                Some(_) => fs::rename(&files.kept, &undo.path)
                    .and_then(|()| storage::sync_directory(&storage::parent(&undo.path))),
                None => storage::remove(&undo.path),
            };
            put.map_err(|error| cannot("put back", &undo.path, &error))?;
        }
        for left in [&files.kept, &files.ours] {
            storage::remove(left).map_err(|error| cannot("remove", left, &error))?;
        }
        storage::remove_made(&storage::parent(&undo.path), undo.made.as_deref())
            .map_err(|error| cannot("remove", &storage::parent(&undo.path), &error))
    }
}

/// What stands beside the file until commit.
struct Files {
    /// What is written and has not its name yet.
    incoming: PathBuf,
    /// What was found.
    kept: PathBuf,
    /// The digest of what was written.
    ours: PathBuf,
}

impl Files {
    fn of(cx: &Context, path: &Path) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let beside = |what: &str| path.with_file_name(format!(".{name}.{what}-{}", mark(cx)));
        Self { incoming: storage::temporary(path, &cx.marker()), kept: beside("kept"), ours: beside("sha256") }
    }

    /// The digest of the file that the step wrote, if it came to that.
    fn written(&self) -> Result<Option<String>, StepError> {
        match fs::read_to_string(&self.ours) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(cannot("read", &self.ours, &error)),
        }
    }
}

fn cannot(doing: &str, path: &Path, error: &io::Error) -> StepError {
    storage::failed(format!("cannot {doing} {}", path.display()), error)
}

fn conflict(undo: &ImageSaveUndo, intended: Option<&String>, present: Option<&String>) -> StepError {
    let named =
        |digest: Option<&String>| digest.map_or_else(|| "nothing".to_owned(), |digest| format!("sha256:{digest}"));
    StepError::conflict(Conflict {
        subject: undo.path.display().to_string(),
        found: named(undo.found.as_ref()),
        intended: intended.map_or_else(|| format!("image {}", undo.image_id), |_| named(intended)),
        present: named(present),
    })
}

/// Writes a small file whole, or not at all.
fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = storage::temporary(path, "whole");
    storage::remove(&temporary)?;
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    storage::sync_directory(&storage::parent(path))
}

/// Returns the SHA-256 of a file, if it is there.
fn digest(cx: &Context, path: &Path) -> Result<Option<String>, StepError> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(|error| cannot("read", path, &error))?,
    };
    let (mut hasher, mut buffer, mut done) = (Sha256::new(), vec![0; 256 << 10], 0);
    loop {
        let read = file.read(&mut buffer).map_err(|error| cannot("read", path, &error))?;
        if read == 0 {
            return Ok(Some(hex(&hasher.finalize())));
        }
        hasher.update(&buffer[..read]);
        done += read as u64;
        watch(cx, done, None, "reading the file that is there").map_err(|_| cancelled())?;
    }
}

/// Writes what the engine sends, packed as the name says, private and durable.
fn write(from: &mut dyn Read, to: &Path, name: &Path, cx: &Context) -> Result<(), StepError> {
    // Which side an error came from decides what is to be done about it.
    let failed = Rc::new(RefCell::new(None));
    let mut writing = || -> io::Result<()> {
        storage::remove(to)?;
        let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
        let tracked = Tracked { file, failed: failed.clone() };
        let mut buffered = BufWriter::with_capacity(256 << 10, tracked);
        let name = name.to_string_lossy();
        let mut counted = Counted { from, done: 0, cx };
        if name.ends_with(".zst") {
            let mut packed = zstd::Encoder::new(buffered, 3)?;
            packed.include_checksum(true)?;
            io::copy(&mut counted, &mut packed)?;
            buffered = packed.finish()?;
        } else if name.ends_with(".gz") {
            let mut packed = flate2::write::GzEncoder::new(buffered, flate2::Compression::default());
            io::copy(&mut counted, &mut packed)?;
            buffered = packed.finish()?;
        } else {
            io::copy(&mut counted, &mut buffered)?;
        }
        buffered.into_inner().map_err(io::IntoInnerError::into_error)?.file.sync_all()
    };
    writing().map_err(|error| match failed.borrow_mut().take() {
        _ if cx.cancelled().is_cancelled() => cancelled(),
        Some(failed) => cannot("write", to, &failed),
        None => cannot("write", to, &error),
    })
}

struct Tracked {
    file: File,
    failed: Rc<RefCell<Option<io::Error>>>,
}

impl Write for Tracked {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes).inspect_err(|error| {
            if error.kind() != io::ErrorKind::Interrupted {
                *self.failed.borrow_mut() = Some(io::Error::new(error.kind(), error.to_string()));
            }
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

struct Counted<'a> {
    from: &'a mut dyn Read,
    done: u64,
    cx: &'a Context,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.from.read(buffer)?;
        self.done += read as u64;
        watch(self.cx, self.done, None, "saving the image")?;
        Ok(read)
    }
}

#[async_trait]
impl Step for ImageSave {
    const KIND: &'static str = "docker.image_save";
    type Undo = ImageSaveUndo;
    type Output = ImageSaveOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<ImageSaveUndo, ImageSaveOutput>, StepError> {
        let client = self.engine.connect(cx).await?;
        let image_id = match self.image(&client).await {
            Ok((id, _)) => id,
            // An earlier step may bring it.
            Err(_) if cx.is_dry_run() => String::new(),
            Err(error) => return Err(error),
        };
        let (path, context) = (self.to.clone(), cx.clone());
        let (found, held) = blocking(move || {
            let found = digest(&context, &path)?;
            let held = found.as_ref().and_then(|_| image_archive::inspect(&path, &context).ok());
            Ok((found, held))
        })
        .await?;
        let made = storage::topmost_missing(&storage::parent(&self.to));
        let undo = ImageSaveUndo { path: self.to.clone(), image_id, found, made };
        let is_it = |archive: &Archive| matches!(&archive.images[..], [only] if only.id == undo.image_id && only.names == [self.config.image.to_string()]);
        if let Some(held) = held.filter(is_it) {
            let reason = format!("{} holds that image already", self.to.display());
            return Ok(Prepared::unchanged(self.output(&undo, held.sha256)?, reason));
        }
        let effect = if undo.found.is_some() { Effect::Modify } else { Effect::Create };
        let change = Change::new(effect, self.to.display().to_string())
            .with_summary(format!("image {} is written there", self.config.image));
        Ok(Prepared::change(undo, [change]))
    }

    async fn apply(&self, cx: &Context, undo: &ImageSaveUndo) -> Result<ImageSaveOutput, StepError> {
        let (known, context) = (undo.clone(), cx.clone());
        // What an earlier call finished.
        let done = blocking(move || {
            let ours = Files::of(&context, &known.path).written()?;
            Ok(ours
                .filter(|_| known.path.exists())
                .filter(|ours| digest(&context, &known.path).is_ok_and(|present| present.as_ref() == Some(ours))))
        })
        .await?;
        if let Some(sha256) = done {
            return self.output(undo, sha256);
        }
        let client = self.engine.connect(cx).await?;
        let (id, of_containerd) = self.image(&client).await?;
        if id != undo.image_id {
            return Err(StepError::conflict(Conflict {
                subject: format!("image {}", self.config.image),
                found: undo.image_id.clone(),
                intended: undo.image_id.clone(),
                present: id,
            }));
        }
        let (step, known, context) = (self.clone(), undo.clone(), cx.clone());
        let name = self.config.image.to_string();
        let stream = client.export_image(&name);
        let incoming = Files::of(cx, &undo.path).incoming;
        let to = incoming.clone();
        let work = move |from: &mut dyn Read| {
            let parent = storage::parent(&known.path);
            storage::create_directories(&parent).map_err(|error| cannot("make", &parent, &error))?;
            write(from, &to, &known.path, &context)
        };
        let written = streams::consume(stream, cx, &format!("saving image {name}"), work).await;
        let (known, context) = (undo.clone(), cx.clone());
        let placed = match written {
            Ok(()) => {
                blocking(move || {
                    let archive = image_archive::inspect(&incoming, &context)?;
                    if !of_containerd && archive.images.iter().all(|image| image.id != known.image_id) {
                        return Err(StepError::transient(format!("image {name} was moved while it was saved"))
                            .with_hint("find out who moves it, then try again"));
                    }
                    step.place(&context, &known, &archive)
                })
                .await
            }
            Err(error) => Err(error),
        };
        if placed.is_err() {
            // What counts is why it failed; what stays is removed by undo.
            let _ = storage::remove(&Files::of(cx, &undo.path).incoming);
        }
        placed
    }

    async fn commit(&self, cx: &Context, undo: &ImageSaveUndo) -> Result<(), StepError> {
        let files = Files::of(cx, &undo.path);
        for left in [&files.kept, &files.ours, &files.incoming] {
            storage::remove(left).map_err(|error| cannot("remove", left, &error))?;
        }
        Ok(())
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![self.engine.resource("file", &self.to.to_string_lossy())]
    }
}

#[async_trait]
impl Rollback for ImageSave {
    async fn rollback(&self, cx: &Context, undo: &ImageSaveUndo, _: Option<&ImageSaveOutput>) -> Result<(), StepError> {
        let (step, context, undo) = (self.clone(), cx.clone(), undo.clone());
        blocking(move || step.put_back(&context, &undo)).await
    }
}
