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
    planned_irreversible: Option<String>,
) -> DeferredBuild {
    let make = kind.make.clone();
    Arc::new(move |outputs| {
        let with = template::fill(&with, &|reference| output(outputs, reference)).map_err(|message| {
            StepError::permanent(message).with_hint("correct the `${steps.…}` in the step's `with`, or its `when`")
        })?;
        let step = make(with, &cx).map_err(build_error)?;
        // The plan took no undo into account; that one is possible after all changes nothing.
        Ok(match &planned_irreversible {
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use schemars::JsonSchema;
    use serde::{Deserialize, Serialize};
    use serde_json::json;

    use super::*;
    use crate::file::{LoadOptions, parse};
    use crate::pipeline::Pipeline;
    use crate::registry::Registry;
    use crate::step::{Prepared, Rollback, Step};

    #[derive(Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Toy {
        path: Option<String>,
        count: Option<u32>,
        #[serde(default)]
        lossy: bool,
    }

    #[async_trait]
    impl Step for Toy {
        const KIND: &'static str = "toy";
        type Undo = ();
        type Output = ();
        async fn prepare(&self, _: &Context) -> Result<Prepared<(), ()>, StepError> {
            Ok(Prepared::unchanged((), ""))
        }
        async fn apply(&self, _: &Context, _: &()) -> Result<(), StepError> {
            Ok(())
        }
        fn definition(&self) -> Value {
            json!(self)
        }
    }

    #[async_trait]
    impl Rollback for Toy {
        async fn rollback(&self, _: &Context, _: &(), _: Option<&()>) -> Result<(), StepError> {
            Ok(())
        }
    }

    fn pipeline(second: &str) -> Pipeline {
        let mut registry = Registry::new();
        registry.step("toy", "Does nothing.", |config: Toy, _| {
            if config.lossy || config.path.as_deref().is_some_and(|path| path.starts_with("/x")) {
                return Ok(AnyStep::irreversible(config, "it is lossy"));
            }
            Ok(AnyStep::reversible(config))
        });
        let text = format!(
            "upgrade: toys\nvars: {{ d: $ }}\nsteps:\n  - {{ id: a, uses: toy }}\n  - {{ id: b, uses: toy, {second} }}"
        );
        parse(&text, Path::new("p"), Path::new("/"), &LoadOptions::default(), &registry)
            .unwrap_or_else(|error| panic!("{error}"))
    }

    fn outputs() -> BTreeMap<StepId, Value> {
        [("a".parse().unwrap(), json!({ "dir": "/x", "n": 3, "yes": true, "list": [1, "two"] }))].into()
    }

    fn built(second: &str) -> Result<Value, StepError> {
        let pipeline = pipeline(second);
        let step = pipeline.step(&"b".parse().unwrap()).unwrap().build(&outputs())?;
        Ok(step.erased().definition())
    }

    #[test]
    fn outputs_are_filled_in_with_their_types() {
        let definition = built(
            "with: { path: '${d}${steps.a.output.dir}/${steps.a.output.list.1}-${steps.a.output.n}', count: '${steps.a.output.n}' }",
        );
        assert_eq!(definition.unwrap(), json!({ "path": "$/x/two-3", "count": 3, "lossy": false }));
    }

    #[test]
    fn what_does_not_fit_is_said_when_it_is_known() {
        for (with, message) in [
            ("count: '${steps.a.output.dir}'", "`count`: invalid type: string \"/x\", expected u32"),
            ("path: '${steps.a.output.dirr}'", "the output of step `a` has no `dirr`; it has: dir, n, yes, list"),
            (
                "path: 'x${steps.a.output.list}'",
                "`${steps.a.output.list}` is a list or a mapping; it cannot stand in a text",
            ),
            ("path: '${steps.a.output.dir}'", "step `b` turned out irreversible once its configuration was known"),
        ] {
            assert_eq!(built(&format!("with: {{ {with} }}")).unwrap_err().message(), message);
        }
    }

    #[test]
    fn what_may_be_irreversible_is_planned_so() {
        for yes in [true, false] {
            let pipeline = pipeline("with: { lossy: '${steps.a.output.lossy}' }");
            assert_eq!(pipeline.graph().pivot().map(StepId::as_str), Some("b"));
            let outputs = [("a".parse().unwrap(), json!({ "lossy": yes }))].into();
            let step = pipeline.step(&"b".parse().unwrap()).unwrap().build(&outputs).unwrap();
            assert_eq!(step.irreversible_reason(), Some("it is lossy"));
        }
    }

    #[test]
    fn conditions_are_asked_when_the_outputs_are_there() {
        for (when, holds) in [
            ("true", Some(true)),
            ("'false'", Some(false)),
            ("'${steps.a.output.yes}'", Some(true)),
            ("'${steps.a.output.n}'", None),
        ] {
            let pipeline = pipeline(&format!("when: {when}"));
            let node = pipeline.step(&"b".parse().unwrap()).unwrap();
            assert_eq!((node.when.as_ref().unwrap().holds)(&outputs()).ok(), holds, "{when}");
        }
    }
    #[cfg(feature = "testkit")]
    #[tokio::test]
    async fn a_check_is_made_when_it_is_asked() {
        #[derive(Deserialize, JsonSchema)]
        struct Says {
            text: String,
        }

        #[async_trait]
        impl Check for Says {
            async fn check(&self, _: &Context) -> Result<Verdict, CheckError> {
                Ok(Verdict::pass(&self.text))
            }
        }

        let mut registry = Registry::new();
        registry.step("toy", "Does nothing.", |config: Toy, _| Ok(AnyStep::reversible(config)));
        registry.check("says", "Says a text.", |config: Says, _| Ok(config));
        let text = "{ upgrade: toys, steps: [{ id: a, uses: toy }],
                      verify: [{ uses: says, with: { text: 'at ${steps.a.output.dir}' } }] }";
        let pipeline =
            parse(text, Path::new("p"), Path::new("/"), &LoadOptions::default(), &registry).expect("it loads");
        let check = &pipeline.verify[0].check;
        assert_eq!((check.kind(), check.definition()), ("says", json!({ "text": "at ${steps.a.output.dir}" })));
        let context = crate::testkit::TestContext::new("says");
        let error = check.check(&context.forward()).await.unwrap_err();
        assert_eq!(error.message(), "step `a` has no output");
        let context = context.output("a".parse().unwrap(), &json!({ "dir": "/x" }));
        assert_eq!(check.check(&context.forward()).await.unwrap().message, "at /x");
    }
}
