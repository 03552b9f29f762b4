//! What the old container is known by, and whether a second one can stand beside it.

use std::collections::BTreeMap;

use bollard::models::{ContainerInspectResponse, EndpointSettings};
use upgrade_core::error::StepError;

use crate::containers::{id_of, name_of};

/// Names the step of the run that made a container: it stays when the run is over, and the next one
/// writes its own.
pub(super) const MADE_BY: &str = "io.github.upgrade-rs.blue-green";

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

/// Refuses a container that nothing can stand beside.
pub(super) fn refuse_what_only_one_can_have(old: &ContainerInspectResponse) -> Result<(), StepError> {
    let name = name_of(old);
    let refused = |what: String, hint: &str| Err(StepError::permanent(what).with_hint(hint));
    let host = old.host_config.clone().unwrap_or_default();
    if host.auto_remove == Some(true) {
        return refused(
            format!("container {name} is removed by the engine when it stops (`--rm`): there would be no way back"),
            "start it without `--rm`, with a restart policy if it is to last",
        );
    }
    let labels = old.config.as_ref().and_then(|config| config.labels.as_ref());
    if labels.is_some_and(|labels| labels.contains_key("com.docker.swarm.task.id")) {
        return refused(
            format!("container {name} belongs to a Swarm service, which would start another one"),
            "`docker service update --image`",
        );
    }
    if old.state.as_ref().and_then(|state| state.paused) == Some(true) {
        return refused(format!("container {name} is paused"), "`docker unpause` it, then run again");
    }
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
