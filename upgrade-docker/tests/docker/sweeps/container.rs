//! `docker.container`: one that runs and gets another image, one that stands still and gets a setting.

#![cfg(test)]

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};

use bollard::Docker;
use bollard::query_parameters::{ListContainersOptionsBuilder, RemoveImageOptions};
use serde_json::{Value, json};
use tokio::runtime::{Handle, Runtime};
use upgrade_core::file::{LoadOptions, parse};
use upgrade_core::names::StepId;
use upgrade_core::pipeline::Pipeline;
use upgrade_core::testkit::{Mutation, Scenario, Sweep, TestContext};
use upgrade_docker::specification::Specification;
use upgrade_docker::{containers, verbatim};
use upgrade_testbed::docker::Image;

use crate::world::{Corner, registry, target};

const WEB: &str = r#"
upgrade: containers
steps:
  - id: web
    uses: docker.container
    with: { target: engine, name: PREFIX-web, image: "IMAGES:2", pull: never, health: GATE }
"#;
const WORKER: &str = r#"
  - id: worker
    uses: docker.container
    with: { target: engine, name: PREFIX-worker, image: "IMAGES:1", pull: never, env: { MODE: fast, OLD: null }, health: GATE }
"#;

/// Two containers, and two images that all worlds share: what takes long is done once.
struct Containers {
    images: Corner,
    runtime: Runtime,
    client: Docker,
    /// A case that ends with somebody else's container leaves the images kept.
    left: AtomicBool,
    /// Whether the one that stands still is there and changed as well.
    both: bool,
}

struct World {
    prefix: String,
    client: Docker,
    runtime: Handle,
}

impl World {
    fn name(&self, step: &str) -> String {
        format!("{}-{step}", self.prefix)
    }

    /// Every container of this world, in the engine's words.
    fn containers(&self) -> Vec<Value> {
        let filters = HashMap::from([("name", vec![format!("^/{}-", self.prefix)])]);
        let options = ListContainersOptionsBuilder::new().all(true).filters(&filters).build();
        self.runtime.block_on(async {
            let mut all = Vec::new();
            for listed in self.client.list_containers(Some(options)).await.unwrap() {
                all.extend(verbatim::inspect(&self.client, &listed.id.unwrap()).await.unwrap());
            }
            all
        })
    }

    fn create(&self, step: &str, body: &Value) -> String {
        let mut body = body.as_object().unwrap().clone();
        let host = body.entry("HostConfig").or_insert_with(|| json!({}));
        host["NetworkMode"] = json!("none");
        let specification = Specification { body, primary: None, networks: BTreeMap::new() };
        self.runtime.block_on(verbatim::create(&self.client, &self.name(step), None, &specification)).unwrap()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for container in self.containers() {
            let id = container["Id"].as_str().unwrap();
            let _ = self.runtime.block_on(containers::remove(&self.client, id, id, true));
        }
    }
}

impl Containers {
    fn new(both: bool) -> Option<Self> {
        let images = Corner::shared("sweep-images")?;
        for version in ["1", "2"] {
            let image = Image::shell("sleep 1000").with(&format!("ENV VERSION={version}"));
            image.build(&images.engine, &images.name(&format!("image:{version}")));
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let cx = TestContext::new("sweep").forward();
        let client = runtime.block_on(target(images.engine.host()).connect(&cx)).unwrap();
        Some(Self { images, runtime, client, left: AtomicBool::new(false), both })
    }

    fn image(&self, version: &str) -> String {
        self.images.name(&format!("image:{version}"))
    }

    fn tags(&self) -> Vec<String> {
        let mut tags = Vec::new();
        for version in ["1", "2"] {
            let image = self.runtime.block_on(self.client.inspect_image(&self.image(version))).unwrap();
            tags.extend(image.repo_tags.unwrap_or_default());
        }
        tags
    }

    fn let_go(&self) {
        for tag in self.tags().iter().filter(|tag| tag.starts_with("upgrade-kept:")) {
            self.runtime.block_on(self.client.remove_image(tag, None::<RemoveImageOptions>, None)).unwrap();
        }
    }
}

impl Scenario for Containers {
    type World = World;

    fn fresh(&self) -> World {
        if self.left.swap(false, Ordering::SeqCst) {
            self.let_go();
        }
        let prefix = self.images.engine.unique("sweep");
        let world = World { prefix, client: self.client.clone(), runtime: self.runtime.handle().clone() };
        let host = json!({ "RestartPolicy": { "Name": "always" } });
        let volumes = json!({ "/data": {} });
        let web = json!({ "Image": self.image("1"), "Env": ["TOKEN=x"], "Volumes": volumes, "HostConfig": host });
        let id = world.create("web", &web);
        self.runtime.block_on(containers::start(&self.client, &id, "web")).unwrap();
        if self.both {
            world.create("worker", &json!({ "Image": self.image("1"), "Env": ["OLD=1"] }));
        }
        world
    }

    fn pipeline(&self, world: &World) -> Pipeline {
        let target =
            format!("targets: {{ engine: {{ uses: docker, with: {{ host: \"{}\" }} }} }}", self.images.engine.host());
        let gate = "{ within: 10s, stable: 0s, every: 20ms }";
        let steps = if self.both { format!("{WEB}{WORKER}") } else { WEB.to_owned() };
        let steps = steps.replace("PREFIX", &world.prefix).replace("GATE", gate);
        let document = format!("{target}\n{}", steps.replace("IMAGES", &self.images.name("image")));
        parse(&document, "pipeline.yaml".as_ref(), "/".as_ref(), &LoadOptions::default(), &registry())
            .unwrap_or_else(|error| panic!("{error}"))
    }

    fn observe(&self, world: &World) -> String {
        let mut lines: Vec<_> = world
            .containers()
            .iter()
            .map(|container| {
                let config = &container["Config"];
                let mut env: Vec<_> = config["Env"].as_array().unwrap().iter().map(Value::to_string).collect();
                env.sort_unstable();
                format!(
                    "{} of {} running {} restarts {} with {} {}",
                    container["Name"],
                    config["Image"],
                    container["State"]["Running"],
                    container["HostConfig"]["RestartPolicy"]["Name"],
                    env.join(" "),
                    container["Mounts"].as_array().map_or(0, Vec::len),
                )
            })
            .collect();
        lines.sort_unstable();
        lines.push(self.tags().join(" "));
        lines.join("\n").replace(&world.prefix, "PREFIX")
    }

    fn interfere(&self, world: &World, step: &StepId) -> bool {
        self.left.store(true, Ordering::SeqCst);
        let name = world.name(step.as_str());
        self.runtime.block_on(containers::remove(&self.client, &name, &name, true)).unwrap();
        world.create(step.as_str(), &json!({ "Image": self.image("1"), "Labels": { "foreign": "1" } }));
        true
    }

    fn survived(&self, world: &World, step: &StepId) -> bool {
        let name = format!("/{}", world.name(step.as_str()));
        world.containers().iter().any(|one| one["Name"] == name.as_str() && one["Config"]["Labels"]["foreign"] == "1")
    }
}

fn sweep(both: bool, stride: u64, at_least: usize) {
    let Some(scenario) = Containers::new(both) else { return };
    let report = Sweep::new(&scenario).every(stride).run().unwrap_or_else(|failure| panic!("{failure}"));
    println!("{report:?}");
    assert!(report.cases >= at_least, "{report:?}");
}

#[test]
fn a_container_is_replaced_or_as_it_was() {
    sweep(false, 3, 30);
}

#[test]
#[ignore = "a campaign of some minutes: two containers, and every append of the journal"]
fn campaign_containers_are_all_replaced_or_none() {
    sweep(true, 1, 80);
}

#[test]
fn every_seeded_defect_of_containers_is_noticed() {
    let Some(scenario) = Containers::new(true) else { return };
    for mutation in Mutation::ALL {
        let failure = Sweep::new(&scenario).with_mutation(mutation).every(5).run();
        super::noticed(mutation, failure);
    }
}
