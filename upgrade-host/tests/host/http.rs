//! `http.get` and `http.probe` against a real server on loopback.

#![cfg(test)]

use std::time::Duration;

use async_trait::async_trait;

use crate::server::{Reply, Server, reply, text};
use serde_json::{Value, json};
use tempfile::TempDir;
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::names::LockName;
use upgrade_core::registry::{AnyTarget, BuildContext};
use upgrade_core::target::Target;
use upgrade_core::testkit::TestContext;
use upgrade_core::tunnel::{Passage, Tunnel};
use upgrade_core::verdict::{Status, Verdict};
use upgrade_host::checks::HttpGetCheck;
use upgrade_host::checks::HttpProbeCheck;

fn get(with: Value) -> HttpGetCheck {
    let config = serde_json::from_value(with).expect("a configuration");
    HttpGetCheck::from_config(config, &BuildContext::new("/")).expect("a check")
}

fn probe(with: Value) -> HttpProbeCheck {
    let config = serde_json::from_value(with).expect("a configuration");
    HttpProbeCheck::from_config(config, &BuildContext::new("/")).expect("a check")
}

async fn ask(check: &impl Check) -> Verdict {
    check.check(&TestContext::new("http").forward()).await.expect("a verdict")
}

async fn closed_port() -> u16 {
    tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("an address").port()
}

#[tokio::test]
async fn a_reply_is_held_to_all_that_is_asked() {
    let server = Server::start(|_, request| {
        assert!(request.starts_with("GET /health HTTP/1.1"));
        reply("200 OK", "x-node: a-1\r\n", r#"{"version":"1.1.0","db":{"rows":3}}"#)
    })
    .await;
    let url = server.url("/health");
    let verdict = ask(&get(json!({
        "url": url, "json": { "/version": "1.1.0", "/db/rows": 3 }, "header": { "X-Node": "a-" },
        "contains": "rows", "max_latency": "5s", "facts": { "rows": "/db/rows" }
    })))
    .await;
    assert_eq!(verdict.status, Status::Pass, "{verdict:?}");
    assert_eq!((verdict.facts["version"].as_str(), verdict.facts["rows"].as_str()), ("1.1.0", "3"));
    assert!(verdict.measurements["latency_ms"] > 0.0);
    for wrong in [
        json!({ "status": 204 }),
        json!({ "status": [201, 204] }),
        json!({ "json": { "/version": "1.0.0" } }),
        json!({ "json": { "/nothing": 1 } }),
        json!({ "header": { "x-node": "b" } }),
        json!({ "header": { "x-other": "" } }),
        json!({ "contains": "columns" }),
    ] {
        let mut with = json!({ "url": url });
        with.as_object_mut().unwrap().extend(wrong.as_object().unwrap().clone());
        let verdict = ask(&get(with)).await;
        assert_eq!(verdict.status, Status::Fail, "{wrong}");
        assert!(verdict.hint.is_some());
    }
}

#[tokio::test]
async fn a_server_that_says_no_is_not_a_question_that_failed() {
    let refused = ask(&get(json!({ "url": format!("http://127.0.0.1:{}/", closed_port().await) }))).await;
    assert_eq!(refused.status, Status::Fail);
    let closing = Server::start(|_, _| Reply::Close).await;
    assert_eq!(ask(&get(json!({ "url": closing.url("/") }))).await.status, Status::Fail);

    let slow = Server::start(|_, _| Reply::Send(Duration::from_secs(60), text("200 OK", "", ""))).await;
    let late = ask(&get(json!({ "url": slow.url("/"), "timeout": "200ms" }))).await;
    assert_eq!(late.status, Status::Unknown);
    let late = ask(&get(json!({ "url": slow.url("/"), "timeout": "200ms", "max_latency": "100ms" }))).await;
    assert_eq!(late.status, Status::Fail, "a limit that has passed is measured");

    let nowhere = get(json!({ "url": "http://no-such-host.invalid/" }));
    let error = nowhere.check(&TestContext::new("http").forward()).await.unwrap_err();
    assert!(error.hint().is_some());
}

#[tokio::test]
async fn redirects_are_followed_when_asked() {
    let server = Server::start(|_, request| match request.starts_with("GET /old") {
        true => reply("302 Found", "location: /new\r\n", ""),
        false => reply("200 OK", "", "here"),
    })
    .await;
    assert_eq!(ask(&get(json!({ "url": server.url("/old") }))).await.status, Status::Fail);
    assert_eq!(ask(&get(json!({ "url": server.url("/old"), "status": 302 }))).await.status, Status::Pass);
    let followed = get(json!({ "url": server.url("/old"), "follow_redirects": true, "contains": "here" }));
    assert_eq!(ask(&followed).await.status, Status::Pass);
}

#[tokio::test]
async fn a_certificate_that_cannot_be_read_is_not_a_verdict() {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("empty.pem"), "").unwrap();
    for ca in ["empty.pem", "missing.pem"] {
        let check = get(json!({ "url": "https://127.0.0.1:1/", "ca": dir.path().join(ca) }));
        let error = check.check(&TestContext::new("http").forward()).await.unwrap_err();
        assert!(error.hint().unwrap().contains("PEM"), "{error:?}");
    }
}

#[tokio::test]
async fn a_secret_header_is_sent_and_shown_nowhere() {
    let dir = TempDir::new().unwrap();
    let canary = "canary-header-5ecret";
    std::fs::write(dir.path().join("token"), canary).unwrap();
    let server = Server::start(move |_, request| {
        assert!(request.contains(&format!("authorization: {canary}")), "the secret is sent");
        // A server that echoes what it was sent.
        let body = format!(r#"{{"version":"{canary}","you":"{canary}"}}"#);
        reply("401 Unauthorized", "", &body)
    })
    .await;
    let secret = json!({ "file": dir.path().join("token") });
    let with = json!({ "url": server.url("/?q=canary-query"), "headers": { "authorization": secret },
        "json": { "/you": "me" }, "facts": { "you": "/you" } });
    let check = get(with);
    let verdict = ask(&check).await;
    assert_eq!(verdict.status, Status::Fail);
    let refused = get(json!({ "url": format!("http://127.0.0.1:{}/?q=canary-query", closed_port().await),
        "headers": { "authorization": secret } }));
    let all = format!("{verdict:?} {check:?} {} {:?}", check.definition(), ask(&refused).await);
    assert!(!all.contains(canary), "{all}");
    assert!(!format!("{verdict:?}").contains("canary-query"), "a query may carry a token");
}

#[tokio::test]
async fn a_probe_measures_errors_and_latencies() {
    let server = Server::start(|number, _| {
        let wait = Duration::from_millis(if number % 10 == 0 { 80 } else { 1 });
        let status = if number % 5 == 0 { "500 Internal Server Error" } else { "200 OK" };
        Reply::Send(wait, text(status, "", ""))
    })
    .await;
    let with = |limits: Value| {
        let mut with = json!({ "url": server.url("/"), "window": "500ms", "rate": 100 });
        with.as_object_mut().unwrap().extend(limits.as_object().unwrap().clone());
        probe(with)
    };
    let verdict = ask(&with(json!({}))).await;
    assert_eq!(verdict.status, Status::Pass, "without limits, figures only");
    assert_eq!(verdict.measurements["requests"], 50.0);
    assert_eq!(verdict.measurements["error_rate"], 0.2);
    assert!(verdict.measurements["p50_ms"] < 60.0 && verdict.measurements["p95_ms"] >= 80.0, "{verdict:?}");
    assert_eq!(ask(&with(json!({ "max_error_rate": "25%" }))).await.status, Status::Pass);
    assert_eq!(ask(&with(json!({ "max_error_rate": "10%" }))).await.status, Status::Fail);
    assert_eq!(ask(&with(json!({ "max_p95": "50ms" }))).await.status, Status::Fail);
}

#[tokio::test]
async fn a_probe_compares_with_the_figures_before_the_run() {
    let server = Server::start(|_, _| Reply::Send(Duration::from_millis(30), text("200 OK", "", ""))).await;
    let check = probe(json!({ "url": server.url("/"), "window": "300ms", "rate": 50,
        "max_p95_increase": "20%", "max_error_rate_increase": "1%" }));
    assert!(check.needs_baseline());
    assert_eq!(ask(&check).await.status, Status::Unknown, "no baseline, no verdict");
    let before = |p95: f64| TestContext::new("http").baseline("p95_ms", p95).baseline("error_rate", 0.0).forward();
    assert_eq!(check.check(&before(10.0)).await.unwrap().status, Status::Fail);
    assert_eq!(check.check(&before(500.0)).await.unwrap().status, Status::Pass);
    assert!(!probe(json!({ "url": server.url("/"), "max_p95": "1s" })).needs_baseline());
}

#[tokio::test]
async fn a_probe_of_a_dead_server_fails_and_of_no_server_is_unknown() {
    let url = format!("http://127.0.0.1:{}/", closed_port().await);
    let dead = probe(json!({ "url": url, "window": "200ms", "rate": 50, "max_error_rate": "1%", "max_p95": "1s" }));
    let verdict = ask(&dead).await;
    assert_eq!((verdict.status, verdict.measurements["error_rate"]), (Status::Fail, 1.0));
    let nowhere = probe(json!({ "url": "http://no-such-host.invalid/", "window": "200ms", "rate": 50 }));
    assert!(nowhere.check(&TestContext::new("http").forward()).await.is_err());
}

#[test]
fn what_cannot_be_asked_is_refused_when_it_is_built() {
    let cx = BuildContext::new("/");
    for wrong in [
        json!({ "url": "127.0.0.1:80" }),
        json!({ "url": "ftp://127.0.0.1/" }),
        json!({ "url": "http://user:pass@127.0.0.1/" }),
        json!({ "url": "http://127.0.0.1/", "method": "G E T" }),
        json!({ "url": "http://127.0.0.1/", "headers": { "a b": "c" } }),
        json!({ "url": "http://127.0.0.1/", "json": { "version": 1 } }),
    ] {
        assert!(HttpGetCheck::from_config(serde_json::from_value(wrong.clone()).unwrap(), &cx).is_err(), "{wrong}");
    }
    for wrong in [json!({ "rate": 0 }), json!({ "window": "100ms", "rate": 10 }), json!({ "min_requests": 0 })] {
        let mut with = json!({ "url": "http://127.0.0.1/" });
        with.as_object_mut().unwrap().extend(wrong.as_object().unwrap().clone());
        assert!(HttpProbeCheck::from_config(serde_json::from_value(with).unwrap(), &cx).is_err(), "{wrong}");
    }
}

/// Stands for a cluster in whose network the server is `api.shop:8080`.
struct Cluster(std::net::SocketAddr);

#[async_trait]
impl Tunnel for Cluster {
    async fn open(&self, _: &Context, host: &str, port: u16) -> Result<Passage, StepError> {
        if (host, port) == ("api.shop", 8080) {
            return Ok(Passage::new(self.0, ()));
        }
        Err(StepError::transient(format!("nothing listens at {host}:{port}")).with_hint("name a service"))
    }
}

#[async_trait]
impl Target for Cluster {
    fn lock(&self) -> LockName {
        LockName::new("cluster", "test").unwrap()
    }

    async fn identity(&self, _: &Context) -> Result<String, StepError> {
        Ok("the test's".into())
    }
}

#[tokio::test]
async fn a_host_of_another_network_is_asked_through_the_target_that_leads_there() {
    let server = Server::start(|_, request| {
        let named = request.to_ascii_lowercase().contains("host: api.shop:8080\r\n");
        reply(if named { "200 OK" } else { "421 Misdirected Request" }, "", "")
    })
    .await;
    let address = server.url("").trim_start_matches("http://").trim_end_matches('/').parse().unwrap();
    let cx = BuildContext::new("/").with_target("cluster", AnyTarget::tunnel("test.cluster", Cluster(address)));
    let get = |with: Value| HttpGetCheck::from_config(serde_json::from_value(with).unwrap(), &cx);
    let there = json!({ "url": "http://api.shop:8080/health", "via": "cluster" });
    let verdict = ask(&get(there.clone()).unwrap()).await;
    assert_eq!(verdict.status, Status::Pass, "{verdict:?}");
    let config = json!({ "url": "http://api.shop:8080/", "via": "cluster", "window": "500ms", "max_error_rate": "0%" });
    let probe = HttpProbeCheck::from_config(serde_json::from_value(config).unwrap(), &cx).unwrap();
    let verdict = ask(&probe).await;
    assert_eq!(verdict.status, Status::Pass, "{verdict:?}");

    let nowhere = get(json!({ "url": "http://api.shop:8081/", "via": "cluster" })).unwrap();
    let error = nowhere.check(&TestContext::new("http").forward()).await.unwrap_err();
    assert!(error.message().contains("api.shop:8081"), "{error:?}");
    for wrong in [
        json!({ "url": "http://10.0.0.1:8080/", "via": "cluster" }),
        json!({ "url": "http://api.shop:8080/", "via": "nothing" }),
        json!({ "url": "http://api.shop:8080/", "via": "cluster", "follow_redirects": true }),
    ] {
        assert_eq!(get(wrong.clone()).unwrap_err().key.as_deref(), Some("via"), "{wrong}");
    }
}
