//! What a replacement takes beside the engine's own work: `docker.container` with its journal, against
//! the calls that a person would make with curl.
//!
//! `cargo run --release -p upgrade-benches --bin docker_calls [ROUNDS [calls]]`
//!
//! By hand: create the next container, stop the old one, give both their names, start the next one,
//! remove the old one; each call on a connection of its own, and nothing looked at. Ours is a whole
//! run, from its first entry to its commit, with a gate that is content with a container that runs.
//! They take turns on containers with the same settings. Ours is run a second time through a socket that
//! notes each call: so much of its time nobody waited for the engine. With `calls`, the calls of the
//! last round are listed. A first round warms up.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use upgrade_benches::docker::Place;
use upgrade_benches::docker::socket::{Call, Watch, ask, busy};
use upgrade_benches::runs::Runs;
use upgrade_benches::{Outcome, spread};
use upgrade_docker::steps::Container;

fn main() -> Outcome<()> {
    let mut arguments = std::env::args().skip(1);
    let rounds: usize = arguments.next().map_or(Ok(20), |text| text.parse())?;
    let list = arguments.next().as_deref() == Some("calls");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // As a task, so that the work runs where a service's would: on a worker of the runtime.
    runtime.block_on(async move { tokio::spawn(async move { compare(rounds, list).await }).await? })
}

async fn compare(rounds: usize, list: bool) -> Outcome<()> {
    let place = Place::take("calls")?;
    let runs = Runs::below(place.home())?;
    let host = place.engine().host().to_owned();
    let socket = Path::new(host.strip_prefix("unix://").ok_or("the engine is not one of this machine")?);
    let watch = Watch::over(socket, place.home().join("watched.sock"))?;
    let images = [place.web("a", "0"), place.web("b", "0")];
    let network = place.network();
    let names = [place.name("hand"), place.name("ours"), place.name("watched")];
    for name in &names {
        place.engine().docker(["run", "--detach", "--name", name, "--network", &network, &images[0]]);
    }
    println!("one container replaced ({rounds} rounds, journal on {})", place.home().display());
    let mut rows: Vec<[f64; 4]> = Vec::new();
    for round in 0..=rounds {
        let image = &images[(round + 1) % 2];
        let hand = by_hand(socket, &names[0], image).await?;
        let ours = runs.commit(step(&place, &host, &names[1], image)?).await?;
        let watched = runs.commit(step(&place, &watch.host(), &names[2], image)?).await?;
        let calls = watch.take();
        if list && round == rounds {
            print(&calls);
        }
        // The first round warms up.
        if round > 0 {
            rows.push([hand, ours, watched, busy(&calls)].map(|time| time.as_secs_f64() * 1e3));
        }
    }
    let of = |value: fn(&[f64; 4]) -> f64| spread(rows.iter().map(value).collect());
    println!("  six calls by hand                 {} ms", of(|row| row[0]));
    println!("  docker.container in a run         {} ms", of(|row| row[1]));
    println!("  ours / by hand                    {} ×   (target ≤ 1.05)", of(|row| row[1] / row[0]));
    println!("  ours, whole / waiting for engine  {} ×   (target ≤ 1.05)", of(|row| row[2] / row[3]));
    println!("  ours, not waiting for the engine  {} ms", of(|row| row[2] - row[3]));
    Ok(())
}

fn step(place: &Place, host: &str, name: &str, image: &str) -> Outcome<Container> {
    let config = json!({
        "target": "engine", "name": name, "image": image, "pull": "never",
        "health": { "stable": "0s", "every": "50ms" },
    });
    Ok(Container::from_config(serde_json::from_value(config)?, &place.context(host)?)?)
}

/// Replaces a container as a person would who trusts that nothing goes wrong.
async fn by_hand(socket: &Path, name: &str, image: &str) -> Outcome<Duration> {
    let found = ask(socket, "GET", &format!("/containers/{name}/json"), None).await?;
    let old = text(&found["Id"])?;
    let began = Instant::now();
    let body = json!({ "Image": image, "HostConfig": found["HostConfig"] });
    let created = ask(socket, "POST", &format!("/containers/create?name={name}.next"), Some(&body)).await?;
    let new = text(&created["Id"])?;
    for (method, path) in [
        ("POST", format!("/containers/{old}/stop?t=10")),
        ("POST", format!("/containers/{old}/rename?name={name}.old")),
        ("POST", format!("/containers/{new}/rename?name={name}")),
        ("POST", format!("/containers/{new}/start")),
        ("DELETE", format!("/containers/{old}")),
    ] {
        ask(socket, method, &path, None).await?;
    }
    Ok(began.elapsed())
}

fn text(value: &Value) -> Outcome<&str> {
    value.as_str().ok_or_else(|| "the engine gave no id".into())
}

fn print(calls: &[Call]) {
    let Some(first) = calls.first() else { return };
    let mut until = first.began;
    for call in calls {
        let ours = call.began.saturating_duration_since(until).as_secs_f64() * 1e3;
        let theirs = (call.ended - call.began).as_secs_f64() * 1e3;
        println!("  {ours:8.1} ms, then {theirs:8.1} ms  {}", call.what);
        until = until.max(call.ended);
    }
}
