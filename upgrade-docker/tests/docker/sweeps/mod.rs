//! Every step of this crate lived through crashes, failures, repetitions and foreign changes, on
//! real engines; and the seeded defects that the sweeps must notice.

#![cfg(test)]

mod blue_green;
mod compose;
mod container;
mod exec;
mod image;
mod image_sources;
mod run;
mod volume_backup;
mod volume_restore;

use std::sync::{Mutex, PoisonError};

use upgrade_core::file::{LoadOptions, parse};
use upgrade_core::names::StepId;
use upgrade_core::pipeline::Pipeline;
use upgrade_core::testkit::{Mutation, Scenario, Sweep, SweepFailure, SweepReport};
use upgrade_testbed::docker::{Engine, Image};

use crate::world::{Corner, registry};

/// Describes one sweep: a corner of an engine as it is before, the steps that change it, and what
/// somebody else may do to it meanwhile.
pub(crate) struct Case {
    /// Makes what is there before.
    pub(crate) setup: fn(&Corner),
    /// The rest of a pipeline file, whose target `engine` is the engine; `PREFIX` stands for the
    /// corner's prefix.
    pub(crate) pipeline: &'static str,
    /// Writes down all of the corner that must be right.
    pub(crate) observe: fn(&Corner) -> String,
    /// Changes what a step works on, as somebody else; of a step that is not named, nothing.
    pub(crate) interfere: fn(&Corner, &str) -> bool,
    /// Tells whether that change is still there.
    pub(crate) survived: fn(&Corner, &str) -> bool,
}

/// Holds the image of all cases of a test, built once.
pub(crate) struct Base(Mutex<Option<Corner>>);

impl Base {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// Gives the image the name `image:1` in a corner.
    pub(crate) fn tag(&self, corner: &Corner, image: impl FnOnce() -> Image) {
        let mut base = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let base = base.get_or_insert_with(|| {
            let base = Corner::of(&corner.engine, "base");
            image().build(&base.engine, &base.name("image:1"));
            base
        });
        corner.engine.docker(["tag", &base.name("image:1"), &corner.name("image:1")]);
    }

    /// Removes it: a static is never dropped.
    pub(crate) fn clear(&self) {
        drop(self.0.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

/// Puts a case on an engine.
pub(crate) struct On<'a> {
    case: &'a Case,
    engine: Engine,
}

impl Scenario for On<'_> {
    type World = Corner;

    fn fresh(&self) -> Corner {
        let corner = Corner::of(&self.engine, "sweep");
        (self.case.setup)(&corner);
        corner
    }

    fn pipeline(&self, world: &Corner) -> Pipeline {
        let document = format!(
            "targets: {{ engine: {{ uses: docker, with: {{ host: \"{}\" }} }} }}\n{}",
            world.engine.host(),
            self.case.pipeline.replace("PREFIX", &world.prefix)
        );
        parse(&document, "pipeline.yaml".as_ref(), "/".as_ref(), &LoadOptions::default(), &registry())
            .unwrap_or_else(|error| panic!("{error}"))
    }

    fn observe(&self, world: &Corner) -> String {
        (self.case.observe)(world).replace(&world.prefix, "PREFIX")
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
    let Some(engine) = upgrade_testbed::docker::shared() else { return };
    let report = Sweep::new(&On { case, engine }).every(stride).run().unwrap_or_else(|failure| panic!("{failure}"));
    println!("{report:?}");
    assert!(report.cases >= at_least, "{report:?}");
}

/// Lives through the troubles between two calls alone, where another sweep dies inside the same calls.
pub(crate) fn sweep_between_calls(case: &Case, stride: u64, at_least: usize) {
    let Some(engine) = upgrade_testbed::docker::shared() else { return };
    let sweep = On { case, engine };
    let report = Sweep::new(&sweep).every(stride).only_between_calls().run();
    let report = report.unwrap_or_else(|failure| panic!("{failure}"));
    assert!(report.cases >= at_least, "{report:?}");
}

/// Asks that each seeded defect is noticed: what a sweep passes proves something only then.
pub(crate) fn notices_every_seeded_defect(case: &Case) {
    let Some(engine) = upgrade_testbed::docker::shared() else { return };
    let case = On { case, engine };
    for mutation in Mutation::ALL {
        let failure = Sweep::new(&case).with_mutation(mutation).run();
        noticed(mutation, failure);
    }
}

/// Asks that a sweep failed for its defect, and not for a machine that is too slow to end a run in time.
pub(crate) fn noticed(mutation: Mutation, swept: Result<SweepReport, SweepFailure>) {
    let failure = swept.expect_err(&format!("{mutation:?} was not noticed"));
    println!("{mutation:?}: {failure}");
    assert!(!(failure.case == "undisturbed" && failure.message.contains("it hangs")), "{mutation:?}: {failure}");
}
