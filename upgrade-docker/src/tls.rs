//! Connections with TLS to an engine of another machine: whom they trust, who they are, and what
//! went wrong where they fail.

use std::path::Path;
use std::sync::Arc;

use bollard::{BollardRequest, ClientVersion, Docker};
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use jiff::Timestamp;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{AlertDescription, CertificateError, ClientConfig, RootCertStore};
use upgrade_core::error::{Class, StepError};

use crate::connection::TlsFiles;

/// Makes a client of an engine; nothing is sent yet.
///
/// Made here and not by the API's client, which trusts every authority of the machine beside the one
/// that is named, and goes without a client certificate where it cannot read it.
pub(crate) fn client(host: &str, files: &TlsFiles, seconds: u64, version: &ClientVersion) -> Result<Docker, StepError> {
    let connector = HttpsConnectorBuilder::new().with_tls_config(configuration(files)?).https_only().enable_http1();
    // A connection that is kept may be closed by the engine just when it is used again.
    let client = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector.build());
    let transport = move |request: BollardRequest| {
        let answer = client.request(request);
        async move { answer.await.map_err(Into::into) }
    };
    let place = host.split_once("://").map_or(host, |(_, place)| place);
    Docker::connect_with_custom_transport(transport, Some(format!("https://{place}")), seconds, version)
        .map_err(|error| StepError::permanent(format!("`{host}` is not where an engine is")).with_cause(&error))
}

fn configuration(files: &TlsFiles) -> Result<ClientConfig, StepError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    for authority in certificates(&files.ca, "the authority of the engine's certificate", "ca")? {
        roots.add(authority).map_err(|error| unusable(&files.ca, "the authority", "ca", &error))?;
    }
    let own = certificates(&files.cert, "the client certificate", "cert")?;
    let key = PrivateKeyDer::from_pem_slice(&read(&files.key, "the key of the client certificate", "key")?)
        .map_err(|error| unusable(&files.key, "the key", "key", &error))?;
    in_time(&own, &roots, &provider, &files.cert)?;
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_root_certificates(roots).with_client_auth_cert(own, key))
        .map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => {
                let (key, certificate) = (files.key.display(), files.cert.display());
                StepError::permanent(format!("the key {key} does not belong to the certificate {certificate}"))
                    .with_hint(
                        "name those that were made together: `tls.cert` and `tls.key` of the target, DOCKER_CERT_PATH",
                    )
            }
            error => unusable(&files.key, "the key of the client certificate", "key", &error),
        })
}

fn certificates(path: &Path, what: &str, key: &str) -> Result<Vec<CertificateDer<'static>>, StepError> {
    let text = read(path, what, key)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(unusable(path, what, key, &rustls::pki_types::pem::Error::NoItemsFound)),
        Err(error) => Err(unusable(path, what, key, &error)),
    }
}

fn read(path: &Path, what: &str, key: &str) -> Result<Vec<u8>, StepError> {
    std::fs::read(path).map_err(|error| unusable(path, what, key, &error))
}

fn unusable(path: &Path, what: &str, key: &str, error: &(dyn std::error::Error + 'static)) -> StepError {
    StepError::permanent(format!("{what} cannot be read from {}", path.display())).with_cause(error).with_hint(format!(
        "put the PEM file there, readable for this user, or name it: `tls.{key}` of the target, DOCKER_CERT_PATH"
    ))
}

/// Looks at the client certificate's time: an engine that refuses it says no more than that it is bad.
fn in_time(
    own: &[CertificateDer<'static>],
    roots: &RootCertStore,
    provider: &Arc<rustls::crypto::CryptoProvider>,
    path: &Path,
) -> Result<(), StepError> {
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots.clone()), Arc::clone(provider)).build().ok();
    let (Some(verifier), Some((first, others))) = (verifier, own.split_first()) else { return Ok(()) };
    // Who signed it is the engine's to judge: that need not be the authority of its own certificate.
    match verifier.verify_client_cert(first, others, UnixTime::now()) {
        Err(rustls::Error::InvalidCertificate(why)) => match times(&why) {
            Some(times) => Err(StepError::permanent(format!("the client certificate {} {times}", path.display()))
                .with_hint("have it renewed by the authority that the engine trusts, and check this machine's clock")),
            None => Ok(()),
        },
        _ => Ok(()),
    }
}

fn times(why: &CertificateError) -> Option<String> {
    let at = |time: &UnixTime| {
        let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
        Timestamp::from_second(seconds).map_or_else(|_| seconds.to_string(), |at| at.to_string())
    };
    match why {
        CertificateError::Expired => Some("has expired".into()),
        CertificateError::ExpiredContext { not_after, .. } => Some(format!("expired at {}", at(not_after))),
        CertificateError::NotValidYet => Some("is not valid yet".into()),
        CertificateError::NotValidYetContext { not_before, .. } => {
            Some(format!("is not valid before {}", at(not_before)))
        }
        _ => None,
    }
}

/// Says what is wrong between this machine and an engine, where it is TLS.
pub(crate) fn trouble(error: &(dyn std::error::Error + 'static)) -> Option<(Class, String, &'static str)> {
    use rustls::Error as E;
    let (what, hint): (String, _) = match find(error)? {
        E::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => (
            "the engine's certificate is not signed by the authority in `ca`".into(),
            "name the authority that signed it: `tls.ca` of the target, or ca.pem in DOCKER_CERT_PATH",
        ),
        E::InvalidCertificate(
            why @ (CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }),
        ) => (
            format!("the engine's certificate is another name's: {why}"),
            "reach the engine by a name or address that its certificate lists, or have this one added to it",
        ),
        E::InvalidCertificate(why) => match times(why) {
            Some(times) => (
                format!("the engine's certificate {times}"),
                "have the engine's certificate renewed, and check this machine's clock",
            ),
            None => (
                format!("the engine's certificate cannot be verified: {why}"),
                "have the engine's certificate made anew, for its name and for the use as a server",
            ),
        },
        E::AlertReceived(alert) if is_about_a_certificate(*alert) => (
            format!("the engine refuses the client certificate: {alert:?}"),
            "name one signed by the authority that the engine trusts (its `tlscacert`): `tls.cert` and `tls.key` of the target, DOCKER_CERT_PATH",
        ),
        E::InvalidMessage(_) => (
            "what answers there does not speak TLS".into(),
            "name the engine's TLS port (2376 as a rule), or drop `tls` of the target (DOCKER_TLS_VERIFY)",
        ),
        other => (format!("TLS failed: {other}"), "compare with `docker --tlsverify version` on this machine"),
    };
    Some((Class::Permanent, what, hint))
}

fn is_about_a_certificate(alert: AlertDescription) -> bool {
    use AlertDescription as A;
    matches!(
        alert,
        A::NoCertificate
            | A::BadCertificate
            | A::UnsupportedCertificate
            | A::CertificateRevoked
            | A::CertificateExpired
            | A::CertificateUnknown
            | A::UnknownCA
            | A::AccessDenied
            | A::CertificateRequired
    )
}

fn find<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<rustls::Error>() {
            return Some(found);
        }
        // What an I/O error holds is not its source: its source is that one's.
        let held = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        next = held.map(|held| held as &(dyn std::error::Error + 'static)).or_else(|| error.source());
    }
    None
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::time::Duration;

    use bollard::exec::{CreateExecOptions, StartExecResults};
    use futures_util::StreamExt as _;
    use upgrade_testbed::docker::{self, Authority, Holder, Image};

    use super::*;
    use crate::connection::{Endpoint, Surroundings};
    use crate::error::Doing as _;

    fn files(directory: &Path) -> TlsFiles {
        let path = |name| directory.join(name);
        TlsFiles { ca: path("ca.pem"), cert: path("cert.pem"), key: path("key.pem") }
    }

    /// Reaches the engine as a target does, and asks who it is.
    async fn reach(endpoint: &Endpoint) -> Result<String, StepError> {
        let client = endpoint.client(Duration::from_secs(20), bollard::API_DEFAULT_VERSION)?;
        let client = client.negotiate_version().await.doing(|| "reaching the engine".into())?;
        Ok(client.info().await.doing(|| "asking".into())?.id.unwrap_or_default())
    }

    async fn refused(host: &str, directory: &Path, message: &str, hint: &str) {
        let endpoint = Endpoint::new(host.to_owned(), Some(files(directory))).unwrap();
        let error = reach(&endpoint).await.unwrap_err();
        assert_eq!(error.class(), Class::Permanent, "{error:?}");
        assert!(error.message().contains(message) && error.hint().unwrap().contains(hint), "{error:?}");
    }

    #[tokio::test]
    async fn an_engine_is_reached_over_tls_and_what_is_wrong_is_named() {
        let Some(own) = docker::secured() else { return };
        let (host, engine, home) = (own.over_tcp(), own.engine(), tempfile::tempdir().unwrap());
        let id = engine.docker(["info", "--format", "{{.ID}}"]);
        let at = |name: &str| home.path().join(name);
        let ours = at("ours");
        own.authority().sign(Holder::Client, 2, &ours);

        // Named by the target, by the environment, by a context that the `docker` command made.
        let named = Endpoint::new(host.clone(), Some(files(&ours))).unwrap();
        assert_eq!(reach(&named).await.unwrap(), id);
        let found = |pairs: &[(&str, &str)]| {
            let variable =
                |name: &str| pairs.iter().find(|(known, _)| *known == name).map(|(_, text)| (*text).to_owned());
            Surroundings { variable: &variable }.endpoint().unwrap()
        };
        let pairs = [("DOCKER_HOST", &*host), ("DOCKER_TLS_VERIFY", "1"), ("DOCKER_CERT_PATH", ours.to_str().unwrap())];
        assert_eq!(reach(&found(&pairs)).await.unwrap(), id);
        let config = at("config");
        let keys = files(&ours);
        let context =
            format!("host={host},ca={},cert={},key={}", keys.ca.display(), keys.cert.display(), keys.key.display());
        let mut made = engine.command(["context", "create", "secured", "--docker", &context]);
        assert!(made.env("DOCKER_CONFIG", &config).env_remove("DOCKER_HOST").status().unwrap().success());
        let pairs = [("DOCKER_CONFIG", config.to_str().unwrap()), ("DOCKER_CONTEXT", "secured")];
        assert_eq!(reach(&found(&pairs)).await.unwrap(), id);

        // A connection that is taken over, as `docker.exec` has it.
        Image::shell("sleep 1000").build(engine, "tls:1");
        let container = engine.docker(["run", "--detach", "--network", "none", "tls:1"]);
        let client = named.client(Duration::from_secs(20), bollard::API_DEFAULT_VERSION).unwrap();
        let command = ["sh", "-c", "echo taken over"].map(str::to_owned).to_vec();
        let exec = CreateExecOptions { cmd: Some(command), attach_stdout: Some(true), ..Default::default() };
        let exec = client.create_exec(&container, exec).await.unwrap().id;
        let StartExecResults::Attached { mut output, .. } = client.start_exec(&exec, None).await.unwrap() else {
            panic!("it is not attached");
        };
        assert_eq!(output.next().await.unwrap().unwrap().to_string(), "taken over\n");

        // Certificates that do not do.
        let stranger = Authority::create(&at("stranger-authority"));
        stranger.sign(Holder::Client, 2, &at("stranger"));
        refused(&host, &at("stranger"), "not signed by the authority in `ca`", "ca.pem in DOCKER_CERT_PATH").await;
        std::fs::copy(own.authority().certificate(), at("stranger/ca.pem")).unwrap();
        refused(&host, &at("stranger"), "refuses the client certificate", "tlscacert").await;
        own.authority().sign(Holder::Client, -1, &at("late"));
        refused(&host, &at("late"), "cert.pem has expired", "renewed").await;
        refused(&host.replace("127.0.0.1", "localhost"), &ours, "another name's", "name or address").await;
        std::fs::copy(ours.join("key.pem"), at("late/key.pem")).unwrap();
        std::fs::copy(at("stranger/cert.pem"), at("late/cert.pem")).unwrap();
        refused(&host, &at("late"), "does not belong to", "tls.key").await;
        std::fs::write(at("late/key.pem"), "no key").unwrap();
        refused(&host, &at("late"), "late/key.pem", "tls.key").await;
        std::fs::remove_file(at("late/cert.pem")).unwrap();
        refused(&host, &at("late"), "late/cert.pem", "DOCKER_CERT_PATH").await;
        let error = reach(&Endpoint::new(host.clone(), None).unwrap()).await.unwrap_err();
        assert!(error.hint().unwrap().contains("wants TLS"), "{error:?}");

        own.kill();
        own.certify(&own.authority(), -1);
        own.start();
        refused(&host, &ours, "the engine's certificate has expired", "renewed").await;
    }

    #[tokio::test]
    async fn what_does_not_speak_tls_is_told_from_what_refuses() {
        let home = tempfile::tempdir().unwrap();
        Authority::create(&home.path().join("authority")).sign(Holder::Client, 2, home.path());
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let host = format!("tcp://{}", listener.local_addr().unwrap());
        let serving = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        });
        refused(&host, home.path(), "does not speak TLS", "2376").await;
        serving.join().unwrap();
    }
}
