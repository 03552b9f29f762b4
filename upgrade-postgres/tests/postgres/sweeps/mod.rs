//! Every step of this crate lived through crashes, failures, repetitions and foreign changes, on
//! real databases; and the seeded defects that the sweeps must notice.

#![cfg(test)]

mod expand;
mod foreign_key;
mod index;
mod migrate;
mod sql;
mod writes;

use upgrade_core::file::{LoadOptions, parse};
use upgrade_core::names::StepId;
use upgrade_core::pipeline::Pipeline;
use upgrade_core::testkit::{Mutation, Scenario, Sweep};
use upgrade_testbed::postgres::{Database, Server, Version, shared};

use crate::world::{registry, target_yaml};

/// Describes one sweep: a database as it is before, the steps that change it, and what somebody
/// else may do to it meanwhile.
pub(crate) struct Case {
    /// Makes the database as it is before.
    pub(crate) setup: &'static str,
    /// The rest of a pipeline file, whose target `db` is the database.
    pub(crate) pipeline: &'static str,
    /// Changes what a step works on, as somebody else; of a step that is not named, nothing.
    pub(crate) interfere: fn(&Database, &str) -> bool,
    /// Tells whether that change is still there.
    pub(crate) survived: fn(&Database, &str) -> bool,
    /// Writes down what is in the tables; without what no two runs have in common.
    pub(crate) contents: fn(&Database) -> String,
    /// Writes down what is to be seen beside schema and contents.
    pub(crate) observe: fn(&Database) -> String,
}

impl Case {
    pub(crate) const fn new(setup: &'static str, pipeline: &'static str) -> Self {
        Self {
            setup,
            pipeline,
            interfere: |_, _| false,
            survived: |_, _| true,
            contents: Database::contents,
            observe: |_| String::new(),
        }
    }
}

/// Puts a case on a server.
pub(crate) struct On<'a> {
    case: &'a Case,
    server: Server,
}

impl Scenario for On<'_> {
    type World = Database;

    fn fresh(&self) -> Database {
        let database = self.server.database();
        database.execute(self.case.setup);
        database
    }

    fn pipeline(&self, world: &Database) -> Pipeline {
        let document = format!("targets: {{ db: {} }}\n{}", target_yaml(&world.url()), self.case.pipeline);
        parse(&document, "pipeline.yaml".as_ref(), "/".as_ref(), &LoadOptions::default(), &registry())
            .unwrap_or_else(|error| panic!("{error}"))
    }

    fn observe(&self, world: &Database) -> String {
        format!("{}\n{}\n{}", world.schema(), (self.case.contents)(world), (self.case.observe)(world))
    }

    fn interfere(&self, world: &Database, step: &StepId) -> bool {
        (self.case.interfere)(world, step.as_str())
    }

    fn survived(&self, world: &Database, step: &StepId) -> bool {
        (self.case.survived)(world, step.as_str())
    }
}

/// Lives through a case on one version.
pub(crate) fn sweep(case: &Case, version: Version, at_least: usize) {
    let Some(server) = shared(version) else { return };
    let report = Sweep::new(&On { case, server }).run().unwrap_or_else(|failure| panic!("{failure}"));
    println!("PostgreSQL {version}: {report:?}");
    assert!(report.cases >= at_least, "{report:?}");
}

/// Asks that each seeded defect is noticed: what a sweep passes proves something only then.
pub(crate) fn notices_every_seeded_defect(case: &Case) {
    let Some(server) = shared(Version::V15) else { return };
    let case = On { case, server };
    for mutation in Mutation::ALL {
        let failure = Sweep::new(&case).with_mutation(mutation).run();
        let failure = failure.expect_err(&format!("{mutation:?} was not noticed"));
        println!("{mutation:?}: {failure}");
    }
}
