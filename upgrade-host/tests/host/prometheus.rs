//! `prometheus.query` against a real Prometheus that scrapes a server of the test's own.

#![cfg(test)]

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use upgrade_core::check::Check;
use upgrade_core::registry::BuildContext;
use upgrade_core::testkit::TestContext;
use upgrade_core::verdict::{Status, Verdict};
use upgrade_host::checks::PrometheusQueryCheck;
use upgrade_testbed::prometheus::{self, Prometheus};

use crate::server::{Reply, Server, reply, text};

const METRICS: &str = "errors_ratio 0.02\nempty_ratio NaN\nendless +Inf\ntwo{side=\"a\"} 1\ntwo{side=\"b\"} 2\n";

fn check(with: Value) -> PrometheusQueryCheck {
    PrometheusQueryCheck::from_config(serde_json::from_value(with).expect("a configuration"), &BuildContext::new("/"))
        .expect("a check")
}

fn with(url: &str, query: &str, more: Value) -> PrometheusQueryCheck {
    let (mut with, Value::Object(more)) = (json!({ "url": url, "query": query }), more) else { unreachable!() };
    with.as_object_mut().unwrap().extend(more);
    check(with)
}

async fn ask(check: &impl Check) -> Verdict {
    check.check(&TestContext::new("prometheus").forward()).await.expect("a verdict")
}

/// Starts a Prometheus on a server whose `requests_total` is the number of the scrape, and waits for the first.
async fn scraping() -> Option<(Server, Prometheus)> {
    let server = Server::start(|number, request| {
        assert!(request.starts_with("GET /metrics"), "{request}");
        let requests = (number + 1) * 10;
        Reply::Send(
            Duration::ZERO,
            text(
                "200 OK",
                "content-type: text/plain; version=0.0.4\r\n",
                &format!("{METRICS}requests_total {requests}\n"),
            ),
        )
    })
    .await;
    let port = server.port;
    let prometheus = tokio::task::spawn_blocking(move || prometheus::start(&[port])).await.unwrap()?;
    let scraped = with(&prometheus.url(), "errors_ratio", json!({}));
    let began = Instant::now();
    while ask(&scraped).await.status != Status::Pass {
        assert!(began.elapsed() < Duration::from_secs(30), "nothing was scraped: {:?}", ask(&scraped).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Some((server, prometheus))
}

#[tokio::test(flavor = "multi_thread")]
async fn one_figure_is_held_to_limits() {
    let Some((_server, prometheus)) = scraping().await else { return };
    let url = prometheus.url();
    let verdict = ask(&with(&url, "errors_ratio", json!({ "max": 0.05, "min": 0 }))).await;
    assert_eq!((verdict.status, verdict.measurements["value"]), (Status::Pass, 0.02), "{verdict:?}");
    let verdict = ask(&with(&format!("{url}/"), "scalar(\n  sum(two)\n)", json!({ "max": 2 }))).await;
    assert_eq!(
        (verdict.status, verdict.measurements["value"]),
        (Status::Fail, 3.0),
        "a scalar, and a URL with a slash"
    );
    assert!(verdict.message.contains("above 2"), "{}", verdict.message);
    assert_eq!(ask(&with(&url, "errors_ratio", json!({ "min": 0.5 }))).await.status, Status::Fail);

    let relative = with(&url, "errors_ratio", json!({ "max_increase": "20%", "max_decrease": "50%" }));
    assert!(relative.needs_baseline() && !with(&url, "up", json!({ "min": 1 })).needs_baseline());
    assert_eq!(ask(&relative).await.status, Status::Unknown, "no baseline, no verdict");
    for (before, status) in [(0.02, Status::Pass), (0.01, Status::Fail), (0.1, Status::Fail)] {
        let cx = TestContext::new("prometheus").baseline("value", before).forward();
        assert_eq!(relative.check(&cx).await.unwrap().status, status, "{before}");
    }
    let cx = TestContext::new("prometheus").baseline("value", 0.0).forward();
    let risen = with(&url, "errors_ratio", json!({ "max_rise": 0.01 }));
    assert_eq!(risen.check(&cx).await.unwrap().status, Status::Fail, "more than nothing, in its own unit");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_figure_is_unknown_and_says_why() {
    let Some((_server, prometheus)) = scraping().await else { return };
    let url = prometheus.url();
    for (query, message, hint) in [
        ("no_such_metric", "no series", "misspelt"),
        ("empty_ratio", "NaN", "no traffic"),
        ("endless", "+Inf", "divided"),
        ("two", r#"2 series, not one: two{instance="127.0.0.1:"#, "sum("),
        ("two[1m]", "range of samples", "rate("),
        (r#""a text""#, "string", "number"),
        ("sum(", "unclosed left parenthesis", "mend it"),
        ("errors_ratio + on() two", "many-to-many matching not allowed", "mend it"),
    ] {
        let verdict = ask(&with(&url, query, json!({ "max": 1 }))).await;
        assert_eq!(verdict.status, Status::Unknown, "{verdict:?}");
        assert!(verdict.message.contains(message), "{query}: {}", verdict.message);
        assert!(verdict.hint.as_deref().unwrap().contains(hint), "{query}: {:?}", verdict.hint);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn too_few_samples_are_no_verdict() {
    let Some((_server, prometheus)) = scraping().await else { return };
    let url = prometheus.url();
    let few = |query: &str, samples: f64| {
        with(&url, query, json!({ "max": 1, "samples_query": "sum(requests_total)", "min_samples": samples }))
    };
    let verdict = ask(&few("empty_ratio", 1e9)).await;
    assert_eq!(verdict.status, Status::Unknown);
    assert!(verdict.message.contains("too few") && verdict.measurements["samples"] > 0.0, "{verdict:?}");
    let verdict = ask(&few("errors_ratio", 1.0)).await;
    assert_eq!(verdict.status, Status::Pass, "{verdict:?}");
    assert!(verdict.measurements["samples"] > 1.0);
}

#[tokio::test]
async fn a_prometheus_that_does_not_answer_has_measured_nothing() {
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let down = ask(&with(&format!("http://127.0.0.1:{closed}"), "up", json!({ "min": 1 }))).await;
    assert_eq!(down.status, Status::Unknown, "{down:?}");
    assert!(down.hint.unwrap().contains("runs"));
    let slow = Server::start(|_, _| Reply::Send(Duration::from_secs(60), text("200 OK", "", ""))).await;
    let late = ask(&with(&slow.url(""), "up", json!({ "timeout": "200ms" }))).await;
    assert!(late.status == Status::Unknown && late.message.contains("200ms"), "{late:?}");
    for (status, body) in [("200 OK", "<html>hello</html>"), ("404 Not Found", "no"), ("502 Bad Gateway", "")] {
        let other = Server::start(move |_, _| reply(status, "", body)).await;
        let verdict = ask(&with(&other.url(""), "up", json!({}))).await;
        assert!(verdict.status == Status::Unknown && verdict.message.contains("not the reply"), "{verdict:?}");
        assert!(verdict.message.contains(&status[..3]) && verdict.hint.is_some());
    }
    let nowhere = with("http://no-such-host.invalid", "up", json!({}));
    let error = nowhere.check(&TestContext::new("prometheus").forward()).await.unwrap_err();
    assert!(error.hint().is_some());
}

#[tokio::test]
async fn a_credential_is_sent_and_shown_nowhere() {
    let dir = TempDir::new().unwrap();
    let canary = "canary-bearer-5ecret";
    std::fs::write(dir.path().join("token"), canary).unwrap();
    // What stands before a Prometheus and asks for a credential; it echoes what it was sent.
    let proxy = Server::start(move |_, request| {
        assert!(request.starts_with("POST /metrics/prometheus/api/v1/query "), "{request}");
        assert!(request.contains("application/x-www-form-urlencoded"), "{request}");
        match request.contains(canary) {
            false => reply("401 Unauthorized", "", ""),
            true => {
                assert!(request.ends_with("query=sum%28up%29+%2B+1%25"), "{request}");
                reply(
                    "400 Bad Request",
                    "",
                    &format!(r#"{{"status":"error","errorType":"bad_data","error":"{canary}"}}"#),
                )
            }
        }
    })
    .await;
    let url = proxy.url("/metrics/prometheus");
    let refused = ask(&with(&url, "up", json!({}))).await;
    assert!(refused.status == Status::Unknown && refused.message.contains("401"), "{refused:?}");
    assert!(refused.hint.unwrap().contains("Authorization"));
    let headers = json!({ "headers": { "authorization": { "file": dir.path().join("token") } } });
    let check = with(&url, "sum(up) + 1%", headers);
    let all = format!("{:?} {check:?} {}", ask(&check).await, check.definition());
    assert!(all.contains("bad_data") && !all.contains(canary), "{all}");
}

#[tokio::test]
async fn a_warning_of_prometheus_is_passed_on() {
    let partial = Server::start(|_, _| {
        let body = r#"{"status":"success","warnings":["one store did not answer"],
            "data":{"resultType":"scalar","result":[1,"7"]}}"#;
        reply("200 OK", "", body)
    })
    .await;
    let verdict = ask(&with(&partial.url(""), "sum(up)", json!({ "max": 9 }))).await;
    assert_eq!((verdict.status, verdict.measurements["value"]), (Status::Warn, 7.0));
    assert!(verdict.message.contains("one store"), "{}", verdict.message);
    assert_eq!(ask(&with(&partial.url(""), "sum(up)", json!({ "max": 6 }))).await.status, Status::Fail);
}

#[test]
fn what_cannot_be_asked_is_refused_when_it_is_built() {
    for (key, wrong) in [
        ("url", json!({ "url": "127.0.0.1:9090" })),
        ("url", json!({ "url": "http://127.0.0.1:9090/api/v1/query" })),
        ("headers", json!({ "headers": { "a b": "c" } })),
        ("query", json!({ "query": " " })),
        ("min", json!({ "min": 2, "max": 1 })),
        ("min_samples", json!({ "samples_query": "sum(up)" })),
        ("samples_query", json!({ "min_samples": 3 })),
    ] {
        let mut with = json!({ "url": "http://127.0.0.1:9090", "query": "up" });
        with.as_object_mut().unwrap().extend(wrong.as_object().unwrap().clone());
        let error = PrometheusQueryCheck::from_config(serde_json::from_value(with).unwrap(), &BuildContext::new("/"))
            .expect_err("refused");
        assert!(format!("{error:?}").contains(&format!("{key:?}")), "{key}: {error:?}");
    }
}
