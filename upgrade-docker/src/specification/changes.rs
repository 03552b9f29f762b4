//! What of a container is to be different, in the notations of the `docker` command.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{body_value, entry, list, object, path, same, target_of, text};

/// Names what is to be different.
#[derive(Clone, Default)]
pub struct Changes {
    /// The name of the image; none leaves it.
    pub image: Option<String>,
    /// Variables to be set, or with none, removed.
    pub env: BTreeMap<String, Option<String>>,
    /// Labels to be set, or with none, removed.
    pub labels: BTreeMap<String, Option<String>>,
    /// The command, in place of the one there is.
    pub command: Option<Vec<String>>,
    /// The ports to be published, in place of those that are.
    pub ports: Option<Vec<Port>>,
    /// Mounts to be added, or put in the place of one at the same path.
    pub mounts: Vec<Mount>,
}

/// Names a port that is published, as `docker run --publish` does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// The address of the machine; empty for all.
    pub address: String,
    /// The port of the machine; empty for any that is free.
    pub published: String,
    /// The port of the container with its protocol: `80/tcp`.
    pub target: String,
}

/// Names a volume or a directory that is mounted, as `docker run --volume` does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The volume, or the path on the machine.
    pub source: String,
    /// The path in the container.
    pub target: String,
    /// What follows: `ro`, `z`.
    pub options: Option<String>,
}

impl std::str::FromStr for Port {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        let wrong = "a port is written [ADDRESS:][PORT:]PORT[/PROTOCOL]: 8080:80, 127.0.0.1:53:53/udp";
        let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let (rest, target) = ports.rsplit_once(':').unwrap_or(("", ports));
        let (address, published) = rest.rsplit_once(':').unwrap_or(("", rest));
        let number = |text: &str| text.parse::<u16>().is_ok_and(|port| port > 0);
        let known = matches!(protocol, "tcp" | "udp" | "sctp");
        if !known || !number(target) || !(published.is_empty() || number(published)) {
            return Err(wrong);
        }
        let address = address.trim_start_matches('[').trim_end_matches(']');
        if !address.is_empty() && address.parse::<std::net::IpAddr>().is_err() {
            return Err(wrong);
        }
        Ok(Self { address: address.into(), published: published.into(), target: format!("{target}/{protocol}") })
    }
}

impl std::str::FromStr for Mount {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        let mut parts = text.splitn(3, ':');
        match (parts.next(), parts.next(), parts.next()) {
            (Some(source), Some(target), options)
                if !source.is_empty() && target.starts_with('/') && options != Some("") =>
            {
                Ok(Self { source: source.into(), target: target.into(), options: options.map(str::to_owned) })
            }
            _ => Err("a mount is written SOURCE:PATH[:OPTIONS]: data:/var/lib/data, /etc/web:/etc/web:ro"),
        }
    }
}

impl Mount {
    fn bind(&self) -> String {
        match &self.options {
            Some(options) => format!("{}:{}:{options}", self.source, self.target),
            None => format!("{}:{}", self.source, self.target),
        }
    }
}

pub(super) fn apply(body: &mut Map<String, Value>, host: &mut Map<String, Value>, image: &Value, changes: &Changes) {
    if let Some(image) = &changes.image {
        body.insert("Image".into(), json!(image));
    }
    apply_env(body, image, &changes.env);
    for (name, value) in &changes.labels {
        let labels = entry(body, "Labels");
        match value {
            Some(value) if image["Labels"].get(name) == Some(&json!(value)) => {
                labels.shift_remove(name);
            }
            Some(value) => {
                labels.insert(name.clone(), json!(value));
            }
            None => {
                labels.shift_remove(name);
            }
        }
    }
    if let Some(command) = &changes.command {
        if body.contains_key("Entrypoint") || !same(&json!(command), &image["Cmd"]) {
            body.insert("Cmd".into(), json!(command));
        } else {
            body.shift_remove("Cmd");
        }
    }
    if let Some(ports) = &changes.ports {
        apply_ports(body, host, ports);
    }
    for mount in &changes.mounts {
        let bind = json!(mount.bind());
        let target = path(&mount.target);
        let mut binds = list(host.get("Binds").unwrap_or(&Value::Null));
        if binds.contains(&bind) {
            continue;
        }
        binds.retain(|bind| target_of(text(bind)) != target);
        binds.push(bind);
        host.insert("Binds".into(), Value::Array(binds));
        if let Some(Value::Array(mounts)) = host.get_mut("Mounts") {
            mounts.retain(|other| path(text(&other["Target"])) != target);
        }
        if let Some(Value::Object(tmpfs)) = host.get_mut("Tmpfs") {
            tmpfs.retain(|other, _| path(other) != target);
        }
    }
}

fn apply_env(body: &mut Map<String, Value>, image: &Value, changes: &BTreeMap<String, Option<String>>) {
    if changes.is_empty() {
        return;
    }
    let supplied = list(&image["Env"]);
    let mut env = list(&body_value(body, "Env"));
    for (name, value) in changes {
        let of_name = |entry: &Value| text(entry).split('=').next() == Some(name);
        let Some(value) = value else {
            env.retain(|entry| !of_name(entry));
            continue;
        };
        let wanted = json!(format!("{name}={value}"));
        if supplied.contains(&wanted) {
            env.retain(|entry| !of_name(entry));
        } else if let Some(present) = env.iter_mut().find(|entry| of_name(entry)) {
            *present = wanted;
        } else {
            env.push(wanted);
        }
    }
    body.insert("Env".into(), Value::Array(env));
}

fn apply_ports(body: &mut Map<String, Value>, host: &mut Map<String, Value>, ports: &[Port]) {
    let mut bindings = Map::new();
    for port in ports {
        let all = bindings.entry(port.target.clone()).or_insert_with(|| json!([]));
        if let Value::Array(all) = all {
            all.push(json!({ "HostIp": port.address, "HostPort": port.published }));
        }
    }
    let published = object(host.get("PortBindings").unwrap_or(&Value::Null));
    if published == bindings {
        return;
    }
    let exposed = entry(body, "ExposedPorts");
    exposed.retain(|port, _| !published.contains_key(port));
    for port in bindings.keys() {
        exposed.insert(port.clone(), json!({}));
    }
    host.insert("PortBindings".into(), Value::Object(bindings));
}
