//! What is done with the two sides: made, scaled, awaited, led to, renewed, removed.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;
use upgrade_core::context::OnConflict;
use upgrade_core::error::StepError;

use super::plan::hash_of;
use super::{LedService, Selector, Sides, conflict};
use crate::error::not_cancelled;
use crate::kept::kept;
use crate::kind::Kind;
use crate::naming::{MARK, mark, selector};
use crate::object::{Object, ObjectName, digest, patch};
use crate::server::Deletion;
use crate::workload::progress::Rollouts;
use crate::workload::status::{self, Rollout};
use crate::workload::{WorkloadKind, WorkloadName};

/// How often is looked while nothing tells.
const LOOK: Duration = Duration::from_millis(100);
/// How long the cluster may take to follow a Service that was led elsewhere.
const FOLLOWS: Duration = Duration::from_secs(60);

impl Sides<'_> {
    /// Pins the Services to what is there: none may see the pods that are made next.
    pub(in crate::steps) async fn hold(&self) -> Result<(), StepError> {
        for service in &self.undo.services {
            self.lead(service, |selector, found| (*selector == found).then(|| found.pinned(&self.undo.blue))).await?;
        }
        Ok(())
    }

    /// Makes the second Deployment, or finds the one that an earlier call made; of as many pods as the first
    /// one has, where `replicas` does not say.
    pub(in crate::steps) async fn make(&self, replicas: Option<u64>) -> Result<Object, StepError> {
        let undo = self.undo;
        let name = self.pair.deployment(&undo.green);
        if let Some(green) = self.green().await? {
            return Ok(green);
        }
        let blue = self.blue().await?;
        let now = digest(blue.at("/spec/template"));
        if (blue.uid() != undo.uid || now != undo.found) && self.cx.on_conflict() == OnConflict::Stop {
            return Err(conflict(
                &self.pair.deployment(&undo.deployment).to_string(),
                &undo.found,
                &undo.intended,
                &now,
            ));
        }
        let template: Value = kept(self.cx, &undo.template, &name).await?;
        let mut body = blue.as_written().0;
        body["metadata"]["name"] = json!(undo.green);
        body["spec"]["template"] = template;
        // As many as carry the traffic now, whoever decides on that.
        body["spec"]["replicas"] = replicas.map_or_else(|| blue.at("/spec/replicas").clone(), |count| json!(count));
        for labels in ["selector/matchLabels", "template/metadata/labels"] {
            if let Some(labels) = body.pointer_mut(&format!("/spec/{labels}")).and_then(Value::as_object_mut) {
                labels.insert(MARK.into(), json!(mark(self.cx)));
            }
        }
        self.server.create_own(&name, &body).await
    }

    /// Returns the Deployment that was found, as it is now.
    pub(in crate::steps) async fn blue(&self) -> Result<Object, StepError> {
        self.server.require(&self.pair.deployment(&self.undo.deployment)).await
    }

    /// Returns the second Deployment, if it is there.
    async fn green(&self) -> Result<Option<Object>, StepError> {
        self.server.get_own(&self.pair.deployment(&self.undo.green)).await
    }

    /// Lets the second Deployment have so many pods.
    pub(in crate::steps) async fn scale(&self, count: u64) -> Result<(), StepError> {
        let name = self.pair.deployment(&self.undo.green);
        let scaled = self.server.change(&name, |green| {
            let is_so = green.at("/spec/replicas").as_u64() == Some(count);
            Ok((!is_so).then(|| patch(green, [("/spec/replicas".to_owned(), Some(json!(count)))])))
        });
        scaled.await.map(drop)
    }

    /// Waits until the second Deployment is complete, and returns what its pods are known by.
    pub(in crate::steps) async fn green_complete(&self) -> Result<String, StepError> {
        self.complete(&self.undo.green).await
    }

    /// Tells whether the second Deployment is complete.
    pub(in crate::steps) async fn is_green_complete(&self) -> Result<bool, StepError> {
        let green = self.server.require(&self.pair.deployment(&self.undo.green)).await?;
        Ok(status::of(WorkloadKind::Deployment, &green) == Rollout::Complete)
    }

    /// Asks that the new pods stay ready for so long.
    pub(in crate::steps) async fn stay(&self, long: Duration) -> Result<(), StepError> {
        let until = Instant::now() + long;
        while Instant::now() < until {
            self.server.pause(LOOK.min(long)).await?;
            if !self.is_green_complete().await? {
                // Who was ready and is not is told with its reason, as on the way there.
                self.green_complete().await?;
                return Err(StepError::permanent(format!(
                    "deployment/{}: its pods did not stay ready for {} s",
                    self.undo.green,
                    long.as_secs_f32()
                ))
                .with_hint("`kubectl describe` of its pods tells why; traffic was not switched"));
            }
        }
        Ok(())
    }

    /// Leads a Service to one side, and waits until the cluster follows.
    pub(in crate::steps) async fn switch(
        &self,
        service: &LedService,
        deployment: &str,
        hash: &str,
    ) -> Result<(), StepError> {
        self.pin(service, hash).await?;
        self.followed(service, deployment).await
    }

    /// Pins a Service to one side.
    pub(in crate::steps) async fn pin(&self, service: &LedService, hash: &str) -> Result<(), StepError> {
        let led = self.lead(service, |selector, found| {
            let pinned = found.pinned(hash);
            (*selector != pinned).then_some(pinned)
        });
        led.await.map(drop)
    }

    /// Leads all traffic back to the pods that were there.
    pub(in crate::steps) async fn release(&self) -> Result<(), StepError> {
        let is_made = self.green().await?.is_some();
        for service in &self.undo.services {
            let blue = |selector: &Selector, found: Selector| {
                let pinned = found.pinned(&self.undo.blue);
                // Where there is nothing to be told apart from, it may follow all.
                (*selector != pinned && (is_made || *selector != found)).then_some(pinned)
            };
            if self.lead(service, blue).await? {
                self.followed(service, &self.undo.deployment).await?;
            }
        }
        Ok(())
    }

    /// Gives the new template to the Deployment that was there, and returns what its pods are known by then.
    pub(in crate::steps) async fn renew(&self) -> Result<String, StepError> {
        let undo = self.undo;
        let name = self.pair.deployment(&undo.deployment);
        let template: Value = kept(self.cx, &undo.template, &name).await?;
        let changed = self.server.change(&name, |present| {
            let now = digest(present.at("/spec/template"));
            if now == undo.intended {
                return Ok(None);
            }
            if now != undo.found && self.cx.on_conflict() == OnConflict::Stop {
                return Err(conflict(&name.to_string(), &undo.found, &undo.intended, &now));
            }
            Ok(Some(patch(present, [("/spec/template".to_owned(), Some(template.clone()))])))
        });
        changed.await?;
        self.complete(&undo.deployment).await
    }

    /// Leads the Services to the renewed pods of the Deployment that was there.
    pub(in crate::steps) async fn settle(&self, hash: &str) -> Result<(), StepError> {
        for service in &self.undo.services {
            let renewed = |selector: &Selector, found: Selector| (*selector != found).then(|| found.pinned(hash));
            if self.lead(service, renewed).await? {
                self.followed(service, &self.undo.deployment).await?;
            }
        }
        Ok(())
    }

    /// Removes the second Deployment, and lets the Services follow what they followed.
    pub(in crate::steps) async fn end(&self) -> Result<(), StepError> {
        if let Some(green) = self.green().await? {
            not_cancelled(self.cx)?;
            let name = self.pair.deployment(&self.undo.green);
            let how = Deletion { uid: Some(green.uid().to_owned()), ..Deletion::default() };
            self.server.delete(&name, &how).await?;
            self.server.await_gone(&name, green.uid()).await?;
        }
        self.await_no_pods().await?;
        for service in &self.undo.services {
            self.lead(service, |selector, found| (*selector != found).then_some(found)).await?;
        }
        Ok(())
    }

    /// Waits until no pod of the second Deployment is there that a Service might find.
    async fn await_no_pods(&self) -> Result<(), StepError> {
        loop {
            let namespace = Some(&*self.undo.namespace);
            let (pods, _) = self.server.list(&Kind::pod(), namespace, &selector(self.cx), "").await?;
            if pods.iter().all(Object::is_going) {
                return Ok(());
            }
            self.server.pause(LOOK).await?;
        }
    }

    /// Waits until a Deployment is complete, and returns what the pods of its newest template are known by.
    async fn complete(&self, name: &str) -> Result<String, StepError> {
        let object = self.pair.deployment(name);
        let deployment = self.server.require(&object).await?;
        let workload = WorkloadName { kind: WorkloadKind::Deployment, name: name.to_owned() };
        let awaited = [(workload, deployment.uid().to_owned())].into();
        Rollouts::of(&self.server, &self.undo.namespace, awaited, "").complete(self.pair.patience).await?;
        let deployment = self.server.require(&object).await?;
        hash_of(&self.server, &deployment, &self.undo.namespace).await?.ok_or_else(|| {
            StepError::unknown(format!("{object} is complete, and its ReplicaSet is not there"))
                .with_hint("try again; `kubectl describe deployment` tells what its controller does")
        })
    }

    /// Leads a Service elsewhere, if `to` says so of its selector and the one found; tells whether it is not
    /// as found by then.
    async fn lead(
        &self,
        service: &LedService,
        to: impl Fn(&Selector, Selector) -> Option<Selector>,
    ) -> Result<bool, StepError> {
        let name = self.pair.service(&service.name);
        let found = Selector(service.selector.clone());
        let led = self.server.change(&name, |present| {
            let selector = Selector::of(present);
            let is_known = present.uid() == service.uid && selector.bare() == found;
            if !is_known && self.cx.on_conflict() == OnConflict::Stop {
                let intended = found.pinned("…").text();
                return Err(conflict(&name.to_string(), &found.text(), &intended, &selector.text()));
            }
            let to = to(&selector, found.clone());
            Ok(to.map(|to| patch(present, [("/spec/selector".to_owned(), Some(to.value()))])))
        });
        let led = led.await?;
        self.cx.progress(
            0,
            0,
            format!("service {}/{} leads to {}", self.undo.namespace, service.name, Selector::of(&led).text()),
        );
        Ok(Selector::of(&led) != found)
    }

    /// Waits until what a Service leads to are pods of a Deployment, and no others.
    pub(in crate::steps) async fn followed(&self, service: &LedService, deployment: &str) -> Result<(), StepError> {
        let name = ObjectName::new(Kind::endpoints(), &self.undo.namespace, &service.name);
        let until = Instant::now() + FOLLOWS;
        let prefix = format!("{deployment}-");
        loop {
            let endpoints = self.server.get(&name).await?.unwrap_or_else(|| Object(Value::Null));
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
            self.server.pause(LOOK).await?;
        }
    }
}
