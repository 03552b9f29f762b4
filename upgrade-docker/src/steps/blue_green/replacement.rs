//! What is there, what is to be made of it, and the new container itself.

use std::collections::{BTreeMap, BTreeSet};

use bollard::Docker;
use bollard::models::{ContainerInspectResponse, ContainerStateStatusEnum, ImageInspect};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use upgrade_core::context::Context;
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::sealed::SealedRef;
use upgrade_core::secret::ExposeSecret;
use upgrade_core::step::{Change, Effect, Prepared};

use super::beside::{MADE_BY, refuse_what_only_one_can_have};
use super::{
    BlueGreen, BlueGreenOutput, BlueGreenUndo, NamesUndo, Standing, Switch, SwitchUndo, another_definition, by_name,
};
use crate::containers::{self, id_of, name_of, state_line};
use crate::error::not_cancelled;
use crate::specification::{Changes, Sources, Specification, config_of, specify};
use crate::{images, verbatim};

/// Keeps how the new container is made; sealed, for it holds the environment.
#[derive(Serialize, Deserialize)]
struct Made {
    body: Map<String, Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    primary: Option<String>,
    networks: BTreeMap<String, Map<String, Value>>,
}

impl BlueGreen {
    /// Finds the container that serves, by name: no state is kept between two upgrades.
    async fn present(&self, client: &Docker) -> Result<(ContainerInspectResponse, String), StepError> {
        let name = &self.config.container;
        let (blue, green) = (format!("{name}-blue"), format!("{name}-green"));
        let mut all = Vec::new();
        for candidate in [name, &blue, &green] {
            all.extend(by_name(client, candidate).await?);
        }
        let old = match all.as_slice() {
            [old] => old.clone(),
            [] => {
                return Err(StepError::permanent(format!("there is no container {name}, {blue} or {green}"))
                    .with_hint("correct `container`, or start the service once: `docker run --name …`"));
            }
            several => {
                let names: Vec<_> = several.iter().map(name_of).collect();
                return Err(StepError::permanent(format!(
                    "{} are all there, and nobody knows which one serves",
                    names.join(" and ")
                ))
                .with_hint("find the one without traffic (`docker logs`, `docker inspect`) and remove it"));
            }
        };
        if !containers::is_running(&old) {
            return Err(StepError::permanent(format!(
                "container {} does not run: {}",
                name_of(&old),
                state_line(&old)
            ))
            .with_hint("start it, or replace it in its place with `docker.container`"));
        }
        let new = if name_of(&old) == blue { green } else { blue };
        Ok((old, new))
    }

    /// Answers `prepare`.
    pub(super) async fn look(
        &self,
        client: &Docker,
        cx: &Context,
    ) -> Result<Prepared<BlueGreenUndo, BlueGreenOutput>, StepError> {
        let (old, new) = self.present(client).await?;
        refuse_what_only_one_can_have(&old)?;
        let reference = self.config.image.to_string();
        let (image, inspected) = self.image(client, cx).await?;
        let mut next = self.describe(client, cx, &old, inspected.as_ref()).await?;
        if old.image.as_ref() == Some(&image.id) && next.same {
            let output = BlueGreenOutput {
                container: name_of(&old).into(),
                id: id_of(&old).into(),
                image: image.id,
                replaced: None,
            };
            return Ok(Prepared::unchanged(output, format!("container {} runs this image", name_of(&old))));
        }
        let (switch, how) = match (&self.config.switch, &self.proxy) {
            (Switch::Alias(config), _) => {
                let names = NamesUndo::record(client, cx, &old, &self.config.container, config).await?;
                let change = Change::new(Effect::Modify, format!("names {}", names.summary())).with_summary(format!(
                    "{new} gets them, then {} loses them; on a network whose subnet nobody chose, connections open then are cut",
                    name_of(&old)
                ));
                (SwitchUndo::Alias(names), change)
            }
            (Switch::Proxy(_), Some(proxy)) => {
                let undo = proxy.record(cx).await?;
                (SwitchUndo::Proxy(undo), proxy.change(&new))
            }
            (Switch::Proxy(_), None) => return Err(another_definition()),
        };
        if let SwitchUndo::Alias(names) = &switch {
            // Names that are not switched are the new one's from the beginning.
            for (_, endpoint) in next.specification.networks.iter_mut().filter(|(network, _)| names.covers(network)) {
                endpoint.shift_remove("Aliases");
            }
        }
        let Specification { body, primary, networks } = next.specification;
        if body.contains_key("MacAddress") {
            return Err(StepError::permanent(format!(
                "container {} has a fixed hardware address, which two cannot have at once",
                name_of(&old)
            ))
            .with_hint("make it without `--mac-address`, or replace it in its place with `docker.container`"));
        }
        let made = Made { body, primary, networks };
        let text = serde_json::to_vec(&made)
            .map_err(|error| StepError::unknown("the new container cannot be described").with_cause(&error))?;
        let made = if cx.is_dry_run() { SealedRef::of(&text) } else { cx.seal(&text).await? };
        let changes = [
            Change::new(Effect::Create, format!("container {new}"))
                .with_summary(self.summary(&reference, &old))
                .undo_loses(format!("what container {new} wrote outside its volumes")),
            how,
            Change::new(Effect::Remove, format!("container {}", name_of(&old)))
                .with_summary("at commit; until then it runs on without traffic"),
        ];
        let old = Standing { name: name_of(&old).to_owned(), id: id_of(&old).to_owned() };
        Ok(Prepared::change(BlueGreenUndo { old, new, image, made, switch }, changes))
    }

    fn summary(&self, reference: &str, old: &ContainerInspectResponse) -> String {
        let mut text = format!("like {}, from image {reference}", name_of(old));
        if !self.config.env.is_empty() {
            let names: Vec<_> = self.config.env.keys().map(String::as_str).collect();
            text.push_str(&format!("; variables {}", names.join(", ")));
        }
        let labels = old.config.as_ref().and_then(|config| config.labels.as_ref());
        if let Some(project) = labels.and_then(|labels| labels.get("com.docker.compose.project")) {
            text.push_str(&format!("; Compose project {project} does not know of it"));
        }
        text
    }

    /// Describes the new container.
    async fn describe(
        &self,
        client: &Docker,
        cx: &Context,
        old: &ContainerInspectResponse,
        image: Option<&ImageInspect>,
    ) -> Result<Next, StepError> {
        let mut changes = Changes { image: Some(self.config.image.to_string()), ..Changes::default() };
        for (name, value) in &self.config.env {
            let value = match value {
                Some(value) => Some(value.resolve(cx).await?.expose_secret().to_owned()),
                None => None,
            };
            changes.env.insert(name.clone(), value);
        }
        let container = verbatim::inspect(client, id_of(old)).await?.ok_or_else(|| gone(name_of(old)))?;
        let old_image = match &old.image {
            Some(id) => images::local(client, id).await?.as_ref().map(config_of).unwrap_or_default(),
            None => Value::Null,
        };
        let new_image = image.map(config_of).unwrap_or_default();
        let inherited = inherited_volumes(client, old).await?;
        let of = |new_image, changes: &Changes| {
            specify(Sources { container: &container, old_image: &old_image, new_image, inherited: &inherited }, changes)
        };
        let same = of(&old_image, &Changes::default()).differences(&of(&new_image, &changes)).is_empty();
        changes.labels.insert(MADE_BY.to_owned(), Some(cx.marker()));
        Ok(Next { specification: of(&new_image, &changes), same })
    }

    /// Makes the new container, starts it, and waits until it serves.
    pub(super) async fn bring_up(
        &self,
        client: &Docker,
        cx: &Context,
        undo: &BlueGreenUndo,
    ) -> Result<ContainerInspectResponse, StepError> {
        let made = cx.unseal(&undo.made).await?;
        let made: Made = serde_json::from_slice(&made)
            .map_err(|error| StepError::permanent("how the new container is made cannot be read").with_cause(&error))?;
        let mut new = self.new_one(client, cx, undo).await?;
        let unfinished = |new: &ContainerInspectResponse| {
            let status = new.state.as_ref().and_then(|state| state.status);
            status == Some(ContainerStateStatusEnum::CREATED)
        };
        if let Some(half) = new.take_if(|new| unfinished(new)) {
            // It may lack some of its networks.
            containers::remove(client, id_of(&half), &undo.new, true).await?;
        }
        let new = match new {
            Some(new) => new,
            None => {
                not_cancelled(cx)?;
                let Made { body, primary, networks } = made;
                undo.image.name(client, cx).await?;
                let specification = Specification { body, primary, networks };
                verbatim::create(client, &undo.new, self.config.platform.as_deref(), &specification).await?;
                self.new_one(client, cx, undo).await?.ok_or_else(|| gone(&undo.new))?
            }
        };
        if new.image.as_ref() != Some(&undo.image.id) {
            return Err(StepError::conflict(Conflict {
                subject: format!("image {}", self.config.image),
                found: undo.image.id.clone(),
                intended: undo.image.id.clone(),
                present: new.image.clone().unwrap_or_default(),
            }));
        }
        not_cancelled(cx)?;
        containers::start(client, id_of(&new), &undo.new).await?;
        self.config.health.wait(client, cx, id_of(&new), &undo.new).await?;
        containers::inspect(client, id_of(&new)).await?.ok_or_else(|| gone(&undo.new))
    }
}

fn gone(name: &str) -> StepError {
    StepError::permanent(format!("container {name} is gone: somebody removed it"))
        .with_hint("find out who removes containers here (`docker events`), then run again")
}

/// Describes the new container, and tells whether the old one is like that already.
struct Next {
    specification: Specification,
    same: bool,
}

/// Names the volumes of the containers that a container takes volumes from.
async fn inherited_volumes(client: &Docker, old: &ContainerInspectResponse) -> Result<BTreeSet<String>, StepError> {
    let mut names = BTreeSet::new();
    let from = old.host_config.as_ref().and_then(|host| host.volumes_from.as_ref());
    for other in from.into_iter().flatten() {
        let other = other.split(':').next().unwrap_or_default();
        let other = containers::inspect(client, other).await?;
        names.extend(other.and_then(|other| other.mounts).into_iter().flatten().filter_map(|mount| mount.name));
    }
    Ok(names)
}
