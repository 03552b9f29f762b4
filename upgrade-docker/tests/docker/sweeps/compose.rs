//! `docker.compose`: a service that gets another image and another variable, in one step or in two.

#![cfg(test)]

use upgrade_core::file::{LoadOptions, parse};
use upgrade_core::names::StepId;
use upgrade_core::pipeline::Pipeline;
use upgrade_core::testkit::{Mutation, Scenario, Sweep};
use upgrade_testbed::docker::{self, Engine, Image};

use crate::stack::Stack;
use crate::world::{Corner, registry};

/// Puts projects of one file on an engine, their images made once for all of them.
struct Projects {
    engine: Engine,
    images: Corner,
    /// What Compose is told to make what is there before.
    before: &'static [&'static str],
    steps: &'static str,
}

// Without a network of its own a project is made in half the time; without a volume of its own, its
// containers carry the same hash in every world.
const FILE: &str = r#"
services:
  web:
    image: "IMAGES-web:1"
    network_mode: none
    environment: { LEVEL: "${LEVEL}" }
"#;

const ONE: &str = r#"
  - id: web
    uses: docker.compose
    with:
      target: engine
      directory: DIRECTORY
      compose: [docker-compose]
      pull: never
      images: { web: "IMAGES-web:2" }
      health: { web: { stable: 0s, every: 50ms } }
"#;

const TWO: &str = r#"
  - id: image
    uses: docker.compose
    with: { target: engine, directory: DIRECTORY, compose: [docker-compose], pull: never, images: { web: "IMAGES-web:2" } }
  - id: variable
    uses: docker.compose
    with: { target: engine, directory: DIRECTORY, compose: [docker-compose], pull: never, env: { LEVEL: "2" } }
"#;

impl Projects {
    fn new(what: &str, before: &'static [&'static str], steps: &'static str) -> Option<Self> {
        docker::compose()?;
        let images = Corner::shared(what)?;
        for tag in ["1", "2"] {
            let image = Image::shell("exec sleep 1000").with(&format!("ENV RELEASE={tag}"));
            image.build(&images.engine, &images.name(&format!("web:{tag}")));
        }
        Some(Self { engine: images.engine.clone(), images, before, steps })
    }

    fn fill(&self, text: &str, stack: Option<&Stack>) -> String {
        let directory = stack.map(|stack| stack.directory.display().to_string()).unwrap_or_default();
        text.replace("IMAGES", &self.images.prefix).replace("DIRECTORY", &directory)
    }
}

impl Scenario for Projects {
    type World = Stack;

    fn fresh(&self) -> Stack {
        let stack = Stack::on(Corner::of(&self.engine, "sweep"), &self.fill(FILE, None));
        stack.write(".env", "LEVEL=1\n");
        stack.compose(self.before);
        stack
    }

    fn pipeline(&self, stack: &Stack) -> Pipeline {
        let document = format!(
            "upgrade: shop\ntargets: {{ engine: {{ uses: docker, with: {{ host: \"{}\" }} }} }}\nsteps:{}",
            self.engine.host(),
            self.fill(self.steps, Some(stack))
        );
        parse(&document, "pipeline.yaml".as_ref(), "/".as_ref(), &LoadOptions::default(), &registry())
            .unwrap_or_else(|error| panic!("{error}"))
    }

    fn observe(&self, stack: &Stack) -> String {
        stack.picture()
    }

    /// Somebody runs Compose by hand with a value that no file says.
    fn interfere(&self, stack: &Stack, _step: &StepId) -> bool {
        stack.compose_with(&[("LEVEL", "9")], self.before);
        true
    }

    fn survived(&self, stack: &Stack, _step: &StepId) -> bool {
        stack.containers()["web_1"]["env"].to_string().contains("LEVEL=9")
    }
}

#[test]
fn a_project_is_upgraded_whole_or_not_at_all() {
    let Some(projects) = Projects::new("sweep-one", &["up", "--detach"], ONE) else { return };
    let report = Sweep::new(&projects).every(30).only_between_calls().run();
    let report = report.unwrap_or_else(|failure| panic!("{failure}"));
    println!("{report:?}");
    assert!(report.cases >= 9, "{report:?}");
}

#[test]
#[ignore = "minutes: scripts/test --full"]
fn campaign_a_project_is_upgraded_whole_or_not_at_all() {
    let Some(projects) = Projects::new("sweep-all", &["up", "--detach"], ONE) else { return };
    let report = Sweep::new(&projects).run().unwrap_or_else(|failure| panic!("{failure}"));
    println!("{report:?}");
    assert!(report.cases >= 25, "{report:?}");
}

#[test]
#[ignore = "minutes: scripts/test --full"]
fn campaign_every_seeded_defect_is_noticed() {
    let Some(projects) = Projects::new("sweep-two", &["up", "--no-start"], TWO) else { return };
    for mutation in Mutation::ALL {
        let failure = Sweep::new(&projects).every(30).with_mutation(mutation).run();
        super::noticed(mutation, failure);
    }
}
