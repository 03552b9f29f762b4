//! Where an engine is: as stated, or found the way the `docker` command finds it.
//!
//! The order is that of Docker's documentation, "Docker contexts": `DOCKER_HOST`, then
//! `DOCKER_CONTEXT`, then the current context of `config.json`, then the socket of this machine.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bollard::{ClientVersion, Docker};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use upgrade_core::registry::BuildError;

use crate::error::DockerError;
use crate::tls;

const SOCKET: &str = "unix:///var/run/docker.sock";

/// Names the files of a connection with TLS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The certificate of who signed the engine's.
    pub ca: PathBuf,
    /// The certificate of this client.
    pub cert: PathBuf,
    /// The key of this client.
    pub key: PathBuf,
}

impl TlsFiles {
    fn below(directory: &Path) -> Self {
        Self { ca: directory.join("ca.pem"), cert: directory.join("cert.pem"), key: directory.join("key.pem") }
    }
}

/// Says where an engine is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// As `DOCKER_HOST` spells it.
    pub(crate) host: String,
    pub(crate) tls: Option<TlsFiles>,
}

/// Gives the environment and the files that decide where the engine is.
pub(crate) struct Surroundings<'a> {
    pub(crate) variable: &'a dyn Fn(&str) -> Option<String>,
}

impl Surroundings<'_> {
    /// The directory of Docker's configuration.
    pub(crate) fn config_directory(&self) -> Option<PathBuf> {
        let variable = |name| (self.variable)(name).filter(|text| !text.is_empty());
        variable("DOCKER_CONFIG")
            .map(PathBuf::from)
            .or_else(|| variable("HOME").map(|home| Path::new(&home).join(".docker")))
    }

    /// Finds the engine that the `docker` command would use.
    pub(crate) fn endpoint(&self) -> Result<Endpoint, BuildError> {
        let variable = |name| (self.variable)(name).filter(|text| !text.is_empty());
        if let Some(host) = variable("DOCKER_HOST") {
            let secured = variable("DOCKER_TLS_VERIFY").is_some() && !host.starts_with("unix://");
            let directory = variable("DOCKER_CERT_PATH").map(PathBuf::from).or_else(|| self.config_directory());
            let tls = secured.then(|| directory.as_deref().map(TlsFiles::below)).flatten();
            return Endpoint::new(host, tls);
        }
        let current = || {
            let text = std::fs::read(self.config_directory()?.join("config.json")).ok()?;
            let config: Value = serde_json::from_slice(&text).ok()?;
            config.get("currentContext")?.as_str().map(str::to_owned)
        };
        match variable("DOCKER_CONTEXT").or_else(current) {
            Some(context) if context != "default" => self.context(&context),
            _ => Endpoint::new(SOCKET.into(), None),
        }
    }

    /// Reads a context of the `docker` command.
    pub(crate) fn context(&self, name: &str) -> Result<Endpoint, BuildError> {
        if name == "default" {
            return Endpoint::new(SOCKET.into(), None);
        }
        let missing = |what: &str| {
            BuildError::new(format!("the Docker context `{name}` {what}"))
                .at("context")
                .with_hint("`docker context ls` lists those there are")
        };
        let directory = self.config_directory().ok_or_else(|| missing("has no home to be looked for in"))?;
        let digest: String = Sha256::digest(name).iter().map(|byte| format!("{byte:02x}")).collect();
        let contexts = directory.join("contexts");
        let meta = std::fs::read(contexts.join("meta").join(&digest).join("meta.json"))
            .map_err(|_| missing("does not exist"))?;
        let meta: Value = serde_json::from_slice(&meta).map_err(|_| missing("cannot be read"))?;
        let host =
            meta.pointer("/Endpoints/docker/Host").and_then(Value::as_str).ok_or_else(|| missing("names no engine"))?;
        let files = TlsFiles::below(&contexts.join("tls").join(&digest).join("docker"));
        let secured = files.ca.is_file() || files.cert.is_file();
        Endpoint::new(host.to_owned(), secured.then_some(files))
    }
}

/// The surroundings of this process.
pub(crate) fn of_this_process() -> Surroundings<'static> {
    Surroundings { variable: &|name| std::env::var(name).ok() }
}

impl Endpoint {
    pub(crate) fn new(host: String, tls: Option<TlsFiles>) -> Result<Self, BuildError> {
        let wrong = |what: String, hint: &str| Err(BuildError::new(what).at("host").with_hint(hint));
        match host.split_once("://") {
            Some(("unix", path)) if path.starts_with('/') => {}
            Some(("tcp" | "http" | "https", place)) if !place.is_empty() && !place.contains('@') => {}
            Some(("ssh", _)) => {
                return wrong(
                    format!("an engine cannot be reached over SSH directly: `{host}`"),
                    "forward its socket: `ssh -NL /run/engine.sock:/var/run/docker.sock HOST`, and name unix:///run/engine.sock",
                );
            }
            _ => return wrong(format!("`{host}` is not where an engine is"), "write unix:///PATH or tcp://HOST:PORT"),
        }
        if host.starts_with("unix:") && tls.is_some() {
            return Err(BuildError::new("a socket of this machine has no TLS").at("tls"));
        }
        Ok(Self { host, tls })
    }

    /// Makes a client; nothing is sent yet.
    pub(crate) fn client(&self, timeout: Duration, version: &ClientVersion) -> Result<Docker, DockerError> {
        let seconds = timeout.as_secs().max(1);
        Ok(match (&self.tls, self.host.strip_prefix("unix://")) {
            (_, Some(path)) => Docker::connect_with_unix(path, seconds, version)?,
            (Some(files), None) => tls::client(&self.host, files, seconds, version)?,
            (None, None) => Docker::connect_with_http(&self.host, seconds, version)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with<'a>(pairs: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<String> + 'a {
        move |name| pairs.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
    }

    #[test]
    fn the_engine_is_found_as_the_docker_command_finds_it() {
        let home = tempfile::tempdir().unwrap();
        let config = home.path().join(".docker");
        let digest_of = |name: &str| -> String { Sha256::digest(name).iter().map(|b| format!("{b:02x}")).collect() };
        let meta = config.join("contexts/meta").join(digest_of("staging"));
        std::fs::create_dir_all(&meta).unwrap();
        std::fs::write(meta.join("meta.json"), r#"{"Endpoints":{"docker":{"Host":"tcp://10.0.0.5:2376"}}}"#).unwrap();
        let home_text = home.path().to_str().unwrap();
        let host = |pairs: &[(&str, &str)]| Surroundings { variable: &with(pairs) }.endpoint().map(|found| found.host);
        assert_eq!(host(&[("HOME", home_text)]).unwrap(), SOCKET);
        assert_eq!(host(&[("HOME", home_text), ("DOCKER_CONTEXT", "staging")]).unwrap(), "tcp://10.0.0.5:2376");
        std::fs::write(config.join("config.json"), r#"{"currentContext":"staging"}"#).unwrap();
        assert_eq!(host(&[("HOME", home_text)]).unwrap(), "tcp://10.0.0.5:2376");
        assert_eq!(host(&[("HOME", home_text), ("DOCKER_HOST", "unix:///run/x.sock")]).unwrap(), "unix:///run/x.sock");
        let error = host(&[("HOME", home_text), ("DOCKER_CONTEXT", "gone")]).unwrap_err();
        assert!(error.hint.unwrap().contains("docker context ls"));
        let error = host(&[("DOCKER_HOST", "ssh://root@host")]).unwrap_err();
        assert!(error.hint.unwrap().contains("ssh -NL"));
    }

    #[test]
    fn tls_is_taken_from_where_docker_keeps_it() {
        let pairs = [("DOCKER_HOST", "tcp://h:2376"), ("DOCKER_TLS_VERIFY", "1"), ("DOCKER_CERT_PATH", "/certs")];
        let found = Surroundings { variable: &with(&pairs) }.endpoint().unwrap();
        assert_eq!(found.tls.unwrap().ca, Path::new("/certs/ca.pem"));
        let error = Endpoint::new("unix:///x".into(), Some(TlsFiles::below(Path::new("/c")))).unwrap_err();
        assert_eq!(error.key.as_deref(), Some("tls"));
    }
}
