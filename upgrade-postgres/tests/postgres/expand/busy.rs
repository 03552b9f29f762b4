//! The sweep of crashes, failures and repetitions, under writers through both shapes.

#![cfg(test)]

use std::sync::{Arc, Mutex};

use serde_json::json;
use tokio::runtime::Runtime;
use upgrade_core::file::{LoadOptions, parse};
use upgrade_core::pipeline::Pipeline;
use upgrade_core::testkit::{Scenario, Sweep};
use upgrade_testbed::postgres::{Database, Version};

use super::live::{Model, RETYPED, Traffic, Writers, setup, wrong};
use crate::world::{database, registry, target_yaml};

const ROWS: i32 = 400;

/// A table that is never left alone.
struct Busy;

struct World {
    traffic: Arc<Traffic>,
    state: Mutex<State>,
    /// Before the database: the writers go first.
    runtime: Option<Runtime>,
    database: Database,
}

struct State {
    writers: Option<Writers>,
    seed: u64,
}

impl World {
    fn start(&self, models: Vec<Model>) {
        let mut state = self.state.lock().unwrap();
        state.seed += 1000;
        let seed = state.seed;
        let _guard = self.runtime.as_ref().unwrap().enter();
        state.writers = Some(Writers::start(&self.database, RETYPED, models, self.traffic.clone(), seed));
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Without waiting for what a writer is told when its database is gone.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Scenario for Busy {
    type World = World;

    fn fresh(&self) -> World {
        let database = database(Version::V15).unwrap();
        let models = setup(&database, ROWS);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let state = Mutex::new(State { writers: None, seed: 0 });
        let world = World { traffic: Arc::new(Traffic::of(ROWS)), state, runtime: Some(runtime), database };
        world.start(models);
        world
    }

    fn pipeline(&self, world: &World) -> Pipeline {
        let mut with = (RETYPED.change)();
        with.as_object_mut()
            .unwrap()
            .extend(json!({ "target": "db", "table": "accounts" }).as_object().unwrap().clone());
        let target = target_yaml(&world.database.url());
        let document = format!(
            "upgrade: busy\ntargets: {{ db: {target} }}\nsteps: [{{ id: retyped, uses: postgres.expand, with: {with} }}]"
        );
        parse(&document, "pipeline.yaml".as_ref(), "/".as_ref(), &LoadOptions::default(), &registry())
            .unwrap_or_else(|error| panic!("{error}"))
    }

    /// Rows come and go; what is to be seen is that each is as its writer knows it.
    fn observe(&self, world: &World) -> String {
        let writers = world.state.lock().unwrap().writers.take().unwrap();
        let schema = world.database.schema();
        let read = if schema.contains("exact numeric") { RETYPED.read } else { "amount::int8" };
        let (models, wrong) = world.runtime.as_ref().unwrap().block_on(async {
            let models = writers.stop().await;
            let wrong = wrong(&world.database.url(), read, &models, &world.traffic).await;
            (models, wrong)
        });
        world.start(models);
        format!("{schema}\n{wrong:#?}")
    }
}

#[test]
#[ignore = "a campaign"]
fn campaign_no_write_is_lost_in_any_case_of_the_sweep() {
    if database(Version::V15).is_none() {
        return;
    }
    let report = Sweep::new(&Busy).run().unwrap_or_else(|failure| panic!("{failure}"));
    println!("{report:?}");
    assert!(report.cases >= 50, "{report:?}");
}
