//! When a container counts as serving.
//!
//! ```text
//! started -> waiting -> steady -> serving
//!               |  ^       |
//!               |  '-------'  a probe failed again
//!               '-> failed: it ended, restarts, is unhealthy, or the time is over
//! ```

use std::time::Duration;

use bollard::Docker;
use bollard::exec::StartExecResults;
use bollard::models::{ContainerInspectResponse, ExecConfig, HealthStatusEnum};
use bollard::query_parameters::LogsOptionsBuilder;
use futures_util::StreamExt as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, timeout};
use upgrade_core::context::Context;
use upgrade_core::error::{Class, StepError};
use upgrade_core::registry::BuildError;
use upgrade_core::units::Span;

use crate::containers::{self, state_line};
use crate::error::{Doing, unless_cancelled};
use crate::inside;

/// How long one probe may take.
const PROBE: Duration = Duration::from_secs(10);
/// How many lines of its log a container that failed is quoted with.
const QUOTED: usize = 20;

/// Says what makes a container count as serving; all that is stated must hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Gate {
    /// Whether the image's own HEALTHCHECK must say *healthy*. Default: if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub healthcheck: Option<bool>,
    /// A request that must be answered well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpProbe>,
    /// A port of the container that must accept connections.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp: Option<u16>,
    /// A program and its arguments, run inside the container, that must exit with 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec: Option<Vec<String>>,
    /// A text that a line of its log must hold, since it was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<String>,
    /// How long it may take until all of it holds.
    #[serde(default = "within")]
    pub within: Span,
    /// How long all of it must then go on to hold.
    #[serde(default = "stable")]
    pub stable: Span,
    /// The pause between two looks.
    #[serde(default = "every")]
    pub every: Span,
}

/// Describes a request to a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HttpProbe {
    /// The port of the container, reached at its own address: for an engine of this machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The path, with `port`.
    #[serde(default = "root")]
    pub path: String,
    /// A whole URL, in place of `port` and `path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// The status that is right. Default: any from 200 to 399.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
}

fn within() -> Span {
    Span::from_secs(60)
}

fn stable() -> Span {
    Span::from_secs(3)
}

fn every() -> Span {
    Span(Duration::from_millis(250))
}

fn root() -> String {
    "/".into()
}

impl Default for Gate {
    fn default() -> Self {
        Self {
            healthcheck: None,
            http: None,
            tcp: None,
            exec: None,
            log: None,
            within: within(),
            stable: stable(),
            every: every(),
        }
    }
}

/// Tells what one look found.
enum Look {
    /// All that is asked for holds.
    Holds,
    /// Not yet, and why.
    NotYet(String),
    /// It never will, and why.
    Never(String),
}

impl Gate {
    /// Refuses what contradicts itself.
    ///
    /// # Errors
    /// The key that is wrong is named.
    pub fn validate(&self) -> Result<(), BuildError> {
        if let Some(http) = &self.http {
            match (&http.url, http.port) {
                (Some(url), None) if url.starts_with("http://") => {}
                (Some(_), None) => {
                    return Err(BuildError::new("a container is asked over plain HTTP")
                        .at("health.http.url")
                        .with_hint(
                            "write it http://HOST:PORT/PATH; for HTTPS use the check `http.get` under `verify:`",
                        ));
                }
                (None, Some(_)) if http.path.starts_with('/') => {}
                (None, Some(_)) => return Err(BuildError::new("a path begins with `/`").at("health.http.path")),
                _ => return Err(BuildError::new("name either `port` or `url`").at("health.http")),
            }
        }
        if self.exec.as_ref().is_some_and(Vec::is_empty) {
            return Err(BuildError::new("there is no program").at("health.exec"));
        }
        if self.log.as_ref().is_some_and(String::is_empty) {
            return Err(BuildError::new("every line holds an empty text").at("health.log"));
        }
        if self.every.0.is_zero() {
            return Err(BuildError::new("the pause between two looks must be longer than nothing").at("health.every"));
        }
        Ok(())
    }

    /// Waits until a container that was started counts as serving; returns how long that took.
    ///
    /// # Errors
    /// It ended, restarts, is unhealthy, or did not get there in time: *permanent*, naming the
    /// container and the reason, its last lines in the detail.
    pub async fn wait(&self, client: &Docker, cx: &Context, id: &str, name: &str) -> Result<Duration, StepError> {
        let began = Instant::now();
        let first = look_up(client, id, name).await?;
        let starts = start_of(&first);
        let mut steady: Option<Instant> = None;
        let mut last;
        loop {
            let container = look_up(client, id, name).await?;
            let look = match fatal(&container, &starts) {
                Some(why) => Look::Never(why),
                None => unless_cancelled(cx, async { Ok(self.look(client, &container).await) }).await?,
            };
            match look {
                Look::Never(why) => {
                    let after = match steady {
                        Some(_) => format!(" within the {} that it must stay healthy", self.stable),
                        None => String::new(),
                    };
                    return Err(self.failed(client, cx, id, name, format!("{why}{after}")).await);
                }
                Look::Holds => {
                    let since = *steady.get_or_insert_with(Instant::now);
                    if since.elapsed() >= self.stable.0 {
                        return Ok(began.elapsed());
                    }
                    last = "healthy, and watched for a while".to_owned();
                }
                Look::NotYet(why) => {
                    steady = None;
                    if began.elapsed() >= self.within.0 {
                        let why = format!("not healthy within {}: {why}", self.within);
                        return Err(self.failed(client, cx, id, name, why).await);
                    }
                    last = why;
                }
            }
            cx.progress(
                began.elapsed().as_secs(),
                (self.within.0 + self.stable.0).as_secs(),
                format!("container {name}: {last}"),
            );
            unless_cancelled(cx, async {
                sleep(self.every.0).await;
                Ok(())
            })
            .await?;
        }
    }

    /// Looks once.
    async fn look(&self, client: &Docker, container: &ContainerInspectResponse) -> Look {
        let health = container.state.as_ref().and_then(|state| state.health.as_ref()).and_then(|health| health.status);
        let has_check = !matches!(health, None | Some(HealthStatusEnum::NONE | HealthStatusEnum::EMPTY));
        match (self.healthcheck, has_check, health) {
            (Some(true), false, _) => {
                return Look::Never("has no health check, and `healthcheck: true` asks for one".into());
            }
            (Some(false), _, _) | (_, false, _) | (_, _, Some(HealthStatusEnum::HEALTHY)) => {}
            (_, _, Some(HealthStatusEnum::UNHEALTHY)) => {
                return Look::Never(format!("its health check fails{}", check_output(container)));
            }
            _ => return Look::NotYet("its health check has not passed yet".into()),
        }
        let mut probes = Vec::new();
        if let Some(port) = self.tcp {
            probes.push(
                timeout(PROBE, tcp(container, port)).await.unwrap_or_else(|_| Err("no connection in time".into())),
            );
        }
        if let Some(probe) = &self.http {
            probes
                .push(timeout(PROBE, http(container, probe)).await.unwrap_or_else(|_| Err("no answer in time".into())));
        }
        if let Some(argv) = &self.exec {
            let ran = timeout(PROBE, exec(client, containers::id_of(container), argv)).await;
            probes.push(ran.unwrap_or_else(|_| Err(format!("`{}` did not return in time", argv.join(" ")))));
        }
        if let Some(text) = &self.log {
            let read = timeout(PROBE, logged(client, container, text)).await;
            probes.push(read.unwrap_or_else(|_| Err("its log could not be read in time".into())));
        }
        match probes.into_iter().find_map(Result::err) {
            Some(why) => Look::NotYet(why),
            None => Look::Holds,
        }
    }

    async fn failed(&self, client: &Docker, cx: &Context, id: &str, name: &str, why: String) -> StepError {
        let lines = containers::last_lines(client, cx, id, QUOTED).await;
        let detail = if lines.is_empty() {
            "it printed nothing".to_owned()
        } else {
            format!("the last lines of its log:\n{}", lines.join("\n"))
        };
        StepError::permanent(format!("container {name} is not serving: {}", cx.mask(&why)))
            .with_detail(detail)
            .with_hint("read the lines of its log in the report; mend the image or its configuration, then run again")
    }
}

async fn look_up(client: &Docker, id: &str, name: &str) -> Result<ContainerInspectResponse, StepError> {
    containers::inspect(client, id).await?.ok_or_else(|| {
        StepError::new(Class::Permanent, format!("container {name} is gone: somebody removed it while it was started"))
            .with_hint("find out who removes containers here (`docker events`), then run again")
    })
}

/// When it was started, and how often by the engine.
fn start_of(container: &ContainerInspectResponse) -> (Option<String>, Option<i64>) {
    let started = container.state.as_ref().and_then(|state| state.started_at.clone());
    (started, container.restart_count)
}

/// Says why a container will not come to serve, without waiting for the time to be over.
fn fatal(container: &ContainerInspectResponse, starts: &(Option<String>, Option<i64>)) -> Option<String> {
    let restarting = container.state.as_ref().and_then(|state| state.restarting).unwrap_or(false);
    if restarting || start_of(container) != *starts {
        // While it runs once more, the code is that of nothing.
        let code = container.state.as_ref().and_then(|state| state.exit_code).filter(|_| restarting);
        let code = code.map(|code| format!(" (exit code {code})")).unwrap_or_default();
        return Some(format!("it ended{code} and is being restarted again and again"));
    }
    (!containers::is_running(container)).then(|| state_line(container))
}

/// What the health check printed last.
fn check_output(container: &ContainerInspectResponse) -> String {
    let health = container.state.as_ref().and_then(|state| state.health.as_ref());
    let last = health.and_then(|health| health.log.as_ref()).and_then(|log| log.last());
    match last.and_then(|last| last.output.as_deref()).map(str::trim).filter(|text| !text.is_empty()) {
        Some(text) => format!(": {}", text.chars().take(200).collect::<String>()),
        None => String::new(),
    }
}

/// The address at which this machine reaches a container of an engine of its own.
pub(crate) fn address_of(container: &ContainerInspectResponse) -> Option<String> {
    let host = container.host_config.as_ref().and_then(|config| config.network_mode.as_deref());
    if host == Some("host") {
        return Some("127.0.0.1".into());
    }
    let networks = container.network_settings.as_ref()?.networks.as_ref()?;
    let mut addresses: Vec<_> =
        networks.iter().filter_map(|(name, endpoint)| Some((name, endpoint.ip_address.as_deref()?))).collect();
    addresses.sort_unstable();
    addresses.into_iter().map(|(_, address)| address).find(|address| !address.is_empty()).map(str::to_owned)
}

fn no_address() -> String {
    "it has no address that this machine reaches (ask with `exec` or `url` instead)".into()
}

async fn tcp(container: &ContainerInspectResponse, port: u16) -> Result<(), String> {
    let address = address_of(container).ok_or_else(no_address)?;
    match tokio::net::TcpStream::connect((address.as_str(), port)).await {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("port {port} does not accept connections: {error}")),
    }
}

/// Trusts nobody: probes are plain HTTP, and the client asks for something all the same.
fn no_tls() -> rustls::ClientConfig {
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("the provider has the default versions")
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth()
}

async fn http(container: &ContainerInspectResponse, probe: &HttpProbe) -> Result<(), String> {
    let url = match (&probe.url, probe.port) {
        (Some(url), _) => url.clone(),
        (None, port) => {
            let address = address_of(container).ok_or_else(no_address)?;
            format!("http://{address}:{}{}", port.unwrap_or(80), probe.path)
        }
    };
    let client = reqwest::Client::builder()
        .tls_backend_preconfigured(no_tls())
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .pool_max_idle_per_host(0)
        .build();
    let client = client.map_err(|error| format!("no client can be made: {error}"))?;
    let answer = client.get(&url).send().await.map_err(|error| {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
        format!("{url} does not answer{cause}")
    })?;
    let status = answer.status().as_u16();
    let right = probe.status.map_or((200..400).contains(&status), |wanted| wanted == status);
    if right { Ok(()) } else { Err(format!("{url} answers with {status}")) }
}

/// Runs a program in a container and returns what it exits with, and what it printed.
///
/// # Errors
/// The program cannot be started there.
pub(crate) async fn run_inside(client: &Docker, id: &str, argv: &[String]) -> Result<(i64, String), StepError> {
    let doing = || format!("running `{}` in a container", argv.join(" "));
    let config = ExecConfig {
        cmd: Some(argv.to_vec()),
        attach_stdout: Some(true),
        attach_stderr: Some(true),
        ..ExecConfig::default()
    };
    let exec = client.create_exec(id, config).await.doing(doing)?;
    let mut text = Vec::new();
    if let StartExecResults::Attached { mut output, .. } = client.start_exec(&exec.id, None).await.doing(doing)? {
        while let Some(piece) = output.next().await {
            let piece = piece.doing(doing)?;
            if text.len() < 1 << 16 {
                text.extend_from_slice(containers::message(&piece));
            }
        }
    }
    let code = inside::ended(client, &exec.id, doing()).await?;
    Ok((code, String::from_utf8_lossy(&text).into_owned()))
}

async fn exec(client: &Docker, id: &str, argv: &[String]) -> Result<(), String> {
    match run_inside(client, id, argv).await {
        Ok((0, _)) => Ok(()),
        Ok((code, text)) => {
            let said = text.trim().lines().last().map(|line| format!(": {line}")).unwrap_or_default();
            Err(format!("`{}` exits with {code}{said}", argv.join(" ")))
        }
        Err(error) => Err(error.message().to_owned()),
    }
}

async fn logged(client: &Docker, container: &ContainerInspectResponse, text: &str) -> Result<(), String> {
    let started = container.state.as_ref().and_then(|state| state.started_at.as_deref()).unwrap_or_default();
    let since = started.parse::<jiff::Timestamp>().map_or(0, |at| at.as_second());
    let options = LogsOptionsBuilder::new().stdout(true).stderr(true).since(i32::try_from(since).unwrap_or(0)).build();
    let mut logs = client.logs(containers::id_of(container), Some(options));
    let mut line = String::new();
    while let Some(piece) = logs.next().await {
        let piece = piece.map_err(|error| format!("its log cannot be read: {error}"))?;
        line.push_str(&String::from_utf8_lossy(containers::message(&piece)));
        if line.contains(text) {
            return Ok(());
        }
        if let Some(end) = line.rfind('\n') {
            line.drain(..=end);
        }
    }
    Err(format!("no line of its log holds `{text}` yet"))
}
