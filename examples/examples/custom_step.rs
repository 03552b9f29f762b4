//! Runs a step and a check of one's own (`src/point_link.rs`), once to the end and once back.
//!
//! cargo run -p upgrade-examples --example custom_step

use std::error::Error;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use upgrade_core::executor::{Executor, Interrupt, Outcome, RunOptions};
use upgrade_core::journal::MemoryJournal;
use upgrade_core::pipeline::{Pipeline, PipelineError};
use upgrade_examples::{LeadsTo, PointLink};

fn pipeline(directory: &Path, expected: &str) -> Result<Pipeline, PipelineError> {
    let link = directory.join("dataset");
    Pipeline::builder("dataset")
        .to("2.0.0")
        .step("link", PointLink { link: link.clone(), target: "dataset-2".into() })
        .verify("content", LeadsTo { link, text: expected.to_owned() })
        .build()
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let directory = tempfile::tempdir()?;
    let link = directory.path().join("dataset");
    fs::write(directory.path().join("dataset-1"), "one")?;
    fs::write(directory.path().join("dataset-2"), "two")?;
    std::os::unix::fs::symlink("dataset-1", &link)?;
    let executor = Executor::new(Arc::new(MemoryJournal::new()));

    // The verification does not find what it expects: the step is undone.
    let pipeline_back = pipeline(directory.path(), "three")?;
    let report = executor.run(&pipeline_back, &RunOptions::default(), &Interrupt::new()).await?;
    assert!(matches!(report.outcome, Outcome::RolledBack { .. }), "{report:?}");
    assert_eq!(fs::read_to_string(&link)?, "one");

    let pipeline = pipeline(directory.path(), "two")?;
    let report = executor.run(&pipeline, &RunOptions::default(), &Interrupt::new()).await?;
    assert_eq!(report.outcome, Outcome::Committed);
    assert_eq!(fs::read_to_string(&link)?, "two");
    println!("rolled back once, then committed: {}", report.run);
    Ok(())
}
