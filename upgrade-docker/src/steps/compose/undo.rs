//! What undoing needs: the files, the tags and the containers as they were found.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use upgrade_core::sealed::SealedRef;

use crate::compose::containers::{FoundContainer, Present};
use crate::compose::kept_file::FileUndo;

/// Holds what putting a project back needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComposeUndo {
    pub(crate) project: String,
    pub(crate) files: Vec<FileUndo>,
    /// In the order in which they start.
    pub(crate) services: Vec<ServiceUndo>,
    /// Which image each tag named, if it named one.
    pub(crate) tags: BTreeMap<String, Option<String>>,
    /// The project's networks.
    pub(crate) networks: BTreeSet<String>,
}

/// Holds what putting a service back needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceUndo {
    pub(crate) service: String,
    /// The image that it is to have; none where it is built.
    pub(crate) image: Option<String>,
    pub(crate) platform: Option<String>,
    /// How many containers it is to have.
    pub(crate) scale: usize,
    /// Whether it is a job that ends, and others wait for that.
    pub(crate) completes: bool,
    /// Whether it lives in another service's containers.
    pub(crate) lives_in: bool,
    /// The services of the project that it starts after. A record that does not say has its services
    /// taken one after the other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) after: Option<BTreeSet<String>>,
    pub(crate) containers: Vec<FoundContainer>,
    /// How its containers were, apart from ids and times, in the order of `containers`.
    pub(crate) described: Option<SealedRef>,
}

impl ComposeUndo {
    /// Lists the images that must not go before commit.
    pub(crate) fn images_found(&self) -> BTreeSet<&str> {
        let of_containers = self.services.iter().flat_map(|service| &service.containers).map(|found| &found.image);
        of_containers.chain(self.tags.values().flatten()).map(String::as_str).collect()
    }
}

/// Sorts services, given in the order in which they start, into waves: each service after all that it
/// starts after, and as early as that allows.
pub(crate) fn waves(services: &[ServiceUndo]) -> Vec<Vec<&ServiceUndo>> {
    let mut waves: Vec<Vec<&ServiceUndo>> = Vec::new();
    for service in services {
        let place = match &service.after {
            None => waves.len(),
            Some(after) => {
                let holds = |wave: &Vec<&ServiceUndo>| wave.iter().any(|one| after.contains(&one.service));
                waves.iter().rposition(holds).map_or(0, |last| last + 1)
            }
        };
        match waves.get_mut(place) {
            Some(wave) => wave.push(service),
            None => waves.push(vec![service]),
        }
    }
    waves
}

impl ServiceUndo {
    /// Tells whether it was there and stopped: so it stays.
    pub(crate) fn was_stopped(&self) -> bool {
        !self.containers.is_empty() && self.containers.iter().all(|container| !container.running)
    }

    pub(crate) fn was(&self, id: &str) -> bool {
        self.containers.iter().any(|found| found.id == id)
    }

    /// Picks the service's containers.
    pub(crate) fn among<'a>(&self, present: &'a [Present]) -> Vec<&'a Present> {
        present.iter().filter(|container| container.service == self.service).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str, after: Option<&[&str]>) -> ServiceUndo {
        ServiceUndo {
            service: name.into(),
            image: None,
            platform: None,
            scale: 1,
            completes: false,
            lives_in: false,
            after: after.map(|names| names.iter().map(|name| (*name).to_owned()).collect()),
            containers: Vec::new(),
            described: None,
        }
    }

    fn names(services: &[ServiceUndo]) -> Vec<Vec<&str>> {
        waves(services).iter().map(|wave| wave.iter().map(|one| one.service.as_str()).collect()).collect()
    }

    #[test]
    fn a_service_comes_after_all_that_it_waits_for_and_no_later() {
        let all = [
            service("cache", Some(&[])),
            service("db", Some(&["volumes"])),
            service("seed", Some(&["db"])),
            service("mail", Some(&["cache"])),
            service("web", Some(&["seed", "cache", "db"])),
        ];
        assert_eq!(names(&all), [vec!["cache", "db"], vec!["seed", "mail"], vec!["web"]]);
    }

    #[test]
    fn of_an_older_record_each_service_waits_for_the_one_before() {
        assert_eq!(names(&[service("db", None), service("web", None)]), [["db"], ["web"]]);
    }
}
