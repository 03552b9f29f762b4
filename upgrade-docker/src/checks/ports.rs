//! `docker.ports`: whether ports can be published: no other container has them, and nobody else.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket};
use std::str::FromStr;
use std::sync::Arc;

use async_trait::async_trait;
use bollard::models::{ContainerSummary, PortSummaryTypeEnum};
use bollard::query_parameters::ListContainersOptionsBuilder;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::check::Check;
use upgrade_core::context::{Context, blocking};
use upgrade_core::error::CheckError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::verdict::Verdict;

use super::joined;
use crate::error::Doing;
use crate::target::Engine;

/// Configures `docker.ports`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PortsCheckConfig {
    /// The engine. Default: the one that the `docker` command would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The ports: `8080`, `127.0.0.1:8080`, `53/udp`.
    pub ports: Vec<PortSpec>,
    /// The container that may have them already: the one that is replaced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
}

/// Names the protocol of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Names a port of the engine's machine: `8080`, `127.0.0.1:8080`, `[::1]:80`, `53/udp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "PortText", into = "String")]
pub struct PortSpec {
    address: Option<IpAddr>,
    port: u16,
    transport: Transport,
}

/// A port as a file spells it: a number where nothing else is said.
#[derive(Deserialize)]
#[serde(untagged)]
enum PortText {
    Number(u16),
    Text(String),
}

/// Says that a text is not a port.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a port: write it 8080, 127.0.0.1:8080 or 53/udp")]
pub struct PortError(String);

impl FromStr for PortSpec {
    type Err = PortError;

    fn from_str(text: &str) -> Result<Self, PortError> {
        let wrong = || PortError(text.escape_debug().take(100).collect());
        let (place, transport) = match text.split_once('/') {
            None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), Transport::Tcp),
            Some((place, "udp")) => (place, Transport::Udp),
            Some(_) => return Err(wrong()),
        };
        let (address, port) = match place.rsplit_once(':') {
            None => (None, place),
            Some((address, port)) => {
                let address = address.trim_start_matches('[').trim_end_matches(']');
                (Some(address.parse().map_err(|_| wrong())?), port)
            }
        };
        let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(wrong)?;
        Ok(Self { address, port, transport })
    }
}

impl fmt::Display for PortSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            Some(address) => write!(f, "{address}:")?,
            None => {}
        }
        write!(f, "{}{}", self.port, if self.transport == Transport::Udp { "/udp" } else { "" })
    }
}

impl TryFrom<PortText> for PortSpec {
    type Error = PortError;
    fn try_from(text: PortText) -> Result<Self, PortError> {
        match text {
            PortText::Number(port) => port.to_string().parse(),
            PortText::Text(text) => text.parse(),
        }
    }
}

impl From<PortSpec> for String {
    fn from(port: PortSpec) -> Self {
        port.to_string()
    }
}

impl JsonSchema for PortSpec {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "PortSpec".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": ["string", "integer"],
            "description": "A port of the engine's machine: 8080, 127.0.0.1:8080, 53/udp"
        })
    }
}

impl PortSpec {
    /// Tells whether a container publishes it.
    fn is_published_by(&self, container: &ContainerSummary) -> bool {
        container.ports.iter().flatten().any(|published| {
            let transport = match published.typ {
                Some(PortSummaryTypeEnum::UDP) => Transport::Udp,
                Some(PortSummaryTypeEnum::SCTP) => return false,
                _ => Transport::Tcp,
            };
            let address = published.ip.as_deref().and_then(|ip| ip.parse::<IpAddr>().ok());
            // The address of all overlaps every one, in either direction.
            let overlaps = match (self.address, address) {
                (Some(wanted), Some(has)) => wanted == has || wanted.is_unspecified() || has.is_unspecified(),
                _ => true,
            };
            published.public_port == Some(self.port) && transport == self.transport && overlaps
        })
    }

    /// Binds it for an instant, and says why that does not go.
    fn bind(self) -> Option<std::io::Error> {
        let place = (self.address.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), self.port);
        match self.transport {
            Transport::Tcp => TcpListener::bind(place).err(),
            Transport::Udp => UdpSocket::bind(place).err(),
        }
    }
}

/// Asks whether ports can be published.
#[derive(Debug)]
pub struct PortsCheck {
    config: PortsCheckConfig,
    engine: Arc<Engine>,
}

impl PortsCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// There is no such target, or no port is named.
    pub fn from_config(config: PortsCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let engine = Engine::named(config.target.as_deref(), cx)?;
        if config.ports.is_empty() {
            return Err(BuildError::new("there is no port to ask for").at("ports"));
        }
        Ok(Self { config, engine })
    }
}

fn name_of(container: &ContainerSummary) -> &str {
    container.names.iter().flatten().next().map_or("", |name| name.trim_start_matches('/'))
}

#[async_trait]
impl Check for PortsCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let client = self.engine.connect(cx).await?;
        // Only what runs has ports; one that is stopped takes them when it is started again.
        let options = ListContainersOptionsBuilder::new().build();
        let containers = client.list_containers(Some(options)).await.doing(|| "listing the containers".into())?;
        let local = self.engine.host().starts_with("unix://");
        let (mut faults, mut unasked) = (Vec::new(), Vec::new());
        for port in &self.config.ports {
            let holders: Vec<_> = containers.iter().filter(|container| port.is_published_by(container)).collect();
            let own = |container: &ContainerSummary| Some(name_of(container)) == self.config.container.as_deref();
            if let Some(other) = holders.iter().find(|container| !own(container)) {
                faults.push(format!("{port} is published by container {}", name_of(other)));
                continue;
            }
            if !holders.is_empty() || !local {
                continue;
            }
            let asked = *port;
            match blocking(move || Ok(asked.bind())).await? {
                Some(error) if error.kind() == std::io::ErrorKind::PermissionDenied => unasked.push(port.to_string()),
                Some(error) => faults.push(format!("{port} cannot be bound: {error}")),
                None => {}
            }
        }
        let all = self.config.ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        Ok(match joined(&faults) {
            Some(faults) => Verdict::fail(faults)
                .with_hint("free it (`docker ps --filter publish=PORT`, `ss -ltnp`), or publish another one"),
            None if !unasked.is_empty() => Verdict::warn(format!(
                "no container publishes {all}; whether a program has {} could not be asked",
                unasked.join(", ")
            ))
            .with_hint("run the upgrade as one who may bind ports below 1024, or look with `ss -ltn`"),
            None if !local => Verdict::pass(format!("no container publishes {all}")),
            None => Verdict::pass(format!("{all} can be published")),
        })
    }

    fn kind(&self) -> &str {
        "docker.ports"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_as_they_are_written() {
        for (text, shown) in [
            ("8080", "8080"),
            ("8080/tcp", "8080"),
            ("53/udp", "53/udp"),
            ("127.0.0.1:80", "127.0.0.1:80"),
            ("[::1]:80", "[::1]:80"),
        ] {
            assert_eq!(text.parse::<PortSpec>().unwrap().to_string(), shown);
        }
        for text in ["", "0", "70000", "x", "80/sctp", "host:80", ":80"] {
            assert!(text.parse::<PortSpec>().is_err(), "{text}");
        }
        assert_eq!(serde_json::from_str::<PortSpec>("8080").unwrap(), "8080".parse().unwrap());
    }
}
