use super::*;

const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

fn image(value: Value) -> Value {
    let mut all = json!({ "Env": ["PATH=/bin", "MODE=image"], "Cmd": ["serve"], "WorkingDir": "/app" });
    merge(&mut all, value);
    all
}

fn merge(all: &mut Value, changes: Value) {
    if let Value::Object(changes) = changes {
        changes.into_iter().for_each(|(key, value)| all[key] = value);
    }
}

/// A container as an engine reports one that was made with these settings from `image`.
fn container(config: Value, host: Value) -> Value {
    let mut all = json!({
        "Id": ID,
        "Config": {
            "Hostname": &ID[..12], "Domainname": "", "User": "", "Image": "web:1", "OnBuild": null, "Tty": false,
            "Env": ["PATH=/bin", "MODE=image"], "Cmd": ["serve"], "Entrypoint": null, "WorkingDir": "/app", "Labels": {},
        },
        "HostConfig": { "NetworkMode": "default", "Binds": null, "RestartPolicy": { "Name": "no" } },
        "Mounts": [],
        "NetworkSettings": { "Networks": { "bridge": { "NetworkID": "b1", "IPAddress": "10.0.0.2", "Aliases": null } } },
    });
    merge(&mut all["Config"], config);
    merge(&mut all["HostConfig"], host);
    all
}

fn specified(container: &Value, old: &Value, new: &Value, changes: &Changes) -> Specification {
    let inherited = BTreeSet::from(["theirs".to_owned()]);
    specify(Sources { container, old_image: old, new_image: new, inherited: &inherited }, changes)
}

fn body(container: &Value) -> Map<String, Value> {
    let image = image(json!({}));
    specified(container, &image, &image, &Changes::default()).body
}

fn host(container: &Value, key: &str) -> Value {
    body(container)["HostConfig"][key].clone()
}

#[test]
fn what_the_image_supplied_follows_the_new_one() {
    let body = body(&container(json!({}), json!({})));
    for key in ["Cmd", "Entrypoint", "WorkingDir", "User", "OnBuild", "Hostname"] {
        assert!(!body.contains_key(key), "{key}: {body:?}");
    }
    assert_eq!((&body["Env"], &body["Image"]), (&json!([]), &json!("web:1")));
}

#[test]
fn what_was_asked_for_stays() {
    let asked = json!({
        "Hostname": "shop", "Domainname": "example.com", "User": "1000", "Env": ["PATH=/bin", "MODE=mine", "TOKEN=x"],
        "Cmd": ["serve", "--fast"], "WorkingDir": "/srv", "StopSignal": "SIGINT", "StopTimeout": 7, "Tty": true,
        "Labels": { "theirs": "1", "mine": "2" }, "NewKey": { "known": "to newer engines" },
    });
    let found = container(asked, json!({ "Devices": [{ "PathOnHost": "/dev/null" }], "Memory": 9_000_000 }));
    let old = image(json!({ "Labels": { "theirs": "1" }, "StopSignal": "SIGTERM" }));
    let made = specified(&found, &old, &image(json!({ "Labels": { "theirs": "9" } })), &Changes::default());
    let body = &made.body;
    assert_eq!(body["Env"], json!(["MODE=mine", "TOKEN=x"]));
    assert_eq!(body["Labels"], json!({ "mine": "2" }));
    for key in ["Hostname", "Domainname", "User", "Cmd", "WorkingDir", "StopSignal", "StopTimeout", "Tty", "NewKey"] {
        assert_eq!(body[key], found["Config"][key], "{key}");
    }
    assert_eq!(body["HostConfig"]["Memory"], json!(9_000_000));
    assert_eq!(body["HostConfig"]["Devices"], json!([{ "PathOnHost": "/dev/null" }]));
    assert!(!format!("{made:?}").contains("TOKEN=x"), "{made:?}");
}

#[test]
fn entrypoint_and_command_are_told_apart() {
    let with = |config: Value, old: Value| {
        let old = image(old);
        let made = specified(&container(config, json!({})), &old, &old, &Changes::default());
        (made.body.get("Entrypoint").cloned(), made.body.get("Cmd").cloned())
    };
    let supplied = json!({ "Entrypoint": ["/run"] });
    assert_eq!(with(json!({ "Entrypoint": ["/run"] }), supplied.clone()), (None, None));
    let own = json!({ "Entrypoint": ["/run"], "Cmd": ["x"] });
    assert_eq!(with(own, supplied.clone()), (None, Some(json!(["x"]))));
    let own = json!({ "Entrypoint": ["/own"], "Cmd": null });
    assert_eq!(with(own, supplied.clone()), (Some(json!(["/own"])), Some(Value::Null)));
    let own = json!({ "Entrypoint": ["/own"], "Cmd": ["serve"] });
    assert_eq!(with(own, supplied.clone()), (Some(json!(["/own"])), Some(json!(["serve"]))));
    // `--entrypoint ""`
    let own = json!({ "Entrypoint": null, "Cmd": ["serve"] });
    assert_eq!(with(own, supplied), (Some(json!([""])), Some(json!(["serve"]))));
}

#[test]
fn a_health_check_is_subtracted_part_by_part() {
    let old = image(json!({ "Healthcheck": { "Test": ["CMD", "old"], "Interval": 5, "Retries": 3 } }));
    let found = container(json!({ "Healthcheck": { "Test": ["CMD", "old"], "Interval": 9, "Retries": 3 } }), json!({}));
    let made = specified(&found, &old, &old, &Changes::default());
    assert_eq!(made.body["Healthcheck"], json!({ "Interval": 9 }));
    let found = container(json!({ "Healthcheck": { "Test": ["CMD", "old"], "Interval": 5, "Retries": 3 } }), json!({}));
    assert!(!specified(&found, &old, &old, &Changes::default()).body.contains_key("Healthcheck"));
    let found = container(json!({ "Healthcheck": { "Test": ["NONE"] } }), json!({}));
    assert_eq!(specified(&found, &old, &old, &Changes::default()).body["Healthcheck"], json!({ "Test": ["NONE"] }));
}

#[test]
fn anonymous_volumes_are_carried_over_and_inherited_ones_left() {
    let mut found = container(
        json!({ "Volumes": { "/data": {} } }),
        json!({ "Binds": ["named:/named:ro", "/alone"], "Mounts": [{ "Type": "volume", "Target": "/mount" }] }),
    );
    let volume =
        |name: &str, path: &str, rw: bool| json!({ "Type": "volume", "Name": name, "Destination": path, "RW": rw });
    found["Mounts"] = json!([
        volume("a1", "/data", true), volume("a2", "/read", false), volume("named", "/named", false),
        volume("a3", "/mount", true), volume("a4", "/alone/", true), volume("theirs", "/theirs", true),
        { "Type": "bind", "Source": "/etc", "Destination": "/etc" },
    ]);
    assert_eq!(host(&found, "Binds"), json!(["named:/named:ro", "a1:/data", "a2:/read:ro", "a4:/alone"]));
    assert_eq!(host(&found, "Mounts"), json!([{ "Type": "volume", "Target": "/mount", "Source": "a3" }]));
}

#[test]
fn networks_keep_what_was_asked_for() {
    let mut found = container(json!({ "MacAddress": "02:42:00:00:00:99" }), json!({ "NetworkMode": "front" }));
    found["NetworkSettings"]["Networks"] = json!({
        "front": { "IPAMConfig": { "IPv4Address": "10.1.0.9" }, "Aliases": ["web", &ID[..12]], "NetworkID": "f",
                   "MacAddress": "02:42:00:00:00:99", "Gateway": "10.1.0.1", "Links": null },
        "back": { "IPAMConfig": {}, "Aliases": ["db-client"], "NetworkID": "k", "DriverOpts": { "a": "b" } },
    });
    let image = image(json!({}));
    let made = specified(&found, &image, &image, &Changes::default());
    assert_eq!(made.primary.as_deref(), Some("front"));
    let front =
        json!({ "IPAMConfig": { "IPv4Address": "10.1.0.9" }, "Aliases": ["web"], "MacAddress": "02:42:00:00:00:99" });
    assert_eq!(Value::Object(made.networks["front"].clone()), front);
    let back = json!({ "Aliases": ["db-client"], "DriverOpts": { "a": "b" } });
    assert_eq!(Value::Object(made.networks["back"].clone()), back);
    assert_eq!(made.body["MacAddress"], json!("02:42:00:00:00:99"));
}

#[test]
fn the_network_that_it_was_made_in_may_be_gone_or_be_named_by_id() {
    let image = image(json!({}));
    let mut found = container(json!({}), json!({ "NetworkMode": "0123456789abcdef" }));
    found["NetworkSettings"]["Networks"] = json!({ "front": { "NetworkID": "0123456789abcdef" } });
    let made = specified(&found, &image, &image, &Changes::default());
    assert_eq!((made.primary.as_deref(), host(&found, "NetworkMode")), (Some("front"), json!("front")));
    found["HostConfig"]["NetworkMode"] = json!("left");
    assert_eq!(host(&found, "NetworkMode"), json!("front"));
    found["NetworkSettings"]["Networks"] = json!({});
    assert_eq!(host(&found, "NetworkMode"), json!("none"));
    found["HostConfig"]["NetworkMode"] = json!("host");
    assert_eq!(host(&found, "NetworkMode"), json!("host"));
}

#[test]
fn a_shared_network_takes_no_name_and_no_port() {
    let found = container(
        json!({ "Hostname": "other", "Domainname": "d", "ExposedPorts": { "80/tcp": {} } }),
        json!({ "NetworkMode": "container:abc", "Links": ["/db:/web/store"] }),
    );
    let body = body(&found);
    for key in ["Hostname", "Domainname", "ExposedPorts"] {
        assert!(!body.contains_key(key), "{key}");
    }
    assert_eq!(host(&found, "Links"), json!(["db:store"]));
}

#[test]
fn changes_are_applied_and_named_without_their_values() {
    let found = container(
        json!({ "Env": ["PATH=/bin", "MODE=image", "OLD=1", "KEEP=2"], "Labels": { "a": "1" },
                "ExposedPorts": { "80/tcp": {}, "90/tcp": {} } }),
        json!({ "PortBindings": { "80/tcp": [{ "HostIp": "", "HostPort": "8080" }] }, "Binds": ["x:/x"],
                "Tmpfs": { "/t": "" } }),
    );
    let some = |text: &str| Some(text.to_owned());
    let changes = Changes {
        image: some("web:2"),
        env: BTreeMap::from([("OLD".into(), None), ("NEW".into(), some("secret")), ("MODE".into(), some("image"))]),
        labels: BTreeMap::from([("a".into(), None), ("b".into(), some("2"))]),
        command: Some(vec!["serve".into()]),
        ports: Some(vec!["127.0.0.1:81:80".parse().unwrap(), "53/udp".parse().unwrap()]),
        mounts: vec!["y:/x/:ro".parse().unwrap(), "z:/t".parse().unwrap()],
    };
    let image = image(json!({}));
    let before = specified(&found, &image, &image, &Changes::default());
    let after = specified(&found, &image, &image, &changes);
    let body = &after.body;
    assert_eq!((&body["Image"], &body["Env"]), (&json!("web:2"), &json!(["KEEP=2", "NEW=secret"])));
    assert_eq!(body["Labels"], json!({ "b": "2" }));
    assert!(!body.contains_key("Cmd"), "the image's own command");
    assert_eq!(body["ExposedPorts"], json!({ "90/tcp": {}, "80/tcp": {}, "53/udp": {} }));
    let bindings = json!({ "80/tcp": [{ "HostIp": "127.0.0.1", "HostPort": "81" }],
                           "53/udp": [{ "HostIp": "", "HostPort": "" }] });
    assert_eq!(body["HostConfig"]["PortBindings"], bindings);
    assert_eq!(body["HostConfig"]["Binds"], json!(["y:/x/:ro", "z:/t"]));
    assert_eq!(body["HostConfig"]["Tmpfs"], json!({}));
    let said = before.differences(&after).join("; ");
    assert!(said.contains("env: +NEW -OLD") && said.contains("labels: -a +b"), "{said}");
    assert!(said.contains("HostConfig.PortBindings") && !said.contains("secret"), "{said}");
    assert!(after.differences(&after).is_empty());
    // What is there already is no change.
    let none = Changes { mounts: vec!["x:/x".parse().unwrap()], ..Changes::default() };
    assert!(before.differences(&specified(&found, &image, &image, &none)).is_empty());
}

#[test]
fn notations_that_are_none_are_refused() {
    for text in ["", "0", "80/icmp", "x:80", "1:2:3:4", "99999:80"] {
        assert!(text.parse::<Port>().is_err(), "{text}");
    }
    for text in ["", "/x", "a:b", ":/x", "a:/x:"] {
        assert!(text.parse::<Mount>().is_err(), "{text}");
    }
    let port: Port = "[::1]:80:80/sctp".parse().unwrap();
    assert_eq!((port.address.as_str(), port.published.as_str(), port.target.as_str()), ("::1", "80", "80/sctp"));
}
