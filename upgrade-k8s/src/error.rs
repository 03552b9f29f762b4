//! Errors of a cluster or of the way to it, as a step reports them.

use std::time::Duration;

use serde_json::Value;
use upgrade_core::context::Context;
use upgrade_core::error::{Class, StepError};

/// Says why work on a cluster failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KubeError {
    /// The API server refused a request.
    #[error("{doing} failed: {}", .answer.message)]
    Refused {
        /// What was tried: "changing deployment shop/web".
        doing: String,
        /// What the server answered.
        answer: Answer,
    },
    /// Nobody knows what became of a request: the API server is not to be reached, or stopped answering.
    #[error("{doing} failed")]
    Lost {
        /// What was tried.
        doing: String,
        /// What the connection said.
        source: kube::Error,
    },
    /// Anything else, as a step reports it already.
    #[error(transparent)]
    Step(#[from] StepError),
}

/// What a server says with 500 where a manifest is not of its kind's shape.
const UNTYPED: &str = "failed to create typed patch object";

/// Holds a refusal of the API server: a `Status` of `meta/v1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The reason: `NotFound`, `Conflict`, `Forbidden`, …
    pub reason: String,
    /// What the server says.
    pub message: String,
    /// Single causes, by reason and message: of a refused eviction, `DisruptionBudget`, and which one it is.
    pub causes: Vec<(String, String)>,
    /// When the server wants to be asked again.
    pub retry_after: Option<Duration>,
}

impl Answer {
    /// Reads what a server answered with.
    pub(crate) fn read(status: u16, retry_after: Option<Duration>, body: &[u8]) -> Self {
        let read: Value = serde_json::from_slice(body).unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().trim().to_owned();
        let causes = read["details"]["causes"].as_array().into_iter().flatten();
        let causes = causes.map(|cause| (text(&cause["reason"]), text(&cause["message"]))).collect();
        // A proxy before the server, or an old answer, is plain text.
        let message = match text(&read["message"]) {
            message if message.is_empty() => String::from_utf8_lossy(body).trim().chars().take(500).collect(),
            message => message,
        };
        let message = if message.is_empty() { format!("the API server answered {status}") } else { message };
        let told = read["details"]["retryAfterSeconds"].as_u64().filter(|seconds| *seconds > 0);
        let retry_after = retry_after.or(told.map(Duration::from_secs));
        Self { status, reason: text(&read["reason"]), message, causes, retry_after }
    }
}

impl KubeError {
    /// Returns the status of the server's answer, if it answered.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Refused { answer, .. } => Some(answer.status),
            _ => None,
        }
    }

    /// Returns what the server refused with, if it answered.
    pub fn answer(&self) -> Option<&Answer> {
        match self {
            Self::Refused { answer, .. } => Some(answer),
            _ => None,
        }
    }

    /// Tells whether what the request was about does not exist.
    pub fn is_missing(&self) -> bool {
        self.status() == Some(404)
    }

    /// Tells whether the object is not as it was when it was read, or exists already.
    pub fn is_in_conflict(&self) -> bool {
        self.status() == Some(409)
    }

    /// Tells whether a watch must start anew, because the server no longer has what came between.
    pub fn is_expired(&self) -> bool {
        self.status() == Some(410)
    }

    /// Tells whether the same request may succeed by itself a little later.
    pub fn is_passing(&self) -> bool {
        match self {
            // 500: etcd's leader changes, a webhook's connection is reset. Every request of this crate may be
            // repeated: what it changes, it changes from one known state to another.
            Self::Refused { answer, .. } => {
                matches!(answer.status, 429 | 500 | 502..=504) && !answer.message.contains(UNTYPED)
            }
            Self::Lost { source, .. } => is_connection(source),
            Self::Step(_) => false,
        }
    }
}

/// Turns the answer *there is no such object* into none.
pub(crate) fn found<T>(answer: Result<T, KubeError>) -> Result<Option<T>, KubeError> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_missing() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Tells a broken way to the server from credentials or certificates that cannot be used.
fn is_connection(error: &kube::Error) -> bool {
    use kube::Error as E;
    match error {
        E::HyperError(_) | E::ReadEvents(_) => true,
        E::Service(_) => !is_certificate(error),
        _ => false,
    }
}

/// Tells whether the server's certificate, or ours, is what a handshake failed on.
fn is_certificate(error: &kube::Error) -> bool {
    let chain = chain(error).join(": ").to_lowercase();
    ["certificate", "unknownissuer", "alert"].iter().any(|sign| chain.contains(sign))
}

fn chain(error: &dyn std::error::Error) -> Vec<String> {
    std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect()
}

impl From<KubeError> for StepError {
    fn from(error: KubeError) -> Self {
        match error {
            KubeError::Step(error) => error,
            KubeError::Refused { doing, answer } => {
                let (class, hint) = advice(&answer);
                StepError::new(class, format!("{doing} failed: {}", answer.message)).with_hint(hint)
            }
            KubeError::Lost { doing, source } => {
                let (class, hint) = match &source {
                    kube::Error::Auth(_) => (
                        Class::Permanent,
                        "the credentials of the kubeconfig cannot be used: `kubectl auth whoami` tries them; log in again",
                    ),
                    _ if is_certificate(&source) => (
                        Class::Permanent,
                        "a certificate is not accepted: `kubectl version` shows whether the kubeconfig is of this cluster; \
                         fetch it anew where certificates were renewed or have expired",
                    ),
                    _ if is_connection(&source) => (
                        Class::Transient,
                        "check that the API server runs and is reached from here: `kubectl get --raw /readyz`",
                    ),
                    _ => (Class::Unknown, "`kubectl get --raw /readyz` tells whether the API server answers"),
                };
                StepError::new(class, format!("{doing} failed")).with_cause(&Told(&source)).with_hint(hint)
            }
        }
    }
}

/// Says what an error of a connection says, once: kube's own texts repeat their source.
#[derive(Debug)]
struct Told<'a>(&'a kube::Error);

impl std::fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let kube::Error::Auth(kube::client::AuthError::AuthExecRun { cmd, out }) = self.0 {
            // What it printed may be a token.
            let said = String::from_utf8_lossy(&out.stderr);
            return write!(f, "the login program `{cmd}` ended with {}: {}", out.status, said.trim());
        }
        let chain = chain(self.0);
        f.write_str(chain.last().map_or("", |last| last.trim()))
    }
}

impl std::error::Error for Told<'_> {}

/// Says what a refusal promises about trying again, and what to do about it.
fn advice(answer: &Answer) -> (Class, &'static str) {
    let said = answer.message.to_lowercase();
    match answer.status {
        401 => (
            Class::Permanent,
            "the cluster does not know these credentials, or they have expired: log in again, or fetch the kubeconfig anew",
        ),
        500 if answer.message.contains(UNTYPED) => (
            Class::Permanent,
            "correct the manifest at the field that is named; old servers want what they know by default written down, \
             as a port's `protocol: TCP`",
        ),
        403 if said.contains("exceeded quota") => {
            (Class::Permanent, "the namespace's quota is used up: `kubectl describe quota`; free or raise it")
        }
        403 => (
            Class::Permanent,
            "give the user this right, by a Role and a RoleBinding; the check k8s.access lists all that a pipeline needs",
        ),
        404 if said.contains("could not find the requested resource") => (
            Class::Permanent,
            "the cluster does not have this kind: install its CustomResourceDefinition, or name another",
        ),
        404 => (Class::Permanent, "it does not exist, or no longer: check its name and namespace"),
        409 => (Class::Transient, "somebody else writes to it at the same time; try again"),
        410 => (Class::Transient, "the watch was too far behind; try again"),
        413 => (Class::Permanent, "it is too large for the cluster to store"),
        422 | 400 => (Class::Permanent, "correct what the message names"),
        429 => (Class::Transient, "the cluster asks for patience; try again"),
        500 if said.contains("webhook") => (
            Class::Transient,
            "an admission webhook fails: `kubectl get validatingwebhookconfigurations,mutatingwebhookconfigurations`",
        ),
        500..=599 => {
            (Class::Transient, "the API server or its storage has a problem: `kubectl get --raw '/readyz?verbose'`")
        }
        _ => (Class::Unknown, "`kubectl get --raw '/readyz?verbose'` tells how the API server is"),
    }
}

/// Says that the call was cancelled.
pub(crate) fn cancelled() -> StepError {
    StepError::transient("cancelled")
}

/// Ends the work when the call is cancelled, before it changes anything more.
pub(crate) fn not_cancelled(cx: &Context) -> Result<(), StepError> {
    if cx.cancelled().is_cancelled() { Err(cancelled()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_refusal_is_read_whatever_it_is_made_of() {
        let body = json!({
            "kind": "Status", "reason": "TooManyRequests", "message": " Cannot evict pod ", "code": 429,
            "details": { "retryAfterSeconds": 10, "causes": [{ "reason": "DisruptionBudget", "message": "The disruption budget web needs 2" }] },
        });
        let answer = Answer::read(429, None, body.to_string().as_bytes());
        assert_eq!(answer.message, "Cannot evict pod");
        assert_eq!(answer.causes, [("DisruptionBudget".to_owned(), "The disruption budget web needs 2".to_owned())]);
        assert_eq!(answer.retry_after, Some(Duration::from_secs(10)));
        assert_eq!(Answer::read(502, None, b"Bad Gateway\n").message, "Bad Gateway");
        assert_eq!(Answer::read(504, None, b"").message, "the API server answered 504");
    }

    #[test]
    fn refusals_are_classed() {
        for (status, message, class, hint) in [
            (401, "Unauthorized", Class::Permanent, "expired"),
            (403, "deployments.apps \"web\" is forbidden", Class::Permanent, "RoleBinding"),
            (403, "pods \"x\" is forbidden: exceeded quota: q", Class::Permanent, "quota"),
            (404, "the server could not find the requested resource", Class::Permanent, "CustomResourceDefinition"),
            (404, "deployments.apps \"web\" not found", Class::Permanent, "namespace"),
            (422, "Deployment.apps \"web\" is invalid", Class::Permanent, "correct"),
            (500, "failed calling webhook \"x\"", Class::Transient, "webhook"),
            (503, "etcd", Class::Transient, "readyz"),
        ] {
            let answer = Answer::read(status, None, json!({ "message": message }).to_string().as_bytes());
            let (found, said) = advice(&answer);
            assert_eq!(found, class, "{message}");
            assert!(said.contains(hint), "{message}: {said}");
        }
    }
}
