//! The change itself, there and back.

use std::collections::BTreeMap;

use serde_json::Value;
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};

use super::plan::{changed, parts};
use super::{Order, RolloutOutput, RolloutStep, RolloutUndo, WorkloadUndo};
use crate::kept::kept;
use crate::kind::Kind;
use crate::object::{Object, ObjectName, digest, patch};
use crate::pods;
use crate::server::{ApiServer, Deletion};
use crate::workload::failure::Pod;
use crate::workload::progress::{Patience, Rollouts};

impl RolloutStep {
    pub(super) async fn forward(&self, cx: &Context, undo: &RolloutUndo) -> Result<RolloutOutput, StepError> {
        let server = self.cluster.connect(cx).await?;
        let mut images = BTreeMap::new();
        for group in self.groups(undo) {
            let mut labels = Vec::new();
            for each in &group {
                let object = self.change(&server, cx, each).await?;
                labels.push(selector_of(&object));
                images.insert(each.workload.to_string(), super::plan::images_of(&object));
            }
            self.follow(&server, undo, &group, &labels).await?;
        }
        Ok(RolloutOutput { images })
    }

    pub(super) async fn back(&self, cx: &Context, undo: &RolloutUndo) -> Result<(), StepError> {
        let server = self.cluster.connect(cx).await?;
        for group in self.groups(undo).into_iter().rev() {
            let (mut labels, mut awaited) = (Vec::new(), Vec::new());
            for each in &group {
                let object = self.restore(&server, cx, undo, each).await?;
                if each.waits_for_broken_pods() {
                    remove_broken(&server, undo, each, &object).await?;
                }
                // What was not complete before need not become so now.
                if each.was_complete {
                    labels.push(selector_of(&object));
                    awaited.push(*each);
                }
            }
            self.follow(&server, undo, &awaited, &labels).await?;
        }
        Ok(())
    }

    /// What is rolled out together.
    fn groups<'a>(&self, undo: &'a RolloutUndo) -> Vec<Vec<&'a WorkloadUndo>> {
        match self.config.order {
            Order::SideBySide => vec![undo.workloads.iter().collect()],
            Order::Sequence => undo.workloads.iter().map(|each| vec![each]).collect(),
        }
    }

    async fn change(&self, server: &ApiServer, cx: &Context, each: &WorkloadUndo) -> Result<Object, StepError> {
        let asked = self.config.workloads.iter().find(|asked| asked.workload == each.workload).ok_or_else(|| {
            StepError::permanent(format!("{} is not in the configuration of this step", each.workload))
        })?;
        let name = self.object(&each.workload);
        let base = match asked.revision {
            None => None,
            Some(_) => {
                let present = server.require(&name).await?;
                // Rolled out, it is kept under another number.
                if each.is(&present, &each.intended) {
                    return Ok(present);
                }
                self.base(server, asked, &present).await?
            }
        };
        server
            .change(&name, |present| {
                each.must_be_the_same(&name, present)?;
                if each.is(present, &each.intended) {
                    return Ok(None);
                }
                if !each.is(present, &each.found) && cx.on_conflict() == OnConflict::Stop {
                    return Err(each.conflict(&name, present));
                }
                let template = changed(asked, &name, base.as_ref(), present)?;
                Ok(Some(patch(present, parts(&template, asked.replicas))))
            })
            .await
    }

    /// Puts the found template back.
    async fn restore(
        &self,
        server: &ApiServer,
        cx: &Context,
        undo: &RolloutUndo,
        each: &WorkloadUndo,
    ) -> Result<Object, StepError> {
        let name = ObjectName::new(each.workload.kind.kind(), &undo.namespace, &each.workload.name);
        let template: Value = kept(cx, &each.template, &name).await?;
        let replicas = each.found.replicas.and_then(|replicas| u32::try_from(replicas).ok());
        let changed = server.change(&name, |present| {
            each.must_be_the_same(&name, present)?;
            if each.is(present, &each.found) {
                return Ok(None);
            }
            if !each.is(present, &each.intended) && cx.on_conflict() == OnConflict::Stop {
                return Err(each.conflict(&name, present));
            }
            Ok(Some(patch(present, parts(&template, replicas))))
        });
        changed.await
    }

    async fn follow(
        &self,
        server: &ApiServer,
        undo: &RolloutUndo,
        group: &[&WorkloadUndo],
        labels: &[Option<String>],
    ) -> Result<(), StepError> {
        if group.is_empty() {
            return Ok(());
        }
        let awaited = group.iter().map(|each| (each.workload.clone(), each.uid.clone())).collect();
        // One workload's pods are found by its labels; those of several, by one watch of the namespace.
        let labels = match labels {
            [Some(labels)] => labels.as_str(),
            _ => "",
        };
        let patience = Patience { deadline: self.config.deadline.0, restarts: self.config.restarts };
        Rollouts::of(server, &undo.namespace, awaited, labels).complete(patience).await
    }
}

impl WorkloadUndo {
    fn must_be_the_same(&self, name: &ObjectName, present: &Object) -> Result<(), StepError> {
        if present.uid() == self.uid {
            return Ok(());
        }
        Err(StepError::conflict(Conflict {
            subject: name.to_string(),
            found: self.uid.clone(),
            intended: self.uid.clone(),
            present: present.uid().to_owned(),
        }))
    }

    fn conflict(&self, name: &ObjectName, present: &Object) -> StepError {
        let short = |digest: &str| digest.chars().take(19).collect::<String>();
        StepError::conflict(Conflict {
            subject: format!("the pod template of {name}"),
            found: short(&self.found.template),
            intended: short(&self.intended.template),
            present: short(&digest(present.at("/spec/template"))),
        })
    }
}

fn selector_of(object: &Object) -> Option<String> {
    pods::selector(object.at("/spec/selector/matchLabels"), object.at("/spec/selector/matchExpressions"))
}

/// Removes pods of the abandoned template that are not ready: their StatefulSet waits for them for ever.
async fn remove_broken(
    server: &ApiServer,
    undo: &RolloutUndo,
    each: &WorkloadUndo,
    object: &Object,
) -> Result<(), StepError> {
    let labels = selector_of(object).unwrap_or_default();
    let (found, _) = server.list(&Kind::pod(), Some(&undo.namespace), &labels, "").await?;
    // The controller may not have looked yet; the current revision is the one found, until all have moved.
    let good = object.text("/status/currentRevision");
    for pod in found.iter().filter(|pod| pod.is_owned_by(&each.uid)) {
        let broken = Pod::read(pod).is_some_and(|read| !read.is_ready && !read.is_going && read.revision != good);
        if broken && each.was_complete {
            let name = ObjectName::new(Kind::pod(), &undo.namespace, pod.name());
            let how = Deletion { uid: Some(pod.uid().to_owned()), ..Deletion::default() };
            server.delete(&name, &how).await?;
        }
    }
    Ok(())
}
