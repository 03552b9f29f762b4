//! One HTTP request as the checks make it: no proxy, no cookies, a bounded reply.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use reqwest::header::{HOST, HeaderMap, HeaderName, HeaderValue};
use reqwest::redirect::Policy;
use reqwest::{Client, ClientBuilder, Method, Url};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use rustls_platform_verifier::BuilderVerifierExt;
use tokio::time::Instant;
use upgrade_core::context::Context;
use upgrade_core::error::CheckError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::secret::ExposeSecret;
use upgrade_core::text_or_secret::TextOrSecret;
use upgrade_core::tunnel::{Passage, Tunnel};

/// How much of a reply's body is read.
pub(crate) const MOST: usize = 1 << 20;

/// Describes a request and how its server is trusted.
#[derive(Debug)]
pub(crate) struct HttpRequest {
    method: Method,
    url: Url,
    headers: BTreeMap<String, TextOrSecret>,
    body: Option<TextOrSecret>,
    ca: Option<PathBuf>,
    follow_redirects: bool,
    timeout: Duration,
    client: OnceLock<Client>,
    via: Option<Via>,
}

/// Leads to a host of another network.
struct Via(Arc<dyn Tunnel>);

impl std::fmt::Debug for Via {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Via")
    }
}

/// Holds the way on which the requests of one check are sent.
#[derive(Debug)]
pub(crate) struct Way {
    client: Client,
    url: Url,
    /// What the server is to take for its name, where that is not the URL's.
    host: Option<HeaderValue>,
    _passage: Option<Passage>,
}

/// Holds what a server answered.
pub(crate) struct HttpReply {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
    pub(crate) latency: Duration,
}

/// Says why there is no reply.
#[derive(Debug)]
pub(crate) enum NoReply {
    /// The server refused, reset or broke off the connection: that is an answer about it.
    Refused(String),
    /// Nothing came in time: the server may hang, or the way to it.
    TimedOut,
    /// The request could not be made: a name that does not resolve, a certificate, a secret.
    NotMade(CheckError),
}

impl HttpRequest {
    pub(crate) fn new(method: &str, url: &str, timeout: Duration) -> Result<Self, BuildError> {
        let url = Url::parse(url).map_err(|error| {
            BuildError::new(format!("this is not a URL: {error}"))
                .at("url")
                .with_hint("write it whole: http://127.0.0.1:8080/health")
        })?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(BuildError::new(format!("`{}` is not http or https", url.scheme())).at("url"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(BuildError::new("a URL with a password would be stored and shown")
                .at("url")
                .with_hint("send it as a header: `headers: { Authorization: { env: NAME } }`"));
        }
        let method = Method::from_bytes(method.as_bytes())
            .map_err(|_| BuildError::new(format!("`{method}` is not an HTTP method")).at("method"))?;
        Ok(Self {
            method,
            url,
            headers: BTreeMap::new(),
            body: None,
            ca: None,
            follow_redirects: false,
            timeout,
            client: OnceLock::new(),
            via: None,
        })
    }

    pub(crate) fn headers(mut self, headers: &BTreeMap<String, TextOrSecret>) -> Result<Self, BuildError> {
        if let Some(name) = headers.keys().find(|name| HeaderName::from_bytes(name.as_bytes()).is_err()) {
            return Err(BuildError::new(format!("`{name}` is not the name of a header")).at("headers"));
        }
        self.headers = headers.clone();
        Ok(self)
    }

    pub(crate) fn path(&self) -> &str {
        self.url.path()
    }

    /// Asks what lies below the URL's own path.
    pub(crate) fn below(mut self, path: &str) -> Self {
        let whole = format!("{}/{path}", self.url.path().trim_end_matches('/'));
        self.url.set_path(&whole);
        self
    }

    pub(crate) fn body(mut self, body: Option<TextOrSecret>) -> Self {
        self.body = body;
        self
    }

    pub(crate) fn ca(mut self, ca: Option<PathBuf>) -> Self {
        self.ca = ca;
        self
    }

    pub(crate) fn follow_redirects(mut self, follow: bool) -> Self {
        self.follow_redirects = follow;
        self
    }

    /// Sends the request through another target, which leads to its host.
    pub(crate) fn via(mut self, name: Option<&str>, cx: &BuildContext) -> Result<Self, BuildError> {
        let Some(name) = name else { return Ok(self) };
        let wrong = |what: &str, hint: &str| Err(BuildError::new(what).at("via").with_hint(hint));
        if self.url.domain().is_none() {
            return wrong("an address is not reached through another target", "write the host's name into the `url`");
        }
        if self.follow_redirects {
            return wrong("a redirect may lead past the way", "drop `follow_redirects`, and ask for what it leads to");
        }
        self.via = Some(Via(cx.tunnel(name)?));
        Ok(self)
    }

    /// Writes the request without its query, which often carries a token.
    pub(crate) fn line(&self) -> String {
        let mut url = self.url.clone();
        url.set_query(None);
        url.set_fragment(None);
        format!("{} {url}", self.method)
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Opens the way that requests are sent on; it is closed when it is dropped.
    pub(crate) async fn way(&self, cx: &Context) -> Result<Way, CheckError> {
        let (Some(via), Some(host), Some(port)) = (&self.via, self.url.domain(), self.url.port_or_known_default())
        else {
            return Ok(Way { client: self.client()?.clone(), url: self.url.clone(), host: None, _passage: None });
        };
        let passage = via.0.open(cx, host, port).await?;
        // The name stays in the URL, for certificates. A port there would win over the passage's.
        let client = self.build(|builder| builder.resolve(host, passage.address()))?;
        let mut url = self.url.clone();
        let host = match url.port() {
            Some(port) => HeaderValue::from_str(&format!("{host}:{port}")).ok(),
            None => None,
        };
        let _ = url.set_port(None);
        Ok(Way { client, url, host, _passage: Some(passage) })
    }

    /// Makes the request once.
    pub(crate) async fn send(&self, cx: &Context, way: &Way) -> Result<HttpReply, NoReply> {
        let mut request = way.client.request(self.method.clone(), way.url.clone());
        if let Some(host) = &way.host {
            request = request.header(HOST, host);
        }
        for (name, value) in &self.headers {
            let value = value.resolve(cx).await.map_err(NoReply::NotMade)?;
            let mut value = HeaderValue::from_str(value.expose_secret()).map_err(|_| {
                NoReply::NotMade(
                    CheckError::permanent(format!("the value of header `{name}` cannot be sent"))
                        .with_hint("it holds a line break or another control character"),
                )
            })?;
            value.set_sensitive(true);
            request = request.header(name, value);
        }
        if let Some(body) = &self.body {
            let body = body.resolve(cx).await.map_err(NoReply::NotMade)?;
            request = request.body(body.expose_secret().to_owned());
        }
        let begun = Instant::now();
        let exchange = async {
            let mut reply = request.send().await?;
            let latency = begun.elapsed();
            let mut body = Vec::new();
            while let Some(chunk) = reply.chunk().await? {
                body.extend_from_slice(&chunk[..chunk.len().min(MOST - body.len())]);
                if body.len() == MOST {
                    break;
                }
            }
            Ok(HttpReply { status: reply.status().as_u16(), headers: reply.headers().clone(), body, latency })
        };
        tokio::select! {
            () = cx.cancelled().cancelled() => Err(NoReply::NotMade(CheckError::unknown("the check was cancelled"))),
            reply = tokio::time::timeout(self.timeout, exchange) => match reply {
                Err(_) => Err(NoReply::TimedOut),
                Ok(reply) => reply.map_err(|error| sort(cx, error)),
            },
        }
    }

    fn client(&self) -> Result<&Client, CheckError> {
        if let Some(client) = self.client.get() {
            return Ok(client);
        }
        let client = self.build(|builder| builder)?;
        Ok(self.client.get_or_init(|| client))
    }

    fn build(&self, adapt: impl FnOnce(ClientBuilder) -> ClientBuilder) -> Result<Client, CheckError> {
        let redirect = if self.follow_redirects { Policy::limited(10) } else { Policy::none() };
        let builder = Client::builder()
            .tls_backend_preconfigured(self.tls()?)
            .redirect(redirect)
            // A health check asks the server itself, whatever the environment says.
            .no_proxy()
            // A kept connection would hide that the server stopped listening.
            .pool_max_idle_per_host(0)
            .user_agent(concat!("upgrade/", env!("CARGO_PKG_VERSION")));
        let client = adapt(builder).build();
        client.map_err(|error| CheckError::permanent("the HTTP client cannot be made").with_cause(&error))
    }

    /// Configures TLS with a provider of our own: installing one for the whole process is the
    /// embedding program's right. System roots are read only where they are used, so that a
    /// machine without any can still be asked over plain HTTP.
    fn tls(&self) -> Result<ClientConfig, CheckError> {
        let unusable = |error: &dyn std::error::Error| {
            CheckError::permanent("TLS cannot be configured")
                .with_cause(&error)
                .with_hint("install the system's certificates (ca-certificates), or name one with `ca:`")
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable(&error))?;
        let builder = match &self.ca {
            Some(path) => builder.with_root_certificates(roots(path)?),
            None if self.url.scheme() == "https" => {
                builder.with_platform_verifier().map_err(|error| unusable(&error))?
            }
            // A redirect may lead to HTTPS; without system roots, none there is trusted.
            None if self.follow_redirects => match builder.clone().with_platform_verifier() {
                Ok(builder) => builder,
                Err(_) => builder.with_root_certificates(RootCertStore::empty()),
            },
            None => builder.with_root_certificates(RootCertStore::empty()),
        };
        Ok(builder.with_no_client_auth())
    }
}

fn roots(path: &Path) -> Result<RootCertStore, CheckError> {
    let wrong = |error: &dyn std::error::Error| {
        CheckError::permanent(format!("the certificates in {} cannot be used", path.display()))
            .with_cause(&error)
            .with_hint("`ca:` names a file with certificates in PEM")
    };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(path).map_err(|error| wrong(&error))? {
        let certificate = certificate.map_err(|error| wrong(&error))?;
        roots.add(certificate).map_err(|error| wrong(&error))?;
    }
    if roots.is_empty() { Err(wrong(&io::Error::other("there is none in it"))) } else { Ok(roots) }
}

/// Tells a server that says no from a question that never reached it.
fn sort(cx: &Context, error: reqwest::Error) -> NoReply {
    let error = error.without_url();
    if error.is_timeout() {
        return NoReply::TimedOut;
    }
    let mut causes = Vec::new();
    let mut refused = false;
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(cause) = next {
        causes.push(cause.to_string());
        if let Some(cause) = cause.downcast_ref::<io::Error>() {
            use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, UnexpectedEof};
            refused |= matches!(
                cause.kind(),
                ConnectionRefused | ConnectionReset | ConnectionAborted | BrokenPipe | UnexpectedEof
            );
        }
        next = cause.source();
    }
    // Once connected, whatever breaks is the server's doing.
    if refused || !(error.is_connect() || error.is_builder() || error.is_redirect()) {
        return NoReply::Refused(cx.mask(causes.last().map_or("it broke off", String::as_str)));
    }
    NoReply::NotMade(
        CheckError::transient("the request could not be made")
            .with_cause(&error)
            .with_hint("check the name, the route and the certificate: try the same URL with curl from this machine"),
    )
}
