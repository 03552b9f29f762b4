//! A switch by names: the new container gets the names of the old one, then the old one loses them.
//!
//! The engine changes the aliases of a container only by connecting it anew. Connections that are
//! open meanwhile live on if the container gets its address back, which the engine grants on
//! networks whose subnet somebody chose. A container's own name is taken away by renaming it,
//! which cuts nothing.

use std::collections::{BTreeMap, HashMap};

use bollard::Docker;
use bollard::models::{
    ContainerInspectResponse, EndpointIpamConfig, EndpointSettings, NetworkConnectRequest, NetworkDisconnectRequest,
};
use serde::{Deserialize, Serialize};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use super::beside::{aliases_of, named_networks};
use super::config::AliasSwitch;
use crate::containers::{self, name_of};
use crate::error::{DockerError, Doing, found};
use crate::naming::kept;

/// Holds what undoing a switch by names needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamesUndo {
    /// By network.
    networks: BTreeMap<String, Connection>,
    /// The name that the old container has until commit, if its own is one of those that are switched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    renamed: Option<String>,
}

/// Describes how the old container was connected to a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Connection {
    aliases: Vec<String>,
    /// What the new one gets.
    intended: Vec<String>,
    address: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ipv6_address: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    links: Vec<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    driver_opts: BTreeMap<String, String>,
}

impl NamesUndo {
    /// Reads what the old container is known by.
    pub(super) async fn record(
        client: &Docker,
        cx: &Context,
        old: &ContainerInspectResponse,
        name: &str,
        switch: &AliasSwitch,
    ) -> Result<Self, StepError> {
        let named = named_networks(old);
        for network in &switch.networks {
            if !named.contains_key(network.as_str()) {
                return Err(StepError::permanent(format!("container {} is not on network {network}", name_of(old)))
                    .with_hint("correct `switch.alias.networks`: `docker inspect` shows where the container is"));
            }
        }
        let mut networks = BTreeMap::new();
        for (network, endpoint) in named {
            if !switch.networks.is_empty() && !switch.networks.iter().any(|known| known == network) {
                continue;
            }
            let aliases = aliases_of(old, endpoint);
            let mut intended = aliases.clone();
            // The first time, others know the old container by its own name.
            if !intended.iter().any(|alias| alias == name) {
                intended.push(name.to_owned());
            }
            refuse_others(client, old, network, &intended).await?;
            let options = endpoint.driver_opts.clone().unwrap_or_default();
            let connection = Connection {
                aliases,
                intended,
                address: endpoint.ip_address.clone().unwrap_or_default(),
                ipv6_address: endpoint.global_ipv6_address.clone().filter(|address| !address.is_empty()),
                links: endpoint.links.clone().unwrap_or_default(),
                driver_opts: options.into_iter().collect(),
            };
            networks.insert(network.to_owned(), connection);
        }
        if networks.is_empty() {
            return Err(StepError::permanent(format!(
                "container {} is on no network where containers have names",
                name_of(old)
            ))
            .with_hint(
                "connect it and its clients to a network of their own (`docker network create`), or switch by a proxy",
            ));
        }
        Ok(Self { networks, renamed: (name_of(old) == name).then(|| kept(name, cx)) })
    }

    /// Says what is switched: `web on front`.
    pub(super) fn summary(&self) -> String {
        let one =
            |(network, connection): (&String, &Connection)| format!("{} on {network}", connection.intended.join(", "));
        self.networks.iter().map(one).collect::<Vec<_>>().join("; ")
    }

    /// Returns whether a network's names are switched.
    pub(super) fn covers(&self, network: &str) -> bool {
        self.networks.contains_key(network)
    }

    /// Gives the names to the new container.
    pub(super) async fn give(&self, client: &Docker, new: &str) -> Result<(), DockerError> {
        for (network, connection) in &self.networks {
            let wanted = Wanted { aliases: &connection.intended, addresses: Addresses::default(), connection };
            connect(client, new, network, wanted).await?;
        }
        Ok(())
    }

    /// Takes the names from the old container.
    pub(super) async fn take(&self, client: &Docker, old: &str) -> Result<(), DockerError> {
        if let Some(name) = &self.renamed {
            containers::rename(client, old, name).await?;
        }
        for (network, connection) in self.networks.iter().filter(|(_, connection)| !connection.aliases.is_empty()) {
            let addresses = Addresses::of(Some(&connection.address), connection.ipv6_address.as_deref());
            let wanted = Wanted { aliases: &[], addresses, connection };
            connect(client, old, network, wanted).await?;
        }
        Ok(())
    }

    /// Gives the old container its names again.
    pub(super) async fn give_back(&self, client: &Docker, old: &str, name: &str) -> Result<(), DockerError> {
        containers::rename(client, old, name).await?;
        for (network, connection) in &self.networks {
            let wanted = Wanted { aliases: &connection.aliases, addresses: Addresses::default(), connection };
            connect(client, old, network, wanted).await?;
        }
        Ok(())
    }

    /// Takes the names from the new container; tells whether it had any.
    pub(super) async fn take_back(&self, client: &Docker, new: &ContainerInspectResponse) -> Result<bool, DockerError> {
        let mut had = false;
        for (network, connection) in &self.networks {
            let named = named_networks(new);
            let Some(endpoint) = named.get(network.as_str()) else { continue };
            if aliases_of(new, endpoint).is_empty() {
                // An earlier call took them, and left it the address for what is under way.
                had |= is_fixed(endpoint);
                continue;
            }
            had = true;
            let addresses = Addresses::of(endpoint.ip_address.as_deref(), endpoint.global_ipv6_address.as_deref());
            let wanted = Wanted { aliases: &[], addresses, connection };
            connect(client, containers::id_of(new), network, wanted).await?;
        }
        Ok(had)
    }
}

/// Refuses a name that a third container answers to as well: nobody could say where the traffic is.
async fn refuse_others(
    client: &Docker,
    old: &ContainerInspectResponse,
    network: &str,
    names: &[String],
) -> Result<(), StepError> {
    let seen = client.inspect_network(network, None).await.doing(|| format!("looking at network {network}"))?;
    for id in seen.containers.iter().flatten().map(|(id, _)| id).filter(|id| *id != containers::id_of(old)) {
        let Some(other) = containers::inspect(client, id).await? else { continue };
        let aliases = named_networks(&other).get(network).map(|endpoint| aliases_of(&other, endpoint));
        let shared = aliases.unwrap_or_default().into_iter().find(|alias| names.contains(alias));
        let shared = shared.or_else(|| names.iter().find(|name| *name == name_of(&other)).cloned());
        if let Some(shared) = shared {
            return Err(StepError::permanent(format!(
                "the name {shared} on network {network} leads to container {} as well as to {}",
                name_of(&other),
                name_of(old)
            ))
            .with_hint("take the name from the one that is not to be replaced, or put a proxy in front of both"));
        }
    }
    Ok(())
}

/// Says how a container is to be connected.
struct Wanted<'a> {
    aliases: &'a [String],
    addresses: Addresses<'a>,
    connection: &'a Connection,
}

/// The addresses that a container should keep.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Addresses<'a> {
    ipv4: Option<&'a str>,
    ipv6: Option<&'a str>,
}

impl<'a> Addresses<'a> {
    /// The engine says nothing, or an empty text, where there is none.
    fn of(ipv4: Option<&'a str>, ipv6: Option<&'a str>) -> Self {
        let there = |address: Option<&'a str>| address.filter(|address| !address.is_empty());
        Self { ipv4: there(ipv4), ipv6: there(ipv6) }
    }

    /// What to ask for, best first: a network may let one choose its addresses of one kind only.
    fn attempts(self) -> Vec<Self> {
        let mut attempts = vec![self, Self { ipv6: None, ..self }, Self { ipv4: None, ..self }];
        attempts.retain(|attempt| !attempt.is_empty());
        attempts.dedup();
        attempts
    }

    fn is_empty(self) -> bool {
        self == Self::default()
    }

    fn given(self) -> Option<EndpointIpamConfig> {
        (!self.is_empty()).then(|| EndpointIpamConfig {
            ipv4_address: self.ipv4.map(str::to_owned),
            ipv6_address: self.ipv6.map(str::to_owned),
            ..EndpointIpamConfig::default()
        })
    }
}

fn is_fixed(endpoint: &EndpointSettings) -> bool {
    let given = endpoint.ipam_config.as_ref();
    let addresses = given.map(|given| [&given.ipv4_address, &given.ipv6_address]);
    addresses.into_iter().flatten().flatten().any(|address| !address.is_empty())
}

/// Connects a container under these aliases and no others. One that is so already is left alone.
async fn connect(client: &Docker, id: &str, network: &str, wanted: Wanted<'_>) -> Result<(), DockerError> {
    let Some(container) = containers::inspect(client, id).await? else { return Ok(()) };
    let name = name_of(&container).to_owned();
    if let Some(endpoint) = named_networks(&container).get(network) {
        let mut aliases = wanted.aliases.to_vec();
        aliases.sort_unstable();
        if aliases_of(&container, endpoint) == aliases && (!is_fixed(endpoint) || !wanted.addresses.is_empty()) {
            return Ok(());
        }
        let request = NetworkDisconnectRequest { container: id.to_owned(), force: Some(false) };
        let gone = client.disconnect_network(network, request).await;
        found(gone.doing(|| format!("disconnecting container {name} from network {network}")))?;
    }
    let settings = |addresses: Addresses<'_>| EndpointSettings {
        aliases: (!wanted.aliases.is_empty()).then(|| wanted.aliases.to_vec()),
        links: (!wanted.connection.links.is_empty()).then(|| wanted.connection.links.clone()),
        driver_opts: (!wanted.connection.driver_opts.is_empty())
            .then(|| wanted.connection.driver_opts.clone().into_iter().collect::<HashMap<_, _>>()),
        ipam_config: addresses.given(),
        ..EndpointSettings::default()
    };
    let request =
        |addresses| NetworkConnectRequest { container: id.to_owned(), endpoint_config: Some(settings(addresses)) };
    let doing = || format!("connecting container {name} to network {network}");
    for addresses in wanted.addresses.attempts() {
        match client.connect_network(network, request(addresses)).await.doing(doing) {
            // Only a subnet that somebody chose lets one choose an address; or another container was quicker.
            Err(error) if error.status().is_some() => {
                tracing::info!(container = %name, %network, "it cannot keep an address: connections open to it are cut");
            }
            other => return other,
        }
    }
    client.connect_network(network, request(Addresses::default())).await.doing(doing)
}
