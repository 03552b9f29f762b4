//! A step that changes nothing, with all that a change needs.

use async_trait::async_trait;
use serde_json::{Value, json};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::step::{Prepared, Rollback, Step};

/// Changes nothing, with an undo record and an output.
pub struct Nothing;

#[async_trait]
impl Step for Nothing {
    const KIND: &'static str = "bench.nothing";
    type Undo = u64;
    type Output = u64;

    async fn prepare(&self, _cx: &Context) -> Result<Prepared<u64, u64>, StepError> {
        Ok(Prepared::change(1, []))
    }

    async fn apply(&self, _cx: &Context, undo: &u64) -> Result<u64, StepError> {
        Ok(*undo)
    }

    fn definition(&self) -> Value {
        json!({})
    }
}

#[async_trait]
impl Rollback for Nothing {
    async fn rollback(&self, _cx: &Context, _undo: &u64, _output: Option<&u64>) -> Result<(), StepError> {
        Ok(())
    }
}

/// Names the step with a number.
pub fn name(at: usize) -> String {
    format!("step-{at:05}")
}
