//! Every step of this crate lived through crashes, failures, repetitions and foreign changes, on a real
//! control plane; and the seeded defects that the sweeps must notice.

#![cfg(test)]

mod apply;
mod blue_green;
mod config;
mod job;
mod rollout;
mod scale;

use upgrade_core::file::{LoadOptions, parse};
use upgrade_core::names::StepId;
use upgrade_core::pipeline::Pipeline;
use upgrade_core::testkit::{Mutation, Scenario, Sweep};
use upgrade_testbed::kubernetes::Cluster;

use crate::world::{Corner, registry};

/// Describes one sweep: a namespace as it is before, the steps that change it, and what somebody else may
/// do to it meanwhile.
pub(crate) struct Case {
    /// Makes what is there before.
    pub(crate) setup: fn(&Corner),
    /// The rest of a pipeline file, whose target `cluster` is the namespace.
    pub(crate) pipeline: &'static str,
    /// Writes down all of the namespace that must be right.
    pub(crate) observe: fn(&Corner) -> String,
    /// Changes what a step works on, as somebody else; of a step that is not named, nothing.
    pub(crate) interfere: fn(&Corner, &str) -> bool,
    /// Tells whether that change is still there.
    pub(crate) survived: fn(&Corner, &str) -> bool,
}

/// Puts a case on a cluster.
pub(crate) struct On<'a> {
    case: &'a Case,
    cluster: Cluster,
}

impl Scenario for On<'_> {
    type World = Corner;

    fn fresh(&self) -> Corner {
        let corner = Corner { namespace: self.cluster.namespace("sweep") };
        (self.case.setup)(&corner);
        corner
    }

    fn pipeline(&self, world: &Corner) -> Pipeline {
        let (kubeconfig, namespace) = (self.cluster.kubeconfig().display(), &world.namespace.name);
        let document = format!(
            "targets: {{ cluster: {{ uses: k8s, with: {{ kubeconfig: \"{kubeconfig}\", namespace: {namespace} }} }} }}\n{}",
            self.case.pipeline
        );
        parse(&document, "pipeline.yaml".as_ref(), "/".as_ref(), &LoadOptions::default(), &registry())
            .unwrap_or_else(|error| panic!("{error}"))
    }

    fn observe(&self, world: &Corner) -> String {
        (self.case.observe)(world)
    }

    fn interfere(&self, world: &Corner, step: &StepId) -> bool {
        (self.case.interfere)(world, step.as_str())
    }

    fn survived(&self, world: &Corner, step: &StepId) -> bool {
        (self.case.survived)(world, step.as_str())
    }
}

/// Lives through every `stride`th trouble of a case.
pub(crate) fn sweep(case: &Case, stride: u64, at_least: usize) {
    let Some(cluster) = upgrade_testbed::kubernetes::shared() else { return };
    sweep_on(cluster, case, stride, at_least);
}

/// Lives through every `stride`th trouble of a case, on a cluster of the caller's.
pub(crate) fn sweep_on(cluster: Cluster, case: &Case, stride: u64, at_least: usize) {
    let report = Sweep::new(&On { case, cluster }).every(stride).run().unwrap_or_else(|failure| panic!("{failure}"));
    println!("{report:?}");
    assert!(report.cases >= at_least, "{report:?}");
}

/// Asks that each seeded defect is noticed: what a sweep passes proves something only then.
pub(crate) fn notices_every_seeded_defect(case: &Case) {
    let Some(cluster) = upgrade_testbed::kubernetes::shared() else { return };
    notices_every_seeded_defect_on(cluster, case);
}

/// Asks the same on a cluster of the caller's.
pub(crate) fn notices_every_seeded_defect_on(cluster: Cluster, case: &Case) {
    let case = On { case, cluster };
    for mutation in Mutation::ALL {
        let failure = Sweep::new(&case).with_mutation(mutation).run();
        let failure = failure.expect_err(&format!("{mutation:?} was not noticed"));
        println!("{mutation:?}: {failure}");
    }
}
