//! A registry's own API, as far as undoing a push needs it: a tag's manifest read, written, removed.
//!
//! Spoken from this machine, not by the engine, which offers none of it. Docker's two ways of
//! logging in: Basic, and a token that another server gives (the Distribution project's `token`).

use std::collections::BTreeMap;
use std::error::Error as _;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use bollard::Docker;
use bollard::auth::DockerCredentials;
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode, Url};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls_platform_verifier::Verifier;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::sealed::hex;
use upgrade_core::secret::SecretString;

use crate::error::{Doing, advice, unless_cancelled};
use crate::reference::ImageReference;
use crate::target::Engine;

/// What a tag can lead to.
const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json, \
     application/vnd.docker.distribution.manifest.v1+prettyjws";
/// Where Docker Hub's registry is.
const HUB: &str = "registry-1.docker.io";
/// The longest manifest: what registries take.
const LONGEST: usize = 4 << 20;
/// How many tags are looked at.
const TAGS: usize = 1000;
const PATIENCE: Duration = Duration::from_secs(60);

/// Holds what a tag leads to, byte for byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) digest: String,
    pub(crate) media_type: String,
    pub(crate) bytes: Vec<u8>,
}

impl Manifest {
    /// Tells whether it is of the image that an engine knows by this id.
    pub(crate) fn is_of(&self, image_id: &str) -> bool {
        #[derive(Deserialize)]
        struct Image {
            config: Option<Configuration>,
        }
        #[derive(Deserialize)]
        struct Configuration {
            digest: String,
        }
        let image = serde_json::from_slice::<Image>(&self.bytes).ok().and_then(|image| image.config);
        self.digest == image_id || image.is_some_and(|config| config.digest == image_id)
    }
}

/// Says what became of a removal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Removal {
    Removed,
    /// This registry does not remove by this name.
    Refused,
}

/// Speaks to one repository of a registry.
pub(crate) struct Repository {
    client: Client,
    base: Url,
    registry: String,
    path: String,
    login: Option<DockerCredentials>,
    authorization: Option<HeaderValue>,
}

impl Repository {
    /// Prepares to speak to the repository of an image, as the engine would: over TLS, and in the
    /// clear only to a registry that the engine treats as insecure.
    ///
    /// # Errors
    /// The engine or the credentials cannot be read.
    pub(crate) async fn of(
        engine: &Engine,
        client: &Docker,
        cx: &Context,
        image: &ImageReference,
    ) -> Result<Self, StepError> {
        let registry = image.registry().to_owned();
        let login = engine.credentials(cx, &registry).await?;
        let clear = is_insecure(client, &registry).await?;
        let is_hub = registry == "docker.io";
        let (scheme, host) = (if clear { "http" } else { "https" }, if is_hub { HUB } else { registry.as_str() });
        let base = Url::parse(&format!("{scheme}://{host}/v2/")).map_err(|error| {
            StepError::permanent(format!("registry {registry} has no address"))
                .with_cause(&error)
                .with_hint("write the image's name with the registry's host and port")
        })?;
        let name = image.name();
        let path = name.strip_prefix(&format!("{registry}/")).unwrap_or(&name);
        let path = if is_hub && !path.contains('/') { format!("library/{path}") } else { path.to_owned() };
        let made = Client::builder()
            .tls_backend_preconfigured(tls(&registry, clear)?)
            .timeout(PATIENCE)
            .redirect(reqwest::redirect::Policy::limited(5))
            .user_agent(concat!("upgrade/", env!("CARGO_PKG_VERSION")))
            .build();
        let client = made.map_err(|error| StepError::permanent("the HTTP client cannot be made").with_cause(&error))?;
        Ok(Self { client, base, registry, path, login, authorization: None })
    }

    /// Reads what a tag or a digest leads to, if it leads anywhere.
    ///
    /// # Errors
    /// The registry cannot be asked, or does not let the user in.
    pub(crate) async fn manifest(&mut self, cx: &Context, reference: &str) -> Result<Option<Manifest>, StepError> {
        let doing = format!("reading the manifest of {}/{}:{reference}", self.registry, self.path);
        let answer = self.ask(cx, &doing, Method::GET, &format!("manifests/{reference}"), None).await?;
        if answer.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let answer = self.expect(&doing, answer).await?;
        let media_type = answer.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media_type = media_type.unwrap_or_default().to_owned();
        let bytes = self.body(cx, &doing, answer).await?;
        let digest = format!("sha256:{}", hex(&Sha256::digest(&bytes)));
        Ok(Some(Manifest { digest, media_type, bytes }))
    }

    /// Lets a tag lead to a manifest whose parts the registry has.
    ///
    /// # Errors
    /// As [`Self::manifest`]; the registry does not take it.
    pub(crate) async fn put(&mut self, cx: &Context, tag: &str, manifest: &Manifest) -> Result<(), StepError> {
        let doing = format!("letting {}/{}:{tag} lead to {} again", self.registry, self.path, manifest.digest);
        let answer = self.ask(cx, &doing, Method::PUT, &format!("manifests/{tag}"), Some(manifest)).await?;
        self.expect(&doing, answer).await.map(drop)
    }

    /// Removes a tag, or a manifest by its digest, which takes all its tags with it.
    ///
    /// # Errors
    /// As [`Self::manifest`].
    pub(crate) async fn remove(&mut self, cx: &Context, reference: &str) -> Result<Removal, StepError> {
        let doing = format!("removing {reference} from {}/{}", self.registry, self.path);
        let answer = self.ask(cx, &doing, Method::DELETE, &format!("manifests/{reference}"), None).await?;
        match answer.status() {
            status if status.is_success() || status == StatusCode::NOT_FOUND => Ok(Removal::Removed),
            // What is no digest, removal that is switched off, and what the user may not do.
            StatusCode::BAD_REQUEST
            | StatusCode::METHOD_NOT_ALLOWED
            | StatusCode::FORBIDDEN
            | StatusCode::UNAUTHORIZED
            | StatusCode::NOT_IMPLEMENTED => Ok(Removal::Refused),
            _ => self.expect(&doing, answer).await.map(|_| Removal::Removed),
        }
    }

    /// Tells whether a tag other than `tag` leads to a manifest; if there are too many to look, that
    /// one may.
    ///
    /// # Errors
    /// As [`Self::manifest`].
    pub(crate) async fn has_other_tag(&mut self, cx: &Context, tag: &str, digest: &str) -> Result<bool, StepError> {
        #[derive(Deserialize)]
        struct Tags {
            #[serde(default)]
            tags: Option<Vec<String>>,
        }
        let doing = format!("listing the tags of {}/{}", self.registry, self.path);
        let answer = self.ask(cx, &doing, Method::GET, &format!("tags/list?n={TAGS}"), None).await?;
        let answer = self.expect(&doing, answer).await?;
        let bytes = self.body(cx, &doing, answer).await?;
        let tags = serde_json::from_slice::<Tags>(&bytes).ok().and_then(|tags| tags.tags).unwrap_or_default();
        if tags.len() >= TAGS {
            return Ok(true);
        }
        for other in tags.iter().filter(|other| *other != tag) {
            if self.manifest(cx, other).await?.is_some_and(|manifest| manifest.digest == digest) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Sends a request, and once more when the registry has said how to log in.
    async fn ask(
        &mut self,
        cx: &Context,
        doing: &str,
        method: Method,
        place: &str,
        body: Option<&Manifest>,
    ) -> Result<Response, StepError> {
        let url = self
            .base
            .join(&format!("{}/{place}", self.path))
            .map_err(|error| StepError::permanent(format!("{doing} failed: it has no address")).with_cause(&error))?;
        for first in [true, false] {
            let mut request = self.client.request(method.clone(), url.clone()).header(ACCEPT, MANIFESTS);
            if let Some(authorization) = &self.authorization {
                request = request.header(AUTHORIZATION, authorization.clone());
            }
            if let Some(manifest) = body {
                request = request.header(CONTENT_TYPE, &manifest.media_type).body(manifest.bytes.clone());
            }
            let answer = self.send(cx, doing, request).await?;
            let challenge = answer.headers().get(WWW_AUTHENTICATE).and_then(|value| value.to_str().ok());
            let challenge = challenge.map(str::to_owned);
            match (answer.status(), challenge) {
                (StatusCode::UNAUTHORIZED, Some(challenge)) if first => self.log_in(cx, &challenge, &method).await?,
                _ => return Ok(answer),
            }
        }
        Err(StepError::unknown(format!("{doing} failed")))
    }

    async fn send(&self, cx: &Context, doing: &str, request: RequestBuilder) -> Result<Response, StepError> {
        let sending = async {
            request.send().await.map_err(|error| {
                let error = error.without_url();
                let cause = error.source().map(ToString::to_string).unwrap_or_default();
                StepError::transient(format!("{doing} failed: {} does not answer: {cause}", self.registry))
                    .with_cause(&error)
                    .with_hint("check that this machine reaches the registry: name, port, proxy, certificates")
            })
        };
        unless_cancelled(cx, sending).await
    }

    async fn body(&self, cx: &Context, doing: &str, mut answer: Response) -> Result<Vec<u8>, StepError> {
        let reading = async {
            let mut bytes = Vec::new();
            while let Some(piece) = answer.chunk().await.map_err(|error| {
                StepError::transient(format!("{doing} failed: the answer broke off"))
                    .with_cause(&error.without_url())
                    .with_hint("try again; if it persists, look at the registry's log")
            })? {
                bytes.extend_from_slice(&piece);
                if bytes.len() > LONGEST {
                    return Err(StepError::permanent(format!(
                        "{doing} failed: the answer is longer than any manifest"
                    ))
                    .with_hint("check that the name leads to a registry"));
                }
            }
            Ok(bytes)
        };
        unless_cancelled(cx, reading).await
    }

    /// Answers a challenge.
    async fn log_in(&mut self, cx: &Context, challenge: &str, method: &Method) -> Result<(), StepError> {
        let (scheme, parameters) = parameters(challenge);
        let login = self.login.clone().unwrap_or_default();
        let basic = |request: RequestBuilder| match &login.username {
            Some(user) => request.basic_auth(user, login.password.as_ref()),
            None => request,
        };
        if scheme.eq_ignore_ascii_case("basic") {
            let request = basic(self.client.get(self.base.clone())).build();
            let header = request.ok().and_then(|request| request.headers().get(AUTHORIZATION).cloned());
            self.authorization = header;
            return Ok(());
        }
        let doing = format!("logging in to registry {}", self.registry);
        let realm = parameters.get("realm").and_then(|realm| Url::parse(realm).ok());
        // A password is not sent in the clear because a registry says so.
        let realm = realm.filter(|realm| realm.scheme() == "https" || self.base.scheme() == "http");
        let Some(mut realm) = realm.filter(|_| scheme.eq_ignore_ascii_case("bearer")) else {
            return Err(StepError::permanent(format!("{doing} failed: it asks for what is not known: {scheme}"))
                .with_hint("check that the image's name leads to a registry"));
        };
        let actions = if *method == Method::DELETE { "pull,push,delete" } else { "pull,push" };
        let scope = format!("repository:{}:{actions}", self.path);
        let service = parameters.get("service").cloned().unwrap_or_default();
        let request = match &login.identitytoken {
            Some(token) => {
                let mut form = Url::parse("http://form/").expect("a constant");
                form.query_pairs_mut()
                    .append_pair("grant_type", "refresh_token")
                    .append_pair("service", &service)
                    .append_pair("client_id", "upgrade")
                    .append_pair("scope", &scope)
                    .append_pair("refresh_token", token);
                let form = form.query().unwrap_or_default().to_owned();
                self.client.post(realm).header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(form)
            }
            None => {
                realm.query_pairs_mut().append_pair("service", &service).append_pair("scope", &scope);
                basic(self.client.get(realm))
            }
        };
        #[derive(Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
        }
        let answer = self.send(cx, &doing, request).await?;
        let answer = self.expect(&doing, answer).await?;
        let bytes = self.body(cx, &doing, answer).await?;
        let answer = serde_json::from_slice::<Answer>(&bytes).ok().and_then(|a| a.token.or(a.access_token));
        let token = answer.ok_or_else(|| {
            StepError::permanent(format!("{doing} failed: it gives no token")).with_hint("look at the registry's log")
        })?;
        cx.remember_secret(&SecretString::from(token.clone()));
        let mut header = HeaderValue::try_from(format!("Bearer {token}"))
            .map_err(|_| StepError::permanent(format!("{doing} failed: its token is none")))?;
        header.set_sensitive(true);
        self.authorization = Some(header);
        Ok(())
    }

    /// Turns an answer that is a refusal into an error.
    async fn expect(&self, doing: &str, answer: Response) -> Result<Response, StepError> {
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let said: String = answer.text().await.unwrap_or_default().trim().chars().take(400).collect();
        let known = match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "denied",
            StatusCode::TOO_MANY_REQUESTS => "too many requests",
            _ => said.as_str(),
        };
        let message = format!("{doing} failed: registry {} answers {}: {said}", self.registry, status.as_u16());
        let (class, hint) = advice(status.as_u16(), known);
        let class = if status.is_server_error() { upgrade_core::error::Class::Transient } else { class };
        Err(StepError::new(class, message).with_hint(hint.unwrap_or("look at the registry's log")))
    }
}

/// Reads `Bearer realm="…",service="…"`.
fn parameters(challenge: &str) -> (&str, BTreeMap<String, String>) {
    let (scheme, mut rest) = challenge.trim().split_once(' ').unwrap_or((challenge.trim(), ""));
    let mut found = BTreeMap::new();
    while let Some((name, after)) = rest.split_once('=') {
        let (value, behind) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => after.split_at(after.find(',').unwrap_or(after.len())),
        };
        found.insert(name.trim_matches([' ', ',']).to_ascii_lowercase(), value.to_owned());
        rest = behind;
    }
    (scheme, found)
}

/// Tells whether the engine speaks to a registry in the clear.
async fn is_insecure(client: &Docker, registry: &str) -> Result<bool, StepError> {
    let info = client.info().await.doing(|| "asking the engine which registries are insecure".into())?;
    let config = info.registry_config.unwrap_or_default();
    let named = config.index_configs.unwrap_or_default().get(registry).and_then(|index| index.secure);
    if let Some(secure) = named {
        return Ok(!secure);
    }
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host).trim_matches(['[', ']']);
    let address = if host == "localhost" { Some(IpAddr::from([127, 0, 0, 1])) } else { host.parse().ok() };
    let Some(address) = address else { return Ok(false) };
    let ranges = config.insecure_registry_cidrs.unwrap_or_default();
    Ok(address.is_loopback() || ranges.iter().any(|range| is_in(range, address)))
}

fn is_in(range: &str, address: IpAddr) -> bool {
    let Some((net, bits)) = range.split_once('/') else { return false };
    let (Ok(net), Ok(bits)) = (net.parse::<IpAddr>(), bits.parse::<u32>()) else { return false };
    let same = |one: u128, other: u128, width: u32| {
        let shift = width.saturating_sub(bits);
        one.checked_shr(shift).unwrap_or(0) == other.checked_shr(shift).unwrap_or(0)
    };
    match (net, address) {
        (IpAddr::V4(net), IpAddr::V4(address)) => same(net.to_bits().into(), address.to_bits().into(), 32),
        (IpAddr::V6(net), IpAddr::V6(address)) => same(net.to_bits(), address.to_bits(), 128),
        _ => false,
    }
}

/// Trusts whom the system trusts, and whom Docker's own directory names for the registry.
fn tls(registry: &str, clear: bool) -> Result<rustls::ClientConfig, StepError> {
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .expect("the provider has the default versions");
    if clear {
        let builder = builder.with_root_certificates(rustls::RootCertStore::empty());
        return Ok(builder.with_no_client_auth());
    }
    let own = Path::new("/etc/docker/certs.d").join(registry).join("ca.crt");
    let own: Vec<_> = CertificateDer::pem_file_iter(own).map(|all| all.flatten().collect()).unwrap_or_default();
    let verifier = Verifier::new_with_extra_roots(own, provider).map_err(|error| {
        StepError::permanent("TLS cannot be configured")
            .with_cause(&error)
            .with_hint("install the system's certificates (ca-certificates)")
    })?;
    let builder = builder.dangerous().with_custom_certificate_verifier(std::sync::Arc::new(verifier));
    Ok(builder.with_no_client_auth())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_challenge_is_taken_apart() {
        let text = r#"Bearer realm="https://auth.example.com/token",service="r.example.com",scope="a:b,c" , error=x"#;
        let (scheme, found) = parameters(text);
        assert_eq!((scheme, found["realm"].as_str()), ("Bearer", "https://auth.example.com/token"));
        assert_eq!(
            (found["service"].as_str(), found["scope"].as_str(), found["error"].as_str()),
            ("r.example.com", "a:b,c", "x")
        );
        assert_eq!(parameters("Basic").0, "Basic");
    }

    #[test]
    fn an_address_is_in_its_range() {
        for (range, address, is) in [
            ("127.0.0.0/8", "127.9.0.1", true),
            ("127.0.0.0/8", "128.0.0.1", false),
            ("10.0.0.0/30", "10.0.0.4", false),
            ("0.0.0.0/0", "1.2.3.4", true),
            ("::1/128", "::1", true),
            ("::1/128", "127.0.0.1", false),
            ("x", "127.0.0.1", false),
        ] {
            assert_eq!(is_in(range, address.parse().unwrap()), is, "{range} {address}");
        }
    }
}
