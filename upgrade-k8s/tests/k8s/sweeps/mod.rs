//! Every step of this crate lived through crashes, failures, repetitions and foreign changes, on a real
//! control plane; and the seeded defects that the sweeps must notice.

#![cfg(test)]

pub(crate) mod apply;
pub(crate) mod backup;
pub(crate) mod blue_green;
pub(crate) mod canary;
pub(crate) mod config;
pub(crate) mod helm;
pub(crate) mod job;
pub(crate) mod node;
pub(crate) mod rollout;
pub(crate) mod scale;

use std::path::Path;

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
    /// The rest of a pipeline file, whose target `cluster` is the namespace; `DIRECTORY`, `NAMESPACE`, `KUBECTL`
    /// and `KUBECONFIG` stand for what they are.
    pub(crate) pipeline: &'static str,
    /// Writes down all of the namespace that must be right.
    pub(crate) observe: fn(&Corner) -> String,
    /// Changes what a step works on, as somebody else; of a step that is not named, nothing.
    pub(crate) interfere: fn(&Corner, &str) -> bool,
    /// Tells whether that change is still there.
    pub(crate) survived: fn(&Corner, &str) -> bool,
}

impl Case {
    /// Reads the pipeline for a namespace that is reached by `kubeconfig`; `target` and `more` are added to the
    /// configuration of the target, and to the file.
    pub(crate) fn read(&self, kubeconfig: &Path, world: &Corner, target: &str, more: &str) -> Pipeline {
        let (own, namespace) = (kubeconfig.display(), &world.namespace.name);
        let kubectl = world.namespace.cluster().programs().join("kubectl");
        let document = format!(
            "targets: {{ cluster: {{ uses: k8s, with: {{ kubeconfig: \"{own}\", namespace: {namespace}{target} }} }} }}\n{}{more}",
            self.pipeline
                .replace("DIRECTORY", &world.directory().to_string_lossy())
                .replace("NAMESPACE", namespace)
                .replace("KUBECTL", &kubectl.display().to_string())
                .replace("KUBECONFIG", &world.kubeconfig().display().to_string())
        );
        parse(&document, "pipeline.yaml".as_ref(), "/".as_ref(), &LoadOptions::default(), &registry())
            .unwrap_or_else(|error| panic!("{error}"))
    }
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
        self.case.read(self.cluster.kubeconfig(), world, "", "")
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
    sweep_on(upgrade_testbed::kubernetes::shared(), case, stride, at_least);
}

/// As [`sweep`], on another cluster.
pub(crate) fn sweep_on(cluster: Option<Cluster>, case: &Case, stride: u64, at_least: usize) {
    let Some(cluster) = cluster else { return };
    let report = Sweep::new(&On { case, cluster }).every(stride).run().unwrap_or_else(|failure| panic!("{failure}"));
    println!("{report:?}");
    assert!(report.cases >= at_least, "{report:?}");
}

/// Asks that each seeded defect is noticed: what a sweep passes proves something only then.
pub(crate) fn notices_every_seeded_defect(case: &Case) {
    notices_every_seeded_defect_on(upgrade_testbed::kubernetes::shared(), case);
}

/// As [`notices_every_seeded_defect`], on another cluster.
pub(crate) fn notices_every_seeded_defect_on(cluster: Option<Cluster>, case: &Case) {
    let Some(cluster) = cluster else { return };
    let case = On { case, cluster };
    for mutation in Mutation::ALL {
        let failure = Sweep::new(&case).with_mutation(mutation).run();
        let failure = failure.expect_err(&format!("{mutation:?} was not noticed"));
        println!("{mutation:?}: {failure}");
    }
}
