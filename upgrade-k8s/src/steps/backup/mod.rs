//! `k8s.backup`: objects of a namespace kept in a file that is proven by reading it back.

mod file;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::context::{Context, blocking};
use upgrade_core::durable;
use upgrade_core::error::StepError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::secret::SecretRef;
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;
use upgrade_core::units::Bytes;

use crate::archive::{self, Header};
use crate::error::not_cancelled;
use crate::kind::Kind;
use crate::object::ObjectName;
use crate::selection::{Selected, Selection, check_exclude, means_secrets, own};
use crate::server::ApiServer;
use crate::target::{Cluster, check_name};

/// What the names of backups end with.
const SUFFIX: &str = ".yaml";
/// What the names of encrypted backups end with.
const ENCRYPTED_SUFFIX: &str = ".yaml.sealed";

/// Configures `k8s.backup`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BackupConfig {
    /// The cluster. Default: the one that `kubectl` would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The namespace whose objects are kept. Default: the target's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// A directory, or a file whose name ends in `.yaml`; encrypted, in `.yaml.sealed`.
    pub to: PathBuf,
    /// The kinds that are kept, as `kubectl` would take them. Default: ConfigMap, Secret,
    /// PersistentVolumeClaim.
    #[serde(default = "usual_kinds")]
    pub kinds: Vec<String>,
    /// A label selector that leaves some of them. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// Objects that are left out, by kind and name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// The key by which the backup is encrypted, 64 hexadecimal digits. Without one, Secrets are refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<SecretRef>,
    /// How many backups of this step are kept in the directory after commit; all if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<usize>,
    /// What must stay free on the file system of the backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free: Option<Bytes>,
    /// What becomes of the backup when the run is rolled back.
    #[serde(default)]
    pub on_rollback: OnRollback,
}

fn usual_kinds() -> Vec<String> {
    ["ConfigMap", "Secret", "PersistentVolumeClaim"].map(str::to_owned).to_vec()
}

/// Says what becomes of a backup when the run that made it is rolled back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnRollback {
    /// It is removed: everything is as it was.
    #[default]
    Remove,
    /// It stays.
    Keep,
}

/// Keeps objects of a namespace in a file before an upgrade touches them.
///
/// # Guarantees
/// The file appears under its name only when it is durable and, read back, holds every object as the
/// cluster gave it. It is readable by its owner alone, and holds no Secret unless it is encrypted.
///
/// # Caveats
/// Each kind is listed as it is at one instant; all of them together are not.
///
/// Called again, or after a crash at any point, apply, rollback and commit converge.
#[derive(Debug, Clone)]
pub struct Backup {
    config: BackupConfig,
    cluster: Arc<Cluster>,
    namespace: String,
    to: PathBuf,
}

/// Holds what undoing a backup needs: nothing was there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupUndo {
    /// The file that is made.
    pub path: PathBuf,
    /// The topmost directory that was not there; absent if all were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made: Option<PathBuf>,
}

/// Tells later steps where the backup is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupOutput {
    /// The file.
    pub path: PathBuf,
    /// Its SHA-256 digest.
    pub sha256: String,
    /// How many objects it holds.
    pub objects: u64,
    /// How many bytes it has.
    pub bytes: u64,
}

impl Backup {
    /// Makes the step from its configuration; relative paths start from the context's directory.
    ///
    /// # Errors
    /// There is no such target; Secrets would be kept without a key; the configuration contradicts itself.
    pub fn from_config(config: BackupConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let cluster = Cluster::named(config.target.as_deref(), cx)?;
        let namespace = config.namespace.clone().unwrap_or_else(|| cluster.namespace().to_owned());
        check_name(&namespace, "namespace")?;
        if config.kinds.is_empty() {
            return Err(BuildError::new("there is nothing to keep")
                .at("kinds")
                .with_hint("name a kind, or leave `kinds` out: `kinds: [ConfigMap]`"));
        }
        if config.key.is_none() && config.kinds.iter().any(|kind| means_secrets(kind)) {
            return Err(BuildError::new("Secrets are kept encrypted, and there is no key")
                .at("key")
                .with_hint(WITHOUT_KEY));
        }
        check_exclude(&config.exclude)?;
        let to = cx.path(&config.to);
        let to = std::path::absolute(&to).unwrap_or(to);
        let (is_plain, is_encrypted) = (ends(&to, SUFFIX), ends(&to, ENCRYPTED_SUFFIX));
        if (is_plain && config.key.is_some()) || (is_encrypted && config.key.is_none()) {
            let suffix = if is_plain { ENCRYPTED_SUFFIX } else { SUFFIX };
            return Err(BuildError::new(format!("the name of such a backup ends in {suffix}"))
                .at("to")
                .with_hint("what is encrypted ends in .yaml.sealed, what `kubectl` can read in .yaml"));
        }
        if (is_plain || is_encrypted) && config.keep.is_some() {
            return Err(BuildError::new("`keep` counts the backups in a directory; `to` names a file")
                .at("keep")
                .with_hint("let `to` name a directory"));
        }
        Ok(Self { config, cluster, namespace, to })
    }

    fn suffix(&self) -> &'static str {
        if self.config.key.is_some() { ENCRYPTED_SUFFIX } else { SUFFIX }
    }

    /// Names the file of this run; the same in every call.
    fn path(&self, cx: &Context) -> PathBuf {
        if ends(&self.to, self.suffix()) {
            return self.to.clone();
        }
        let version = cx.from().or(cx.to()).map_or_else(|| "0.0.0".to_owned(), ToString::to_string);
        self.to.join(format!("{}-{version}-{}{}", cx.subject(), cx.run(), self.suffix()))
    }

    fn selection(&self) -> Selection {
        Selection {
            kinds: self.config.kinds.clone(),
            selector: self.config.selector.clone().unwrap_or_default(),
            exclude: self.config.exclude.clone(),
        }
    }

    async fn select(&self, server: &ApiServer) -> Result<Selected, StepError> {
        let selection = self.selection();
        if self.config.key.is_none() && selection.kinds(server).await?.contains(&Kind::secret()) {
            return Err(StepError::permanent("Secrets are kept encrypted, and there is no key").with_hint(WITHOUT_KEY));
        }
        selection.objects(server, &self.namespace).await
    }

    async fn plan(&self, cx: &Context) -> Result<Prepared<BackupUndo, BackupOutput>, StepError> {
        let path = self.path(cx);
        if path.symlink_metadata().is_ok() {
            return Err(StepError::permanent(format!("{} is there already", path.display()))
                .with_hint("move it away, or let `to` name a directory: each run then makes a file of its own"));
        }
        archive::cipher(cx, self.config.key.as_ref()).await?;
        let server = self.cluster.connect(cx).await?;
        let selected = self.select(&server).await?;
        // What an earlier step of the same run makes is not there yet when the run is planned.
        if selected.objects.is_empty() && !cx.is_dry_run() {
            return Err(nothing(&self.namespace));
        }
        let wanted: usize = selected.objects.iter().map(|(_, object)| object.0.to_string().len()).sum();
        file::expect_room(&path, wanted as u64 + self.config.free.unwrap_or_default().0)?;
        let change = Change::new(Effect::Create, path.display().to_string())
            .with_summary(summary(&selected, self.config.key.is_some()));
        let made = durable::topmost_missing(&durable::parent(&path));
        Ok(Prepared::change(BackupUndo { path, made }, [change]))
    }

    async fn make(&self, cx: &Context, undo: &BackupUndo) -> Result<BackupOutput, StepError> {
        let cipher = archive::cipher(cx, self.config.key.as_ref()).await?;
        let server = self.cluster.connect(cx).await?;
        let identity = self.cluster.identity(cx).await?;
        let selected = self.select(&server).await?;
        if selected.objects.is_empty() {
            return Err(nothing(&self.namespace));
        }
        for (reason, names) in &selected.left_out {
            let names: Vec<_> = names.iter().map(ToString::to_string).collect();
            tracing::info!("not in the backup, {reason}: {}", names.join(", "));
        }
        let objects: Vec<_> = selected.objects.iter().map(|(_, object)| own(object)).collect();
        let header = Header::new(cx, identity, self.namespace.clone(), self.selection());
        let free = self.config.free.unwrap_or_default().0;
        not_cancelled(cx)?;
        let (path, marker) = (undo.path.clone(), cx.marker());
        blocking(move || file::store(&path, &marker, header, &objects, cipher.as_ref(), free)).await
    }
}

/// What to do where Secrets would be kept without a key.
const WITHOUT_KEY: &str = "name a key, `key: { file: /etc/upgrade/backup.key }` (`openssl rand -hex 32` makes one), or \
                           name the other kinds: `kinds: [ConfigMap, PersistentVolumeClaim]`";

fn ends(path: &Path, suffix: &str) -> bool {
    path.to_string_lossy().ends_with(suffix)
}

fn nothing(namespace: &str) -> StepError {
    StepError::permanent(format!("no object of namespace {namespace} is to be kept"))
        .with_hint("correct `namespace`, `kinds` or `selector`; what the cluster makes itself is never kept")
}

/// Says how many of each kind are kept, and what is not.
fn summary(selected: &Selected, is_encrypted: bool) -> String {
    let mut counts: Vec<(String, usize)> = Vec::new();
    for (name, _) in &selected.objects {
        match counts.iter_mut().find(|(kind, _)| *kind == name.kind.plural) {
            Some((_, count)) => *count += 1,
            None => counts.push((name.kind.plural.clone(), 1)),
        }
    }
    let mut parts: Vec<_> = counts.into_iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    if parts.is_empty() {
        parts.push("nothing that is there now".to_owned());
    }
    let mut text = parts.join(", ");
    if is_encrypted {
        text.push_str("; encrypted");
    }
    for (reason, names) in &selected.left_out {
        text.push_str(&format!("; left out, {reason}: {}", few(names)));
    }
    text
}

/// How many names are written down in one line.
const SHOWN: usize = 5;

/// Names the first ones, and says how many more there are.
pub(super) fn few(names: &[ObjectName]) -> String {
    let shown: Vec<_> = names.iter().take(SHOWN).map(ToString::to_string).collect();
    match names.len().saturating_sub(SHOWN) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

#[async_trait]
impl Step for Backup {
    const KIND: &'static str = "k8s.backup";
    type Undo = BackupUndo;
    type Output = BackupOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<BackupUndo, BackupOutput>, StepError> {
        self.plan(cx).await
    }

    async fn apply(&self, cx: &Context, undo: &BackupUndo) -> Result<BackupOutput, StepError> {
        if undo.path.symlink_metadata().is_ok() {
            let (context, undo) = (cx.clone(), undo.clone());
            return blocking(move || file::ours(&context, &undo)).await;
        }
        let made = self.make(cx, undo).await;
        if made.is_err() {
            let (context, undo) = (cx.clone(), undo.clone());
            // What counts is why it failed; what stays is removed by settle or rollback.
            let _ = blocking(move || file::clear(&context, &undo)).await;
        }
        made
    }

    async fn settle(&self, cx: &Context, undo: &BackupUndo) -> Result<(), StepError> {
        let (context, undo) = (cx.clone(), undo.clone());
        blocking(move || file::clear(&context, &undo)).await
    }

    async fn commit(&self, cx: &Context, undo: &BackupUndo) -> Result<(), StepError> {
        let Some(keep) = self.config.keep else { return Ok(()) };
        let (context, undo, suffix) = (cx.clone(), undo.clone(), self.suffix());
        blocking(move || file::prune(&context, &undo, suffix, keep)).await
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![self.cluster.part("objects", &self.namespace)]
    }
}

#[async_trait]
impl Rollback for Backup {
    async fn rollback(&self, cx: &Context, undo: &BackupUndo, _: Option<&BackupOutput>) -> Result<(), StepError> {
        let (context, undo, on_rollback) = (cx.clone(), undo.clone(), self.config.on_rollback);
        blocking(move || {
            file::clear(&context, &undo)?;
            if on_rollback == OnRollback::Keep { Ok(()) } else { file::remove(&context, &undo) }
        })
        .await
    }
}
