//! The containers that Compose made for a project, found by its labels.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use bollard::Docker;
use bollard::models::ContainerInspectResponse;
use bollard::query_parameters::{EventsOptionsBuilder, ListContainersOptionsBuilder};
use futures_util::StreamExt as _;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};
use upgrade_core::error::StepError;

use crate::containers::{self, grace_of, id_of, is_running, name_of};
use crate::error::Doing;

const PROJECT: &str = "com.docker.compose.project";
const SERVICE: &str = "com.docker.compose.service";
const NUMBER: &str = "com.docker.compose.container-number";
const HASH: &str = "com.docker.compose.config-hash";
const ONE_OFF: &str = "com.docker.compose.oneoff";
/// Say when and by what a container was made, not what it is.
const OF_ITS_MAKING: [&str; 7] = [
    NUMBER,
    HASH,
    "com.docker.compose.replace",
    "com.docker.compose.image",
    "com.docker.compose.version",
    "com.docker.compose.depends_on",
    "com.docker.compose.project.config_files",
];

/// Names a container as it was found, without anything that may be secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FoundContainer {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) number: u32,
    pub(crate) image: String,
    /// The image as the project's files name it.
    pub(crate) reference: String,
    pub(crate) running: bool,
    pub(crate) hash: String,
    /// Whether it has volumes without a name, which only Compose's own replacement carries over.
    pub(crate) anonymous_volumes: bool,
}

/// Holds a container as it stands.
#[derive(Debug, Clone)]
pub(crate) struct Present {
    pub(crate) service: String,
    pub(crate) found: FoundContainer,
    pub(crate) grace: Duration,
    inspect: ContainerInspectResponse,
}

fn label<'a>(container: &'a ContainerInspectResponse, name: &str) -> &'a str {
    let labels = container.config.as_ref().and_then(|config| config.labels.as_ref());
    labels.and_then(|labels| labels.get(name)).map_or("", String::as_str)
}

impl Present {
    fn of(container: ContainerInspectResponse) -> Self {
        let anonymous = container.mounts.iter().flatten().any(|mount| {
            let name = mount.name.as_deref().unwrap_or_default();
            mount.typ.as_deref() == Some("volume")
                && name.len() == 64
                && name.bytes().all(|byte| byte.is_ascii_hexdigit())
        });
        let found = FoundContainer {
            id: id_of(&container).to_owned(),
            name: name_of(&container).to_owned(),
            number: label(&container, NUMBER).parse().unwrap_or(0),
            image: container.image.clone().unwrap_or_default(),
            reference: container.config.as_ref().and_then(|config| config.image.clone()).unwrap_or_default(),
            running: is_running(&container),
            hash: label(&container, HASH).to_owned(),
            anonymous_volumes: anonymous,
        };
        Self { service: label(&container, SERVICE).to_owned(), found, grace: grace_of(&container), inspect: container }
    }

    pub(crate) fn id(&self) -> &str {
        &self.found.id
    }

    /// Tells whether it lives in a container of the project that is there no more: in its network, its
    /// processes, its volumes.
    pub(crate) fn is_orphan(&self, all: &[Self]) -> bool {
        let host = self.inspect.host_config.as_ref();
        let modes = host.into_iter().flat_map(|host| [&host.network_mode, &host.ipc_mode, &host.pid_mode]).flatten();
        let modes = modes.filter_map(|mode| mode.strip_prefix("container:"));
        let volumes = host.and_then(|host| host.volumes_from.as_ref()).into_iter().flatten();
        let volumes = volumes.map(|from| from.split(':').next().unwrap_or_default());
        modes.chain(volumes).any(|other| !all.iter().any(|one| one.id() == other || one.found.name == other))
    }

    /// Describes it without what differs between two containers that are the same to those who use
    /// them: ids, names, addresses, times. Holds secrets: to be sealed, and never shown.
    pub(crate) fn normalised(&self) -> Value {
        let whole = serde_json::to_value(&self.inspect).unwrap_or_default();
        let id = self.id();
        let mut config = whole["Config"].clone();
        if let Some(config) = config.as_object_mut() {
            // The engine's own choice: an id, its own or that of the container whose network it lives in.
            let chosen = |name: &str| name.len() == 12 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
            if config.get("Hostname").and_then(Value::as_str).is_some_and(chosen) {
                config.remove("Hostname");
            }
            for key in ["AttachStdin", "AttachStdout", "AttachStderr", "Volumes"] {
                config.remove(key);
            }
            if let Some(labels) = config.get_mut("Labels").and_then(Value::as_object_mut) {
                labels.retain(|name, _| !OF_ITS_MAKING.contains(&name.as_str()));
            }
            if let Some(Value::Array(environment)) = config.get_mut("Env") {
                // Version 1 leaves the id of the container there whose volumes it carried over.
                environment
                    .retain(|variable| !variable.as_str().is_some_and(|text| text.starts_with("affinity:container=")));
                environment.sort_by_key(ToString::to_string);
            }
        }
        let mut host = whole["HostConfig"].clone();
        if let Some(host) = host.as_object_mut() {
            // What is mounted is told by the mounts; a container of another service has another id by now.
            for key in ["Binds", "Mounts", "VolumesFrom", "Links", "ContainerIDFile"] {
                host.remove(key);
            }
            for value in host.values_mut() {
                if value.as_str().is_some_and(|text| text.starts_with("container:")) {
                    *value = "container".into();
                }
            }
        }
        let mut mounts: Vec<Value> = whole["Mounts"].as_array().into_iter().flatten().map(|mount| {
            json!({ "type": mount["Type"], "name": mount["Name"], "source": mount["Source"], "to": mount["Destination"], "rw": mount["RW"] })
        }).collect();
        mounts.sort_by_key(|mount| mount["to"].to_string());
        let networks: BTreeMap<&String, Value> = whole["NetworkSettings"]["Networks"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(name, endpoint)| {
                let own = |alias: &&Value| {
                    !alias.as_str().is_some_and(|alias| id.starts_with(alias) || alias == self.found.name)
                };
                let mut aliases: Vec<&Value> =
                    endpoint["Aliases"].as_array().into_iter().flatten().filter(own).collect();
                aliases.sort_by_key(|alias| alias.to_string());
                // Version 1 gives a container its aliases when it starts it.
                aliases.retain(|_| self.found.running);
                (name, json!({ "aliases": aliases, "ipam": endpoint["IPAMConfig"].as_object().filter(|ipam| !ipam.is_empty()) }))
            })
            .collect();
        json!({ "config": config, "host": host, "mounts": mounts, "networks": networks, "image": self.found.image })
    }
}

/// Names the parts in which two descriptions differ, without what they say.
pub(crate) fn differing(before: &Value, after: &Value) -> Vec<String> {
    let mut parts = Vec::new();
    for (part, name) in [("image", "image"), ("mounts", "volumes"), ("networks", "networks")] {
        if before[part] != after[part] {
            parts.push(name.to_owned());
        }
    }
    for part in ["config", "host"] {
        let keys = |value: &Value| {
            value[part].as_object().into_iter().flatten().map(|(key, _)| key.clone()).collect::<Vec<_>>()
        };
        let mut all = keys(before);
        all.extend(keys(after));
        all.sort_unstable();
        all.dedup();
        parts.extend(all.into_iter().filter(|key| before[part][key.as_str()] != after[part][key.as_str()]));
    }
    parts
}

/// Lists the containers of a project, stopped ones too, by service and number.
pub(crate) async fn of_project(client: &Docker, project: &str) -> Result<Vec<Present>, StepError> {
    labelled(client, project, Vec::new()).await
}

/// Lists the containers of one service of a project, stopped ones too, by number.
pub(crate) async fn of_service(client: &Docker, project: &str, service: &str) -> Result<Vec<Present>, StepError> {
    labelled(client, project, vec![format!("{SERVICE}={service}")]).await
}

async fn labelled(client: &Docker, project: &str, mut labels: Vec<String>) -> Result<Vec<Present>, StepError> {
    labels.extend([format!("{PROJECT}={project}"), format!("{ONE_OFF}=False")]);
    let filters = HashMap::from([("label".to_owned(), labels)]);
    let options = ListContainersOptionsBuilder::new().all(true).filters(&filters).build();
    let listed =
        client.list_containers(Some(options)).await.doing(|| format!("listing the containers of {project}"))?;
    let mut all = Vec::new();
    for id in listed.into_iter().filter_map(|container| container.id) {
        // One that went in between is not there.
        if let Some(container) = containers::inspect(client, &id).await? {
            all.push(Present::of(container));
        }
    }
    all.sort_by(|a, b| (&a.service, a.found.number, &a.found.name).cmp(&(&b.service, b.found.number, &b.found.name)));
    Ok(all)
}

/// Waits until nothing more comes of requests that were under way when their sender died: the stop
/// of a container, the making of one.
pub(crate) async fn await_quiet(client: &Docker, project: &str) -> Result<(), StepError> {
    let mut before = None;
    loop {
        let all = of_project(client, project).await?;
        for container in all.iter().filter(|container| container.found.running) {
            if is_being_stopped(client, container).await? {
                containers::stop(client, container.id(), &container.found.name, container.grace).await?;
            }
        }
        let now: Vec<_> = of_project(client, project).await?.into_iter().map(|container| container.found).collect();
        if before.as_ref() == Some(&now) {
            return Ok(());
        }
        before = Some(now);
        sleep(Duration::from_millis(150)).await;
    }
}

/// Tells whether a running container was sent a signal so lately that its end may be under way.
async fn is_being_stopped(client: &Docker, container: &Present) -> Result<bool, StepError> {
    // By the engine's own clock, and to the fraction: what happened a moment ago counts most.
    let info = client.info().await.doing(|| "asking the engine for its time".into())?;
    let until = info.system_time.unwrap_or_default();
    let now = until.parse::<jiff::Timestamp>().unwrap_or_else(|_| jiff::Timestamp::now());
    let until = format!("{}.{:09}", now.as_second(), now.subsec_nanosecond());
    let since = now.as_second() - i64::try_from(container.grace.as_secs()).unwrap_or(60) - 5;
    let filters = HashMap::from([
        ("container".to_owned(), vec![container.id().to_owned()]),
        ("event".to_owned(), vec!["kill".to_owned()]),
    ]);
    let options = EventsOptionsBuilder::new().since(&since.to_string()).until(&until).filters(&filters).build();
    let mut events = client.events(Some(options));
    match timeout(Duration::from_secs(10), events.next()).await {
        Ok(Some(event)) => event.doing(|| "reading what the engine did".into()).map(|_| true).map_err(StepError::from),
        Ok(None) | Err(_) => Ok(false),
    }
}
