//! `http.probe`: asks a URL at a steady rate and measures errors and latencies.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::CheckError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::units::{Share, Span};
use upgrade_core::verdict::{Limit, Verdict};

use crate::http::{HttpRequest, NoReply};
use upgrade_core::text_or_secret::TextOrSecret;

/// Configures `http.probe`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HttpProbeCheckConfig {
    /// What is asked; it must be safe to ask often.
    pub url: String,
    /// The method.
    #[serde(default = "get")]
    pub method: String,
    /// Headers to send: texts, or references to secrets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, TextOrSecret>,
    /// A file of PEM certificates to trust in place of the system's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// A target through which the host is reached, where only another network knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub via: Option<String>,
    /// How long requests are sent.
    #[serde(default = "window")]
    pub window: Span,
    /// How many requests are sent a second, whether or not earlier ones were answered.
    #[serde(default = "rate")]
    pub rate: f64,
    /// How long one reply may take; past it the request counts as an error.
    #[serde(default = "timeout")]
    pub timeout: Span,
    /// The fewest requests that allow a verdict.
    #[serde(default = "min_requests")]
    pub min_requests: u32,
    /// The largest share of requests without a reply, or with a status of 500 and above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_error_rate: Option<Share>,
    /// The most that the share of errors may grow over the one before the run, in points.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_error_rate_increase: Option<Share>,
    /// The longest that 95 of 100 replies may take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_p95: Option<Span>,
    /// The most that it may grow over the one before the run, as a share of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_p95_increase: Option<Share>,
}

fn get() -> String {
    "GET".to_owned()
}

fn window() -> Span {
    Span::from_secs(5)
}

fn rate() -> f64 {
    20.0
}

fn timeout() -> Span {
    Span::from_secs(2)
}

fn min_requests() -> u32 {
    10
}

impl HttpProbeCheckConfig {
    /// Asks a URL for five seconds, twenty times a second, without limits.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            method: get(),
            headers: BTreeMap::new(),
            ca: None,
            via: None,
            window: window(),
            rate: rate(),
            timeout: timeout(),
            min_requests: min_requests(),
            max_error_rate: None,
            max_error_rate_increase: None,
            max_p95: None,
            max_p95_increase: None,
        }
    }

    fn limits(&self) -> BTreeMap<String, Limit> {
        let errors = Limit {
            max: self.max_error_rate.map(|share| share.0),
            max_rise: self.max_error_rate_increase.map(|share| share.0),
            ..Limit::default()
        };
        let p95 = Limit {
            max: self.max_p95.map(|span| span.0.as_secs_f64() * 1000.0),
            max_increase: self.max_p95_increase,
            ..Limit::default()
        };
        let limits = [("error_rate", errors), ("p95_ms", p95)];
        limits.into_iter().filter(|(_, limit)| *limit != Limit::default()).map(|(n, l)| (n.to_owned(), l)).collect()
    }
}

/// Asks a URL at a steady rate over a window of time.
///
/// Requests leave on schedule, answered or not: a server that stalls is measured as it looks to
/// its users, not as it looks to one patient client.
#[derive(Debug)]
pub struct HttpProbeCheck {
    config: HttpProbeCheckConfig,
    request: Arc<HttpRequest>,
}

impl HttpProbeCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// The URL or a header's name is not one, or the window is too short for the requests.
    pub fn from_config(config: HttpProbeCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        if !(config.rate > 0.0 && config.rate <= 1000.0) {
            return Err(BuildError::new("the rate must be above 0 and at most 1000 requests a second").at("rate"));
        }
        if config.min_requests == 0 {
            return Err(BuildError::new("a verdict needs at least one request").at("min_requests"));
        }
        if planned(&config) < u64::from(config.min_requests) {
            return Err(BuildError::new(format!(
                "{} at {} requests a second are fewer than the {} that a verdict needs",
                config.window, config.rate, config.min_requests
            ))
            .at("window")
            .with_hint("widen `window`, raise `rate`, or lower `min_requests`"));
        }
        let request = HttpRequest::new(&config.method, &config.url, config.timeout.0)?
            .headers(&config.headers)?
            .ca(config.ca.as_ref().map(|path| cx.path(path)))
            .via(config.via.as_deref(), cx)?;
        Ok(Self { config, request: Arc::new(request) })
    }

    async fn measure(&self, cx: &Context) -> Result<Samples, CheckError> {
        let way = Arc::new(self.request.way(cx).await.map_err(|error| error.map_text(|text| cx.mask(text)))?);
        let mut requests = JoinSet::new();
        let begun = Instant::now();
        for number in 0..planned(&self.config) {
            sleep_until(begun + Duration::from_secs_f64(number as f64 / self.config.rate)).await;
            if cx.cancelled().is_cancelled() {
                return Err(CheckError::unknown("the check was cancelled"));
            }
            let (request, cx, way) = (self.request.clone(), cx.clone(), way.clone());
            requests.spawn(async move { request.send(&cx, &way).await });
        }
        let mut samples = Samples::default();
        let mut not_made = None;
        while let Some(outcome) = requests.join_next().await {
            match outcome {
                Ok(Ok(reply)) => samples.reply(reply.latency, reply.status >= 500),
                // It took at least that long, which the percentiles must not hide.
                Ok(Err(NoReply::TimedOut)) => samples.reply(self.config.timeout.0, true),
                Ok(Err(NoReply::Refused(_))) => samples.errors += 1,
                Ok(Err(NoReply::NotMade(error))) => not_made = Some(error),
                Err(error) => not_made = Some(CheckError::unknown("a request was lost").with_cause(&error)),
            }
        }
        match not_made {
            Some(error) => Err(error.map_text(|text| cx.mask(text))),
            None => Ok(samples),
        }
    }
}

fn planned(config: &HttpProbeCheckConfig) -> u64 {
    (config.window.0.as_secs_f64() * config.rate).floor() as u64
}

#[derive(Default)]
struct Samples {
    errors: usize,
    latencies: Vec<Duration>,
    answered: usize,
}

impl Samples {
    fn reply(&mut self, latency: Duration, error: bool) {
        self.latencies.push(latency);
        self.answered += usize::from(!error);
        self.errors += usize::from(error);
    }

    fn requests(&self) -> usize {
        self.answered + self.errors
    }

    fn error_rate(&self) -> f64 {
        self.errors as f64 / self.requests() as f64
    }

    /// Returns the latency that this share of the replies did not exceed (nearest rank).
    fn percentile_ms(&mut self, share: f64) -> Option<f64> {
        self.latencies.sort_unstable();
        let rank = (share * self.latencies.len() as f64).ceil() as usize;
        Some(self.latencies.get(rank.max(1) - 1)?.as_secs_f64() * 1000.0)
    }
}

#[async_trait]
impl Check for HttpProbeCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let mut samples = self.measure(cx).await?;
        let (requests, line) = (samples.requests(), self.request.line());
        if requests < self.config.min_requests as usize {
            return Ok(Verdict::unknown(format!("{line}: {requests} requests are too few for a verdict"))
                .with_hint("widen `window` or raise `rate`")
                .with_measurement("requests", requests as f64));
        }
        let rate = Share(samples.error_rate());
        let p95 = samples.percentile_ms(0.95);
        let latency = p95.map_or_else(|| "no reply".to_owned(), |p95| format!("95% of replies within {p95:.1} ms"));
        let mut verdict = Verdict::pass(format!("{line}: {rate} errors in {requests} requests, {latency}"))
            .with_measurement("requests", requests as f64)
            .with_measurement("error_rate", rate.0);
        for (name, share) in [("p50_ms", 0.5), ("p95_ms", 0.95), ("p99_ms", 0.99)] {
            if let Some(value) = samples.percentile_ms(share) {
                verdict = verdict.with_measurement(name, value);
            }
        }
        let limits = self.config.limits();
        let baseline = limits.keys().filter_map(|name| Some((name.clone(), cx.baseline(name)?))).collect();
        Ok(verdict
            .held_to(&limits, &baseline)
            .with_hint("read the log of the service; ask the same URL with curl and look at the machine's load"))
    }

    fn kind(&self) -> &str {
        "http.probe"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn needs_baseline(&self) -> bool {
        self.config.limits().values().any(Limit::is_relative)
    }
}
