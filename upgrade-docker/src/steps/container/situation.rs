//! Where a replacement stands, read from the engine alone: its names are the record.

use bollard::Docker;
use bollard::models::ContainerInspectResponse;
use upgrade_core::context::Context;
use upgrade_core::error::{Conflict, StepError};

use super::ContainerUndo;
use crate::containers::{self, id_of, name_of, state_line};
use crate::error::DockerError;
use crate::naming;

/// How many digits of an id stand for it, as in what the `docker` command prints.
const SHORT: usize = 12;

/// Says how far the next container has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// It is being made: it may lack a network.
    Incoming,
    /// It is complete, and from then on the old one may be touched.
    Next,
    /// It has the name.
    InPlace,
}

/// Holds what there is.
#[derive(Debug)]
pub(super) struct Situation {
    /// The container found by `prepare`, wherever it is now.
    pub(super) old: Option<ContainerInspectResponse>,
    /// The one that is to take its place.
    pub(super) new: Option<(Stage, ContainerInspectResponse)>,
    /// The one that has the name and is neither.
    pub(super) foreign: Option<ContainerInspectResponse>,
}

/// The name of the old container while the one with this id has its place.
pub(super) fn aside(name: &str, cx: &Context, new: &str) -> String {
    format!("{}-{}", naming::kept(name, cx), new.get(..SHORT).unwrap_or(new))
}

/// Looks a container up by its name alone, where the engine would take an id as well.
pub(super) async fn by_name(client: &Docker, name: &str) -> Result<Option<ContainerInspectResponse>, DockerError> {
    Ok(containers::inspect(client, name).await?.filter(|container| name_of(container) == name))
}

impl Situation {
    /// Looks at the engine. `known` is the id of the next container, where it is known.
    pub(super) async fn read(
        client: &Docker,
        cx: &Context,
        undo: &ContainerUndo,
        known: Option<&str>,
    ) -> Result<Self, DockerError> {
        let name = &undo.name;
        let old = containers::inspect(client, &undo.found.id).await?.filter(|old| id_of(old) == undo.found.id);
        let mut new = None;
        for (stage, own) in [(Stage::Incoming, naming::incoming(name, cx)), (Stage::Next, naming::next(name, cx))] {
            new = by_name(client, &own).await?.map(|container| (stage, container)).or(new);
        }
        let holder = by_name(client, name).await?.filter(|holder| id_of(holder) != undo.found.id);
        let Some(holder) = holder else { return Ok(Self { old, new, foreign: None }) };
        let prefix = format!("{}-", naming::kept(name, cx));
        let beside = old.as_ref().and_then(|old| name_of(old).strip_prefix(&prefix));
        let is_new = known.or(beside).is_some_and(|id| id_of(&holder).starts_with(id));
        if is_new && new.is_none() {
            return Ok(Self { old, new: Some((Stage::InPlace, holder)), foreign: None });
        }
        Ok(Self { old, new, foreign: Some(holder) })
    }

    /// Says what is there that is neither found nor intended.
    pub(super) fn conflict(&self, undo: &ContainerUndo) -> StepError {
        let describe = |container: &ContainerInspectResponse| {
            let image = container.config.as_ref().and_then(|config| config.image.as_deref()).unwrap_or_default();
            format!("{} of image {image}, {}", short(id_of(container)), state_line(container))
        };
        let present = match (&self.foreign, &self.old) {
            (Some(foreign), _) => describe(foreign),
            (None, Some(old)) => format!("{}, with the name {}", short(id_of(old)), name_of(old)),
            (None, None) => "absent".into(),
        };
        StepError::conflict(Conflict {
            subject: format!("container {}", undo.name),
            found: format!("{} of image {}", short(&undo.found.id), undo.found.image),
            intended: format!("one of image {}", undo.intended.image),
            present,
        })
    }
}

pub(super) fn short(id: &str) -> &str {
    id.get(..SHORT).unwrap_or(id)
}
