//! The number of pods itself, there and back, and the pods that follow from it.

use std::time::Duration;

use tokio::time::Instant;
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};

use super::{Scale, ScaleOutput, ScaleUndo, ScaledWorkload, replicas_of};
use crate::object::{Object, ObjectName, patch};
use crate::server::ApiServer;
use crate::steps::rollout::Order;
use crate::workload::members;
use crate::workload::progress::{Patience, Rollouts};

/// How often pods that are on their way out are looked for.
const LOOK: Duration = Duration::from_millis(500);

/// Which way the number is led.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Forward,
    Back,
}

/// What the number that is met asks for.
#[derive(Debug, PartialEq, Eq)]
enum Met {
    /// It is as it shall be, or an autoscaler's.
    Leave,
    /// The goal is to be written.
    Write,
    /// Somebody else chose it.
    Foreign,
}

impl ScaledWorkload {
    fn goal(&self, way: Way) -> u32 {
        if way == Way::Forward { self.intended } else { self.found }
    }

    fn meets(&self, way: Way, present: u32) -> Met {
        let (goal, start) = match way {
            Way::Forward => (self.intended, self.found),
            Way::Back => (self.found, self.intended),
        };
        if present == goal {
            Met::Leave
        } else if present == start {
            Met::Write
        } else if self.autoscaled && present > 0 {
            if goal == 0 { Met::Write } else { Met::Leave }
        } else {
            Met::Foreign
        }
    }

    fn conflict(&self, name: &ObjectName, present: &Object) -> StepError {
        let is_other = present.uid() != self.uid;
        let (subject, found, intended, present) = if is_other {
            (name.to_string(), self.uid.clone(), self.uid.clone(), present.uid().to_owned())
        } else {
            let count = |count: u32| format!("{count} pods");
            let present = count(replicas_of(present));
            (format!("the number of pods of {name}"), count(self.found), count(self.intended), present)
        };
        StepError::conflict(Conflict { subject, found, intended, present })
    }
}

impl Scale {
    pub(super) async fn forward(&self, cx: &Context, undo: &ScaleUndo) -> Result<ScaleOutput, StepError> {
        let server = self.cluster.connect(cx).await?;
        for group in self.groups(undo) {
            self.lead(&server, cx, undo, &group, Way::Forward).await?;
        }
        let each = self.config.workloads.iter().map(|each| (each.workload.to_string(), each.replicas));
        let mut output = ScaleOutput { found: each.clone().collect(), replicas: each.collect() };
        // What is not in the record had the number that is asked for.
        output.found.extend(undo.workloads.iter().map(|each| (each.workload.to_string(), each.found)));
        Ok(output)
    }

    pub(super) async fn back(&self, cx: &Context, undo: &ScaleUndo) -> Result<(), StepError> {
        let server = self.cluster.connect(cx).await?;
        for group in self.groups(undo).into_iter().rev() {
            self.lead(&server, cx, undo, &group, Way::Back).await?;
        }
        Ok(())
    }

    /// What is scaled together.
    fn groups<'a>(&self, undo: &'a ScaleUndo) -> Vec<Vec<&'a ScaledWorkload>> {
        match self.config.order {
            Order::SideBySide => vec![undo.workloads.iter().collect()],
            Order::Sequence => undo.workloads.iter().map(|each| vec![each]).collect(),
        }
    }

    /// Writes the numbers of a group, and waits for what follows from them.
    async fn lead(
        &self,
        server: &ApiServer,
        cx: &Context,
        undo: &ScaleUndo,
        group: &[&ScaledWorkload],
        way: Way,
    ) -> Result<(), StepError> {
        let mut started = Vec::new();
        for each in group {
            let object = self.write(server, cx, &undo.namespace, each, way).await?;
            // What was not complete before need not become so now; what has no pods has none to wait for.
            if replicas_of(&object) > 0 && (way == Way::Forward || each.was_complete) {
                started.push((each.workload.clone(), each.uid.clone()));
            }
        }
        let deadline = self.config.deadline.0;
        let until = Instant::now() + deadline;
        if !started.is_empty() {
            let patience = Patience { deadline, restarts: self.config.restarts };
            let awaited = started.into_iter().collect();
            Rollouts::of(server, &undo.namespace, awaited, "").complete(patience).await?;
        }
        for each in group {
            self.await_departures(server, &undo.namespace, each, until).await?;
        }
        Ok(())
    }

    async fn write(
        &self,
        server: &ApiServer,
        cx: &Context,
        namespace: &str,
        each: &ScaledWorkload,
        way: Way,
    ) -> Result<Object, StepError> {
        let name = ObjectName::new(each.workload.kind.kind(), namespace, &each.workload.name);
        let goal = || ("/spec/replicas".to_owned(), Some(each.goal(way).into()));
        let changed = server.change(&name, |present| {
            if present.uid() != each.uid {
                return Err(each.conflict(&name, present));
            }
            match each.meets(way, replicas_of(present)) {
                Met::Leave => Ok(None),
                Met::Foreign if cx.on_conflict() == OnConflict::Stop => Err(each.conflict(&name, present)),
                Met::Write | Met::Foreign => Ok(Some(patch(present, [goal()]))),
            }
        });
        changed.await
    }

    /// Waits until no pod of a workload is on its way out; of one that has none, until none is there: a
    /// controller does not count a pod any more that still works off what it has.
    async fn await_departures(
        &self,
        server: &ApiServer,
        namespace: &str,
        each: &ScaledWorkload,
        until: Instant,
    ) -> Result<(), StepError> {
        let name = ObjectName::new(each.workload.kind.kind(), namespace, &each.workload.name);
        loop {
            let object = server.require(&name).await?;
            let is_seen = object.number("/metadata/generation") <= object.number("/status/observedGeneration");
            let is_stopped = replicas_of(&object) == 0;
            let mut left = members::pods_of(server, each.workload.kind, &object).await?;
            left.retain(|pod| is_stopped || pod.is_going());
            let none_counted = !is_stopped || object.number("/status/replicas") == 0;
            if is_seen && none_counted && left.is_empty() {
                return Ok(());
            }
            let workload = &each.workload;
            server.context().progress(0, 0, format!("{workload}: {} pods are on their way out", left.len()));
            if Instant::now() >= until {
                let pods: Vec<_> = left.iter().map(Object::name).collect();
                let (pods, deadline) = (pods.join(", "), self.config.deadline.0.as_secs());
                return Err(StepError::permanent(format!(
                    "{workload}: pods are still there after {deadline} s: {pods}"
                ))
                .with_hint(
                    "`kubectl describe` of them tells what they wait for: a finalizer, a node that does not answer",
                ));
            }
            server.pause(LOOK).await?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meets(autoscaled: bool, found: u32, intended: u32, way: Way, present: u32) -> Met {
        let workload = "deployment/web".parse().unwrap();
        let each = ScaledWorkload { workload, uid: "u".into(), found, intended, was_complete: true, autoscaled };
        each.meets(way, present)
    }

    #[test]
    fn a_third_number_is_somebody_elses() {
        for way in [Way::Forward, Way::Back] {
            assert_eq!(meets(false, 3, 1, way, 5), Met::Foreign);
            assert_eq!(meets(false, 3, 1, way, 0), Met::Foreign);
        }
        assert_eq!(meets(false, 3, 1, Way::Forward, 3), Met::Write);
        assert_eq!(meets(false, 3, 1, Way::Forward, 1), Met::Leave);
        assert_eq!(meets(false, 3, 1, Way::Back, 1), Met::Write);
        assert_eq!(meets(false, 3, 1, Way::Back, 3), Met::Leave);
    }

    #[test]
    fn an_autoscalers_number_is_left_unless_there_shall_be_none() {
        assert_eq!(meets(true, 3, 0, Way::Forward, 4), Met::Write);
        assert_eq!(meets(true, 3, 0, Way::Back, 0), Met::Write);
        assert_eq!(meets(true, 3, 0, Way::Back, 4), Met::Leave);
        assert_eq!(meets(true, 3, 5, Way::Forward, 4), Met::Leave);
        // No autoscaler goes there.
        assert_eq!(meets(true, 3, 5, Way::Back, 0), Met::Foreign);
    }
}
