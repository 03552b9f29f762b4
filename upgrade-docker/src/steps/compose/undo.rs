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
