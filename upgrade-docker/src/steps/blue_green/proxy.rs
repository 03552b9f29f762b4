//! A switch by a proxy: the file that says where the traffic goes is written, asked for, and read.

use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bollard::Docker;
use bollard::models::ContainerInspectResponse;
use serde::{Deserialize, Serialize};
use upgrade_core::context::{Context, OnConflict, blocking};
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::names::LockName;
use upgrade_core::registry::BuildContext;
use upgrade_core::sealed::{SealedRef, sha256_hex};
use upgrade_core::step::{Change, Effect};
use upgrade_core::target::{Target, this_machine};

use super::config::ProxySwitch;
use super::program;
use super::template::{Place, Template};
use crate::containers::{self, name_of};
use crate::error::{not_cancelled, unless_cancelled};
use crate::health::{address_of, run_inside};

/// Leads traffic by a file that a proxy reads.
#[derive(Debug, Clone)]
pub(super) struct Proxy {
    config: ProxySwitch,
    file: PathBuf,
    pub(super) template_file: Option<PathBuf>,
    directory: PathBuf,
}

/// Holds what undoing a switch by a proxy needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxyUndo {
    path: PathBuf,
    /// None if there was no file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    found: Option<FoundFile>,
    /// The template, with which the step knows again what it wrote.
    template: SealedRef,
}

/// Describes the file that was found; its contents may be secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FoundFile {
    contents: SealedRef,
    mode: u32,
    user: u32,
    group: u32,
}

/// Says that the file is being put back: from then on the proxy may have read the new one.
#[derive(Debug, Serialize, Deserialize)]
struct PuttingBack {
    putting_back: bool,
}

impl Proxy {
    pub(super) fn new(config: &ProxySwitch, cx: &BuildContext) -> Self {
        Self {
            file: cx.path(&config.file),
            template_file: config.template_file.as_ref().map(|path| cx.path(path)),
            directory: cx.base_dir().to_owned(),
            config: config.clone(),
        }
    }

    /// Names the file as what the step changes.
    pub(super) fn target(&self) -> Arc<dyn Target> {
        let lock = LockName::path(&self.file).unwrap_or_else(|_| {
            LockName::new("path-digest", &sha256_hex(self.file.to_string_lossy().as_bytes()))
                .expect("a digest is printable and not empty")
        });
        Arc::new(FileOfThisMachine { lock })
    }

    /// Reads the file that is there, and keeps it.
    pub(super) async fn record(&self, cx: &Context) -> Result<ProxyUndo, StepError> {
        let template = match &self.template_file {
            Some(file) => {
                let text = tokio::fs::read_to_string(file).await;
                text.map_err(|error| io_error(format!("the template {} cannot be read", file.display()), &error))?
            }
            None => self.config.template.clone().unwrap_or_default(),
        };
        let template = Template::new(template);
        template.validate().map_err(|why| {
            StepError::permanent(why).with_hint("correct the template: the names are `address`, `port` and `name`")
        })?;
        let keep = async |contents: &[u8]| {
            if cx.is_dry_run() { Ok(SealedRef::of(contents)) } else { cx.seal(contents).await }
        };
        let found = match read(&self.file).await? {
            Some(file) => Some(FoundFile {
                contents: keep(&file.contents).await?,
                mode: file.mode,
                user: file.user,
                group: file.group,
            }),
            None => None,
        };
        Ok(ProxyUndo { path: self.file.clone(), found, template: keep(template.text().as_bytes()).await? })
    }

    /// Describes the switch for the plan.
    pub(super) fn change(&self, new: &str) -> Change {
        let effect = if self.file.exists() { Effect::Modify } else { Effect::Create };
        let place = self.config.container.as_ref().map(|name| format!(" in container {name}")).unwrap_or_default();
        let reload = program::line(&self.config.reload);
        Change::new(effect, self.file.display().to_string())
            .with_summary(format!("leads to container {new}, port {}; then `{reload}`{place}", self.config.port))
    }

    /// Leads the traffic to the new container.
    pub(super) async fn switch(
        &self,
        client: &Docker,
        cx: &Context,
        undo: &ProxyUndo,
        new: &ContainerInspectResponse,
    ) -> Result<(), StepError> {
        let template = self.template(cx, undo).await?;
        let address = self.address(new)?;
        let place = Place { address: &address, port: self.config.port, name: name_of(new) };
        let intended = template.render(place).map_err(StepError::permanent)?;
        let present = read(&undo.path).await?;
        if !self.may_change(&template, undo, present.as_ref(), name_of(new)) && cx.on_conflict() == OnConflict::Stop {
            return Err(conflict(undo, &intended, present.as_ref()));
        }
        write(undo, intended.into_bytes(), cx).await?;
        if !self.config.check.is_empty()
            && let Err(error) = self.run(client, cx, &self.config.check).await
        {
            // Nobody has read it yet, and whoever starts the proxy now must not find it broken.
            put_back(undo, cx).await?;
            let hint = "correct the template, or what else the program complains of; the proxy goes on as before";
            return Err(error.with_hint(hint));
        }
        not_cancelled(cx)?;
        self.run(client, cx, &self.config.reload).await
    }

    /// Leads the traffic to the old container again; tells whether the new one had it.
    pub(super) async fn switch_back(
        &self,
        client: &Docker,
        cx: &Context,
        undo: &ProxyUndo,
        new: &str,
    ) -> Result<bool, StepError> {
        let present = read(&undo.path).await?;
        let resumed = cx.last_checkpoint::<PuttingBack>()?.is_some();
        if is_found(undo, present.as_ref()) {
            if resumed {
                self.run(client, cx, &self.config.reload).await?;
            }
            return Ok(resumed);
        }
        let template = self.template(cx, undo).await?;
        if !self.may_change(&template, undo, present.as_ref(), new) && cx.on_conflict() == OnConflict::Stop {
            return Err(conflict(undo, &format!("what leads to container {new}"), present.as_ref()));
        }
        cx.checkpoint(&PuttingBack { putting_back: true }).await?;
        put_back(undo, cx).await?;
        self.run(client, cx, &self.config.reload).await?;
        Ok(true)
    }

    async fn template(&self, cx: &Context, undo: &ProxyUndo) -> Result<Template, StepError> {
        let text = cx.unseal(&undo.template).await?;
        Ok(Template::new(String::from_utf8_lossy(&text).into_owned()))
    }

    /// Tells whether the file is as found, or as this step writes it.
    fn may_change(&self, template: &Template, undo: &ProxyUndo, present: Option<&Present>, new: &str) -> bool {
        let ours = present.and_then(|file| std::str::from_utf8(&file.contents).ok());
        is_found(undo, present) || ours.is_some_and(|text| template.wrote(text, self.config.port, new))
    }

    /// Returns the address at which the proxy reaches a container.
    fn address(&self, new: &ContainerInspectResponse) -> Result<String, StepError> {
        let address = match &self.config.network {
            Some(network) => {
                let networks = new.network_settings.as_ref().and_then(|settings| settings.networks.as_ref());
                let endpoint = networks.and_then(|networks| networks.get(network));
                endpoint.and_then(|endpoint| endpoint.ip_address.clone()).filter(|address| !address.is_empty())
            }
            None => address_of(new),
        };
        address.ok_or_else(|| {
            StepError::permanent(format!("container {} has no address that a proxy could reach", name_of(new)))
                .with_hint("name one of its networks in `switch.proxy.network` (`docker inspect` lists them)")
        })
    }

    /// Runs the check or the reload where the proxy is.
    async fn run(&self, client: &Docker, cx: &Context, argv: &[String]) -> Result<(), StepError> {
        let (code, said) = match &self.config.container {
            None => program::run(cx, argv, &self.directory).await?,
            Some(name) => {
                let proxy = containers::inspect(client, name).await?;
                let proxy = proxy.filter(containers::is_running).ok_or_else(|| {
                    StepError::permanent(format!("container {name}, the proxy, does not run"))
                        .with_hint("start it, or correct `switch.proxy.container`")
                })?;
                // Given up, it goes on there; whatever reads the file later reads what is there then.
                unless_cancelled(cx, run_inside(client, containers::id_of(&proxy), argv)).await?
            }
        };
        if code == 0 {
            return Ok(());
        }
        Err(StepError::permanent(format!("`{}` exits with {code}", program::line(argv)))
            .with_detail(cx.mask(said.trim()))
            .with_hint("read what it said in the report, mend the proxy, and try again"))
    }
}

/// Holds a file as it is.
struct Present {
    contents: Vec<u8>,
    mode: u32,
    user: u32,
    group: u32,
}

async fn read(path: &Path) -> Result<Option<Present>, StepError> {
    let path = path.to_owned();
    blocking(move || {
        let failed = |error: &io::Error| io_error(format!("{} cannot be read", path.display()), error);
        let metadata = match std::fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|error| failed(&error))?,
        };
        let contents = std::fs::read(&path).map_err(|error| failed(&error))?;
        let mode = metadata.mode() & 0o7777;
        Ok(Some(Present { contents, mode, user: metadata.uid(), group: metadata.gid() }))
    })
    .await
}

fn is_found(undo: &ProxyUndo, present: Option<&Present>) -> bool {
    match (&undo.found, present) {
        (None, None) => true,
        (Some(found), Some(present)) => SealedRef::of(&present.contents) == found.contents,
        _ => false,
    }
}

fn conflict(undo: &ProxyUndo, intended: &str, present: Option<&Present>) -> StepError {
    let token = |digest: &str| format!("sha256:{}", &digest[..12]);
    StepError::conflict(Conflict {
        subject: undo.path.display().to_string(),
        found: undo.found.as_ref().map_or_else(|| "absent".into(), |found| token(&found.contents.sha256)),
        intended: token(&sha256_hex(intended.as_bytes())),
        present: present.map_or_else(|| "absent".into(), |file| token(&sha256_hex(&file.contents))),
    })
}

async fn put_back(undo: &ProxyUndo, cx: &Context) -> Result<(), StepError> {
    match &undo.found {
        Some(found) => {
            let contents = cx.unseal(&found.contents).await?;
            write(undo, contents, cx).await
        }
        None => {
            let path = undo.path.clone();
            blocking(move || {
                let removed = std::fs::remove_file(&path).and_then(|()| sync_directory(&path));
                match removed {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                    other => other.map_err(|error| io_error(format!("{} cannot be removed", path.display()), &error)),
                }
            })
            .await
        }
    }
}

/// Writes the file at once and durably, with the owner and the mode that were found.
async fn write(undo: &ProxyUndo, contents: Vec<u8>, cx: &Context) -> Result<(), StepError> {
    // A link is followed: distributions keep such files elsewhere and link them.
    let path = std::fs::canonicalize(&undo.path).unwrap_or_else(|_| undo.path.clone());
    let (mode, owner) = match &undo.found {
        Some(found) => (found.mode, Some((found.user, found.group))),
        None => (0o644, None),
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // A leading dot: what includes `*` does not include this.
    let temporary = path.with_file_name(format!(".{name}.upgrade-{}", crate::naming::mark(cx)));
    blocking(move || {
        let written = (|| {
            match std::fs::remove_file(&temporary) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
            file.write_all(&contents)?;
            if let Some((user, group)) = owner {
                std::os::unix::fs::fchown(&file, Some(user), Some(group))?;
            }
            file.set_permissions(std::fs::Permissions::from_mode(mode))?;
            file.sync_all()?;
            std::fs::rename(&temporary, &path)?;
            sync_directory(&path)
        })();
        written.map_err(|error| {
            let _ = std::fs::remove_file(&temporary);
            io_error(format!("{} cannot be written", path.display()), &error)
        })
    })
    .await
}

fn sync_directory(path: &Path) -> io::Result<()> {
    std::fs::File::open(path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")))?
        .sync_all()
}

fn io_error(what: String, error: &io::Error) -> StepError {
    use io::ErrorKind as Kind;
    let (permanent, hint) = match error.kind() {
        Kind::PermissionDenied => (true, "run as a user who may change this file and its directory"),
        Kind::NotFound => (true, "check that the directory exists"),
        Kind::StorageFull | Kind::QuotaExceeded => (true, "free some space on that file system, then try again"),
        Kind::ReadOnlyFilesystem => (true, "mount the file system writable, then try again"),
        Kind::NotADirectory | Kind::IsADirectory => (true, "name a file"),
        _ => (false, "try again; if it persists, look at the file system and the kernel's log (`dmesg`)"),
    };
    let class = if permanent { StepError::permanent } else { StepError::transient };
    class(what).with_cause(error).with_hint(hint)
}

/// A file of this machine as what a step changes.
struct FileOfThisMachine {
    lock: LockName,
}

#[async_trait]
impl Target for FileOfThisMachine {
    fn lock(&self) -> LockName {
        self.lock.clone()
    }

    async fn identity(&self, _cx: &Context) -> Result<String, StepError> {
        Ok(this_machine())
    }
}
