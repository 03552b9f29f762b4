//! Errors of an engine or of the way to it, as a step reports them.

use upgrade_core::context::Context;
use upgrade_core::error::{Class, StepError};

use crate::tls;

/// Says why work on an engine failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DockerError {
    /// The engine refused a request, or it is not to be reached.
    #[error("{doing} failed")]
    Engine {
        /// What was tried: "starting container web".
        doing: String,
        /// What the engine or the connection said.
        source: bollard::errors::Error,
    },
    /// Anything else, as a step reports it already.
    #[error(transparent)]
    Step(#[from] StepError),
}

impl From<bollard::errors::Error> for DockerError {
    fn from(source: bollard::errors::Error) -> Self {
        Self::Engine { doing: "a request to the engine".into(), source }
    }
}

/// Says what was tried when a request failed.
pub trait Doing<T> {
    /// Names what was tried: "starting container web".
    ///
    /// # Errors
    /// The one that there was.
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, DockerError>;
}

impl<T, E: Into<DockerError>> Doing<T> for Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, DockerError> {
        self.map_err(|error| match error.into() {
            DockerError::Engine { source, .. } => DockerError::Engine { doing: what(), source },
            other @ DockerError::Step(_) => other,
        })
    }
}

/// Turns the answer *there is no such thing* into none.
pub(crate) fn found<T>(answer: Result<T, DockerError>) -> Result<Option<T>, DockerError> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_missing() => Ok(None),
        Err(error) => Err(error),
    }
}

impl DockerError {
    /// Returns the status of the engine's answer, if it answered.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Engine { source: bollard::errors::Error::DockerResponseServerError { status_code, .. }, .. } => {
                Some(*status_code)
            }
            _ => None,
        }
    }

    /// Tells whether the engine was killed while it started a container, and cannot start it any
    /// more: it does not end what it has left of it, and refuses to make it again beside that.
    pub fn is_left_over(&self) -> bool {
        match self {
            Self::Engine { source: bollard::errors::Error::DockerResponseServerError { message, .. }, .. } => {
                is_left_over(message)
            }
            _ => false,
        }
    }

    /// Tells whether the engine killed a container and did not see it end.
    pub fn missed_the_exit(&self) -> bool {
        match self {
            Self::Engine { source: bollard::errors::Error::DockerResponseServerError { message, .. }, .. } => {
                message.contains("did not receive an exit event")
            }
            _ => false,
        }
    }

    /// Tells whether what the request was about does not exist.
    pub fn is_missing(&self) -> bool {
        self.status() == Some(404)
    }

    /// Tells whether the request does not fit the present state: a name that is taken, a container
    /// that is being removed.
    pub fn is_in_conflict(&self) -> bool {
        self.status() == Some(409)
    }

    /// Tells whether nobody knows what became of the request: the way to the engine broke.
    pub fn is_connection_lost(&self) -> bool {
        use bollard::errors::Error as E;
        match self {
            Self::Engine { source, .. } => matches!(
                source,
                E::IOError { .. }
                    | E::HyperResponseError { .. }
                    | E::HyperLegacyError { .. }
                    | E::RequestTimeoutError
                    | E::SocketNotFoundError(_)
            ),
            Self::Step(_) => false,
        }
    }
}

impl From<DockerError> for StepError {
    fn from(error: DockerError) -> Self {
        use bollard::errors::Error as E;
        let lost = error.is_connection_lost();
        let (doing, source) = match error {
            DockerError::Step(error) => return error,
            DockerError::Engine { doing, source } => (doing, source),
        };
        let answered = match &source {
            E::DockerResponseServerError { status_code, message } => Some((*status_code, message.clone())),
            // Within a stream the engine has no status left to answer with.
            E::DockerStreamError { error } => Some((500, error.clone())),
            _ => None,
        };
        if let Some((status, message)) = answered {
            let (class, hint) = advice(status, &message);
            let error = StepError::new(class, format!("{doing} failed: {}", message.trim()));
            return match hint {
                Some(hint) => error.with_hint(hint),
                None => error,
            };
        }
        if let Some((class, what, hint)) = tls::trouble(&source) {
            return StepError::new(class, format!("{doing} failed: {what}")).with_cause(&source).with_hint(hint);
        }
        let (class, hint) = match &source {
            E::UnsupportedURISchemeError { .. } | E::URLParseError { .. } | E::InvalidURIError { .. } => {
                (Class::Permanent, "write the engine's address as unix:///PATH or tcp://HOST:PORT")
            }
            E::SocketNotFoundError(_) => (
                Class::Transient,
                "start the engine (`systemctl start docker`), or name another one: `host` of the target, DOCKER_HOST",
            ),
            E::HyperLegacyError { .. } if is_refused(&source) => (
                Class::Permanent,
                "let the user reach the engine's socket (group `docker`), or run the command as one who may",
            ),
            _ if lost => {
                (Class::Transient, "check that the engine runs (`docker version`): `upgrade resume` when it is back")
            }
            _ => (Class::Unknown, "this is not expected of an engine: look at its log, and report it"),
        };
        StepError::new(class, format!("{doing} failed")).with_cause(&source).with_hint(hint)
    }
}

/// Tells whether an engine refuses to start a container for what it left of an earlier start: its task, the
/// name of its program's process, the directory of its shim.
fn is_left_over(message: &str) -> bool {
    let has = |text: &str| message.contains(text);
    (message.starts_with("task ") && has("already exists"))
        || message.trim() == "id already in use"
        || (has("failed to start shim") && has("file exists"))
}

fn is_refused(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<std::io::Error>()
            && io.kind() == std::io::ErrorKind::PermissionDenied
        {
            return true;
        }
        next = error.source();
    }
    false
}

/// Classes what an engine answered, with the line that tells what to do.
pub(crate) fn advice(status: u16, message: &str) -> (Class, Option<&'static str>) {
    use Class::{Permanent, Transient};
    let said = message.to_lowercase();
    let has = |text: &str| said.contains(text);
    if has("no space left on device") {
        return (Permanent, Some("free space for the engine (`docker system df`), then `upgrade resume`"));
    }
    if has("toomanyrequests") || has("too many requests") {
        return (Transient, Some("the registry limits pulls: log in (`registries` of the target), or wait"));
    }
    if has("unauthorized") || has("no basic auth credentials") || has("incorrect username or password") || has("denied")
    {
        return (
            Permanent,
            Some(
                "check user and password for the registry: `registries` of the target, or `docker login`; and that the image's name is right",
            ),
        );
    }
    if has("manifest unknown") || has("repository does not exist") || (has("manifest for") && has("not found")) {
        return (Permanent, Some("check the image's name and tag, and that it was pushed"));
    }
    if has("no matching manifest") || has("does not match the specified platform") {
        return (Permanent, Some("build and push the image for this platform as well, or name another `platform`"));
    }
    if is_left_over(&said) {
        return (
            Permanent,
            Some(
                "the engine was killed while it started this container: `ctr --namespace moby tasks delete --force ID`, or `docker rm --force` it if it wrote nothing that matters; then again",
            ),
        );
    }
    if has("did not receive an exit event") {
        return (Transient, Some("the engine waits for the end of a container: look at its log, then try again"));
    }
    if has("port is already allocated") || has("address already in use") {
        return (
            Permanent,
            Some("free the port (`docker ps --filter publish=PORT`, `ss -ltnp`), or publish another one"),
        );
    }
    if has("tls handshake timeout")
        || has("i/o timeout")
        || has("connection refused")
        || has("no such host")
        || has("connection reset")
        || has("server misbehaving")
    {
        return (Transient, Some("check that the engine reaches the registry: name, port, proxy, DNS"));
    }
    if has("sent an http request to an https server") {
        return (
            Permanent,
            Some(
                "the engine wants TLS: name `tls` with the `host` of the target, or set DOCKER_TLS_VERIFY and DOCKER_CERT_PATH",
            ),
        );
    }
    if status == 404 && said.trim() == "not found" {
        return (
            Permanent,
            Some(
                "this engine lacks that request (Podman cannot ask a registry): name the image by its digest, or `pull: missing`",
            ),
        );
    }
    match status {
        404 => (Permanent, Some("what is named does not exist on this engine: `docker ps --all`, `docker images`")),
        409 => (Permanent, Some("somebody else works on the same thing: look at it with `docker inspect`")),
        503 => (Transient, Some("the engine is starting or stopping: `upgrade resume` when it is back")),
        _ => (Permanent, None),
    }
}

/// Says that the call was asked to end.
pub(crate) fn cancelled() -> StepError {
    StepError::transient("cancelled before it was done")
        .with_hint("run `upgrade resume` to go on, or `upgrade rollback` to put everything back")
}

/// Ends the work when the call is cancelled, before it changes anything more.
#[allow(dead_code)]
pub(crate) fn not_cancelled(cx: &Context) -> Result<(), StepError> {
    if cx.cancelled().is_cancelled() { Err(cancelled()) } else { Ok(()) }
}

/// Awaits what may be given up at any instant: a pull, a look, a pause. What changes something at
/// the engine goes on there, and is awaited to its end instead.
pub(crate) async fn unless_cancelled<T>(
    cx: &Context,
    work: impl Future<Output = Result<T, StepError>>,
) -> Result<T, StepError> {
    tokio::select! {
        done = work => done,
        () = cx.cancelled().cancelled() => Err(cancelled()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_engine_says_is_classed() {
        for (status, message, class, hint) in [
            (500, "write /var/lib/x: no space left on device", Class::Permanent, "free space"),
            (404, "manifest for r/x:1 not found: manifest unknown", Class::Permanent, "name and tag"),
            (500, "Get https://r/v2/: unauthorized: authentication required", Class::Permanent, "password"),
            (500, "dial tcp 127.0.0.1:5000: connect: connection refused", Class::Transient, "reaches the registry"),
            (
                500,
                "driver failed: Bind for 0.0.0.0:80 failed: port is already allocated",
                Class::Permanent,
                "free the port",
            ),
            (404, "No such container: web", Class::Permanent, "does not exist"),
        ] {
            let (found, said) = advice(status, message);
            assert_eq!(found, class, "{message}");
            assert!(said.is_some_and(|said| said.contains(hint)), "{message}: {said:?}");
        }
    }
}
