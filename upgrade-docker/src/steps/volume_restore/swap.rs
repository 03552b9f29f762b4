//! What stands at the engine while a volume is replaced. Volumes cannot be renamed, so that what one
//! holds is copied; and what stands there tells after a crash how far it was:
//!
//! ```text
//! volume V.kept, no container V.kept     a copy of what V held, begun
//! container V.kept                       the copy is whole; its label says what it holds
//! container V.replacing                  V holds half of something, and it is ours
//! container V.restored                   V held what the backup has, and may be written to since
//! ```
//!
//! The containers also keep the volumes from being pruned. Only `V.replacing` ever runs: to remove
//! what V holds, which no archive can.

use std::path::Path;
use std::time::Duration;

use bollard::Docker;
use bollard::models::{MountVolumeOptions, MountVolumeOptionsDriverConfig, VolumeCreateRequest};
use tokio::time::sleep;
use upgrade_core::context::{Context, blocking};
use upgrade_core::error::StepError;

use crate::containers;
use crate::error::{Doing, cancelled, not_cancelled};
use crate::naming::{MARKER, labels};
use crate::volumes::archive::{self, Description};
use crate::volumes::contents::Contents;
use crate::volumes::helper::{self, Helper};
use crate::volumes::{self, beside};

/// The label that says which content a kept copy has.
const CONTENT: &str = "io.github.upgrade-rs.content";
const POLL: Duration = Duration::from_millis(20);

pub(super) struct Swap<'a> {
    pub(super) client: &'a Docker,
    pub(super) cx: &'a Context,
    pub(super) volume: &'a str,
    pub(super) image: &'a str,
}

impl Swap<'_> {
    fn name(&self, what: &str) -> String {
        beside(self.volume, what, self.cx)
    }

    async fn stands(&self, what: &str) -> Result<Option<String>, StepError> {
        helper::own(self.client, self.cx, &self.name(what)).await
    }

    async fn remove(&self, what: &str) -> Result<(), StepError> {
        helper::remove(self.client, self.cx, &self.name(what)).await
    }

    /// Tells whether the volume holds half of something that is ours.
    pub(super) async fn is_replacing(&self) -> Result<bool, StepError> {
        // Both stand there for an instant when it is whole again.
        Ok(self.stands("replacing").await?.is_some() && !self.is_restored().await?)
    }

    /// Tells whether the restore was done, whatever the volume holds since.
    pub(super) async fn is_restored(&self) -> Result<bool, StepError> {
        Ok(self.stands("restored").await?.is_some())
    }

    /// Reads what the volume holds before anything is changed, and makes sure that it can be removed.
    pub(super) async fn look(&self) -> Result<Option<Contents>, StepError> {
        if !self.cx.is_dry_run() {
            // Left by a run that died while it looked, before it could be resumed or undone.
            helper::clear(self.client, self.volume, ".look-").await?;
        }
        self.read(true).await
    }

    /// Reads what the volume holds; none if it is not there.
    pub(super) async fn contents(&self) -> Result<Option<Contents>, StepError> {
        self.read(false).await
    }

    async fn read(&self, with_program: bool) -> Result<Option<Contents>, StepError> {
        if volumes::inspect(self.client, self.volume).await?.is_none() {
            return Ok(None);
        }
        let name = self.name("look");
        let id = Helper::new(&name, self.image, self.volume).create(self.client, self.cx).await?;
        let read = async {
            if with_program {
                self.expect_program(&id).await?;
            }
            helper::contents(self.client, self.cx, &id).await
        };
        let read = read.await;
        let removed = helper::remove(self.client, self.cx, &name).await;
        let read = read?;
        removed?;
        Ok(Some(read))
    }

    async fn expect_program(&self, id: &str) -> Result<(), StepError> {
        for place in ["/bin/rm", "/usr/bin/rm"] {
            if helper::has(self.client, id, place).await? {
                return Ok(());
            }
        }
        Err(StepError::permanent(format!("the image {} has no program `rm`, which empties the volume", self.image))
            .with_hint("name as `image` one on the engine that has it: busybox, alpine, debian"))
    }

    /// Copies what the volume holds into another one, whole, before anything is removed.
    pub(super) async fn keep(&self, present: &Contents) -> Result<(), StepError> {
        let (kept, copying, token) = (self.name("kept"), self.name("copy"), present.token());
        if self.kept().await?.as_ref() == Some(&token) {
            return Ok(());
        }
        self.remove("kept").await?;
        self.remove("copy").await?;
        volumes::remove_own(self.client, self.cx, &kept).await?;
        not_cancelled(self.cx)?;
        let request = VolumeCreateRequest {
            name: Some(kept.clone()),
            labels: Some(labels(self.cx)),
            ..VolumeCreateRequest::default()
        };
        self.client.create_volume(request).await.doing(|| format!("making volume {kept}"))?;
        let look = self.name("look");
        let from = Helper::new(&look, self.image, self.volume).create(self.client, self.cx).await?;
        let to = Helper::new(&copying, self.image, &kept).create(self.client, self.cx).await?;
        helper::copy(self.client, self.cx, &from, &to).await?;
        let copied = helper::contents(self.client, self.cx, &to).await?;
        if let Some(path) = present.difference(&copied) {
            return Err(StepError::permanent(format!(
                "the engine does not copy volume {} exactly: {path} differs; nothing was changed",
                self.volume
            ))
            .with_hint("if it changed meanwhile, let who writes wait (`consumers`); else mend or move that entry"));
        }
        self.sync(&kept).await?;
        let mut holder = Helper::new(&kept, self.image, &kept);
        holder.labels.push((CONTENT, &token));
        holder.create(self.client, self.cx).await?;
        self.remove("copy").await?;
        self.remove("look").await
    }

    /// Returns what the kept copy holds, if there is a whole one.
    async fn kept(&self) -> Result<Option<String>, StepError> {
        helper::own_label(self.client, self.cx, &self.name("kept"), CONTENT).await
    }

    /// Says for whoever comes after a crash that the volume holds half of something from now on;
    /// makes the volume if it is `missing`.
    pub(super) async fn replacing(&self, missing: Option<&Description>) -> Result<String, StepError> {
        not_cancelled(self.cx)?;
        let name = self.name("replacing");
        let mut replacing = Helper::new(&name, self.image, self.volume);
        replacing.missing = missing.map(|description| MountVolumeOptions {
            labels: Some(description.labels.iter().filter(|(key, _)| *key != MARKER).map(owned).collect()),
            driver_config: Some(MountVolumeOptionsDriverConfig {
                name: Some(description.driver.clone()).filter(|driver| !driver.is_empty()),
                options: Some(description.options.iter().map(owned).collect()),
            }),
            ..MountVolumeOptions::default()
        });
        replacing.create(self.client, self.cx).await
    }

    /// Removes all that the volume holds.
    pub(super) async fn empty(&self) -> Result<(), StepError> {
        let name = self.name("replacing");
        let id = self.replacing(None).await?;
        containers::start(self.client, &id, &name).await?;
        while containers::inspect(self.client, &id).await?.is_some_and(|there| containers::is_running(&there)) {
            if self.cx.cancelled().is_cancelled() {
                containers::stop(self.client, &id, &name, Duration::ZERO).await?;
                return Err(cancelled());
            }
            sleep(POLL).await;
        }
        // The program always fails at the directory itself, so what is left tells.
        if helper::contents(self.client, self.cx, &id).await?.is_empty() {
            return Ok(());
        }
        let said = containers::last_lines(self.client, self.cx, &id, 20).await;
        Err(StepError::permanent(format!("volume {} cannot be emptied", self.volume))
            .with_detail(said.join("\n"))
            .with_hint("an entry may be immutable (`lsattr`), or somebody writes there"))
    }

    /// Puts what a backup holds into the empty volume; returns what the volume then holds.
    pub(super) async fn fill(&self, backup: &Path) -> Result<Contents, StepError> {
        let id = self.replacing(None).await?;
        let (backup, context) = (backup.to_owned(), self.cx.clone());
        let sending = move |to: &mut dyn std::io::Write| archive::replay(&backup, to, &context).map(drop);
        helper::upload(self.client, self.cx, &id, sending).await?;
        let held = helper::contents(self.client, self.cx, &id).await?;
        self.sync(self.volume).await?;
        Ok(held)
    }

    /// Notes that the volume holds what the backup has.
    pub(super) async fn restored(&self) -> Result<(), StepError> {
        let name = self.name("restored");
        Helper::new(&name, self.image, self.volume).create(self.client, self.cx).await?;
        self.remove("replacing").await
    }

    /// Puts back what the volume held.
    pub(super) async fn put_kept_back(&self) -> Result<(), StepError> {
        let kept = self.name("kept");
        let (Some(token), Some(from)) = (self.kept().await?, self.stands("kept").await?) else {
            return Err(StepError::permanent(format!(
                "what volume {} held was kept in volume {kept}, and is gone",
                self.volume
            ))
            .with_hint("put it back from a backup, then `upgrade resolve RUN STEP --skip --reason …`"));
        };
        self.remove("restored").await?;
        self.empty().await?;
        let to = self.replacing(None).await?;
        helper::copy(self.client, self.cx, &from, &to).await?;
        let held = helper::contents(self.client, self.cx, &to).await?.token();
        if held != token {
            return Err(StepError::permanent(format!(
                "volume {} does not hold what it held before: {held}, not {token}",
                self.volume
            ))
            .with_hint(format!("compare it with volume {kept}, which somebody may have changed")));
        }
        self.sync(self.volume).await
    }

    /// Removes the volume that the step made.
    pub(super) async fn discard(&self) -> Result<(), StepError> {
        for container in ["look", "replacing", "restored"] {
            self.remove(container).await?;
        }
        Ok(volumes::remove(self.client, self.volume).await?)
    }

    /// Ends or awaits what an interrupted call left at work; what tells how far it was stays.
    pub(super) async fn settle(&self) -> Result<(), StepError> {
        if let Some(id) = self.stands("replacing").await? {
            containers::stop(self.client, &id, &self.name("replacing"), Duration::ZERO).await?;
        }
        self.remove("copy").await?;
        self.remove("look").await
    }

    /// Removes all but the volume itself.
    pub(super) async fn clear(&self) -> Result<(), StepError> {
        for container in ["look", "copy", "replacing", "restored", "kept"] {
            self.remove(container).await?;
        }
        volumes::remove_own(self.client, self.cx, &self.name("kept")).await
    }

    /// Makes a volume's files durable where that can be done from here: no engine does it on demand.
    async fn sync(&self, name: &str) -> Result<(), StepError> {
        let Some(volume) = volumes::inspect(self.client, name).await? else { return Ok(()) };
        blocking(move || {
            if let Ok(directory) = std::fs::File::open(&volume.mountpoint) {
                let _ = rustix::fs::syncfs(&directory);
            }
            Ok(())
        })
        .await
    }
}

fn owned((key, value): (&String, &String)) -> (String, String) {
    (key.clone(), value.clone())
}
