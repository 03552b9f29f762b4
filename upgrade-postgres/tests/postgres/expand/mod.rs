//! `postgres.expand`: what the sweeps cannot show.

#![cfg(test)]

mod busy;
mod live;
mod refusals;
mod shapes;

use serde_json::{Value, json};
use upgrade_core::error::{Class, StepError};
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::testkit::TestContext;
use upgrade_postgres::steps::{Expand, ExpandConfig, ExpandOutput, ExpandUndo};
use upgrade_testbed::postgres::Database;

use crate::world::build_context;

/// Holds one step of a run of its own.
struct Run {
    step: Expand,
    test: TestContext,
    undo: Option<ExpandUndo>,
}

impl Run {
    fn new(database: &Database, table: &str, change: &Value) -> Self {
        let mut with = json!({ "target": "db", "table": table });
        with.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let config: ExpandConfig = serde_json::from_value(with).unwrap();
        let step = Expand::from_config(config, &build_context(&database.url())).unwrap();
        Self { step, test: TestContext::new("expand"), undo: None }
    }

    async fn prepare(&mut self) -> Result<Prepared<ExpandUndo, ExpandOutput>, StepError> {
        let prepared = self.step.prepare(&self.test.forward()).await?;
        if let Prepared::Change { undo, .. } = &prepared {
            // As it comes back from a journal.
            self.undo = Some(serde_json::from_value(serde_json::to_value(undo).unwrap()).unwrap());
        }
        Ok(prepared)
    }

    fn undo(&self) -> &ExpandUndo {
        self.undo.as_ref().unwrap()
    }

    async fn apply(&mut self) -> Result<ExpandOutput, StepError> {
        if self.undo.is_none() {
            self.prepare().await?;
        }
        self.step.apply(&self.test.forward(), self.undo()).await
    }

    async fn rollback(&self) -> Result<(), StepError> {
        self.step.rollback(&self.test.back(), self.undo(), None).await
    }

    async fn commit(&self) -> Result<(), StepError> {
        self.step.commit(&self.test.commit(), self.undo()).await
    }

    /// Makes a call again and again, whatever cuts it off, as a run that is resumed does.
    async fn until<T>(&self, mut call: impl AsyncFnMut(&Self) -> Result<T, StepError>) -> T {
        for _ in 0..1000 {
            match call(self).await {
                Ok(done) => return done,
                Err(error) => {
                    assert_ne!(error.class(), Class::Permanent, "{error}: {:?} {:?}", error.causes(), error.detail());
                    while self.step.settle(&self.test.forward(), self.undo()).await.is_err() {}
                }
            }
        }
        panic!("it does not end");
    }
}

/// Asks that nothing of ours is left.
fn nothing_left(database: &Database) {
    let schema = database.schema();
    assert!(!schema.contains("upgrade"), "{schema}");
}
