//! How long a service is down while its container is replaced, against Compose's own replacement.
//!
//! `cargo run --release -p upgrade-benches --bin docker_downtime [ROUNDS]`
//!
//! One service of one project, an image that answers at once and one that takes 0.3 seconds until it does,
//! on the host's network, and then behind a published port; ended at once by its stop signal. A request
//! every 5 ms, each on a connection of its own; down is from the last answer of the old container to the first one of the new. They take
//! turns: `up --detach --force-recreate`, `docker.compose`, and `docker.container` on a container with
//! the same settings, the last two there and back and there for good. A first round warms up.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use upgrade_benches::docker::traffic::Traffic;
use upgrade_benches::docker::{Place, Reached, compose, free_port, run_compose};
use upgrade_benches::runs::Runs;
use upgrade_benches::{Outcome, spread};
use upgrade_docker::steps::{Compose, Container};

fn main() -> Outcome<()> {
    let rounds: usize = std::env::args().nth(1).map_or(Ok(5), |text| text.parse())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // As a task, so that the work runs where a service's would: on a worker of the runtime.
    runtime.block_on(async move {
        for (ready, reached) in [("0", Reached::Directly), ("0.3", Reached::Directly), ("0", Reached::Published)] {
            tokio::spawn(compare(ready, reached, rounds)).await??;
        }
        Ok(())
    })
}

/// Holds a project with one service, and a container like that service's.
struct World {
    place: Place,
    runs: Runs,
    argv: Vec<String>,
    directory: PathBuf,
    images: [String; 2],
    /// Of the project's service, and of the container.
    ports: [u16; 2],
}

async fn compare(ready: &str, reached: Reached, rounds: usize) -> Outcome<()> {
    let world = World::make(ready, reached)?;
    let (how, compose) = (reached.text(), world.argv.join(" "));
    println!("a service {how} that answers after {ready} s, down for ({rounds} rounds, {compose}):");
    let mut rows: Vec<[f64; 5]> = Vec::new();
    for round in 0..=rounds {
        let row = world.round(round).await?;
        // The first round warms up.
        if round > 0 {
            rows.push(row);
        }
    }
    let names = [
        "up --force-recreate",
        "docker.container",
        "docker.container, undone",
        "docker.compose",
        "docker.compose, undone",
    ];
    for (at, name) in names.iter().enumerate() {
        let time = spread(rows.iter().map(|row| row[at]).collect());
        let ratio = spread(rows.iter().map(|row| row[at] / row[0]).collect());
        println!("  {name:26} {time} ms  {ratio} ×");
    }
    println!("  target ≤ 0.8 ×");
    Ok(())
}

impl World {
    fn make(ready: &str, reached: Reached) -> Outcome<Self> {
        let place = Place::take("downtime")?;
        let argv = compose()?;
        let images = [place.web("a", ready), place.web("b", ready)];
        let ports = [free_port()?, free_port()?];
        let text =
            format!("version: \"3.8\"\nservices:\n  web:\n    image: \"{}\"\n{}", images[0], reached.lines(ports[0]));
        let directory = place.project(&text)?;
        run_compose(&argv, &place, &directory, &["up", "--detach"])?;
        let name = place.name("web");
        let mut run = ["run", "--detach", "--name", &name].map(str::to_owned).to_vec();
        run.extend(reached.arguments(ports[1], &place.network()));
        run.push(images[0].clone());
        place.engine().docker(&run);
        let runs = Runs::below(place.home())?;
        Ok(Self { place, runs, argv, directory, images, ports })
    }

    async fn round(&self, round: usize) -> Outcome<[f64; 5]> {
        let image = &self.images[(round + 1) % 2];
        let [service, container] = self.ports;

        let traffic = Traffic::start(service).await?;
        let (argv, directory) = (self.argv.clone(), self.directory.clone());
        tokio::task::block_in_place(|| {
            run_compose(&argv, &self.place, &directory, &["up", "--detach", "--force-recreate"])
        })?;
        let theirs = first(traffic, service).await?;

        let traffic = Traffic::start(container).await?;
        self.runs.there_and_back(self.container(image)?).await?;
        let undone = last(traffic, container).await?;
        let traffic = Traffic::start(container).await?;
        self.runs.commit(self.container(image)?).await?;
        let replaced = first(traffic, container).await?;

        let traffic = Traffic::start(service).await?;
        self.runs.there_and_back(self.compose(&directory, image)?).await?;
        let brought_back = last(traffic, service).await?;
        let traffic = Traffic::start(service).await?;
        self.runs.commit(self.compose(&directory, image)?).await?;
        let brought = first(traffic, service).await?;
        Ok([theirs, replaced, undone, brought, brought_back])
    }

    fn container(&self, image: &str) -> Outcome<Container> {
        let config = json!({
            "target": "engine", "name": self.place.name("web"), "image": image, "pull": "never",
            "health": gate(self.ports[1]),
        });
        let context = self.place.context(self.place.engine().host())?;
        Ok(Container::from_config(serde_json::from_value(config)?, &context)?)
    }

    fn compose(&self, directory: &Path, image: &str) -> Outcome<Compose> {
        let config = json!({
            "target": "engine", "directory": directory, "images": { "web": image }, "pull": "never",
            "compose": self.argv, "health": { "web": gate(self.ports[0]) },
        });
        let context = self.place.context(self.place.engine().host())?;
        Ok(Compose::from_config(serde_json::from_value(config)?, &context)?)
    }
}

fn gate(port: u16) -> Value {
    json!({ "http": { "url": format!("http://127.0.0.1:{port}/id") }, "stable": "0s", "every": "50ms" })
}

async fn first(traffic: Traffic, port: u16) -> Outcome<f64> {
    Ok(traffic.stop(port).await?.first().ok_or("nothing was replaced")?.milliseconds())
}

async fn last(traffic: Traffic, port: u16) -> Outcome<f64> {
    match &traffic.stop(port).await?[..] {
        [_, back] => Ok(back.milliseconds()),
        gaps => Err(format!("{} containers took another one's place, not two", gaps.len()).into()),
    }
}
