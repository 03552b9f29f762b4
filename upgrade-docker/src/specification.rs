//! What a container is made of, taken from one that is there: the same again from another image.
//!
//! An engine reports what a container was asked to be and what its image supplied as one. Only the
//! first is carried over; the second follows the new image. The work is done on the engine's own
//! words, not on a model of them: what an engine newer than this program knows is carried as well.

mod changes;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use bollard::models::ImageInspect;
use serde_json::{Map, Value, json};

pub use changes::{Changes, Mount, Port};

/// What the image supplies as a whole, if the container does not say otherwise.
const FROM_THE_IMAGE: [&str; 6] = ["User", "WorkingDir", "StopSignal", "Shell", "OnBuild", "ArgsEscaped"];
const HEALTH: [&str; 6] = ["Test", "Interval", "Timeout", "StartPeriod", "StartInterval", "Retries"];
/// What of a network's endpoint is asked for; the rest is what came of it.
const ENDPOINT: [&str; 4] = ["IPAMConfig", "Links", "DriverOpts", "GwPriority"];
const BUILT_IN: [&str; 6] = ["default", "bridge", "host", "none", "nat", ""];

/// Describes a container to be made.
///
/// Holds the environment of the container: nothing of it is shown by `Debug`.
#[derive(Clone, PartialEq)]
pub struct Specification {
    /// What the engine is asked to create, without its networks.
    pub body: Map<String, Value>,
    /// The name of the network that it is created in, if that is one to be configured.
    pub primary: Option<String>,
    /// How it stands in each network, by the network's name.
    pub networks: BTreeMap<String, Map<String, Value>>,
}

impl fmt::Debug for Specification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Specification")
            .field("keys", &self.body.keys())
            .field("networks", &self.networks.keys())
            .finish_non_exhaustive()
    }
}

/// Names what a specification is made from.
#[derive(Clone, Copy)]
pub struct Sources<'a> {
    /// The container as the engine describes it.
    pub container: &'a Value,
    /// The configuration of the image that it was made from.
    pub old_image: &'a Value,
    /// The configuration of the image that the next one is made from.
    pub new_image: &'a Value,
    /// The volumes of the containers that it takes volumes from.
    pub inherited: &'a BTreeSet<String>,
}

/// Returns the configuration of an image, as [`Sources`] takes it.
pub fn config_of(image: &ImageInspect) -> Value {
    serde_json::to_value(&image.config).unwrap_or_default()
}

/// Describes the container that is like one that is there, but for its image and some changes.
///
/// # Guarantees
/// With no change and twice the same image, what is made from it is what was there: all that the
/// engine reports, but for ids, times, and what the engine chooses anew at every start. Anonymous
/// volumes are named in it, so that the next container has the same ones.
///
/// # Caveats
/// A setting that was given and equals what the old image supplied is taken for the image's.
pub fn specify(sources: Sources<'_>, changes: &Changes) -> Specification {
    let Sources { container, old_image, new_image, .. } = sources;
    let mut body = object(&container["Config"]);
    let mut host = object(&container["HostConfig"]);
    let id = text(&container["Id"]);

    subtract_image(&mut body, old_image);
    settle_hostname(&mut body, &host, id);
    carry_links(&mut host);
    carry_volumes(&mut host, sources);
    let fixed_address = body.shift_remove("MacAddress").filter(|value| !is_nothing(value));
    let (primary, mut networks) = carry_networks(&mut host, &container["NetworkSettings"]["Networks"], id);
    // Without a name to hang it on, engines that know it there still take it from the body.
    match (fixed_address, primary.as_ref().and_then(|name| networks.get_mut(name))) {
        (Some(address), Some(endpoint)) => {
            endpoint.insert("MacAddress".into(), address.clone());
            body.insert("MacAddress".into(), address);
        }
        (Some(address), None) => {
            body.insert("MacAddress".into(), address);
        }
        (None, _) => {}
    }

    changes::apply(&mut body, &mut host, new_image, changes);
    body.insert("HostConfig".into(), Value::Object(host));
    Specification { body, primary, networks }
}

/// Takes away what the old image supplied, so that the new one's takes its place.
fn subtract_image(body: &mut Map<String, Value>, image: &Value) {
    for key in FROM_THE_IMAGE {
        if same(&body_value(body, key), &image[key]) {
            body.shift_remove(key);
        }
    }
    if let Some(Value::Array(env)) = body.get_mut("Env") {
        let supplied = list(&image["Env"]);
        env.retain(|entry| !supplied.contains(entry));
    }
    for key in ["Labels", "Volumes"] {
        if let Some(Value::Object(map)) = body.get_mut(key) {
            map.retain(|name, value| image[key].get(name) != Some(value));
        }
    }
    if let Some(Value::Object(ports)) = body.get_mut("ExposedPorts") {
        ports.retain(|port, _| image["ExposedPorts"].get(port).is_none());
    }
    subtract_program(body, image);
    // An image's check is taken over part by part, so it is subtracted so.
    if let Some(Value::Object(check)) = body.get_mut("Healthcheck") {
        for key in HEALTH {
            if check.get(key).is_none_or(|part| is_nothing(part) || same(part, &image["Healthcheck"][key])) {
                check.shift_remove(key);
            }
        }
        if check.is_empty() {
            body.shift_remove("Healthcheck");
        }
    }
}

/// Entrypoint and command depend on each other: who names an entrypoint gets no command of the image.
fn subtract_program(body: &mut Map<String, Value>, image: &Value) {
    let (entrypoint, supplied) = (body_value(body, "Entrypoint"), &image["Entrypoint"]);
    if same(&entrypoint, supplied) {
        body.shift_remove("Entrypoint");
        if same(&body_value(body, "Cmd"), &image["Cmd"]) {
            body.shift_remove("Cmd");
        }
    } else if is_nothing(&entrypoint) {
        // The engine's spelling of an image's entrypoint that is set aside.
        body.insert("Entrypoint".into(), json!([""]));
    }
}

/// A name that the engine made from the id was not asked for, and one that belongs to another
/// container or to the machine cannot be asked for.
fn settle_hostname(body: &mut Map<String, Value>, host: &Map<String, Value>, id: &str) {
    let mode = |key: &str| host.get(key).map_or("", text);
    let shared = mode("NetworkMode").starts_with("container:") || mode("UTSMode") == "host";
    let hostname = body.get("Hostname").map_or("", text);
    if shared || (!hostname.is_empty() && id.starts_with(hostname) && hostname.len() == 12) {
        body.shift_remove("Hostname");
    }
    if shared {
        body.shift_remove("Domainname");
    }
    if mode("NetworkMode").starts_with("container:") {
        body.shift_remove("ExposedPorts");
    }
}

/// The engine reports `/db:/web/alias` of what was asked for as `db:alias`.
fn carry_links(host: &mut Map<String, Value>) {
    if let Some(Value::Array(links)) = host.get_mut("Links") {
        for link in links {
            if let Some((other, alias)) = text(link).split_once(':') {
                let alias = alias.rsplit('/').next().unwrap_or(alias);
                *link = Value::String(format!("{}:{alias}", other.trim_start_matches('/')));
            }
        }
    }
}

/// Names the volumes that the engine made for this container, or the next one would get new ones.
fn carry_volumes(host: &mut Map<String, Value>, sources: Sources<'_>) {
    let mut binds = list(host.get("Binds").unwrap_or(&Value::Null));
    let mut mounts = list(host.get("Mounts").unwrap_or(&Value::Null));
    let mut changed = false;
    for mount in list(&sources.container["Mounts"]) {
        let (name, target) = (text(&mount["Name"]), path(text(&mount["Destination"])));
        if text(&mount["Type"]) != "volume" || name.is_empty() || sources.inherited.contains(name) {
            continue;
        }
        if let Some(mount) = mounts.iter_mut().find(|mount| path(text(&mount["Target"])) == target) {
            if is_nothing(&mount["Source"]) {
                mount["Source"] = json!(name);
            }
            continue;
        }
        if binds.iter().any(|bind| target_of(text(bind)) == target && text(bind).contains(':')) {
            continue;
        }
        binds.retain(|bind| target_of(text(bind)) != target);
        let read_only = if mount["RW"] == json!(false) { ":ro" } else { "" };
        binds.push(json!(format!("{name}:{target}{read_only}")));
        changed = true;
    }
    if changed {
        host.insert("Binds".into(), Value::Array(binds));
    }
    if !mounts.is_empty() {
        host.insert("Mounts".into(), Value::Array(mounts));
    }
}

type Networks = BTreeMap<String, Map<String, Value>>;

/// Takes from the networks what was asked for: addresses, aliases, options.
fn carry_networks(host: &mut Map<String, Value>, found: &Value, id: &str) -> (Option<String>, Networks) {
    let mode = host.get("NetworkMode").map_or("", text).to_owned();
    if mode.starts_with("container:") || mode == "host" || mode == "none" {
        return (None, Networks::new());
    }
    let mut networks = Networks::new();
    let mut primary = None;
    let found = object(found);
    for (name, endpoint) in &found {
        let mut asked = Map::new();
        for key in ENDPOINT {
            if let Some(value) = endpoint.get(key).filter(|value| !is_nothing(value)) {
                asked.insert(key.into(), value.clone());
            }
        }
        // Engines before 26 list the container's short id among its aliases.
        let aliases: Vec<_> = list(&endpoint["Aliases"])
            .into_iter()
            .filter(|alias| text(alias).len() != 12 || !id.starts_with(text(alias)))
            .collect();
        if !aliases.is_empty() {
            asked.insert("Aliases".into(), Value::Array(aliases));
        }
        let network = text(&endpoint["NetworkID"]);
        let is_mode = *name == mode
            || (mode.len() >= 12 && network.starts_with(&mode))
            || (mode == "default" && BUILT_IN.contains(&name.as_str()));
        if is_mode {
            primary = Some(name.clone());
        }
        networks.insert(name.clone(), asked);
    }
    if let Some(name) = &primary
        && *name != mode
        && !BUILT_IN.contains(&mode.as_str())
    {
        // The engine files what it is asked for under the name that it is asked with.
        host.insert("NetworkMode".into(), json!(name));
    }
    if primary.is_none() {
        // It was taken out of the network that it was made in.
        primary = networks.keys().next().cloned();
        host.insert("NetworkMode".into(), json!(primary.as_deref().unwrap_or("none")));
    }
    if primary.as_deref() == Some("none") || primary.as_deref() == Some("host") {
        networks.retain(|name, _| Some(name) != primary.as_ref());
        primary = None;
    }
    (primary, networks)
}

impl Specification {
    /// Names what differs from another one, in words that show no value: `env: +MODE -DEBUG`.
    pub fn differences(&self, next: &Self) -> Vec<String> {
        let mut found = Vec::new();
        compare(&mut found, "", &self.body, &next.body);
        if self.networks != next.networks || self.primary != next.primary {
            found.push("networks".into());
        }
        found
    }
}

fn compare(found: &mut Vec<String>, prefix: &str, before: &Map<String, Value>, after: &Map<String, Value>) {
    let keys: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    for key in keys {
        let (old, new) = (before.get(key).unwrap_or(&Value::Null), after.get(key).unwrap_or(&Value::Null));
        if same(old, new) || (prefix.is_empty() && key == "Image") {
            continue;
        }
        match (key.as_str(), old, new) {
            ("HostConfig", Value::Object(old), Value::Object(new)) => compare(found, "HostConfig.", old, new),
            ("Env", ..) => found.push(format!("env: {}", named(&variables(old), &variables(new)))),
            ("Labels", ..) => found.push(format!("labels: {}", named(&object(old), &object(new)))),
            _ => found.push(format!("{prefix}{key}")),
        }
    }
}

/// Names what was added (`+`), taken away (`-`) or changed (`~`).
fn named(before: &Map<String, Value>, after: &Map<String, Value>) -> String {
    let names: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let signs = names.into_iter().filter_map(|name| match (before.get(name), after.get(name)) {
        (None, Some(_)) => Some(format!("+{name}")),
        (Some(_), None) => Some(format!("-{name}")),
        (old, new) if old != new => Some(format!("~{name}")),
        _ => None,
    });
    signs.collect::<Vec<_>>().join(" ")
}

fn variables(env: &Value) -> Map<String, Value> {
    let pair = |entry: &Value| {
        let (name, value) = text(entry).split_once('=').unwrap_or((text(entry), ""));
        (name.to_owned(), json!(value))
    };
    list(env).iter().map(pair).collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn list(value: &Value) -> Vec<Value> {
    value.as_array().cloned().unwrap_or_default()
}

fn object(value: &Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap_or_default()
}

fn body_value(body: &Map<String, Value>, key: &str) -> Value {
    body.get(key).cloned().unwrap_or_default()
}

fn entry<'a>(body: &'a mut Map<String, Value>, key: &str) -> &'a mut Map<String, Value> {
    let value = body.entry(key).or_insert_with(|| json!({}));
    if !value.is_object() {
        *value = json!({});
    }
    value.as_object_mut().expect("it was made one just now")
}

/// The path in the container of `SOURCE:PATH[:OPTIONS]`, or of a path alone.
fn target_of(bind: &str) -> &str {
    path(bind.split(':').nth(1).unwrap_or(bind))
}

fn path(text: &str) -> &str {
    if text.len() > 1 { text.trim_end_matches('/') } else { text }
}

/// Engines report what was not said as nothing, as null, or as something empty.
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

fn same(one: &Value, other: &Value) -> bool {
    one == other || (is_nothing(one) && is_nothing(other))
}
