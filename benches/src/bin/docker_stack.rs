//! Twenty services as one unit, against Compose's own replacement of all of them.
//!
//! `cargo run --release -p upgrade-benches --bin docker_stack [ROUNDS [SERVICES]]`
//!
//! The services do not depend on each other. Theirs is `up --detach --force-recreate`; ours is a whole
//! run of `docker.compose` that moves the variable with the tag of all of them, from its first entry to
//! its commit, each gated (running is enough). They take turns on one project. A first round warms up.

use std::fmt::Write as _;
use std::time::Instant;

use serde_json::json;
use upgrade_benches::docker::{Place, compose, run_compose};
use upgrade_benches::runs::Runs;
use upgrade_benches::{Outcome, spread};
use upgrade_docker::steps::Compose;

fn main() -> Outcome<()> {
    let mut arguments = std::env::args().skip(1);
    let rounds: usize = arguments.next().map_or(Ok(3), |text| text.parse())?;
    let services: usize = arguments.next().map_or(Ok(20), |text| text.parse())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // As a task, so that the work runs where a service's would: on a worker of the runtime.
    runtime.block_on(async move { tokio::spawn(async move { compare(rounds, services).await }).await? })
}

async fn compare(rounds: usize, services: usize) -> Outcome<()> {
    let place = Place::take("stack")?;
    let runs = Runs::below(place.home())?;
    let argv = compose()?;
    let name = place.web("a", "0").trim_end_matches(":a").to_owned();
    place.web("b", "0");
    let mut text = "version: \"3.8\"\nservices:\n".to_owned();
    for number in 1..=services {
        write!(text, "  web{number}:\n    image: \"{name}:${{TAG}}\"\n")?;
    }
    let directory = place.project(&text)?;
    std::fs::write(directory.join(".env"), "TAG=a\n")?;
    run_compose(&argv, &place, &directory, &["up", "--detach"])?;

    println!("{services} services replaced ({rounds} rounds, {}):", argv.join(" "));
    let health: serde_json::Map<_, _> =
        (1..=services).map(|number| (format!("web{number}"), json!({ "stable": "0s", "every": "50ms" }))).collect();
    let mut rows: Vec<[f64; 2]> = Vec::new();
    for round in 0..=rounds {
        let began = Instant::now();
        tokio::task::block_in_place(|| {
            run_compose(&argv, &place, &directory, &["up", "--detach", "--force-recreate"])
        })?;
        let theirs = began.elapsed();
        let config = json!({
            "target": "engine", "directory": directory, "env": { "TAG": (["b", "a"][round % 2]) }, "pull": "never",
            "compose": argv, "health": health,
        });
        let context = place.context(place.engine().host())?;
        let ours = runs.commit(Compose::from_config(serde_json::from_value(config)?, &context)?).await?;
        // The first round warms up.
        if round > 0 {
            rows.push([theirs, ours].map(|time| time.as_secs_f64()));
        }
    }
    let of = |value: fn(&[f64; 2]) -> f64| spread(rows.iter().map(value).collect());
    println!("  up --force-recreate  {} s", of(|row| row[0]));
    println!("  docker.compose       {} s", of(|row| row[1]));
    println!("  ours / theirs        {} ×   (target ≤ 1.0)", of(|row| row[1] / row[0]));
    Ok(())
}
