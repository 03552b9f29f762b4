//! The way there, the way back, and the end.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};

use super::plan::hash_of;
use super::{BlueGreen, BlueGreenOutput, BlueGreenUndo, LedService, Selector};
use crate::error::not_cancelled;
use crate::kept::kept;
use crate::kind::Kind;
use crate::naming::{MARK, is_ours, mark, put_mark};
use crate::object::{Object, ObjectName, digest, patch};
use crate::server::{ApiServer, Deletion};
use crate::steps::rollout::images_of;
use crate::workload::WorkloadKind;
use crate::workload::progress::{Patience, Rollouts};
use crate::workload::status::{self, Rollout};

/// How often is looked while nothing tells.
const LOOK: Duration = Duration::from_millis(100);
/// How long the cluster may take to follow a Service that was switched.
const FOLLOWS: Duration = Duration::from_secs(60);

impl BlueGreen {
    pub(super) async fn forward(&self, cx: &Context, undo: &BlueGreenUndo) -> Result<BlueGreenOutput, StepError> {
        let server = self.cluster.connect(cx).await?;
        // The pods of both bear the labels that the Services follow: none may see those that are made next.
        for service in &undo.services {
            self.lead(&server, cx, undo, service, |selector, found| {
                (*selector == found).then(|| found.pinned(&undo.blue))
            })
            .await?;
        }
        let green = self.make(&server, cx, undo).await?;
        self.complete(&server, undo, &undo.green, green.uid()).await?;
        let green = server.require(&self.deployment(&undo.green)).await?;
        let hash = hash_of(&server, &green, &undo.namespace).await?.ok_or_else(|| lost(undo))?;
        for preview in undo.services.iter().skip(1) {
            self.pin(&server, cx, undo, preview, &hash).await?;
        }
        self.stay(&server, undo).await?;
        for service in &undo.services {
            self.pin(&server, cx, undo, service, &hash).await?;
            self.followed(&server, service, &undo.green).await?;
        }
        Ok(BlueGreenOutput { deployment: undo.green.clone(), images: images_of(&green) })
    }

    pub(super) async fn back(&self, cx: &Context, undo: &BlueGreenUndo) -> Result<(), StepError> {
        let server = self.cluster.connect(cx).await?;
        for service in &undo.services {
            let led = self.lead(&server, cx, undo, service, |selector, found| {
                (*selector != found).then(|| found.pinned(&undo.blue))
            });
            if led.await? {
                self.followed(&server, service, &undo.deployment).await?;
            }
        }
        self.end(&server, cx, undo).await
    }

    pub(super) async fn finish(&self, cx: &Context, undo: &BlueGreenUndo) -> Result<(), StepError> {
        let server = self.cluster.connect(cx).await?;
        let name = self.deployment(&undo.deployment);
        let template: Value = kept(cx, &undo.template, &name).await?;
        let changed = server.change(&name, |present| {
            let now = digest(present.at("/spec/template"));
            if now == undo.intended {
                return Ok(None);
            }
            if now != undo.found && cx.on_conflict() == OnConflict::Stop {
                return Err(conflict(&name.to_string(), &undo.found, &undo.intended, &now));
            }
            Ok(Some(patch(present, [("/spec/template".to_owned(), Some(template.clone()))])))
        });
        let deployment = changed.await?;
        self.complete(&server, undo, &undo.deployment, deployment.uid()).await?;
        let deployment = server.require(&name).await?;
        let hash = hash_of(&server, &deployment, &undo.namespace).await?.ok_or_else(|| lost(undo))?;
        for service in &undo.services {
            let led = self
                .lead(&server, cx, undo, service, |selector, found| (*selector != found).then(|| found.pinned(&hash)));
            if led.await? {
                self.followed(&server, service, &undo.deployment).await?;
            }
        }
        self.end(&server, cx, undo).await
    }

    /// Removes the second Deployment, and lets the Services follow what they followed.
    async fn end(&self, server: &ApiServer, cx: &Context, undo: &BlueGreenUndo) -> Result<(), StepError> {
        let name = self.deployment(&undo.green);
        if let Some(green) = server.get(&name).await? {
            if !is_ours(&green, cx) {
                return Err(conflict(&name.to_string(), "absent", "made by this step", "made by somebody else"));
            }
            not_cancelled(cx)?;
            let how = Deletion { uid: Some(green.uid().to_owned()), ..Deletion::default() };
            server.delete(&name, &how).await?;
            server.await_gone(&name, green.uid()).await?;
        }
        self.await_no_pods(server, cx, undo).await?;
        for service in &undo.services {
            self.lead(server, cx, undo, service, |selector, found| (*selector != found).then_some(found)).await?;
        }
        Ok(())
    }

    /// Waits until no pod of the second Deployment is there that a Service might find.
    async fn await_no_pods(&self, server: &ApiServer, cx: &Context, undo: &BlueGreenUndo) -> Result<(), StepError> {
        let label = format!("{MARK}={}", mark(cx));
        loop {
            let (pods, _) = server.list(&Kind::pod(), Some(&undo.namespace), &label, "").await?;
            if pods.iter().all(Object::is_going) {
                return Ok(());
            }
            server.pause(LOOK).await?;
        }
    }

    /// Makes the second Deployment, or finds the one that an earlier call made.
    async fn make(&self, server: &ApiServer, cx: &Context, undo: &BlueGreenUndo) -> Result<Object, StepError> {
        let name = self.deployment(&undo.green);
        if let Some(green) = server.get(&name).await? {
            return if is_ours(&green, cx) {
                Ok(green)
            } else {
                Err(conflict(&name.to_string(), "absent", "made by this step", "made by somebody else"))
            };
        }
        let blue = server.require(&self.deployment(&undo.deployment)).await?;
        let now = digest(blue.at("/spec/template"));
        if (blue.uid() != undo.uid || now != undo.found) && cx.on_conflict() == OnConflict::Stop {
            return Err(conflict(&self.deployment(&undo.deployment).to_string(), &undo.found, &undo.intended, &now));
        }
        let template: Value = kept(cx, &undo.template, &name).await?;
        let mut body = blue.as_written().0;
        body["metadata"]["name"] = json!(undo.green);
        body["spec"]["template"] = template;
        // As many as carry the traffic now, whoever decides on that.
        body["spec"]["replicas"] = blue.at("/spec/replicas").clone();
        for labels in ["selector/matchLabels", "template/metadata/labels"] {
            if let Some(labels) = body.pointer_mut(&format!("/spec/{labels}")).and_then(Value::as_object_mut) {
                labels.insert(MARK.into(), json!(mark(cx)));
            }
        }
        put_mark(&mut body, cx);
        not_cancelled(cx)?;
        Ok(server.create(&name, &body).await?)
    }

    async fn complete(&self, server: &ApiServer, undo: &BlueGreenUndo, name: &str, uid: &str) -> Result<(), StepError> {
        let awaited = [(self.workload(name), uid.to_owned())].into();
        let patience = Patience { deadline: self.config.deadline.0, restarts: self.config.restarts };
        Rollouts::of(server, &undo.namespace, awaited, "").complete(patience).await
    }

    /// Asks that the new pods stay ready for as long as they must have been before the switch.
    async fn stay(&self, server: &ApiServer, undo: &BlueGreenUndo) -> Result<(), StepError> {
        let until = Instant::now() + self.config.stable.0;
        while Instant::now() < until {
            server.pause(LOOK.min(self.config.stable.0)).await?;
            let green = server.require(&self.deployment(&undo.green)).await?;
            if status::of(WorkloadKind::Deployment, &green) != Rollout::Complete {
                // Who was ready and is not is told with its reason, as on the way there.
                return match self.complete(server, undo, &undo.green, green.uid()).await {
                    Err(error) => Err(error),
                    Ok(()) => Err(StepError::permanent(format!(
                        "deployment/{}: its pods did not stay ready for {} s",
                        undo.green, self.config.stable
                    ))
                    .with_hint("`kubectl describe` of its pods tells why; traffic was not switched")),
                };
            }
        }
        Ok(())
    }

    async fn pin(
        &self,
        server: &ApiServer,
        cx: &Context,
        undo: &BlueGreenUndo,
        service: &LedService,
        hash: &str,
    ) -> Result<(), StepError> {
        let led = self.lead(server, cx, undo, service, |selector, found| {
            let pinned = found.pinned(hash);
            (*selector != pinned).then_some(pinned)
        });
        led.await.map(drop)
    }

    /// Leads a Service elsewhere, if `to` says so of its selector and the one found; tells whether it is not
    /// as found by then.
    async fn lead(
        &self,
        server: &ApiServer,
        cx: &Context,
        undo: &BlueGreenUndo,
        service: &LedService,
        to: impl Fn(&Selector, Selector) -> Option<Selector>,
    ) -> Result<bool, StepError> {
        let name = self.service(&service.name);
        let found = Selector(service.selector.clone());
        let led = server.change(&name, |present| {
            let selector = Selector::of(present);
            let is_known = present.uid() == service.uid && selector.bare() == found;
            if !is_known && cx.on_conflict() == OnConflict::Stop {
                let intended = found.pinned("…").text();
                return Err(conflict(&name.to_string(), &found.text(), &intended, &selector.text()));
            }
            let to = to(&selector, found.clone());
            Ok(to.map(|to| patch(present, [("/spec/selector".to_owned(), Some(to.value()))])))
        });
        let led = led.await?;
        cx.progress(
            0,
            0,
            format!("service {}/{} leads to {}", undo.namespace, service.name, Selector::of(&led).text()),
        );
        Ok(Selector::of(&led) != found)
    }

    /// Waits until what a Service leads to are pods of a Deployment, and no others.
    async fn followed(&self, server: &ApiServer, service: &LedService, deployment: &str) -> Result<(), StepError> {
        let name = ObjectName::new(Kind::endpoints(), &self.namespace, &service.name);
        let until = Instant::now() + FOLLOWS;
        let prefix = format!("{deployment}-");
        loop {
            let endpoints = server.get(&name).await?.unwrap_or_else(|| Object(Value::Null));
            let ready: Vec<_> = endpoints
                .list("/subsets")
                .flat_map(|subset| subset["addresses"].as_array().into_iter().flatten())
                .map(|address| address["targetRef"]["name"].as_str().unwrap_or_default())
                .collect();
            let is_its = |pod: &&str| {
                // A pod is named after its ReplicaSet, and that after its Deployment.
                pod.strip_prefix(&prefix).is_some_and(|rest| rest.split('-').count() == 2)
            };
            if !ready.is_empty() && ready.iter().all(is_its) {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(StepError::transient(format!(
                    "service {} was led to deployment/{deployment}, and the cluster does not follow",
                    service.name
                ))
                .with_hint("see its endpoints (`kubectl get endpoints`) and whether the controller manager runs"));
            }
            server.pause(LOOK).await?;
        }
    }
}

fn lost(undo: &BlueGreenUndo) -> StepError {
    StepError::unknown(format!("deployment/{} is complete, and its ReplicaSet is not there", undo.green))
        .with_hint("try again; `kubectl describe deployment` tells what its controller does")
}

fn conflict(subject: &str, found: &str, intended: &str, present: &str) -> StepError {
    let short =
        |text: &str| if text.starts_with("sha256:") { text.chars().take(19).collect() } else { text.to_owned() };
    StepError::conflict(Conflict {
        subject: subject.to_owned(),
        found: short(found),
        intended: short(intended),
        present: short(present),
    })
}
