//! What is there, what is to be made of it, and the new container itself.

use std::collections::BTreeMap;

use bollard::Docker;
use bollard::models::{ContainerInspectResponse, NetworkConnectRequest};
use bollard::query_parameters::CreateContainerOptionsBuilder;
use upgrade_core::context::Context;
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::sealed::SealedRef;
use upgrade_core::secret::ExposeSecret;
use upgrade_core::step::{Change, Effect, Prepared};

use super::successor::{
    Differences, Successor, aliases_of, named_networks, refuse_what_only_one_can_have, successor, variable,
};
use super::{BlueGreen, BlueGreenOutput, BlueGreenUndo, NamesUndo, Standing, Switch, SwitchUndo, another_definition};
use crate::containers::{self, id_of, name_of, state_line};
use crate::error::{Doing, not_cancelled};
use crate::images;

impl BlueGreen {
    /// Finds the container that serves, by name: no state is kept between two upgrades.
    async fn present(&self, client: &Docker) -> Result<(ContainerInspectResponse, String), StepError> {
        let name = &self.config.container;
        let (blue, green) = (format!("{name}-blue"), format!("{name}-green"));
        let mut all = Vec::new();
        for candidate in [name, &blue, &green] {
            all.extend(containers::inspect(client, candidate).await?);
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
        let platform = self.config.platform.as_deref();
        let image = if cx.is_dry_run() {
            images::local(client, &reference).await?
        } else {
            Some(images::obtain(&self.engine, client, cx, &self.config.image, platform, self.config.pull).await?)
        };
        let image = image.as_ref().map(images::id_of).transpose()?.unwrap_or_default();
        let mut env = BTreeMap::new();
        for (name, value) in &self.config.env {
            let value = match value {
                Some(value) => Some(value.resolve(cx).await?.expose_secret().to_owned()),
                None => None,
            };
            env.insert(name.clone(), value);
        }
        let same = env.iter().all(|(name, value)| variable(&old, name) == value.as_deref());
        if old.image.as_deref() == Some(&image) && same {
            let output =
                BlueGreenOutput { container: name_of(&old).into(), id: id_of(&old).into(), image, replaced: None };
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
        let made = self.describe(client, cx, &old, &env, &switch).await?;
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
        text
    }

    async fn describe(
        &self,
        client: &Docker,
        cx: &Context,
        old: &ContainerInspectResponse,
        env: &BTreeMap<String, Option<String>>,
        switch: &SwitchUndo,
    ) -> Result<Successor, StepError> {
        let old_image = match &old.image {
            Some(id) => images::local(client, id).await?,
            None => None,
        };
        // Names that are not switched are the new one's from the beginning.
        let all = named_networks(old).into_iter();
        let beyond = all.filter(|(network, _)| match switch {
            SwitchUndo::Alias(names) => !names.covers(network),
            SwitchUndo::Proxy(_) => true,
        });
        let aliases = beyond.map(|(network, endpoint)| (network.to_owned(), aliases_of(old, endpoint))).collect();
        let image = self.config.image.to_string();
        let differences = Differences { image: &image, env, aliases: &aliases, made_by: cx.marker() };
        Ok(successor(old, old_image.and_then(|image| image.config).as_ref(), differences))
    }

    /// Makes the new container, starts it, and waits until it serves.
    pub(super) async fn bring_up(
        &self,
        client: &Docker,
        cx: &Context,
        undo: &BlueGreenUndo,
    ) -> Result<ContainerInspectResponse, StepError> {
        let made = cx.unseal(&undo.made).await?;
        let made: Successor = serde_json::from_slice(&made)
            .map_err(|error| StepError::permanent("how the new container is made cannot be read").with_cause(&error))?;
        let new = match self.new_one(client, cx, undo).await? {
            Some(new) => new,
            None => {
                not_cancelled(cx)?;
                let options = CreateContainerOptionsBuilder::new().name(&undo.new).build();
                let created = client.create_container(Some(options), made.body).await;
                created.doing(|| format!("making container {}", undo.new))?;
                self.new_one(client, cx, undo).await?.ok_or_else(|| gone(&undo.new))?
            }
        };
        if new.image.as_deref() != Some(&undo.image) {
            return Err(StepError::conflict(Conflict {
                subject: format!("image {}", self.config.image),
                found: undo.image.clone(),
                intended: undo.image.clone(),
                present: new.image.clone().unwrap_or_default(),
            }));
        }
        for (network, endpoint) in made.networks {
            if named_networks(&new).contains_key(network.as_str()) {
                continue;
            }
            let request = NetworkConnectRequest { container: id_of(&new).to_owned(), endpoint_config: Some(endpoint) };
            let connected = client.connect_network(&network, request).await;
            connected.doing(|| format!("connecting container {} to network {network}", undo.new))?;
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
