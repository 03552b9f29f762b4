//! Containers of every sort: replaced, put back, and compared with what they were.

#![cfg(test)]

use std::collections::BTreeMap;

use bollard::Docker;
use serde_json::{Value, json};
use upgrade_core::step::{Prepared, Step};
use upgrade_core::testkit::TestContext;
use upgrade_docker::specification::Specification;
use upgrade_docker::{containers, verbatim};
use upgrade_testbed::docker::Image;

use super::{back, container, undo};
use crate::world::{Corner, target};

/// How many containers are replaced at a time.
const LANES: usize = 5;

/// The addresses of this process's own networks.
fn subnet() -> String {
    format!("10.212.{}", std::process::id() % 250)
}

/// Takes from what the engine says the ids, the times and what came of chance.
pub(super) fn normal(container: &Value) -> Value {
    let id = container["Id"].as_str().unwrap();
    let mut all = container.clone();
    for key in ["Id", "Created", "State", "Image", "ResolvConfPath", "HostnamePath", "HostsPath", "LogPath", "Name"] {
        all[key].take();
    }
    for key in ["RestartCount", "GraphDriver", "ExecIDs", "Path", "Args"] {
        all[key].take();
    }
    let config = &mut all["Config"];
    config["Image"].take();
    if config["Hostname"].as_str().is_some_and(|name| name.len() == 12 && id.starts_with(name)) {
        config["Hostname"].take();
    }
    if let Some(env) = config["Env"].as_array_mut() {
        env.retain(|entry| entry.as_str() != Some("FROM=image-1") && entry.as_str() != Some("FROM=image-2"));
        env.sort_by_key(Value::to_string);
    }
    if let Some(labels) = config["Labels"].as_object_mut() {
        labels.remove("testbed");
    }
    // Anonymous volumes are named in the next container; what is mounted in the end is the same.
    let mut mounts = all["Mounts"].take().as_array().cloned().unwrap_or_default();
    let mut of_binds = |mount: &Value| {
        let bind = format!("{}:{}", mount["Name"].as_str()?, mount["Destination"].as_str()?);
        let binds = all["HostConfig"]["Binds"].as_array_mut()?;
        binds.retain(|other| other.as_str().is_some_and(|other| other != bind && other != format!("{bind}:ro")));
        Some(())
    };
    for mount in &mut mounts {
        of_binds(mount);
        mount["Mode"].take();
    }
    mounts.sort_by_key(|mount| mount["Destination"].to_string());
    all["Mounts"] = json!(mounts);
    let host = &mut all["HostConfig"];
    if host["Binds"] == json!([]) {
        host["Binds"].take();
    }
    for mount in host["Mounts"].as_array_mut().into_iter().flatten() {
        mount["Source"].take();
    }
    let mut networks = all["NetworkSettings"]["Networks"].take();
    for endpoint in networks.as_object_mut().into_iter().flat_map(|all| all.values_mut()) {
        for key in ["EndpointID", "MacAddress", "IPAddress", "Gateway", "IPPrefixLen"] {
            endpoint[key].take();
        }
        if let Some(aliases) = endpoint["Aliases"].as_array_mut() {
            aliases.retain(|alias| alias.as_str() != Some(&id[..12]));
        }
        if endpoint["Aliases"] == json!([]) {
            endpoint["Aliases"].take();
        }
        for key in ["IPAMConfig", "DriverOpts"] {
            if endpoint[key] == json!({}) {
                endpoint[key].take();
            }
        }
    }
    let ports = all["NetworkSettings"]["Ports"].as_object().map(|ports| ports.keys().cloned().collect::<Vec<_>>());
    all["NetworkSettings"] = json!({ "Networks": networks, "Ports": ports });
    without_nulls(all)
}

fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let kept = map.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(kept.map(|(key, value)| (key, without_nulls(value))).collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(without_nulls).collect()),
        other => other,
    }
}

/// One container: what stands before its image on the command line, what after, and what its image
/// says beyond the plain one.
struct Case {
    name: &'static str,
    arguments: &'static [&'static str],
    command: &'static [&'static str],
    image: &'static [&'static str],
}

const fn with(name: &'static str, arguments: &'static [&'static str]) -> Case {
    Case { name, arguments, command: &[], image: &[] }
}

/// `PREFIX` stands for the corner's prefix, `OTHER` for a container that runs beside.
const CASES: &[Case] = &[
    with("plain", &[]),
    with("env", &["-e", "A=1", "-e", "B=x = y 'z'", "-e", "EMPTY=", "-e", "FROM=me"]),
    with("labels", &["-l", "a=1", "-l", "com.example.b=two words"]),
    Case { command: &["sleep", "999"], ..with("command", &[]) },
    Case { command: &["-c", "sleep 998"], ..with("entrypoint", &["--entrypoint", "/bin/sh"]) },
    Case {
        command: &["sleep", "997"],
        image: &["ENTRYPOINT [\"/bin/nothing\"]"],
        ..with("no-entrypoint", &["--entrypoint", ""])
    },
    Case { command: &["sleep", "996"], image: &["ENTRYPOINT [\"/bin/env\", \"X=1\"]"], ..with("both", &[]) },
    with("named-volume", &["-v", "PREFIX-data:/data", "-v", "PREFIX-ro:/ro:ro"]),
    with("anonymous-volume", &["-v", "/data", "-v", "/more"]),
    Case { image: &["VOLUME /data"], ..with("volume-of-image", &[]) },
    with("binds", &["-v", "/usr/share:/share:ro", "-v", "/tmp:/host-tmp:rprivate"]),
    with(
        "mounts",
        &["--mount", "type=volume,dst=/m", "--mount", "type=volume,src=PREFIX-m,dst=/n,readonly,volume-nocopy"],
    ),
    with("mounted-bind", &["--mount", "type=bind,src=/usr/share,dst=/s,readonly,bind-propagation=private"]),
    with("tmpfs", &["--tmpfs", "/t:size=1m,mode=1770", "--mount", "type=tmpfs,dst=/u,tmpfs-size=65536"]),
    with("volumes-from", &["--volumes-from", "OTHER:ro"]),
    with("fixed-address", &["--network", "PREFIX-net", "--ip", "SUBNET.77", "--network-alias", "shop"]),
    with("two-networks", &["--network", "PREFIX-net", "--network-alias", "front"]),
    with("link", &["--network", "PREFIX-net", "--link", "PREFIX-other:store"]),
    with("legacy-link", &["--link", "PREFIX-plain-other:store"]),
    with("host-network", &["--network", "host"]),
    with("no-network", &["--network", "none"]),
    with("shared-network", &["--network", "container:OTHER"]),
    with("hardware-address", &["--mac-address", "02:42:aa:bb:cc:dd"]),
    with("ports", &["-p", "127.0.0.1::80", "-p", "127.0.0.1::53/udp", "--expose", "9000-9001"]),
    Case { image: &["EXPOSE 7000"], ..with("all-ports", &["-P"]) },
    with("on-failure", &["--restart", "on-failure:3"]),
    with("always", &["--restart", "always"]),
    with(
        "limits",
        &[
            "--memory",
            "64m",
            "--memory-swap",
            "96m",
            "--memory-reservation",
            "32m",
            "--cpus",
            "0.5",
            "--cpu-shares",
            "300",
            "--cpuset-cpus",
            "0",
            "--pids-limit",
            "77",
            "--ulimit",
            "nofile=200:300",
            "--shm-size",
            "8m",
            "--oom-score-adj",
            "200",
            "--blkio-weight",
            "0",
        ],
    ),
    with("quota", &["--cpu-period", "50000", "--cpu-quota", "20000", "--kernel-memory", "0"]),
    with("health", &["--health-cmd", "true", "--health-interval", "400ms", "--health-retries", "2"]),
    Case { image: &["HEALTHCHECK CMD false"], ..with("no-health", &["--no-healthcheck"]) },
    Case {
        image: &["HEALTHCHECK --timeout=9s CMD true"],
        ..with("health-interval", &["--health-interval", "300ms", "--health-start-period", "1s"])
    },
    with("user", &["-u", "65534:1", "--group-add", "5", "-w", "/tmp"]),
    Case { image: &["USER nobody", "WORKDIR /tmp"], ..with("user-of-image", &[]) },
    with("capabilities", &["--cap-add", "NET_ADMIN", "--cap-drop", "CHOWN", "--security-opt", "no-new-privileges"]),
    with("privileged", &["--privileged"]),
    with("devices", &["--device", "/dev/null:/dev/nothing:r", "--device-cgroup-rule", "c 1:3 mr"]),
    with("log", &["--log-driver", "json-file", "--log-opt", "max-size=1m", "--log-opt", "max-file=2"]),
    with("no-log", &["--log-driver", "none"]),
    with("names", &["--hostname", "shop", "--domainname", "example.com", "--add-host", "db:10.1.2.3"]),
    with("resolver", &["--dns", "10.9.9.9", "--dns-search", "example.com", "--dns-option", "ndots:2"]),
    with("stop", &["--stop-signal", "SIGTERM", "--stop-timeout", "1"]),
    with("terminal", &["-t", "-i"]),
    with("init", &["--init", "--read-only", "--runtime", "runc"]),
    with("namespaces", &["--ipc", "shareable", "--pid", "host", "--uts", "host"]),
    with("shared-namespaces", &["--ipc", "container:OTHER", "--pid", "container:OTHER"]),
    with("sysctl", &["--sysctl", "net.ipv4.ip_unprivileged_port_start=99"]),
];

fn plain(version: &str) -> Image {
    Image::shell("sleep 1000").with(&format!("ENV FROM=image-{version}"))
}

impl Case {
    /// Starts the container and returns its name and that of the next image.
    async fn start(&self, corner: &Corner, client: &Docker) -> (String, String) {
        let engine = &corner.engine;
        let name = corner.name(self.name);
        let image = |version: &str| {
            if self.image.is_empty() {
                return corner.name(&format!("plain-image:{version}"));
            }
            let tag = corner.name(&format!("{}-image:{version}", self.name));
            self.image.iter().fold(plain(version), |image, line| image.with(line)).build(engine, &tag);
            tag
        };
        let (old, new) = (image("1"), image("2"));
        if self.name == "hardware-address" {
            // The command of today does not ask an older engine for one; the engine knows it.
            let body = json!({ "Image": old, "MacAddress": "02:42:aa:bb:cc:dd" }).as_object().unwrap().clone();
            let specification = Specification { body, primary: None, networks: BTreeMap::new() };
            let id = verbatim::create(client, &name, None, &specification).await.unwrap();
            containers::start(client, &id, &name).await.unwrap();
            return (name, new);
        }
        // Where the tests themselves are not privileged, such a container is not to be started.
        let start: &[_] = if self.name == "privileged" { &["create"] } else { &["run", "--detach"] };
        let mut all: Vec<String> = start.iter().map(|&text| text.to_owned()).collect();
        all.extend(["--name".into(), name.clone()]);
        let fill = |text: &&str| {
            let text = text.replace("PREFIX", &corner.prefix).replace("OTHER", &corner.name("other"));
            text.replace("SUBNET", &subnet())
        };
        all.extend(self.arguments.iter().map(fill));
        all.push(old);
        all.extend(self.command.iter().map(fill));
        engine.docker(&all);
        if self.name == "two-networks" {
            let address = format!("{}.199", subnet());
            let alias = ["network", "connect", "--alias", "back", "--ip", &address];
            engine.docker(alias.iter().copied().chain([corner.name("net2").as_str(), &name]));
        }
        (name, new)
    }

    async fn live(&self, corner: &Corner) {
        let test = TestContext::new(self.name);
        let client = target(corner.engine.host()).connect(&test.forward()).await.unwrap();
        let (name, new) = self.start(corner, &client).await;
        let inspect = async || verbatim::inspect(&client, &name).await.unwrap().unwrap();
        let before = inspect().await;
        let step = container(corner, json!({ "name": name, "image": new }));
        let found = undo(&step, &test).await;
        step.apply(&test.forward(), &found).await.unwrap_or_else(|error| panic!("{}: {error:?}", self.name));
        let after = inspect().await;
        assert_ne!(after["Id"], before["Id"], "{}", self.name);
        assert_eq!(after["Config"]["Image"], new.as_str(), "{}", self.name);
        assert_eq!(after["State"]["Running"], before["State"]["Running"], "{}", self.name);
        let env = after["Config"]["Env"].as_array().unwrap();
        assert!(self.name == "env" || env.contains(&json!("FROM=image-2")), "{}: {env:?}", self.name);
        same(&normal(&before), &normal(&after), self.name);
        let again = step.prepare(&TestContext::new("again").forward()).await.unwrap();
        assert!(matches!(again, Prepared::Unchanged { .. }), "{}: {again:?}", self.name);

        back(&step, &test, &found).await.unwrap_or_else(|error| panic!("{}: {error:?}", self.name));
        let last = inspect().await;
        assert_eq!(last["Id"], before["Id"], "{}", self.name);
        assert_eq!(last["State"]["Running"], before["State"]["Running"], "{}", self.name);
        same(&normal(&before), &normal(&last), self.name);
        containers::remove(&client, last["Id"].as_str().unwrap(), &name, true).await.unwrap();
    }
}

fn same(before: &Value, after: &Value, name: &str) {
    let (before, after) = (serde_json::to_string_pretty(before).unwrap(), serde_json::to_string_pretty(after).unwrap());
    let lines = |one: &str, other: &str| -> String {
        one.lines().filter(|line| !other.lines().any(|other| other == *line)).map(|line| format!("{line}\n")).collect()
    };
    assert!(before == after, "{name} differs; before:\n{}after:\n{}", lines(&before, &after), lines(&after, &before));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 5)]
async fn every_setting_is_carried_over_and_put_back() {
    let Some(corner) = Corner::shared("setting") else { return };
    let engine = &corner.engine;
    for (network, subnet) in [("net", "0/25"), ("net2", "128/25")] {
        engine.docker([
            "network",
            "create",
            "--subnet",
            &format!("{}.{subnet}", self::subnet()),
            &corner.name(network),
        ]);
    }
    for version in ["1", "2"] {
        plain(version).build(engine, &corner.name(&format!("plain-image:{version}")));
    }
    let image = corner.name("plain-image:1");
    let (other, net) = (corner.name("other"), corner.name("net"));
    let shared = ["--ipc", "shareable", "-v", "/inherited"];
    engine.docker(["run", "-d", "--name", &other, "--network", &net].iter().chain(&shared).chain(&[image.as_str()]));
    engine.docker(["run", "-d", "--name", &corner.name("plain-other"), &image]);
    let corner = std::sync::Arc::new(corner);
    let lanes = std::sync::Arc::new(tokio::sync::Semaphore::new(LANES));
    let cases: Vec<_> = CASES
        .iter()
        .map(|case| {
            let (corner, lanes) = (corner.clone(), lanes.clone());
            tokio::spawn(async move {
                let _lane = lanes.acquire().await;
                case.live(&corner).await;
            })
        })
        .collect();
    let mut wrong = Vec::new();
    for case in cases {
        wrong.extend(case.await.err().map(|error| error.to_string()));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
