//! Steps, checks and conditions whose configuration waits for the outputs of earlier steps.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use serde_json::Value;

use super::template::{self, OutputRef};
use crate::check::Check;
use crate::context::Context;
use crate::erased::AnyStep;
use crate::error::{CheckError, StepError};
use crate::names::StepId;
use crate::pipeline::{DeferredBuild, When};
use crate::registry::{BuildContext, Kind, Make, MakeError};
use crate::verdict::Verdict;

fn output(outputs: &BTreeMap<StepId, Value>, reference: &OutputRef<'_>) -> Result<Value, String> {
    let found = outputs.iter().find(|(step, _)| step.as_str() == reference.step);
    let (_, value) = found.ok_or_else(|| format!("step `{}` has no output: it did not run", reference.step))?;
    selected(value, reference)
}

fn selected(value: &Value, reference: &OutputRef<'_>) -> Result<Value, String> {
    template::select(value, &reference.path).cloned().ok_or_else(|| {
        let known: Vec<&str> = value.as_object().into_iter().flatten().map(|(key, _)| key.as_str()).collect();
        let path = reference.path.join(".");
        format!("the output of step `{}` has no `{path}`; it has: {}", reference.step, known.join(", "))
    })
}

fn build_error(error: MakeError) -> StepError {
    match error {
        MakeError::Shape { message, path } if path.is_empty() => StepError::permanent(message),
        MakeError::Shape { message, path } => StepError::permanent(format!("`{}`: {message}", path.join("."))),
        MakeError::Build(error) => match error.hint {
            Some(hint) => StepError::permanent(error.message).with_hint(hint),
            None => StepError::permanent(error.message),
        },
    }
}

/// Returns what builds a step from `with` once the outputs are there.
pub(super) fn step(
    kind: &Kind<AnyStep>,
    with: Value,
    cx: BuildContext,
    not_to_be_undone: Option<String>,
) -> DeferredBuild {
    let make = kind.make.clone();
    Arc::new(move |outputs| {
        let with = template::fill(&with, &|reference| output(outputs, reference)).map_err(|message| {
            StepError::permanent(message).with_hint("correct the `${steps.…}` in the step's `with`, or its `when`")
        })?;
        let step = make(with, &cx).map_err(build_error)?;
        Ok(match &not_to_be_undone {
            Some(reason) => step.into_irreversible(reason.clone()),
            None => step,
        })
    })
}

/// Returns what decides whether a step runs, from a text that refers to outputs.
pub(super) fn condition(text: String) -> When {
    let template = Value::String(text.clone());
    When {
        text,
        holds: Arc::new(move |outputs| {
            let value = template::fill(&template, &|reference| output(outputs, reference))
                .map_err(|message| StepError::permanent(message).with_hint("correct the step's `when`"))?;
            truth(&value).ok_or_else(|| {
                StepError::permanent("`when` is neither true nor false")
                    .with_hint("let it refer to an output that is true or false")
            })
        }),
    }
}

/// Returns a condition that is known already.
pub(super) fn constant(holds: bool) -> When {
    When { text: holds.to_string(), holds: Arc::new(move |_| Ok(holds)) }
}

/// Reads true or false, as a value or as a text.
pub(super) fn truth(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(value) => Some(*value),
        Value::String(text) => text.parse().ok(),
        _ => None,
    }
}

/// Asks a check that is made when the outputs it refers to are there.
pub(super) struct DeferredCheck {
    pub(super) name: String,
    pub(super) make: Make<Arc<dyn Check>>,
    pub(super) with: Value,
    pub(super) cx: BuildContext,
}

#[async_trait]
impl Check for DeferredCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let find = |reference: &OutputRef<'_>| {
            let step = StepId::try_from(reference.step).map_err(|error| error.to_string())?;
            let value: Value = cx.output(&step).map_err(|error| error.message().to_owned())?;
            selected(&value, reference)
        };
        let with = template::fill(&self.with, &find).map_err(StepError::permanent)?;
        let check = (self.make)(with, &self.cx).map_err(build_error)?;
        check.check(cx).await
    }

    fn kind(&self) -> &str {
        &self.name
    }

    fn definition(&self) -> Value {
        self.with.clone()
    }
}
