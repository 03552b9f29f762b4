//! How long it takes from a gate that failed until the old container serves again.
//!
//! `cargo run --release -p upgrade-benches --bin docker_rollback [ROUNDS]`
//!
//! `docker.container` brings an image that never serves: once a program that ignores its stop signal,
//! with a grace of two seconds, and once one that ends at once. Counted from the moment when the
//! failure is in the journal to the first answer of the old container. A first round warms up.

use std::time::Instant;

use serde_json::json;
use upgrade_benches::docker::traffic::Traffic;
use upgrade_benches::docker::{Place, Reached, free_port};
use upgrade_benches::runs::Runs;
use upgrade_benches::{Outcome, spread};
use upgrade_docker::steps::Container;
use upgrade_testbed::docker::Image;

const GRACE: &str = "2";

fn main() -> Outcome<()> {
    let rounds: usize = std::env::args().nth(1).map_or(Ok(7), |text| text.parse())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // As a task, so that the work runs where a service's would: on a worker of the runtime.
    runtime.block_on(async move {
        for reached in [Reached::Directly, Reached::Published] {
            tokio::spawn(measure(reached, rounds)).await??;
        }
        Ok(())
    })
}

async fn measure(reached: Reached, rounds: usize) -> Outcome<()> {
    let place = Place::take("rollback")?;
    let runs = Runs::below(place.home())?;
    let (port, name) = (free_port()?, place.name("web"));
    let image = place.web("good", "0");
    let ignoring = Image::shell("trap '' TERM; while :; do sleep 1; done").with("STOPSIGNAL SIGTERM");
    let bad = [place.image("ignoring", &ignoring), place.image("ending", &Image::shell("exec sleep 1000"))];
    let mut run = ["run", "--detach", "--name", &name, "--stop-timeout", GRACE].map(str::to_owned).to_vec();
    run.extend(reached.arguments(port, &place.network()));
    run.push(image);
    place.engine().docker(&run);

    println!("from a failed gate to the old container serving, {} ({rounds} rounds):", reached.text());
    let mut rows: Vec<[f64; 2]> = Vec::new();
    for round in 0..=rounds {
        let mut row = [0.0; 2];
        for (image, time) in bad.iter().zip(&mut row) {
            let config = json!({
                "target": "engine", "name": name, "image": image, "pull": "never",
                "health": { "http": { "url": format!("http://127.0.0.1:{port}/id") }, "within": "500ms",
                            "stable": "0s", "every": "50ms" },
            });
            let step = Container::from_config(serde_json::from_value(config)?, &place.context(place.engine().host())?)?;
            let traffic = Traffic::start(port).await?;
            let failed: Instant = runs.fail(step).await?;
            let gaps = traffic.stop(port).await?;
            let back = gaps.last().ok_or("the old container was never stopped")?.first;
            *time = (back - failed).as_secs_f64();
        }
        // The first round warms up.
        if round > 0 {
            rows.push(row);
        }
    }
    let of = |at: usize| spread(rows.iter().map(|row| row[at]).collect());
    println!("  a program that ignores its stop signal, grace {GRACE} s {} s   (target ≤ 3)", of(0));
    println!("  a program that ends at once                     {} s   (target ≤ 1)", of(1));
    Ok(())
}
