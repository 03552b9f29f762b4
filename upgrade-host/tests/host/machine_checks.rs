//! The checks of the machine, and `tcp.connect`.

#![cfg(test)]

use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use upgrade_core::error::CheckError;
use upgrade_core::registry::{BuildContext, Registry};
use upgrade_core::testkit::TestContext;
use upgrade_core::verdict::{Status, Verdict};

async fn ask(kind: &str, with: Value, base: &std::path::Path) -> Result<Verdict, CheckError> {
    let mut registry = Registry::new();
    upgrade_host::register(&mut registry);
    let check = registry.make_check(kind, with, &BuildContext::new(base)).expect("a check");
    assert_eq!(check.kind(), kind);
    check.check(&TestContext::new("machine").forward()).await
}

#[tokio::test]
async fn every_check_measures_and_holds_to_its_limit() {
    let dir = TempDir::new().unwrap();
    let half = f64::MIN_POSITIVE;
    for (kind, fine, over, measured) in [
        ("host.disk", json!({ "path": ".", "free": "1KiB" }), json!({ "path": ".", "free": "8000TiB" }), "free_bytes"),
        ("host.disk", json!({ "path": "not/yet/there" }), json!({ "path": ".", "free_share": 1.1 }), "free_share"),
        ("host.memory", json!({ "available": "1KiB" }), json!({ "available": "8000TiB" }), "available_bytes"),
        ("host.memory", json!({}), json!({ "available_share": 1.1 }), "available_share"),
        ("host.load", json!({ "max_per_core": 1e6 }), json!({ "max_per_core": half }), "load1"),
        ("host.cpu", json!({ "max_busy": 1.01, "window": "200ms" }), Value::Null, "busy_share"),
    ] {
        let verdict = ask(kind, fine, dir.path()).await.unwrap();
        assert_eq!(verdict.status, Status::Pass, "{kind}: {verdict:?}");
        assert!(verdict.measurements[measured].is_finite());
        // An idle machine has no load to be over.
        if over != Value::Null && (kind != "host.load" || verdict.measurements[measured] > 0.0) {
            let verdict = ask(kind, over, dir.path()).await.unwrap();
            assert_eq!(verdict.status, Status::Fail, "{kind}: {verdict:?}");
            assert!(verdict.hint.is_some());
        }
    }
}

#[tokio::test]
async fn a_version_is_read_from_a_file() {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("VERSION"), "1.2.3\n").unwrap();
    std::fs::write(dir.path().join("package.json"), r#"{"name":"notes","meta":{"version":"2.0.0"}}"#).unwrap();
    let plain = ask("host.file", json!({ "path": "VERSION" }), dir.path()).await.unwrap();
    assert_eq!(plain.facts["version"], "1.2.3");
    let with = json!({ "path": "package.json", "facts": { "version": "/meta/version" }, "contains": "notes" });
    assert_eq!(ask("host.file", with, dir.path()).await.unwrap().facts["version"], "2.0.0");
    assert_eq!(ask("host.file", json!({ "path": "none" }), dir.path()).await.unwrap().status, Status::Fail);
    let with = json!({ "path": "VERSION", "facts": { "version": "/version" } });
    assert!(ask("host.file", with, dir.path()).await.is_err(), "what cannot be read is not known");
}

#[tokio::test]
async fn a_port_answers_a_ping() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut buffer = [0; 64];
                let read = stream.read(&mut buffer).await.unwrap_or(0);
                match &buffer[..read] {
                    b"PING\r\n" => {
                        // In two parts: an answer may come in pieces.
                        stream.write_all(b"+PO").await.unwrap();
                        tokio::time::sleep(Duration::from_millis(20)).await;
                        stream.write_all(b"NG\r\n").await.unwrap();
                    }
                    b"HANG" => tokio::time::sleep(Duration::from_secs(60)).await,
                    _ => stream.write_all(b"-ERR unknown\r\n").await.unwrap(),
                }
            });
        }
    });
    let dir = TempDir::new().unwrap();
    for (send, status) in [(r"PING\r\n", Status::Pass), ("QUIT", Status::Fail), ("HANG", Status::Unknown)] {
        let with = json!({ "port": port, "send": send, "expect": "+PONG", "timeout": "500ms" });
        let verdict = ask("tcp.connect", with, dir.path()).await.unwrap();
        assert_eq!(verdict.status, status, "{send}: {verdict:?}");
    }
    assert_eq!(ask("tcp.connect", json!({ "port": port }), dir.path()).await.unwrap().status, Status::Pass);
    server.abort();
    let _ = server.await;
    assert_eq!(ask("tcp.connect", json!({ "port": port }), dir.path()).await.unwrap().status, Status::Fail);
    let with = json!({ "host": "no-such-host.invalid", "port": 1 });
    assert!(ask("tcp.connect", with, dir.path()).await.is_err());
}
