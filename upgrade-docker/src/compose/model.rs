//! What the files of a project mean, as `compose config` prints it: both versions print YAML.

use std::collections::{BTreeMap, BTreeSet};

use upgrade_core::error::StepError;
use yaml_serde::Value;

use crate::compose::program::Generation;

/// Holds what matters of a project.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Model {
    /// The project's name, where Compose says it.
    pub(crate) name: Option<String>,
    pub(crate) services: BTreeMap<String, Service>,
}

/// Holds what matters of a service.
#[derive(Clone, Default, PartialEq)]
pub(crate) struct Service {
    pub(crate) image: Option<String>,
    /// Whether an image of its own is built, so that none is pulled.
    pub(crate) builds: bool,
    pub(crate) platform: Option<String>,
    pub(crate) scale: usize,
    pub(crate) profiles: Vec<String>,
    /// What it starts after.
    pub(crate) after: BTreeSet<String>,
    /// Services whose containers it lives in: it is made anew with them.
    pub(crate) lives_in: BTreeSet<String>,
    /// Whether others wait until it has ended well, so that to end is what it is for.
    pub(crate) completes: bool,
    /// All of it, secrets included: compared, never shown.
    whole: Value,
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service").field("image", &self.image).field("scale", &self.scale).finish_non_exhaustive()
    }
}

fn text<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    value.get(key).and_then(Value::as_str)
}

/// A list of names, or a map by names.
fn names(value: Option<&Value>) -> BTreeSet<String> {
    match value {
        Some(Value::Sequence(items)) => items.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        Some(Value::Mapping(map)) => map.keys().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => BTreeSet::new(),
    }
}

fn number(value: Option<&Value>) -> Option<usize> {
    match value? {
        Value::Number(number) => usize::try_from(number.as_u64()?).ok(),
        Value::String(text) => text.parse().ok(),
        _ => None,
    }
}

fn service(value: &Value) -> Service {
    let of_service = |text: &str| text.strip_prefix("service:").map(str::to_owned);
    let mut lives_in: BTreeSet<String> =
        ["network_mode", "ipc", "pid"].iter().filter_map(|key| of_service(text(value, key)?)).collect();
    let first = |from: &String| from.split(':').next().unwrap_or_default().to_owned();
    lives_in.extend(names(value.get("volumes_from")).iter().filter(|from| !from.starts_with("container:")).map(first));
    let links = names(value.get("links")).iter().map(first).collect::<BTreeSet<_>>();
    Service {
        image: text(value, "image").map(str::to_owned),
        builds: value.get("build").is_some(),
        platform: text(value, "platform").map(str::to_owned),
        scale: number(value.get("scale"))
            .or_else(|| number(value.get("deploy").and_then(|deploy| deploy.get("replicas"))))
            .unwrap_or(1),
        profiles: names(value.get("profiles")).into_iter().collect(),
        after: names(value.get("depends_on")).into_iter().chain(links).chain(lives_in.iter().cloned()).collect(),
        lives_in,
        completes: false,
        whole: value.clone(),
    }
}

/// Reads what `compose config` printed.
pub(crate) fn read(text_of_config: &str, generation: Generation) -> Result<Model, StepError> {
    let strange = || {
        StepError::unknown("what Docker Compose prints for `config` is not understood")
            .with_hint("run `docker compose config` by hand; if it prints the project, report this")
    };
    let root: Value = yaml_serde::from_str(text_of_config).map_err(|_| strange())?;
    let all = root.get("services").and_then(Value::as_mapping).ok_or_else(strange)?;
    let mut model = Model::default();
    if generation == Generation::Two {
        model.name = text(&root, "name").map(str::to_owned);
    }
    for (name, value) in all {
        model.services.insert(name.as_str().ok_or_else(strange)?.to_owned(), service(value));
    }
    let awaited: BTreeSet<String> = all
        .values()
        .filter_map(|value| value.get("depends_on")?.as_mapping())
        .flatten()
        .filter(|(_, how)| text(how, "condition") == Some("service_completed_successfully"))
        .filter_map(|(name, _)| name.as_str().map(str::to_owned))
        .collect();
    for name in awaited {
        if let Some(service) = model.services.get_mut(&name) {
            service.completes = true;
        }
    }
    Ok(model)
}

impl Model {
    /// Returns the same project with other images.
    pub(crate) fn with_images(mut self, images: &BTreeMap<String, String>) -> Self {
        for (name, image) in images {
            if let Some(service) = self.services.get_mut(name) {
                service.image = Some(image.clone());
                if let Value::Mapping(map) = &mut service.whole {
                    map.insert("image".into(), image.as_str().into());
                }
            }
        }
        self
    }

    /// Lists the services that a plain `up` would start.
    pub(crate) fn active(&self, profiles: &[String]) -> BTreeSet<String> {
        let on = |service: &Service| {
            service.profiles.is_empty() || service.profiles.iter().any(|name| profiles.contains(name))
        };
        self.services.iter().filter(|(_, service)| on(service)).map(|(name, _)| name.clone()).collect()
    }

    /// Lists the services of which another model says something else.
    pub(crate) fn differing(&self, other: &Self) -> BTreeSet<String> {
        let same = |name: &String, service: &Service| other.services.get(name) == Some(service);
        self.services.iter().filter(|(name, service)| !same(name, service)).map(|(name, _)| name.clone()).collect()
    }

    /// Adds what lives in containers of the chosen services, and returns all of it in the order in
    /// which it is started.
    pub(crate) fn in_order(&self, mut chosen: BTreeSet<String>) -> Vec<String> {
        loop {
            let also: Vec<String> = self
                .services
                .iter()
                .filter(|(name, service)| !chosen.contains(*name) && !service.lives_in.is_disjoint(&chosen))
                .map(|(name, _)| name.clone())
                .collect();
            if also.is_empty() {
                break;
            }
            chosen.extend(also);
        }
        let mut order = Vec::new();
        while order.len() < chosen.len() {
            let waits = |name: &String| {
                self.services.get(name).is_some_and(|service| {
                    self.all_before(service).iter().any(|before| chosen.contains(before) && !order.contains(before))
                })
            };
            let ready: Vec<String> =
                chosen.iter().filter(|name| !order.contains(*name) && !waits(name)).cloned().collect();
            if ready.is_empty() {
                // Compose itself refuses a circle; whatever is left has no order.
                order.extend(chosen.iter().filter(|name| !order.contains(*name)).cloned().collect::<Vec<_>>());
            }
            order.extend(ready);
        }
        order
    }

    /// All that a service starts after, through services that are not chosen too.
    pub(crate) fn all_before(&self, service: &Service) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut next: Vec<String> = service.after.iter().cloned().collect();
        while let Some(name) = next.pop() {
            if found.insert(name.clone()) {
                next.extend(self.services.get(&name).into_iter().flat_map(|service| service.after.iter().cloned()));
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOP: &str = r#"
name: shop
services:
  db: { image: "postgres:15", environment: { PASSWORD: hidden } }
  seed: { image: "shop/seed:1", depends_on: [db], restart: "no" }
  cache: { image: "redis:7", depends_on: { db: { condition: service_started } } }
  web:
    build: .
    deploy: { replicas: 3 }
    depends_on: { seed: { condition: service_completed_successfully }, cache: { condition: service_healthy } }
  side: { image: "shop/side:1", network_mode: "service:web" }
  report: { image: "shop/report:1", profiles: [jobs], scale: 2 }
"#;

    fn shop() -> Model {
        read(SHOP, Generation::Two).unwrap()
    }

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn services_come_in_the_order_in_which_they_start() {
        let order = shop().in_order(set(&["web", "db", "cache", "seed"]));
        assert_eq!(order, ["db", "cache", "seed", "web", "side"]);
        assert_eq!(shop().in_order(set(&["web", "db"])), ["db", "web", "side"]);
    }

    #[test]
    fn what_is_said_of_a_service_is_read_from_either_notation() {
        let shop = shop();
        assert_eq!(shop.name.as_deref(), Some("shop"));
        assert!(shop.services["web"].builds && !shop.services["db"].builds);
        assert_eq!((shop.services["web"].scale, shop.services["report"].scale, shop.services["db"].scale), (3, 2, 1));
        assert!(shop.services["seed"].completes && !shop.services["cache"].completes);
        assert_eq!(shop.active(&[]), set(&["cache", "db", "seed", "side", "web"]));
        assert!(shop.active(&["jobs".into()]).contains("report"));
        assert!(!format!("{shop:?}").contains("hidden"));
    }

    #[test]
    fn another_image_makes_another_service() {
        let images = BTreeMap::from([("db".to_owned(), "postgres:16".to_owned())]);
        let next = shop().with_images(&images);
        assert_eq!(next.differing(&shop()), set(&["db"]));
        assert_eq!(next.clone().with_images(&images).differing(&next), set(&[]));
    }
}
