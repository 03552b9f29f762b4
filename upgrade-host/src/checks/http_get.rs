//! `http.get`: asks a URL once and looks at the reply.

use std::collections::BTreeMap;
use std::path::PathBuf;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::CheckError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::units::Span;
use upgrade_core::verdict::Verdict;

use crate::http::{HttpReply, HttpRequest, NoReply};
use upgrade_core::text_or_secret::TextOrSecret;

/// Configures `http.get`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HttpGetCheckConfig {
    /// What is asked.
    pub url: String,
    /// The method.
    #[serde(default = "get")]
    pub method: String,
    /// Headers to send: texts, or references to secrets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, TextOrSecret>,
    /// A body to send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<TextOrSecret>,
    /// The statuses that pass: one, or a list.
    #[serde(default)]
    pub status: Statuses,
    /// JSON pointers and the values that must stand there.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub json: BTreeMap<String, Value>,
    /// Headers of the reply and texts that they must contain.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub header: BTreeMap<String, String>,
    /// A text that the body must contain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contains: Option<String>,
    /// The longest that the reply's head may take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_latency: Option<Span>,
    /// Facts to read from the JSON of the reply: a name, and the pointer to its value.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub facts: BTreeMap<String, String>,
    /// Whether redirects are followed (ten at most).
    #[serde(default)]
    pub follow_redirects: bool,
    /// A file of PEM certificates to trust in place of the system's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// A target through which the host is reached, where only another network knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub via: Option<String>,
    /// The longest that the whole exchange may take.
    #[serde(default = "timeout")]
    pub timeout: Span,
}

fn get() -> String {
    "GET".to_owned()
}

fn timeout() -> Span {
    Span::from_secs(10)
}

/// Lists the statuses that pass: 200 alone unless said otherwise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Statuses {
    /// One status.
    One(u16),
    /// Any of several.
    Any(Vec<u16>),
}

impl Default for Statuses {
    fn default() -> Self {
        Self::One(200)
    }
}

impl Statuses {
    fn contain(&self, status: u16) -> bool {
        match self {
            Self::One(one) => *one == status,
            Self::Any(any) => any.contains(&status),
        }
    }

    fn line(&self) -> String {
        match self {
            Self::One(one) => one.to_string(),
            Self::Any(any) => any.iter().map(u16::to_string).collect::<Vec<_>>().join(" or "),
        }
    }
}

impl HttpGetCheckConfig {
    /// Asks a URL and expects status 200.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            method: get(),
            headers: BTreeMap::new(),
            body: None,
            status: Statuses::default(),
            json: BTreeMap::new(),
            header: BTreeMap::new(),
            contains: None,
            max_latency: None,
            facts: BTreeMap::new(),
            follow_redirects: false,
            ca: None,
            via: None,
            timeout: timeout(),
        }
    }
}

/// Asks a URL once and looks at the reply.
#[derive(Debug)]
pub struct HttpGetCheck {
    config: HttpGetCheckConfig,
    request: HttpRequest,
}

impl HttpGetCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// The URL, the method, a header's name or a JSON pointer is not one.
    pub fn from_config(config: HttpGetCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        for (key, pointers) in
            [("json", config.json.keys().collect::<Vec<_>>()), ("facts", config.facts.values().collect())]
        {
            if let Some(wrong) = pointers.into_iter().find(|pointer| !pointer.is_empty() && !pointer.starts_with('/')) {
                return Err(BuildError::new(format!("`{wrong}` is not a JSON pointer"))
                    .at(key)
                    .with_hint(format!("a pointer starts with a slash: `/{wrong}`")));
            }
        }
        let request = HttpRequest::new(&config.method, &config.url, config.timeout.0)?
            .headers(&config.headers)?
            .body(config.body.clone())
            .ca(config.ca.as_ref().map(|path| cx.path(path)))
            .follow_redirects(config.follow_redirects)
            .via(config.via.as_deref(), cx)?;
        Ok(Self { config, request })
    }

    /// Returns what is wrong with a reply.
    fn faults(&self, reply: &HttpReply, json: Option<&Value>) -> Vec<String> {
        let HttpGetCheckConfig { status, header, contains, max_latency, json: expected, .. } = &self.config;
        let mut faults = Vec::new();
        if !status.contain(reply.status) {
            faults.push(format!("status {}, expected {}", reply.status, status.line()));
        }
        for (pointer, expected) in expected {
            match json.map(|json| json.pointer(pointer)) {
                Some(Some(found)) if found == expected => {}
                Some(Some(found)) => faults.push(format!("{pointer} is {}, expected {expected}", short(found))),
                Some(None) => faults.push(format!("{pointer} is not there, expected {expected}")),
                None => faults.push(format!("the body is not JSON, expected {pointer} to be {expected}")),
            }
        }
        for (name, expected) in header {
            let mut found = reply.headers.get_all(name).iter();
            if !found.any(|value| String::from_utf8_lossy(value.as_bytes()).contains(expected)) {
                faults.push(format!("header {name} does not contain `{expected}`"));
            }
        }
        if let Some(text) = contains
            && !String::from_utf8_lossy(&reply.body).contains(text)
        {
            faults.push(format!("the body does not contain `{text}`"));
        }
        if let Some(most) = max_latency
            && reply.latency > most.0
        {
            faults.push(format!("it took {} ms, at most {most} allowed", reply.latency.as_millis()));
        }
        faults
    }

    fn judge(&self, cx: &Context, reply: &HttpReply) -> Verdict {
        let json: Option<Value> = serde_json::from_slice(&reply.body).ok();
        let faults = self.faults(reply, json.as_ref());
        let line = self.request.line();
        let verdict = if faults.is_empty() {
            let latency = reply.latency.as_millis();
            Verdict::pass(cx.mask(&format!("{line}: status {} in {latency} ms", reply.status)))
        } else {
            Verdict::fail(cx.mask(&format!("{line}: {}", faults.join("; "))))
                .with_hint("read the log of the service that answered; ask it again with curl")
        };
        let mut verdict = verdict
            .with_measurement("latency_ms", reply.latency.as_secs_f64() * 1000.0)
            .with_measurement("status", f64::from(reply.status));
        let default = ("version".to_owned(), "/version".to_owned());
        let named = self.config.facts.iter().map(|(name, pointer)| (name.clone(), pointer.clone()));
        for (name, pointer) in std::iter::once(default).chain(named) {
            if let Some(value) = json.as_ref().and_then(|json| json.pointer(&pointer)) {
                verdict = verdict.with_fact(name, cx.mask(&short(value)));
            }
        }
        verdict
    }
}

/// Writes a value of a reply, which may be of any length, in a line.
fn short(value: &Value) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    match text.char_indices().nth(200) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[async_trait]
impl Check for HttpGetCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let line = self.request.line();
        let waited = self.request.timeout();
        let way = self.request.way(cx).await.map_err(|error| error.map_text(|text| cx.mask(text)))?;
        match self.request.send(cx, &way).await {
            Ok(reply) => Ok(self.judge(cx, &reply)),
            Err(NoReply::Refused(why)) => Ok(Verdict::fail(format!("{line}: {why}"))
                .with_hint("nothing answers there: see whether the service runs and on which address it listens")),
            // The limit on latency has been measured to be passed, reply or not.
            Err(NoReply::TimedOut) if self.config.max_latency.is_some_and(|most| most.0 <= waited) => {
                Ok(Verdict::fail(format!("{line}: no reply within {}", Span(waited)))
                    .with_hint("the service hangs or the machine is overloaded: look at its log and at the load"))
            }
            Err(NoReply::TimedOut) => Ok(Verdict::unknown(format!("{line}: no reply within {}", Span(waited)))
                .with_hint("the service may hang, or the way to it be cut; `max_latency` makes this a failure")),
            Err(NoReply::NotMade(error)) => Err(error.map_text(|text| cx.mask(text))),
        }
    }

    fn kind(&self) -> &str {
        "http.get"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}
