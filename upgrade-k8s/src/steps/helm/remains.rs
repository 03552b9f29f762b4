//! What an upgrade that was broken off leaves beside what Helm knows of.
//!
//! A rollback compares the revision it goes to with the last one alone. It fails where that one no longer
//! has an object that is still there, as after an upgrade that did not come to removing it; and where the
//! last one is a rollback that was broken off itself, it leaves what the upgrade had added. Then the objects
//! are taken back one by one first, to what the manifest found says of them. What a rollback of Helm 3 makes
//! again lacks the label and annotations by which Helm knows its own.

use serde_json::{Value, json};
use upgrade_core::error::StepError;

use crate::difference::revert;
use crate::manifest::Manifest;
use crate::object::{Object, ObjectName};
use crate::server::{ApiServer, Deletion, WRITERS};

/// Which object of a cluster belongs to which release, as Helm writes it.
const RELEASE: &str = "meta.helm.sh/release-name";
const RELEASE_NAMESPACE: &str = "meta.helm.sh/release-namespace";
const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// What Helm leaves in place.
const POLICY: &str = "helm.sh/resource-policy";

/// Takes back, of each object, what `ours` made of what `found` says.
pub(super) async fn take_back(
    server: &ApiServer,
    namespace: &str,
    release: &str,
    found: &str,
    ours: &str,
) -> Result<(), StepError> {
    let mut before = Vec::new();
    for each in Manifest::parse(found, "the manifest found")? {
        before.push((each.name(server, namespace).await?, each.object));
    }
    for each in Manifest::parse(ours, "the manifest of the upgrade")? {
        let name = each.name(server, namespace).await?;
        match before.iter().find(|(before, _)| *before == name) {
            Some((_, was)) => {
                change(server, &name, |present| revert(&present.0, &was.0, &each.object.0)).await?;
            }
            None => remove(server, &name, release).await?,
        }
    }
    Ok(())
}

/// Marks the objects of a manifest as this release's, where that is not written on them.
pub(super) async fn mark_own(
    server: &ApiServer,
    namespace: &str,
    release: &str,
    manifest: &str,
) -> Result<(), StepError> {
    for each in Manifest::parse(manifest, "the manifest found")? {
        let name = each.name(server, namespace).await?;
        let marked = |present: &Object| {
            let mut body = present.0.clone();
            if present.annotation(RELEASE).is_none() {
                body["metadata"]["annotations"][RELEASE] = json!(release);
                body["metadata"]["annotations"][RELEASE_NAMESPACE] = json!(namespace);
            }
            if present.label(MANAGED_BY).is_none() {
                body["metadata"]["labels"][MANAGED_BY] = json!("Helm");
            }
            body
        };
        change(server, &name, marked).await?;
    }
    Ok(())
}

/// Changes an object from the state in which it is found; Helm makes again what is gone.
async fn change(server: &ApiServer, name: &ObjectName, decide: impl Fn(&Object) -> Value) -> Result<(), StepError> {
    let mut attempt = 1;
    while let Some(present) = server.get(name).await? {
        let body = decide(&present);
        if body == present.0 {
            return Ok(());
        }
        match server.replace(name, &body).await {
            Err(error) if error.is_in_conflict() && attempt < WRITERS => attempt += 1,
            done => return Ok(done.map(drop)?),
        }
    }
    Ok(())
}

/// Removes what was not there before, if it is this release's.
async fn remove(server: &ApiServer, name: &ObjectName, release: &str) -> Result<(), StepError> {
    let Some(present) = server.get(name).await? else { return Ok(()) };
    let is_kept = |object: &Object| object.annotation(POLICY) == Some("keep");
    if present.annotation(RELEASE) != Some(release) || is_kept(&present) {
        return Ok(());
    }
    let how = Deletion { uid: Some(present.uid().to_owned()), ..Deletion::default() };
    server.delete(name, &how).await?;
    server.await_gone(name, present.uid()).await
}
