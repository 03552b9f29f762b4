//! `prometheus.query`: asks a Prometheus for one figure and holds it to limits.

use std::collections::BTreeMap;
use std::path::PathBuf;

use async_trait::async_trait;
use reqwest::Url;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::CheckError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::text_or_secret::TextOrSecret;
use upgrade_core::units::{Share, Span};
use upgrade_core::verdict::{Limit, Verdict};

use crate::http::{HttpReply, HttpRequest, MOST, NoReply};

/// Configures `prometheus.query`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PrometheusQueryCheckConfig {
    /// Where the Prometheus is: `http://127.0.0.1:9090`, without `/api`.
    pub url: String,
    /// What is asked, in PromQL; it must give one figure.
    pub query: String,
    /// Headers to send: texts, or references to secrets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, TextOrSecret>,
    /// A file of PEM certificates to trust in place of the system's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// A target through which the Prometheus is reached, where only another network knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub via: Option<String>,
    /// The longest that one exchange may take.
    #[serde(default = "timeout")]
    pub timeout: Span,
    /// The least that passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    /// The most that passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
    /// The most that it may grow over the figure before the run, as a share of that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_increase: Option<Share>,
    /// The most that it may fall below the figure before the run, as a share of that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_decrease: Option<Share>,
    /// The most that it may grow over the figure before the run, in its own unit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_rise: Option<f64>,
    /// A second query, that counts what the first one rests on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples_query: Option<String>,
    /// The least that it must give for a verdict.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_samples: Option<f64>,
}

fn timeout() -> Span {
    Span::from_secs(10)
}

impl PrometheusQueryCheckConfig {
    /// Asks a Prometheus for a figure, without limits.
    pub fn new(url: impl Into<String>, query: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            query: query.into(),
            headers: BTreeMap::new(),
            ca: None,
            via: None,
            timeout: timeout(),
            min: None,
            max: None,
            max_increase: None,
            max_decrease: None,
            max_rise: None,
            samples_query: None,
            min_samples: None,
        }
    }

    fn limit(&self) -> Limit {
        Limit {
            min: self.min,
            max: self.max,
            max_increase: self.max_increase,
            max_decrease: self.max_decrease,
            max_rise: self.max_rise,
        }
    }

    fn validate(&self) -> Result<(), BuildError> {
        for (key, query) in [("query", Some(&self.query)), ("samples_query", self.samples_query.as_ref())] {
            if query.is_some_and(|query| query.trim().is_empty()) {
                return Err(BuildError::new("a query is a text in PromQL")
                    .at(key)
                    .with_hint("try it on the Prometheus' own page first: sum(rate(http_requests_total[1m]))"));
            }
        }
        let numbers =
            [("min", self.min), ("max", self.max), ("max_rise", self.max_rise), ("min_samples", self.min_samples)];
        if let Some((key, _)) = numbers.iter().find(|(_, number)| number.is_some_and(|number| !number.is_finite())) {
            return Err(BuildError::new("a limit is a finite number").at(*key));
        }
        if let (Some(min), Some(max)) = (self.min, self.max)
            && min > max
        {
            return Err(BuildError::new(format!("nothing is at least {min} and at most {max}")).at("min"));
        }
        match (&self.samples_query, self.min_samples) {
            (Some(_), None) => Err(BuildError::new("nothing says how many samples are enough")
                .at("min_samples")
                .with_hint("name the least that `samples_query` must give: `min_samples: 100`")),
            (None, Some(_)) => Err(BuildError::new("nothing says how samples are counted")
                .at("samples_query")
                .with_hint("count them in PromQL: `samples_query: sum(increase(http_requests_total[1m]))`")),
            _ => Ok(()),
        }
    }
}

/// Asks a Prometheus for one figure and holds it to limits.
#[derive(Debug)]
pub struct PrometheusQueryCheck {
    config: PrometheusQueryCheckConfig,
    value: HttpRequest,
    samples: Option<HttpRequest>,
}

impl PrometheusQueryCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// The URL or a header's name is not one, a query is empty, or limits exclude each other.
    pub fn from_config(config: PrometheusQueryCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        config.validate()?;
        let request = |query: &str| {
            let mut headers = config.headers.clone();
            headers.insert("content-type".to_owned(), "application/x-www-form-urlencoded".into());
            let request = HttpRequest::new("POST", &config.url, config.timeout.0)?;
            if request.path().contains("/api/v1") {
                return Err(BuildError::new("the URL is that of the Prometheus, not of its interface")
                    .at("url")
                    .with_hint("leave out `/api/v1/…`: http://127.0.0.1:9090"));
            }
            request
                .below("api/v1/query")
                .headers(&headers)?
                .body(Some(form(query).into()))
                .ca(config.ca.as_ref().map(|path| cx.path(path)))
                .via(config.via.as_deref(), cx)
        };
        let value = request(&config.query)?;
        let samples = config.samples_query.as_deref().map(request).transpose()?;
        Ok(Self { config, value, samples })
    }

    async fn ask(
        &self,
        cx: &Context,
        request: &HttpRequest,
        query: &str,
    ) -> Result<Result<Figure, Verdict>, CheckError> {
        let line = request.line();
        let silent = |why: String| {
            Verdict::unknown(format!("{line}: {why}"))
                .with_hint("nothing was measured: see whether Prometheus runs and listens on that address")
        };
        let way = request.way(cx).await.map_err(|error| error.map_text(|text| cx.mask(text)))?;
        Ok(match request.send(cx, &way).await {
            Ok(reply) => read(&reply, &line, &one_line(query)).map_err(|verdict| masked(cx, verdict)),
            Err(NoReply::Refused(why)) => Err(silent(why)),
            Err(NoReply::TimedOut) => Err(silent(format!("no reply within {}", Span(request.timeout())))),
            Err(NoReply::NotMade(error)) => return Err(error.map_text(|text| cx.mask(text))),
        })
    }
}

/// Encodes the form that a query is sent in: as a part of the URL, a long one would be refused.
fn form(query: &str) -> String {
    let url = Url::parse_with_params("http://localhost/", [("query", query)]).expect("the base is a URL");
    url.query().unwrap_or_default().to_owned()
}

fn one_line(query: &str) -> String {
    query.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn masked(cx: &Context, verdict: Verdict) -> Verdict {
    Verdict { message: cx.mask(&verdict.message), ..verdict }
}

/// Holds the one figure that a query gave.
#[derive(Debug)]
struct Figure {
    value: f64,
    /// What Prometheus remarks about it: that a part of the data is missing, for one.
    warnings: Vec<String>,
}

#[derive(Deserialize)]
struct Answer {
    status: String,
    #[serde(default)]
    data: Option<Data>,
    #[serde(default, rename = "errorType")]
    error_type: String,
    #[serde(default)]
    error: String,
    #[serde(default)]
    warnings: Vec<String>,
}

#[derive(Deserialize)]
struct Data {
    #[serde(rename = "resultType")]
    kind: String,
    result: Value,
}

#[derive(Deserialize)]
struct Series {
    #[serde(default)]
    metric: BTreeMap<String, String>,
    /// A time and a number; without it, the series is one of native histograms.
    value: Option<(f64, String)>,
}

/// Reads the one figure in a reply; what is none is *unknown*.
fn read(reply: &HttpReply, line: &str, query: &str) -> Result<Figure, Verdict> {
    if matches!(reply.status, 401 | 403) {
        return Err(Verdict::unknown(format!("{line}: refused with status {}", reply.status))
            .with_hint("send what it asks for: `headers: { Authorization: { file: /run/secrets/prometheus } }`"));
    }
    let Ok(answer) = serde_json::from_slice::<Answer>(&reply.body) else {
        if reply.status == 200 && reply.body.len() >= MOST {
            return Err(Verdict::unknown(format!("`{query}`: the reply is larger than {MOST} bytes"))
                .with_hint("it gives a great many series: aggregate them, as with sum(…)"));
        }
        return Err(Verdict::unknown(format!("{line}: status {}, and not the reply of a Prometheus", reply.status))
            .with_hint("`url` is that of the Prometheus, with its path where it has one: http://127.0.0.1:9090"));
    };
    let Answer { status, data, error_type, error, warnings } = answer;
    let data = match data {
        Some(data) if status == "success" => data,
        _ => {
            return Err(Verdict::unknown(format!("`{query}`: {error} ({error_type})")).with_hint(
                match error_type.as_str() {
                    "bad_data" | "execution" => "try the query on the Prometheus' own page, and mend it",
                    "timeout" | "canceled" => "the query takes too long: narrow it, or record it by a rule",
                    _ => "look at the log of the Prometheus and try again",
                },
            ));
        }
    };
    let unreadable = || Verdict::unknown(format!("`{query}`: the result of type {} cannot be read", data.kind));
    let text = match data.kind.as_str() {
        "scalar" => serde_json::from_value::<(f64, String)>(data.result.clone()).map_err(|_| unreadable())?.1,
        "vector" => {
            let series: Vec<Series> = serde_json::from_value(data.result.clone()).map_err(|_| unreadable())?;
            single(&series, query)?
        }
        "matrix" => {
            return Err(Verdict::unknown(format!("`{query}` gives a range of samples, not one figure"))
                .with_hint("reduce it: rate(…[1m]), avg_over_time(…[1m])"));
        }
        _ => return Err(unreadable().with_hint("the query must give a number: a scalar, or a vector of one series")),
    };
    let value: f64 = text.parse().map_err(|_| unreadable())?;
    if value.is_nan() {
        return Err(Verdict::unknown(format!("`{query}` is NaN"))
            .with_hint("nothing divided by nothing: there was no traffic; wait for some, or widen the range"));
    }
    if value.is_infinite() {
        return Err(Verdict::unknown(format!("`{query}` is {text}"))
            .with_hint("something divided by nothing, or a quantile above the last bucket: look at its parts"));
    }
    Ok(Figure { value, warnings })
}

/// Returns the number of the only series.
fn single(series: &[Series], query: &str) -> Result<String, Verdict> {
    match series {
        [] => Err(Verdict::unknown(format!("`{query}` gives no series"))
            .with_hint("a name or label is misspelt, or nothing was scraped yet: see the targets of the Prometheus")),
        [Series { value: Some((_, text)), .. }] => Ok(text.clone()),
        [Series { value: None, .. }] => Err(Verdict::unknown(format!("`{query}` gives a histogram, not a number"))
            .with_hint("take a figure of it: histogram_quantile(0.95, …), histogram_fraction(…)")),
        several => {
            let named: Vec<String> = several.iter().take(3).map(|each| labels(&each.metric)).collect();
            let more = if several.len() > 3 { ", …" } else { "" };
            Err(Verdict::unknown(format!(
                "`{query}` gives {} series, not one: {}{more}",
                several.len(),
                named.join(", ")
            ))
            .with_hint("aggregate them, as with sum(…), max(…) or avg(…), or select one by its labels"))
        }
    }
}

fn labels(metric: &BTreeMap<String, String>) -> String {
    let name = metric.get("__name__").map_or("", String::as_str);
    let pairs = metric.iter().filter(|(name, _)| *name != "__name__").map(|(name, text)| format!("{name}={text:?}"));
    format!("{name}{{{}}}", pairs.collect::<Vec<_>>().join(","))
}

#[async_trait]
impl Check for PrometheusQueryCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let mut counted = None;
        // Counted first: where there was no traffic, that says more than the NaN that it led to.
        if let (Some(request), Some(query), Some(least)) =
            (&self.samples, &self.config.samples_query, self.config.min_samples)
        {
            let samples = match self.ask(cx, request, query).await? {
                Ok(figure) => figure.value,
                Err(verdict) => return Ok(verdict),
            };
            if samples < least {
                return Ok(Verdict::unknown(format!("{samples} samples are too few to judge: {least} are wanted"))
                    .with_hint("wait for more traffic, widen the range of both queries, or lower `min_samples`")
                    .with_measurement("samples", samples));
            }
            counted = Some(samples);
        }
        let query = one_line(&self.config.query);
        let figure = match self.ask(cx, &self.value, &query).await? {
            Ok(figure) => figure,
            Err(verdict) => return Ok(verdict),
        };
        let said = format!("`{query}` is {}", figure.value);
        let verdict = if figure.warnings.is_empty() {
            Verdict::pass(said)
        } else {
            Verdict::warn(cx.mask(&format!("{said}, with a warning of Prometheus: {}", figure.warnings.join("; "))))
        };
        let verdict = verdict.with_measurement("value", figure.value);
        let verdict = match counted {
            Some(samples) => verdict.with_measurement("samples", samples),
            None => verdict,
        };
        let limits = BTreeMap::from([("value".to_owned(), self.config.limit())]);
        let baseline = cx.baseline("value").map(|before| ("value".to_owned(), before)).into_iter().collect();
        Ok(verdict.held_to(&limits, &baseline).with_hint("ask the Prometheus the same query, and look at its graph"))
    }

    fn kind(&self) -> &str {
        "prometheus.query"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn needs_baseline(&self) -> bool {
        self.config.limit().is_relative()
    }
}
