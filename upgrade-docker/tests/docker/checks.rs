//! The checks on a real engine.

#![cfg(test)]

use std::net::TcpListener;
use std::time::Duration;

use serde_json::{Value, json};
use upgrade_core::error::CheckError;
use upgrade_core::testkit::TestContext;
use upgrade_core::verdict::{Status, Verdict};
use upgrade_testbed::docker::{self, Engine, Image};

use crate::world::{Corner, check, target};

async fn answer(engine: &Engine, kind: &str, test: &TestContext, with: &Value) -> Result<Verdict, CheckError> {
    let mut all = json!({ "target": "engine" });
    all.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
    check(engine, kind, all).unwrap_or_else(|error| panic!("{error}")).check(&test.forward()).await
}

async fn ask(engine: &Engine, kind: &str, with: &Value) -> Verdict {
    answer(engine, kind, &TestContext::new("check"), with).await.unwrap_or_else(|error| panic!("{error:?}"))
}

/// Asks for several things, each with the status and a part of the message that it must get.
async fn table(engine: &Engine, kind: &str, rows: &[(Value, Status, &str)]) {
    for (with, status, message) in rows {
        let verdict = ask(engine, kind, with).await;
        assert_eq!(verdict.status, *status, "{with}: {verdict:?}");
        assert!(verdict.message.contains(message), "{with}: {verdict:?}");
        assert!(verdict.status == Status::Pass || verdict.hint.is_some(), "{with}: {verdict:?}");
    }
}

fn wrong(engine: &Engine, kind: &str, rows: &[(Value, &str)]) {
    for (with, key) in rows {
        let error = check(engine, kind, with.clone()).map(drop).unwrap_err();
        assert_eq!(error.key.as_deref(), Some(*key), "{with}: {error}");
    }
}

#[tokio::test]
async fn an_engine_is_asked_for_its_version_storage_and_space() {
    let Some(engine) = docker::shared() else { return };
    let version = engine.docker(["version", "--format", "{{.Server.Version}}"]);
    let driver = engine.docker(["info", "--format", "{{.Driver}}"]);
    let verdict = ask(&engine, "docker.engine", &json!({})).await;
    assert_eq!((verdict.facts["version"].as_str(), verdict.facts["storage"].as_str()), (&*version, &*driver));
    let rows = [
        (json!({ "version": ">=1.13", "api": "1.41", "storage": ["none", driver] }), Status::Pass, "Docker Engine"),
        (json!({ "version": ">=99" }), Status::Fail, "not >=99"),
        (json!({ "api": "1.99" }), Status::Fail, "not 1.99"),
        (json!({ "storage": ["zfs"] }), Status::Fail, "not zfs"),
    ];
    table(&engine, "docker.engine", &rows).await;
    if verdict.measurements.contains_key("free_bytes") {
        let rows = [
            (json!({ "free": "1MiB", "free_share": "0.01%" }), Status::Pass, "Docker Engine"),
            (json!({ "free": "900TiB" }), Status::Fail, "900"),
            (json!({ "free_share": "100%" }), Status::Fail, "needed"),
        ];
        table(&engine, "docker.engine", &rows).await;
    }
    wrong(&engine, "docker.engine", &[(json!({ "version": "new" }), "version"), (json!({ "api": "1" }), "api")]);
}

#[tokio::test]
async fn an_engine_that_does_not_answer_fails_the_check() {
    let Some(own) = docker::own() else { return };
    let check = check(own.engine(), "docker.engine", json!({ "target": "engine" })).unwrap();
    let cx = TestContext::new("check").forward();
    assert_eq!(check.check(&cx).await.unwrap().status, Status::Pass);
    own.kill();
    let verdict = check.check(&cx).await.unwrap();
    assert!(verdict.status == Status::Fail && verdict.message.contains("does not answer"), "{verdict:?}");
}

#[tokio::test]
async fn an_image_is_found_on_the_engine_and_in_its_registry() {
    let (Some(corner), Some(registry)) = (Corner::shared("image"), docker::registry(true)) else { return };
    let engine = &corner.engine;
    let name = format!("{}/{}:1.0", registry.address(), corner.prefix);
    let id = Image::web("1.0").with("LABEL tier=web").build(engine, &name);
    engine.docker(["login", "--username", docker::USER, "--password", docker::PASSWORD, &registry.address()]);
    let pushed = engine.docker(["push", &name]);
    engine.docker(["logout", &registry.address()]);
    let digest = pushed.split_whitespace().find(|word| word.starts_with("sha256:")).unwrap().to_owned();
    let other = format!("sha256:{}", "0".repeat(64));

    let verdict = ask(engine, "docker.image", &json!({ "image": name })).await;
    assert_eq!((verdict.facts["id"].as_str(), verdict.facts["digest"].as_str()), (&*id, &*digest));
    assert!(verdict.measurements["size_bytes"] > 0.0 && verdict.measurements["age_seconds"] < 600.0, "{verdict:?}");
    let here = |more: Value| {
        let mut with = json!({ "image": name, "place": "engine" });
        with.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        with
    };
    let rows = [
        (
            here(json!({ "digest": digest, "max_age": "1h", "labels": { "tier": "web" } })),
            Status::Pass,
            "on the engine",
        ),
        (here(json!({ "digest": other })), Status::Fail, "its digest is"),
        (here(json!({ "platform": "linux/s390x" })), Status::Fail, "not linux/s390x"),
        (here(json!({ "max_age": "1ms" })), Status::Fail, "is the most"),
        (here(json!({ "labels": { "tier": "db" } })), Status::Fail, "its label tier is `web`"),
        (here(json!({ "labels": { "owner": "ops" } })), Status::Fail, "no label owner"),
        (json!({ "image": corner.name("none:1"), "place": "engine" }), Status::Fail, "is not on the engine"),
    ];
    table(engine, "docker.image", &rows).await;

    engine.docker(["image", "rm", "--force", &name]);
    let refused = ask(engine, "docker.image", &json!({ "image": name })).await;
    assert!(refused.status == Status::Fail && refused.hint.unwrap().contains("password"), "{}", refused.message);
    let secret = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(secret.path(), docker::PASSWORD).unwrap();
    let config = serde_json::from_value(json!({
        "host": engine.host(),
        "registries": { registry.address(): { "username": docker::USER, "password": { "file": secret.path() } } },
    }));
    let cx = upgrade_core::registry::BuildContext::new("/");
    let known = upgrade_docker::Engine::from_config(config.unwrap(), &cx).unwrap();
    let cx = cx.with_target("engine", upgrade_core::registry::AnyTarget::new("docker", known));
    let kinds = crate::world::registry();
    for (with, status, message) in [
        (json!({ "image": name, "digest": digest, "target": "engine" }), Status::Pass, "in the registry"),
        (json!({ "image": name, "place": "registry", "target": "engine" }), Status::Pass, "in the registry"),
        (json!({ "image": name, "digest": other, "target": "engine" }), Status::Fail, "its digest is"),
        (
            json!({ "image": name, "labels": { "tier": "web" }, "target": "engine" }),
            Status::Unknown,
            "only in the registry",
        ),
        (json!({ "image": name.replace(":1.0", ":2.0"), "target": "engine" }), Status::Fail, "cannot be pulled"),
    ] {
        let check = kinds.make_check("docker.image", with.clone(), &cx).unwrap();
        let verdict = check.check(&TestContext::new("check").forward()).await.unwrap();
        assert!(verdict.status == status && verdict.message.contains(message), "{with}: {verdict:?}");
    }
    assert!(corner.list(&["image", "ls"], "{{.Repository}}").is_empty());
    let rows = [
        (json!({ "image": name, "digest": "1.0" }), "digest"),
        (json!({ "image": name, "place": "registry", "max_age": "1d" }), "max_age"),
    ];
    wrong(engine, "docker.image", &rows);
}

#[tokio::test]
async fn a_container_is_asked_how_it_is() {
    let Some(corner) = Corner::shared("container") else { return };
    let engine = &corner.engine;
    let run = |what: &str, image: Image, arguments: &[&str]| {
        let (name, tag) = (corner.name(what), corner.name(&format!("{what}:1")));
        image.build(engine, &tag);
        let mut all = vec!["run", "--detach", "--network", "none", "--name", &name];
        all.extend(arguments);
        all.push(&tag);
        engine.docker(&all);
        name
    };
    let web = run("web", Image::shell("sleep 1000").healthcheck("true"), &[]);
    let sick = run("sick", Image::shell("sleep 1000").healthcheck("false"), &[]);
    let ended = run("ended", Image::shell("exit 3"), &[]);
    let loops = run("loops", Image::shell("sleep 0.1; exit 1"), &["--restart", "always"]);
    engine.docker(["tag", &corner.name("ended:1"), &corner.name("moved:1")]);
    for _ in 0..100 {
        let health = |name: &str| engine.docker(["inspect", "--format", "{{.State.Health.Status}}", name]);
        if health(&web) == "healthy" && health(&sick) == "unhealthy" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let rows = [
        (json!({ "container": web, "healthy": true, "max_restarts": 0 }), Status::Pass, "running, healthy"),
        (json!({ "container": web, "image": corner.name("web:1"), "min_uptime": "100ms" }), Status::Pass, "running"),
        (json!({ "container": web, "image": corner.name("moved:1") }), Status::Fail, "not of what"),
        (json!({ "container": web, "image": corner.name("none:1") }), Status::Fail, "is not on the engine"),
        (json!({ "container": web, "min_uptime": "1d" }), Status::Fail, "is the least"),
        (json!({ "container": web, "running": false }), Status::Fail, "it is running"),
        (json!({ "container": sick }), Status::Fail, "unhealthy"),
        (json!({ "container": sick, "healthy": false }), Status::Pass, "running"),
        (json!({ "container": ended }), Status::Fail, "exited with 3"),
        (json!({ "container": ended, "running": false }), Status::Pass, "exited with 3"),
        (json!({ "container": corner.name("none") }), Status::Fail, "there is no container"),
        (json!({ "container": corner.name("none"), "running": false }), Status::Pass, "there is no container"),
    ];
    table(engine, "docker.container", &rows).await;
    let verdict = ask(engine, "docker.container", &json!({ "container": loops, "max_restarts": 0 })).await;
    assert!(verdict.status == Status::Fail && verdict.measurements["restarts"] > 0.0, "{verdict:?}");
    engine.docker(["pause", &web]);
    table(engine, "docker.container", &[(json!({ "container": web }), Status::Fail, "paused")]).await;
    engine.docker(["unpause", &web]);
    let rows = [
        (json!({ "container": "" }), "container"),
        (json!({ "container": web, "running": false, "max_restarts": 1 }), "max_restarts"),
    ];
    wrong(engine, "docker.container", &rows);
}

#[tokio::test]
async fn new_errors_in_a_log_are_noticed_and_known_ones_are_not() {
    let Some(corner) = Corner::shared("logs") else { return };
    let engine = &corner.engine;
    let (name, image) = (corner.name("web"), corner.name("image:1"));
    Image::shell("echo 'Error 17: slow reply'; tail -f /tmp/log 2>/dev/null || sleep 1000").build(engine, &image);
    let script = "echo 'Error 17: slow reply'; touch /tmp/log; exec tail -f /tmp/log";
    engine.docker(["run", "--detach", "--network", "none", "--name", &name, &image, "sh", "-c", script]);
    let say = |text: &str| engine.docker(["exec", &name, "sh", "-c", &format!("echo '{text}' >>/tmp/log")]);
    let with = json!({ "container": name, "ignore": ["0 errors"] });
    tokio::time::sleep(Duration::from_millis(500)).await;
    let before = answer(engine, "docker.logs", &TestContext::new("logs").is_baseline(), &with).await.unwrap();
    assert!(before.status == Status::Pass && before.measurements["errors"] == 1.0, "{before:?}");
    assert!(!format!("{:?}", before.facts).contains("slow"), "{:?}", before.facts);
    let after =
        || before.facts.iter().fold(TestContext::new("logs"), |test, (name, value)| test.baseline_fact(name, value));
    say("Error 18: slow reply");
    say("done with 0 errors");
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let verdict = answer(engine, "docker.logs", &after(), &with).await.unwrap();
    assert!(verdict.status == Status::Pass && verdict.measurements["errors"] >= 1.0, "{verdict:?}");
    say("FATAL: no such column: price");
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let verdict = answer(engine, "docker.logs", &after(), &with).await.unwrap();
    assert!(verdict.status == Status::Fail && verdict.message.contains("no such column: price"), "{verdict:?}");
    assert_eq!(verdict.measurements["new_errors"], 1.0);
    let verdict = answer(engine, "docker.logs", &after(), &json!({ "container": name, "max_new": 1 })).await.unwrap();
    assert_eq!(verdict.status, Status::Fail, "`0 errors` counts there: {verdict:?}");
    let verdict = answer(engine, "docker.logs", &TestContext::new("logs"), &with).await.unwrap();
    assert_eq!(verdict.status, Status::Unknown);
    let none = json!({ "container": corner.name("none") });
    let verdict = answer(engine, "docker.logs", &TestContext::new("logs").is_baseline(), &none).await.unwrap();
    assert_eq!(verdict.status, Status::Pass);
    assert_eq!(answer(engine, "docker.logs", &after(), &none).await.unwrap().status, Status::Fail);
    assert!(check(engine, "docker.logs", json!({ "container": name })).unwrap().needs_baseline());
    wrong(engine, "docker.logs", &[(json!({ "container": name, "errors": [] }), "errors")]);
}

#[tokio::test]
async fn a_port_that_somebody_has_is_noticed() {
    let Some(corner) = Corner::shared("ports") else { return };
    let engine = &corner.engine;
    let (name, image) = (corner.name("web"), corner.name("image:1"));
    Image::shell("sleep 1000").build(engine, &image);
    engine.docker(["run", "--detach", "--name", &name, "--publish", "127.0.0.1::8080", &image]);
    let published = engine.docker(["port", &name, "8080"]);
    let port: u16 = published.rsplit(':').next().unwrap().parse().unwrap();
    let by = format!("{port} is published by container {name}");
    let mut rows = vec![
        (json!({ "ports": [port] }), Status::Fail, by.as_str()),
        (json!({ "ports": [format!("127.0.0.1:{port}")], "container": name }), Status::Pass, "can be published"),
        (json!({ "ports": [format!("{port}/udp")] }), Status::Pass, "can be published"),
    ];
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = listener.local_addr().unwrap().port();
    let cannot = format!("127.0.0.1:{taken} cannot be bound");
    if target(engine.host()).host().starts_with("unix://") {
        rows.push((json!({ "ports": [format!("127.0.0.1:{taken}")] }), Status::Fail, &cannot));
    }
    table(engine, "docker.ports", &rows).await;
    wrong(engine, "docker.ports", &[(json!({ "ports": [] }), "ports")]);
}
