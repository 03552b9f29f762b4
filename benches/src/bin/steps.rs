//! Steps through the executor and the file journal against bare syncs, in one run.
//!
//! `cargo run --release -p upgrade-benches --bin steps [DIRECTORY]`
//!
//! The steps do nothing but have an undo record and an output: all the time is the transaction's.
//! Bare appends and runs take turns, and the median of the rounds' ratios counts.

use std::fs::OpenOptions;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use upgrade_benches::nothing::{Nothing, name};
use upgrade_benches::{Outcome, append_raw, median, spread};
use upgrade_core::executor::{Executor, Interrupt, Outcome as Ending, RunOptions};
use upgrade_core::journal::FileJournal;
use upgrade_core::pipeline::Pipeline;

const ROUNDS: usize = 15;
const APPENDS: usize = 100;
const SEQUENTIAL: usize = 500;
const ABREAST: usize = 2000;
const WIDTH: usize = 100;

fn main() -> Outcome<()> {
    let directory = std::env::args().nth(1).map_or_else(std::env::temp_dir, Into::into);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // As a task, so that the work runs where a service's would: on a worker of the runtime.
    runtime.block_on(async move { tokio::spawn(async move { compare(&directory).await }).await? })
}

async fn compare(directory: &Path) -> Outcome<()> {
    let home = tempfile::tempdir_in(directory)?;
    println!("durable steps a second ({ROUNDS} rounds, on {})", directory.display());
    let raw = OpenOptions::new().create(true).append(true).open(home.path().join("raw"))?;
    let line = [b'x'; 256];
    let executor = Executor::new(Arc::new(FileJournal::open(home.path().join("journal"))?));
    let one_by_one = steps(SEQUENTIAL, 1)?;
    let abreast = steps(ABREAST, WIDTH)?;

    let mut times: Vec<[f64; 3]> = Vec::new();
    for round in 0..=ROUNDS {
        let time = [
            append_raw(&raw, &line, APPENDS)?.as_secs_f64() / APPENDS as f64,
            run(&executor, &one_by_one).await?.as_secs_f64() / SEQUENTIAL as f64,
            run(&executor, &abreast).await?.as_secs_f64() / ABREAST as f64,
        ];
        // The first round warms up.
        if round > 0 {
            times.push(time);
        }
    }
    let names = ["append + fdatasync", "a step, one after another", "a step, 100 side by side"];
    for (place, name) in names.iter().enumerate() {
        let each = median(times.iter().map(|time| time[place]).collect());
        println!("  {name:30} {:8.0} /s   {:7.1} µs each", 1.0 / each, each * 1e6);
    }
    let ratio = |over: usize, under: usize| spread(times.iter().map(|time| time[over] / time[under]).collect());
    println!("  one after another / raw        {} ×   (target ≥ 0.45)", ratio(0, 1));
    println!("  side by side / one by one      {} ×   (target ≥ 8)", ratio(1, 2));
    Ok(())
}

/// A pipeline of steps that follow each other if `width` is one, else need nothing.
fn steps(count: usize, width: usize) -> Outcome<Pipeline> {
    let mut builder = Pipeline::builder("bench");
    if width > 1 {
        builder = builder.max_parallel(width);
    }
    for at in 0..count {
        let needs = at.checked_sub(1).filter(|_| width == 1).map(name);
        builder = builder.step_with(name(at), Nothing, |options| options.needs(needs));
    }
    Ok(builder.build()?)
}

async fn run(executor: &Executor, pipeline: &Pipeline) -> Outcome<Duration> {
    let start = Instant::now();
    let report = executor.run(pipeline, &RunOptions::default(), &Interrupt::new()).await?;
    match report.outcome {
        Ending::Committed => Ok(start.elapsed()),
        other => Err(format!("the run ended as {other:?}").into()),
    }
}
