//! An engine as the target of an upgrade: where it is, who may pull, and what of it is changed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use bollard::{API_DEFAULT_VERSION, ClientVersion, Docker};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::names::LockName;
use upgrade_core::registry::{BuildContext, BuildError, Registry};
use upgrade_core::secret::SecretRef;
use upgrade_core::target::Target;
use upgrade_core::units::Span;

use crate::connection::{Endpoint, TlsFiles, of_this_process};
use crate::error::{Doing, cancelled};
use crate::tunnel::TunnelConfig;

/// Configures the target kind `docker`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EngineConfig {
    /// Where the engine is: `unix:///PATH` or `tcp://HOST:PORT`. If absent, the engine that the
    /// `docker` command would use: `DOCKER_HOST`, the current context, the socket of this machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// The Docker context that names the engine, in place of `host`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<String>,
    /// The files for TLS, with a `host` that is reached over the network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsFiles>,
    /// How long the engine may take to answer one request. Default 2 m.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Span>,
    /// Who may pull from and push to a registry, by the registry's host. One that is not named
    /// here is looked up in Docker's own configuration and its credential helpers.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub registries: BTreeMap<String, RegistryLogin>,
    /// How targets that name this one as `via` are reached, where this machine has no route to the
    /// engine's networks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tunnel: Option<TunnelConfig>,
}

/// Names a user of a registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RegistryLogin {
    /// The user.
    pub username: String,
    /// The password or token.
    pub password: SecretRef,
}

pub(crate) fn register(registry: &mut Registry) {
    registry.tunnel("docker", "Names a Docker Engine, and who may pull from which registry", Engine::from_config);
}

/// Names a Docker Engine and connects to it.
///
/// # Guarantees
/// The newest API that both sides know is spoken. Nothing is sent before [`Engine::connect`].
#[derive(Clone, Debug)]
pub struct Engine {
    endpoint: Endpoint,
    timeout: Duration,
    registries: BTreeMap<String, RegistryLogin>,
    tunnel: Option<TunnelConfig>,
    /// Where the tunnel is known to lead: trying costs time, and a connection there.
    pub(crate) led: Arc<Mutex<BTreeSet<(String, u16)>>>,
    /// The API that the engine was found to speak: asking for it costs more than most calls.
    spoken: Arc<OnceLock<ClientVersion>>,
}

impl Engine {
    /// Makes the target from its configuration.
    ///
    /// # Errors
    /// `host` is not where an engine can be, or `context` does not exist.
    pub fn from_config(config: EngineConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let endpoint = match (config.host, config.context) {
            (Some(_), Some(_)) => return Err(BuildError::new("`host` and `context` exclude each other").at("context")),
            (Some(host), None) => {
                let tls = config.tls.map(|tls| TlsFiles {
                    ca: cx.path(tls.ca),
                    cert: cx.path(tls.cert),
                    key: cx.path(tls.key),
                });
                Endpoint::new(host, tls)?
            }
            (None, _) if config.tls.is_some() => {
                return Err(BuildError::new("`tls` belongs to a `host`")
                    .at("tls")
                    .with_hint("name the `host` as well"));
            }
            (None, Some(context)) => of_this_process().context(&context)?,
            (None, None) => of_this_process().endpoint()?,
        };
        let timeout = config.timeout.map_or(Duration::from_secs(120), |span| span.0);
        if let Some(tunnel) = &config.tunnel {
            tunnel.validate()?;
        }
        let (registries, tunnel) = (config.registries, config.tunnel);
        Ok(Self { endpoint, timeout, registries, tunnel, led: Arc::default(), spoken: Arc::default() })
    }

    /// Returns the target that a step or check names, or the engine of this machine.
    ///
    /// # Errors
    /// There is no such target.
    pub fn named(target: Option<&str>, cx: &BuildContext) -> Result<Arc<Self>, BuildError> {
        match target {
            Some(name) => cx.target::<Self>(name),
            None => Self::from_config(EngineConfig::default(), cx).map(Arc::new),
        }
    }

    /// Returns where the engine is, as `DOCKER_HOST` spells it.
    pub fn host(&self) -> &str {
        &self.endpoint.host
    }

    /// Returns the files for TLS, where the engine is reached with it.
    pub(crate) fn tls(&self) -> Option<&TlsFiles> {
        self.endpoint.tls.as_ref()
    }

    /// Returns who may pull from and push to registries, as far as the target says.
    pub(crate) fn registries(&self) -> &BTreeMap<String, RegistryLogin> {
        &self.registries
    }

    /// Returns how networks of the engine are reached, if not by their addresses.
    pub(crate) fn tunnel(&self) -> Option<&TunnelConfig> {
        self.tunnel.as_ref()
    }

    /// Connects for the step or check that is called.
    ///
    /// # Errors
    /// The engine cannot be reached.
    pub async fn connect(&self, cx: &Context) -> Result<Docker, StepError> {
        self.connect_for(cx, self.timeout).await
    }

    /// Connects for requests that the engine may take longer to answer: a stop with a long grace.
    ///
    /// # Errors
    /// As [`Engine::connect`].
    pub async fn connect_for(&self, cx: &Context, longest: Duration) -> Result<Docker, StepError> {
        let doing = || format!("reaching the Docker Engine at {}", self.endpoint.host);
        let known = self.spoken.get();
        let client =
            self.endpoint.client(longest.max(self.timeout), known.unwrap_or(API_DEFAULT_VERSION)).doing(doing)?;
        let reached = async {
            if known.is_some() {
                return client.ping().await.map(|_| client);
            }
            let client = client.negotiate_version().await?;
            // One that another call found meanwhile is the same.
            let _ = self.spoken.set(client.client_version());
            Ok(client)
        };
        tokio::select! {
            client = reached => Ok(client.doing(doing)?),
            () = cx.cancelled().cancelled() => Err(cancelled()),
        }
    }

    /// Names one thing of the engine as what a step changes, so that runs on different things of one
    /// engine do not wait for each other.
    pub fn resource(&self, kind: &str, name: &str) -> Arc<dyn Target> {
        let resource = format!("{} {kind} {name}", self.endpoint.host);
        let lock = LockName::new("docker", &resource.escape_debug().to_string()).expect("an escaped text is printable");
        Arc::new(Resource { engine: self.clone(), lock })
    }
}

#[async_trait]
impl Target for Engine {
    fn lock(&self) -> LockName {
        LockName::new("docker", &self.endpoint.host.escape_debug().to_string()).expect("an escaped text is printable")
    }

    async fn identity(&self, cx: &Context) -> Result<String, StepError> {
        let client = self.connect(cx).await?;
        let info = client.info().await.doing(|| "asking the engine who it is".into())?;
        let version = client.version().await.doing(|| "asking the engine who it is".into())?;
        let components = version.components.unwrap_or_default();
        if components.iter().any(|component| component.name == "Podman Engine") {
            // Its id is another one each time it is asked.
            let (name, root) = (info.name.unwrap_or_default(), info.docker_root_dir.unwrap_or_default());
            return Ok(format!("podman {name} {root}"));
        }
        info.id.filter(|id| !id.is_empty()).map(|id| format!("engine {id}")).ok_or_else(|| {
            StepError::permanent(format!("the engine at {} has no id", self.endpoint.host)).with_hint(
                "without one, it cannot be told from another engine: `docker info` shows it; update the engine",
            )
        })
    }
}

/// A thing of an engine.
struct Resource {
    engine: Engine,
    lock: LockName,
}

#[async_trait]
impl Target for Resource {
    fn lock(&self) -> LockName {
        self.lock.clone()
    }

    async fn identity(&self, cx: &Context) -> Result<String, StepError> {
        self.engine.identity(cx).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine(host: &str) -> Engine {
        let config = EngineConfig { host: Some(host.into()), ..EngineConfig::default() };
        Engine::from_config(config, &BuildContext::new(".")).unwrap()
    }

    #[test]
    fn things_of_an_engine_are_locked_by_themselves() {
        let (here, there) = (engine("unix:///run/a.sock"), engine("unix:///run/b.sock"));
        let web = here.resource("container", "web").lock();
        assert!(web.overlaps(&here.resource("container", "web").lock()));
        assert!(!web.overlaps(&here.resource("container", "db").lock()));
        assert!(!web.overlaps(&there.resource("container", "web").lock()));
    }

    #[test]
    fn a_configuration_that_contradicts_itself_names_its_key() {
        let build = |config| Engine::from_config(config, &BuildContext::new(".")).unwrap_err();
        let both =
            EngineConfig { host: Some("tcp://h:1".into()), context: Some("c".into()), ..EngineConfig::default() };
        assert_eq!(build(both).key.as_deref(), Some("context"));
        let wrong = EngineConfig { host: Some("localhost".into()), ..EngineConfig::default() };
        assert_eq!(build(wrong).key.as_deref(), Some("host"));
    }

    #[tokio::test]
    async fn an_engine_that_is_not_there_is_named_with_what_to_do() {
        let cx = upgrade_core::testkit::TestContext::new("web").forward();
        let error = engine("unix:///nowhere/engine.sock").connect(&cx).await.unwrap_err();
        assert!(error.message().contains("unix:///nowhere/engine.sock"), "{error:?}");
        assert!(error.hint().unwrap().contains("start the engine"), "{error:?}");
        let error = engine("tcp://127.0.0.1:1").connect(&cx).await.unwrap_err();
        assert!(error.hint().unwrap().contains("check that the engine runs"), "{error:?}");
    }
}
