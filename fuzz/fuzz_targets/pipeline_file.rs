//! Reads arbitrary text as a pipeline file: a pipeline or a message that shows the line, never a panic.
#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use async_trait::async_trait;
use libfuzzer_sys::fuzz_target;
use schemars::JsonSchema;
use serde::Deserialize;
use upgrade_core::AnyStep;
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::{CheckError, StepError};
use upgrade_core::file::{LoadOptions, parse};
use upgrade_core::registry::Registry;
use upgrade_core::step::{Prepared, Step};
use upgrade_core::units::{Bytes, Share, Span};
use upgrade_core::verdict::Verdict;

/// Has a field of every sort that a configuration can have.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)]
struct Config {
    path: String,
    list: Option<Vec<String>>,
    number: Option<i64>,
    size: Option<Bytes>,
    share: Option<Share>,
    span: Option<Span>,
}

struct Nothing;

#[async_trait]
impl Step for Nothing {
    const KIND: &'static str = "t.step";
    type Undo = ();
    type Output = ();

    async fn prepare(&self, _: &Context) -> Result<Prepared<(), ()>, StepError> {
        Ok(Prepared::unchanged((), "nothing to do"))
    }

    async fn apply(&self, _: &Context, _: &()) -> Result<(), StepError> {
        Ok(())
    }
}

#[async_trait]
impl Check for Nothing {
    async fn check(&self, _: &Context) -> Result<Verdict, CheckError> {
        Ok(Verdict::pass("nothing asked"))
    }
}

static REGISTRY: LazyLock<Registry> = LazyLock::new(|| {
    let mut registry = Registry::new();
    registry.step("t.step", "does nothing", |_: Config, _| Ok(AnyStep::irreversible(Nothing, "it is a trial")));
    registry.check("t.check", "asks nothing", |_: Config, _| Ok(Nothing));
    registry
});

fuzz_target!(|text: &str| {
    match parse(text, Path::new("fuzz.yaml"), Path::new("/nowhere"), &LoadOptions::default(), &REGISTRY) {
        Ok(pipeline) => drop(pipeline.define()),
        // What is wrong must also be possible to show.
        Err(error) => drop((error.render(true), error.render(false), error.to_string())),
    }
});
