//! `k8s.restore`: brings objects back to what a backup of them holds.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use upgrade_core::context::{Context, blocking};
use upgrade_core::durable;
use upgrade_core::error::{Class, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::sealed::sha256_hex;
use upgrade_core::secret::SecretRef;
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;

use super::backup::few;
use crate::archive::{self, Header};
use crate::difference::revert;
use crate::error::KubeError;
use crate::kind::Kind;
use crate::manifest::Manifest;
use crate::naming::put_marker;
use crate::object::{Object, ObjectName};
use crate::restoration::{Restoration, States};
use crate::selection::{check_exclude, is_excluded, own};
use crate::server::{ApiServer, WRITERS};
use crate::target::{Cluster, check_name};

/// Configures `k8s.restore`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreConfig {
    /// The cluster. Default: the one that `kubectl` would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The namespace that is restored. Default: the target's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// A backup that `k8s.backup` made.
    pub backup: PathBuf,
    /// The SHA-256 digest that the backup must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// The key that the backup was encrypted by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<SecretRef>,
    /// Objects of the backup that are left as they are, by kind and name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// Whether a backup of another cluster or namespace is taken. Default: false.
    #[serde(default)]
    pub elsewhere: bool,
}

/// Brings objects back to what a backup holds: what is gone is made again, what changed is reverted.
///
/// # Guarantees
/// The backup is read to its end, and the cluster is asked whether it would take every object, before
/// anything is changed. What was found is kept until commit, so that the undo is exact. Objects that the
/// backup does not hold are left alone.
///
/// # Caveats
/// Contents of volumes are not in the backup: a claim that is made again gets another volume.
///
/// Called again, or after a crash at any point, apply and rollback converge.
#[derive(Debug, Clone)]
pub struct Restore {
    config: RestoreConfig,
    cluster: Arc<Cluster>,
    namespace: String,
    backup: PathBuf,
}

/// Holds what undoing a restore needs, in the order in which objects are restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreUndo {
    /// The SHA-256 digest of the backup.
    pub backup_sha256: String,
    /// Each object that changes.
    pub objects: Vec<Restoration>,
}

/// Tells later steps what was restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreOutput {
    /// What was gone and is made again.
    pub created: Vec<String>,
    /// What was reverted.
    pub changed: Vec<String>,
}

impl Restore {
    /// Makes the step from its configuration; relative paths start from the context's directory.
    ///
    /// # Errors
    /// There is no such target, the digest is not one, or `exclude` names no object.
    pub fn from_config(config: RestoreConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let cluster = Cluster::named(config.target.as_deref(), cx)?;
        let namespace = config.namespace.clone().unwrap_or_else(|| cluster.namespace().to_owned());
        check_name(&namespace, "namespace")?;
        let hexadecimal = |text: &str| text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if config.sha256.as_deref().is_some_and(|digest| !hexadecimal(digest)) {
            return Err(BuildError::new("a SHA-256 digest has 64 hexadecimal digits")
                .at("sha256")
                .with_hint("`sha256sum BACKUP` prints it, and the output of the step that made it has it"));
        }
        check_exclude(&config.exclude)?;
        let backup = cx.path(&config.backup);
        Ok(Self { config, cluster, namespace, backup })
    }

    /// Reads the backup, and makes sure that it is the one that is meant.
    async fn read(&self, cx: &Context) -> Result<(Header, Vec<Object>, String), StepError> {
        let cipher = archive::cipher(cx, self.config.key.as_ref()).await?;
        let (path, expected) = (self.backup.clone(), self.config.sha256.clone());
        let read = blocking(move || {
            let origin = path.display().to_string();
            let file = std::fs::read(&path)
                .map_err(|error| durable::failed(format!("the backup {origin} cannot be read"), &error))?;
            let sha256 = sha256_hex(&file);
            if let Some(expected) = expected.filter(|expected| !expected.eq_ignore_ascii_case(&sha256)) {
                return Err(StepError::permanent(format!("{origin} has the SHA-256 digest {sha256}, not {expected}"))
                    .with_hint("it is another backup, or was changed: find the right one"));
            }
            let (header, objects) = archive::read(&file, cipher.as_ref(), &origin)?;
            Ok((header, objects, sha256))
        });
        let (header, objects, sha256) = read.await?;
        self.is_of_here(cx, &header).await?;
        Ok((header, objects, sha256))
    }

    async fn is_of_here(&self, cx: &Context, header: &Header) -> Result<(), StepError> {
        if self.config.elsewhere {
            return Ok(());
        }
        let here = self.cluster.identity(cx).await?;
        let backup = self.backup.display();
        let what = if header.cluster != here {
            format!("{backup} is of {}, and this is {here}", header.cluster)
        } else if header.namespace != self.namespace {
            format!("{backup} is of namespace {}, not of {}", header.namespace, self.namespace)
        } else {
            return Ok(());
        };
        Err(StepError::permanent(what).with_hint(
            "name the right `backup`, `target` or `namespace`; to restore it here all the same, say `elsewhere: true`",
        ))
    }

    async fn plan(&self, cx: &Context) -> Result<Prepared<RestoreUndo, RestoreOutput>, StepError> {
        let (header, objects, backup_sha256) = self.read(cx).await?;
        let server = self.cluster.connect(cx).await?;
        let (mut held, mut restorations, mut changes, mut refused) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for object in in_order(objects) {
            let (name, wanted) = self.wanted(&server, object).await?;
            held.push(name.clone());
            if is_excluded(&self.config.exclude, &name) {
                continue;
            }
            let (present, states) = match try_restore(&server, cx, &name, &wanted).await {
                Ok(Some(tried)) => tried,
                Ok(None) => continue,
                Err(error) if is_refusal(&error) => {
                    let is_there = server.get(&name).await?.is_some();
                    refused.push(not_restored(&name, is_there, &error));
                    continue;
                }
                Err(error) => return Err(self.advised(error)),
            };
            changes.push(change(&name, present.as_ref(), &states, &wanted));
            restorations.push(Restoration::record(cx, name, present.as_ref(), &states).await?);
        }
        if let Some((_, hint)) = refused.first() {
            let lines: Vec<_> = refused.iter().map(|(said, _)| said.as_str()).collect();
            return Err(StepError::permanent(lines.join("; ")).with_hint(hint));
        }
        let since = self.made_since(&server, &header, &held).await?;
        if restorations.is_empty() {
            let output = RestoreOutput { created: Vec::new(), changed: Vec::new() };
            return Ok(Prepared::unchanged(output, "the objects are as the backup has them"));
        }
        let mut summary = format!("{} of {} from {}", restorations.len(), held.len(), self.backup.display());
        if !since.is_empty() {
            summary.push_str(&format!("; made since, left alone: {}", few(&since)));
        }
        let whole = format!("objects of namespace {}", self.namespace);
        changes.insert(0, Change::new(Effect::Modify, whole).with_summary(summary));
        Ok(Prepared::change(RestoreUndo { backup_sha256, objects: restorations }, changes))
    }

    /// Names an object of the backup as this cluster does, in the namespace that is restored.
    async fn wanted(&self, server: &ApiServer, mut object: Object) -> Result<(ObjectName, Object), StepError> {
        if let Some(metadata) = object.0["metadata"].as_object_mut()
            && metadata.contains_key("namespace")
        {
            metadata.insert("namespace".into(), json!(self.namespace));
        }
        let manifest = Manifest { object, origin: self.backup.display().to_string() };
        let name = manifest.name(server, &self.namespace).await?;
        Ok((name, manifest.object))
    }

    /// Lists what the backup would hold if it were made now, and does not.
    async fn made_since(
        &self,
        server: &ApiServer,
        header: &Header,
        held: &[ObjectName],
    ) -> Result<Vec<ObjectName>, StepError> {
        let selected = match header.selection.objects(server, &self.namespace).await {
            // It is good to know, and no more: neither a kind that is gone nor a missing right to list hinders.
            Err(error) if error.class() == Class::Permanent => return Ok(Vec::new()),
            selected => selected?,
        };
        Ok(selected.objects.into_iter().map(|(name, _)| name).filter(|name| !held.contains(name)).collect())
    }

    fn advised(&self, error: KubeError) -> StepError {
        if error.is_missing() {
            return StepError::from(error).with_hint(format!(
                "the namespace {} is not there: create it in an earlier step, or name another as `namespace`",
                self.namespace
            ));
        }
        error.into()
    }
}

/// What others live in comes first; the order is the backup's otherwise.
fn in_order(mut objects: Vec<Object>) -> Vec<Object> {
    objects.sort_by_key(|object| match object.text("/kind") {
        "Namespace" => 0,
        "CustomResourceDefinition" => 1,
        _ => 2,
    });
    objects
}

/// Asks what restoring an object would make of it; none where it is as the backup has it.
async fn try_restore(
    server: &ApiServer,
    cx: &Context,
    name: &ObjectName,
    wanted: &Object,
) -> Result<Option<(Option<Object>, States)>, KubeError> {
    let mut attempt = 1;
    loop {
        let present = server.get(name).await?;
        let (tried, asked) = match &present {
            None => {
                let mut body = wanted.0.clone();
                put_marker(&mut body, cx);
                (server.try_create(name, &body).await, wanted.0.clone())
            }
            Some(present) if present.is_going() => {
                return Err(StepError::transient(format!("{name} is being deleted"))
                    .with_hint("wait until it is gone: `kubectl describe` says what holds it")
                    .into());
            }
            Some(present) => {
                let now = own(present);
                if now == *wanted {
                    return Ok(None);
                }
                let body = revert(&present.0, &wanted.0, &now.0);
                let asked = own(&Object(body.clone())).0;
                (server.try_replace(name, &body).await, asked)
            }
        };
        let after = match tried {
            // Somebody wrote in between: it is looked at again.
            Err(error) if error.is_in_conflict() && attempt < WRITERS => {
                attempt += 1;
                continue;
            }
            after => after?,
        };
        let states = States::new(present.as_ref(), &after, &asked);
        return Ok((!states.are_equal()).then_some((present, states)));
    }
}

/// Tells whether the cluster refuses what a backup holds, rather than this user or this moment.
fn is_refusal(error: &KubeError) -> bool {
    matches!(error.status(), Some(422 | 400))
}

/// Says of an object what the cluster has against it, and the way out.
fn not_restored(name: &ObjectName, is_there: bool, error: &KubeError) -> (String, String) {
    // Of a claim the server tells the whole difference after the first line.
    let said = error.answer().and_then(|answer| answer.message.lines().next()).unwrap_or_default();
    let named = format!("{}/{}", name.kind, name.name);
    let leave = format!("leave it as it is with `exclude: [{named}]`");
    let hint = if !is_there {
        format!("make room for it as the message says, or {leave}")
    } else if name.kind == Kind::persistent_volume_claim() {
        format!("a claim can only grow: {leave}, or delete it, and what is on its volume, first")
    } else {
        format!("what cannot be changed can be made again: `kubectl delete {named}` first, or {leave}")
    };
    (format!("{name} cannot be restored: {said}"), hint)
}

fn change(name: &ObjectName, present: Option<&Object>, states: &States, wanted: &Object) -> Change {
    if present.is_some() {
        return Change::new(Effect::Modify, name.to_string()).with_summary(states.differences().join("; "));
    }
    let change = Change::new(Effect::Create, name.to_string());
    if name.kind != Kind::persistent_volume_claim() {
        return change.with_summary("it is gone");
    }
    let volume = match wanted.text("/spec/volumeName") {
        "" => "it is gone; made again, it gets another volume: contents are not in the backup".to_owned(),
        volume => format!("it is gone; made again, it asks for volume {volume}, which must be free to be claimed"),
    };
    change.with_summary(volume).undo_loses("what is written to its volume after the restore")
}

#[async_trait]
impl Step for Restore {
    const KIND: &'static str = "k8s.restore";
    type Undo = RestoreUndo;
    type Output = RestoreOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<RestoreUndo, RestoreOutput>, StepError> {
        self.plan(cx).await
    }

    async fn apply(&self, cx: &Context, undo: &RestoreUndo) -> Result<RestoreOutput, StepError> {
        let server = self.cluster.connect(cx).await?;
        let mut output = RestoreOutput { created: Vec::new(), changed: Vec::new() };
        let total = undo.objects.len() as u64;
        for (done, each) in undo.objects.iter().enumerate() {
            cx.progress(done as u64, total, each.object.to_string());
            each.carry_out(&server, cx).await?;
            let list = if each.uid.is_some() { &mut output.changed } else { &mut output.created };
            list.push(each.object.to_string());
        }
        Ok(output)
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![self.cluster.part("objects", &self.namespace)]
    }
}

#[async_trait]
impl Rollback for Restore {
    async fn rollback(&self, cx: &Context, undo: &RestoreUndo, _: Option<&RestoreOutput>) -> Result<(), StepError> {
        let server = self.cluster.connect(cx).await?;
        for each in undo.objects.iter().rev() {
            each.put_back(&server, cx).await?;
        }
        Ok(())
    }
}
