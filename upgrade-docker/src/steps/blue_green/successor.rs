//! The container that is to serve beside the old one: as that one was made, from another image.

use std::collections::{BTreeMap, HashMap};

use bollard::models::{
    ContainerConfig, ContainerCreateBody, ContainerInspectResponse, EndpointSettings, HostConfig, ImageConfig,
    NetworkingConfig,
};
use serde::{Deserialize, Serialize};
use upgrade_core::error::StepError;

use crate::containers::{id_of, name_of};

/// Names the step of the run that made a container.
pub(super) const MADE_BY: &str = "io.github.upgrade-rs.blue-green";

/// Describes a container that is to be made, and where it is connected.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Successor {
    pub(super) body: ContainerCreateBody,
    /// The networks that it is connected to before it is started: an engine before API 1.44 takes
    /// only one when it is made.
    pub(super) networks: BTreeMap<String, EndpointSettings>,
}

/// Says what differs from the old container.
pub(super) struct Differences<'a> {
    pub(super) image: &'a str,
    /// By name; none takes a variable away.
    pub(super) env: &'a BTreeMap<String, Option<String>>,
    /// The aliases on each network.
    pub(super) aliases: &'a BTreeMap<String, Vec<String>>,
    pub(super) made_by: String,
}

/// Returns the networks of a container that have names: those that somebody made.
pub(super) fn named_networks(container: &ContainerInspectResponse) -> BTreeMap<&str, &EndpointSettings> {
    let networks = container.network_settings.as_ref().and_then(|settings| settings.networks.as_ref());
    let all = networks.into_iter().flatten().map(|(name, endpoint)| (name.as_str(), endpoint));
    all.filter(|(name, _)| !matches!(*name, "bridge" | "host" | "none")).collect()
}

/// Returns the aliases that were given to a container, without the one that the engine adds.
pub(super) fn aliases_of(container: &ContainerInspectResponse, endpoint: &EndpointSettings) -> Vec<String> {
    let all = endpoint.aliases.iter().flatten();
    let mut given: Vec<_> = all.filter(|alias| alias.len() != 12 || !id_of(container).starts_with(*alias)).collect();
    given.sort_unstable();
    given.dedup();
    given.into_iter().cloned().collect()
}

/// Returns the value of a variable of a container.
pub(super) fn variable<'a>(container: &'a ContainerInspectResponse, name: &str) -> Option<&'a str> {
    let env = container.config.as_ref()?.env.as_ref()?;
    env.iter().find_map(|entry| entry.strip_prefix(name)?.strip_prefix('='))
}

/// Refuses a container that nothing can stand beside.
pub(super) fn refuse_what_only_one_can_have(old: &ContainerInspectResponse) -> Result<(), StepError> {
    let name = name_of(old);
    let refused = |what: String, hint: &str| Err(StepError::permanent(what).with_hint(hint));
    let host = old.host_config.clone().unwrap_or_default();
    let mode = host.network_mode.as_deref().unwrap_or_default();
    if mode == "host" || mode.starts_with("container:") {
        return refused(
            format!(
                "container {name} uses the network of {mode}, and a second one beside it would want the same ports"
            ),
            "give it a network of its own with a proxy in front, or replace it in its place with `docker.container`",
        );
    }
    let ports = host.port_bindings.iter().flatten();
    let fixed = ports.flat_map(|(port, bindings)| bindings.iter().flatten().map(move |binding| (port, binding)));
    for (port, binding) in fixed {
        let published = binding.host_port.as_deref().unwrap_or_default();
        if !matches!(published, "" | "0") {
            return refused(
                format!("container {name} publishes its port {port} as {published}, which two cannot have at once"),
                "let a proxy publish the port and reach the container at its own address, or replace it in its place with `docker.container`",
            );
        }
    }
    for (network, endpoint) in named_networks(old) {
        let given = endpoint.ipam_config.as_ref();
        let fixed = given.and_then(|given| given.ipv4_address.as_ref().or(given.ipv6_address.as_ref()));
        if let Some(address) = fixed.filter(|address| !address.is_empty()) {
            return refused(
                format!(
                    "container {name} has the fixed address {address} on network {network}, which two cannot have at once"
                ),
                "let others reach it by an alias and take the fixed address away (`docker network disconnect`, `docker network connect --alias`)",
            );
        }
    }
    Ok(())
}

/// Describes a container like the old one, from another image.
///
/// What the old container has only because its image said so comes from the new image instead.
/// Volumes are those of the old one, anonymous ones included: both use them until commit.
pub(super) fn successor(
    old: &ContainerInspectResponse,
    old_image: Option<&ImageConfig>,
    differences: Differences<'_>,
) -> Successor {
    let config = old.config.clone().unwrap_or_default();
    let image = old_image.cloned().unwrap_or_default();
    let mut host = old.host_config.clone().unwrap_or_default();
    keep_anonymous_volumes(old, &mut host);
    let mut networks: BTreeMap<String, EndpointSettings> = named_networks(old)
        .into_iter()
        .map(|(name, endpoint)| {
            let settings = EndpointSettings {
                aliases: differences.aliases.get(name).cloned(),
                links: endpoint.links.clone(),
                driver_opts: endpoint.driver_opts.clone().filter(|options| !options.is_empty()),
                ..EndpointSettings::default()
            };
            (name.to_owned(), settings)
        })
        .collect();
    let first = first_network(old, &host);
    let first = first.and_then(|name| networks.remove_entry(&name));
    let networking_config = first.map(|(name, endpoint)| {
        host.network_mode = Some(name.clone());
        NetworkingConfig { endpoints_config: Some(HashMap::from([(name, endpoint)])) }
    });
    let entrypoint = unless_default(config.entrypoint.clone(), &image.entrypoint);
    // An entrypoint of the container's own takes the image's command away.
    let cmd = if entrypoint.is_some() { config.cmd.clone() } else { unless_default(config.cmd.clone(), &image.cmd) };
    let named_after_itself = config.hostname.as_deref().is_some_and(|hostname| id_of(old).starts_with(hostname));
    let body = ContainerCreateBody {
        hostname: config.hostname.clone().filter(|_| !named_after_itself),
        domainname: config.domainname.clone(),
        user: unless_default(config.user.clone(), &image.user),
        attach_stdin: config.attach_stdin,
        attach_stdout: config.attach_stdout,
        attach_stderr: config.attach_stderr,
        exposed_ports: beyond(config.exposed_ports.clone(), image.exposed_ports.as_deref()),
        tty: config.tty,
        open_stdin: config.open_stdin,
        stdin_once: config.stdin_once,
        env: Some(environment(&config, &image, differences.env)),
        cmd,
        healthcheck: unless_default(config.healthcheck.clone(), &image.healthcheck),
        image: Some(differences.image.to_owned()),
        volumes: beyond(config.volumes.clone(), image.volumes.as_deref()),
        working_dir: unless_default(config.working_dir.clone(), &image.working_dir),
        entrypoint,
        network_disabled: config.network_disabled,
        labels: Some(labels(&config, &image, differences.made_by)),
        stop_signal: unless_default(config.stop_signal.clone(), &image.stop_signal),
        stop_timeout: config.stop_timeout,
        shell: unless_default(config.shell, &image.shell),
        host_config: Some(host),
        networking_config,
        ..ContainerCreateBody::default()
    };
    Successor { body, networks }
}

fn unless_default<T: PartialEq>(value: Option<T>, default: &Option<T>) -> Option<T> {
    if value == *default { None } else { value }
}

fn beyond(all: Option<Vec<String>>, defaults: Option<&[String]>) -> Option<Vec<String>> {
    let own: Vec<_> = all?.into_iter().filter(|each| !defaults.unwrap_or_default().contains(each)).collect();
    (!own.is_empty()).then_some(own)
}

fn environment(
    config: &ContainerConfig,
    image: &ImageConfig,
    changes: &BTreeMap<String, Option<String>>,
) -> Vec<String> {
    let defaults = image.env.as_deref().unwrap_or_default();
    let name_in = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
    let own = config.env.iter().flatten().filter(|entry| !defaults.contains(entry));
    let kept = own.filter(|entry| !changes.contains_key(&name_in(entry))).cloned();
    // Without `=` the engine takes away what the image would give.
    let changed = changes.iter().map(|(name, value)| match value {
        Some(value) => format!("{name}={value}"),
        None => name.clone(),
    });
    kept.chain(changed).collect()
}

fn labels(config: &ContainerConfig, image: &ImageConfig, made_by: String) -> HashMap<String, String> {
    let defaults = image.labels.clone().unwrap_or_default();
    let own = config.labels.clone().unwrap_or_default().into_iter();
    let mut labels: HashMap<_, _> = own.filter(|(name, value)| defaults.get(name) != Some(value)).collect();
    labels.insert(MADE_BY.to_owned(), made_by);
    labels
}

/// Mounts by name what the old container has without one, or the new one would begin empty.
fn keep_anonymous_volumes(old: &ContainerInspectResponse, host: &mut HostConfig) {
    let mut binds = host.binds.clone().unwrap_or_default();
    let in_binds = |destination: &str| binds.iter().any(|bind| bind.split(':').nth(1) == Some(destination));
    let in_mounts = |destination: &str| {
        host.mounts.iter().flatten().any(|mount| {
            mount.target.as_deref() == Some(destination) && mount.source.as_ref().is_some_and(|name| !name.is_empty())
        })
    };
    let mut found = Vec::new();
    for mount in old.mounts.iter().flatten().filter(|mount| mount.typ.as_deref() == Some("volume")) {
        let (Some(name), Some(destination)) = (&mount.name, &mount.destination) else { continue };
        if !in_binds(destination) && !in_mounts(destination) {
            let mode = if mount.rw == Some(false) { ":ro" } else { "" };
            found.push((destination.clone(), format!("{name}:{destination}{mode}")));
        }
    }
    if let Some(mounts) = &mut host.mounts {
        mounts.retain(|mount| !found.iter().any(|(destination, _)| mount.target.as_ref() == Some(destination)));
    }
    if !found.is_empty() {
        binds.extend(found.into_iter().map(|(_, bind)| bind));
        host.binds = Some(binds);
    }
}

/// The network that the container is made on: the one that its mode names, by name or id.
fn first_network(old: &ContainerInspectResponse, host: &HostConfig) -> Option<String> {
    let mode = host.network_mode.as_deref().unwrap_or("default");
    let named = named_networks(old);
    let own = named.iter().find(|(name, endpoint)| **name == mode || endpoint.network_id.as_deref() == Some(mode));
    own.map(|(name, _)| (*name).to_owned())
}
