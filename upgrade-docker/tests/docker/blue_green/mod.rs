//! `docker.blue_green`: traffic switched by names and by a proxy, and what goes wrong on the way.

#![cfg(test)]

mod alias;
mod proxy;
mod records;

use serde_json::{Value, json};
use upgrade_core::error::StepError;
use upgrade_core::step::{Prepared, Step};
use upgrade_core::testkit::TestContext;
use upgrade_docker::steps::{BlueGreen, BlueGreenConfig, BlueGreenUndo};
use upgrade_testbed::docker::Image;

use crate::world::{Corner, build_context};

impl Corner {
    /// Makes the image of a web service that says its version.
    fn web(&self, version: &str) -> String {
        let name = self.name(&format!("image:{version}"));
        Image::web(version).build(&self.engine, &name);
        name
    }

    /// Makes a network whose subnet is chosen, as those are that let a container keep its address.
    fn network(&self, what: &str) {
        let name = self.name(what);
        for _ in 0..50 {
            // Others choose as well.
            let number = any_number() % 2000;
            let subnet = format!("10.212.{}.{}/27", number / 8, number % 8 * 32);
            if self.engine.command(["network", "create", "--subnet", &subnet, &name]).output().unwrap().status.success()
            {
                return;
            }
        }
        panic!("no subnet is free");
    }

    /// Makes a network that has addresses of both kinds; the subnet of the older kind only where `chosen`.
    fn network_with_ipv6(&self, name: &str, chosen: bool) {
        for _ in 0..50 {
            let number = any_number() % 2000;
            let older = format!("10.212.{}.{}/27", number / 8, number % 8 * 32);
            let newer = format!("fd00:d0c:{:x}::/64", any_number() % 0x10000);
            let mut arguments = vec!["network", "create", "--ipv6", "--subnet", &newer];
            let subnet = ["--subnet", &older];
            arguments.extend(if chosen { &subnet[..] } else { &[] });
            arguments.push(name);
            if self.engine.command(arguments).output().unwrap().status.success() {
                return;
            }
        }
        panic!("no subnet is free");
    }

    fn address(&self, container: &str) -> String {
        let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
        self.engine.docker(["inspect", "--format", format, &self.name(container)])
    }

    /// The containers of the service: name, version, whether it runs.
    fn colours(&self) -> Vec<String> {
        let format = "{{.Names}} {{.Image}} {{.State}}";
        let all = self.list(&["ps", "--all", "--filter", &format!("name={}", self.name("web"))], format);
        all.iter().map(|line| line.replace(&format!("{}-", self.prefix), "")).collect()
    }
}

fn step(corner: &Corner, image: &str, switch: &Value, more: &Value) -> BlueGreen {
    let mut with = json!({
        "target": "engine", "container": corner.name("web"), "image": image, "pull": "never", "switch": switch,
        "drain": "100ms", "health": { "http": { "port": 8080, "path": "/version" }, "stable": "0s", "every": "50ms" },
    });
    with.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let config: BlueGreenConfig = serde_json::from_value(with).unwrap();
    BlueGreen::from_config(config, &build_context(corner.engine.host())).unwrap()
}

async fn undo(step: &BlueGreen, test: &TestContext) -> BlueGreenUndo {
    match step.prepare(&test.forward()).await.unwrap() {
        Prepared::Change { undo, .. } => undo,
        other => panic!("{other:?}"),
    }
}

async fn refused(step: &BlueGreen) -> StepError {
    step.prepare(&TestContext::new("web").forward()).await.unwrap_err()
}

fn any_number() -> u32 {
    use std::hash::{BuildHasher as _, Hasher as _};
    std::collections::hash_map::RandomState::new().build_hasher().finish() as u32
}
