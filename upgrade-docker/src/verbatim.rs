//! Containers in the engine's own words.
//!
//! Typed models know the fields of one version of the API, and drop what an older or a newer engine
//! says beyond them. What is carried from one container to the next must not lose anything, so it is
//! asked for and sent as it is spelled.

use bollard::Docker;
use bollard::models::{ContainerCreateBody, EndpointSettings, NetworkConnectRequest};
use bollard::query_parameters::CreateContainerOptionsBuilder;
use futures_util::StreamExt as _;
use serde_json::{Map, Value, json};
use upgrade_core::error::StepError;

use crate::error::{DockerError, Doing, found};
use crate::specification::Specification;

/// From this version of the API on, a container is created in all of its networks at once.
const ALL_NETWORKS_AT_ONCE: (usize, usize) = (1, 44);

/// Looks a container up, by name or id, and returns all that the engine says.
///
/// # Errors
/// The engine cannot be asked, or its answer is no JSON.
pub async fn inspect(client: &Docker, name: &str) -> Result<Option<Value>, DockerError> {
    let doing = || format!("looking at container {name}");
    // The client has no request of its own whose answer it leaves as it is, but for the export.
    let asking = client.clone().with_request_modifier(|mut request| {
        let address = request.uri().to_string();
        if let Some(address) = address.strip_suffix("/export").and_then(|start| format!("{start}/json").parse().ok()) {
            *request.uri_mut() = address;
        }
        request
    });
    let mut answer = asking.export_container(name);
    let mut text = Vec::new();
    while let Some(piece) = answer.next().await {
        match found(piece.doing(doing))? {
            Some(piece) => text.extend_from_slice(&piece),
            None => return Ok(None),
        }
    }
    serde_json::from_slice(&text).map(Some).map_err(|error| {
        let error = StepError::unknown(format!("{} failed: the answer is no JSON", doing())).with_cause(&error);
        error.with_hint("this is not expected of an engine: look at its log, and report it").into()
    })
}

/// Creates a container and connects it with its networks; starts nothing. Returns its id.
///
/// # Errors
/// The name is taken, or the engine refuses what is asked for. A container that could not be
/// connected with all of its networks is left for the caller to remove, by its name.
pub async fn create(
    client: &Docker,
    name: &str,
    platform: Option<&str>,
    specification: &Specification,
) -> Result<String, DockerError> {
    let version = client.client_version();
    let at_once = (version.major_version, version.minor_version) >= ALL_NETWORKS_AT_ONCE;
    let body = serde_json::to_vec(&body_of(specification, at_once))
        .map_err(|error| StepError::permanent("a container cannot be described as JSON").with_cause(&error))?;
    let sending = client.clone().with_request_modifier(move |mut request| {
        *request.body_mut() = bollard::body_full(body.clone().into());
        request
    });
    let mut options = CreateContainerOptionsBuilder::new().name(name);
    if let Some(platform) = platform {
        options = options.platform(platform);
    }
    let created = sending.create_container(Some(options.build()), ContainerCreateBody::default()).await;
    let id = created.doing(|| format!("creating container {name}"))?.id;
    if !at_once {
        for (network, endpoint) in &specification.networks {
            if specification.primary.as_ref() != Some(network) {
                connect(client, &id, name, network, endpoint).await?;
            }
        }
    }
    Ok(id)
}

async fn connect(
    client: &Docker,
    id: &str,
    name: &str,
    network: &str,
    endpoint: &Map<String, Value>,
) -> Result<(), DockerError> {
    let doing = || format!("connecting container {name} with network {network}");
    let endpoint: EndpointSettings = serde_json::from_value(Value::Object(endpoint.clone())).map_err(|error| {
        StepError::permanent(format!("{} failed: its settings are not understood", doing())).with_cause(&error)
    })?;
    let request = NetworkConnectRequest { container: id.to_owned(), endpoint_config: Some(endpoint) };
    client.connect_network(network, request).await.doing(doing)
}

fn body_of(specification: &Specification, at_once: bool) -> Value {
    let mut body = specification.body.clone();
    let mut endpoints = Map::new();
    for (network, endpoint) in &specification.networks {
        let first = specification.primary.as_ref() == Some(network);
        let alone = specification.networks.len() == 1;
        let mut endpoint = endpoint.clone();
        if !at_once {
            endpoint.shift_remove("MacAddress");
        }
        // Engines are picky about their built-in network: it is named only where there is need.
        if (first || at_once) && !(alone && endpoint.is_empty()) {
            endpoints.insert(network.clone(), Value::Object(endpoint));
        }
    }
    if at_once && endpoints.values().any(|endpoint| endpoint.get("MacAddress").is_some()) {
        body.shift_remove("MacAddress");
    }
    if !endpoints.is_empty() {
        body.insert("NetworkingConfig".into(), json!({ "EndpointsConfig": endpoints }));
    }
    Value::Object(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_engines_are_given_one_network_and_newer_ones_all() {
        let endpoint = |value: Value| value.as_object().cloned().unwrap();
        let specification = Specification {
            body: endpoint(json!({ "Image": "web:1", "MacAddress": "m" })),
            primary: Some("front".into()),
            networks: [
                ("front".to_owned(), endpoint(json!({ "Aliases": ["web"], "MacAddress": "m" }))),
                ("back".to_owned(), Map::new()),
            ]
            .into(),
        };
        let older = json!({ "Image": "web:1", "MacAddress": "m",
                            "NetworkingConfig": { "EndpointsConfig": { "front": { "Aliases": ["web"] } } } });
        assert_eq!(body_of(&specification, false), older);
        let newer = json!({ "Image": "web:1", "NetworkingConfig": { "EndpointsConfig": {
            "front": { "Aliases": ["web"], "MacAddress": "m" }, "back": {} } } });
        assert_eq!(body_of(&specification, true), newer);
        let plain = Specification { networks: [("bridge".to_owned(), Map::new())].into(), ..specification };
        assert!(body_of(&plain, true).get("NetworkingConfig").is_none());
    }
}
