//! The sweeps on the core's own toy world, and the seeded defects that they must notice.

#![cfg(test)]
#![cfg(feature = "testkit")]

use upgrade_core::names::StepId;
use upgrade_core::pipeline::Pipeline;
use upgrade_core::testkit::toy::{SetText, TextIs, ToyWorld};
use upgrade_core::testkit::{Mutation, Scenario, Sweep};

/// A diamond: `b` and `c` side by side between `a` and `d`, and two steps on the same text.
struct Diamond;

impl Scenario for Diamond {
    type World = ToyWorld;

    fn fresh(&self) -> ToyWorld {
        ToyWorld::new([("a", "old"), ("b", "old"), ("kept", "as it is"), ("done", "already")])
    }

    fn pipeline(&self, world: &ToyWorld) -> Pipeline {
        Pipeline::builder("diamond")
            .check("kept", TextIs::new(world, "kept", "as it is"))
            .step("a", SetText::new(world, "a", "new"))
            .step_with("b", SetText::new(world, "b", "new"), |step| step.needs(["a"]))
            .step_with("c", SetText::new(world, "c", "made"), |step| step.needs(["a"]))
            .step_with("d", SetText::new(world, "a", "newest"), |step| step.needs(["b", "c"]))
            .step("done", SetText::new(world, "done", "already"))
            .verify("newest", TextIs::new(world, "a", "newest"))
            .build()
            .unwrap()
    }

    fn observe(&self, world: &ToyWorld) -> String {
        world.observe()
    }

    fn interfere(&self, world: &ToyWorld, step: &StepId) -> bool {
        // Steps `a` and `d` share a text: what is foreign to one is the other's own.
        matches!(step.as_str(), "b" | "c") && {
            world.put(step.as_str(), Some("somebody else's"));
            true
        }
    }

    fn survived(&self, world: &ToyWorld, step: &StepId) -> bool {
        world.get(step.as_str()).as_deref() == Some("somebody else's")
    }
}

#[test]
fn every_crash_failure_and_repetition_ends_before_or_after() {
    let report = Sweep::new(&Diamond).run().unwrap_or_else(|failure| panic!("{failure}"));
    assert!(report.cases > 150, "{report:?}");
}

#[test]
fn the_sweep_notices_every_seeded_defect() {
    for mutation in Mutation::ALL {
        let failure = Sweep::new(&Diamond).with_mutation(mutation).run();
        let failure = failure.expect_err(&format!("{mutation:?} was not noticed"));
        println!("{mutation:?}: {failure}");
    }
}
