//! Finds out which cluster is meant, and who asks.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};
use serde_json::{Value, json};
use upgrade_core::error::StepError;
use upgrade_core::registry::BuildError;

/// The files that a service account's container has.
const IN_CLUSTER: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(10);

/// Holds what a kubeconfig says of one cluster, before anybody is asked.
#[derive(Clone, Debug)]
pub(crate) struct Endpoint {
    source: Source,
    /// Where the API server is.
    pub(crate) server: String,
    /// The namespace of what names none.
    pub(crate) namespace: String,
}

#[derive(Clone, Debug)]
enum Source {
    /// The kubeconfig, parsed; it holds credentials, which kube keeps from being printed.
    File { kubeconfig: Box<Kubeconfig>, context: Option<String>, named: String },
    /// The service account of the container that this process runs in.
    ServiceAccount,
}

impl Endpoint {
    /// Reads the kubeconfig that is named, or the one that `kubectl` would use; in a container without
    /// one, its service account is taken.
    pub(crate) fn find(kubeconfig: Option<&Path>, context: Option<&str>) -> Result<Self, BuildError> {
        let (kubeconfig, named) = match kubeconfig {
            Some(path) => (read(path).map_err(|error| error.at("kubeconfig"))?, path.display().to_string()),
            None => {
                let paths = usual_paths();
                let there: Vec<_> = paths.iter().filter(|path| path.is_file()).collect();
                if there.is_empty() {
                    return match context {
                        None if Path::new(IN_CLUSTER).exists() => Self::service_account(),
                        _ => Err(no_kubeconfig(&paths)),
                    };
                }
                let mut merged: Option<Kubeconfig> = None;
                for path in &there {
                    let next = read(path)?;
                    merged = Some(match merged {
                        Some(before) => before.merge(next).map_err(|error| explained(path, &error))?,
                        None => next,
                    });
                }
                let named: Vec<_> = there.iter().map(|path| path.display().to_string()).collect();
                (merged.unwrap_or_default(), named.join(", "))
            }
        };
        let wanted = context.or(kubeconfig.current_context.as_deref().filter(|name| !name.is_empty()));
        let known: Vec<_> = kubeconfig.contexts.iter().map(|each| each.name.as_str()).collect();
        let list = if known.is_empty() { "it has none".to_owned() } else { format!("it has: {}", known.join(", ")) };
        let Some(wanted) = wanted else {
            return Err(BuildError::new(format!("{named} has no current context"))
                .at("context")
                .with_hint(format!("name a `context`; {list}")));
        };
        let found = kubeconfig.contexts.iter().find(|each| each.name == wanted);
        let Some(found) = found.and_then(|each| each.context.as_ref()) else {
            return Err(BuildError::new(format!("{named} has no context `{wanted}`")).at("context").with_hint(list));
        };
        let cluster = kubeconfig.clusters.iter().find(|each| each.name == found.cluster);
        let server = cluster.and_then(|each| each.cluster.as_ref()).and_then(|cluster| cluster.server.clone());
        let Some(server) = server else {
            return Err(BuildError::new(format!(
                "{named}: context `{wanted}` names cluster `{}`, which has no server there",
                found.cluster
            ))
            .at("context")
            .with_hint("fetch the kubeconfig anew"));
        };
        let namespace = found.namespace.clone().unwrap_or_else(|| "default".to_owned());
        let context = Some(wanted.to_owned());
        Ok(Self { source: Source::File { kubeconfig: Box::new(kubeconfig), context, named }, server, namespace })
    }

    fn service_account() -> Result<Self, BuildError> {
        let config = Config::incluster().map_err(|error| {
            BuildError::new(format!("the service account of this container cannot be used: {error}"))
                .with_hint("let the pod mount its service account's token, or name a `kubeconfig`")
        })?;
        let server = config.cluster_url.to_string();
        Ok(Self { source: Source::ServiceAccount, server, namespace: config.default_namespace })
    }

    /// Writes a kubeconfig for another program that is to reach the same cluster as the same user; it holds
    /// credentials.
    pub(crate) fn kubeconfig(&self) -> Value {
        match &self.source {
            Source::File { kubeconfig, context, .. } => {
                let mut written = serde_json::to_value(kubeconfig).unwrap_or_default();
                written["current-context"] = json!(context);
                written
            }
            Source::ServiceAccount => {
                let certificate = Path::new(IN_CLUSTER).with_file_name("ca.crt");
                json!({
                    "apiVersion": "v1", "kind": "Config", "current-context": "pod",
                    "clusters": [{ "name": "pod", "cluster": { "server": self.server, "certificate-authority": certificate } }],
                    "users": [{ "name": "pod", "user": { "tokenFile": IN_CLUSTER } }],
                    "contexts": [{ "name": "pod", "context": { "cluster": "pod", "user": "pod" } }],
                })
            }
        }
    }

    /// Makes a client. Requests are not repeated by it: this crate knows which may be.
    pub(crate) async fn client(&self) -> Result<Client, StepError> {
        let mut config = match &self.source {
            Source::ServiceAccount => Config::incluster().map_err(|error| {
                StepError::permanent("the service account of this container cannot be used")
                    .with_cause(&error)
                    .with_hint("let the pod mount its service account's token, or name a `kubeconfig`")
            })?,
            Source::File { kubeconfig, context, named } => {
                let options = KubeConfigOptions { context: context.clone(), ..KubeConfigOptions::default() };
                Config::from_custom_kubeconfig((**kubeconfig).clone(), &options).await.map_err(|error| {
                    StepError::permanent(format!("{named} cannot be used"))
                        .with_cause(&error)
                        .with_hint("`kubectl version` tries it; fetch it anew where files that it names are gone")
                })?
            }
        };
        config.connect_timeout = Some(CONNECT);
        config.default_retry = false;
        Client::try_from(config).map_err(|error| {
            StepError::permanent(format!("credentials for {} cannot be used", self.server))
                .with_cause(&error)
                .with_hint("`kubectl version` tries them; log in again, or fetch the kubeconfig anew")
        })
    }
}

/// The files of `KUBECONFIG`, or the one of the user.
fn usual_paths() -> Vec<PathBuf> {
    match std::env::var_os("KUBECONFIG").filter(|value| !value.is_empty()) {
        Some(paths) => std::env::split_paths(&paths).filter(|path| !path.as_os_str().is_empty()).collect(),
        None => std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".kube/config")).into_iter().collect(),
    }
}

fn read(path: &Path) -> Result<Kubeconfig, BuildError> {
    Kubeconfig::read_from(path).map_err(|error| explained(path, &error))
}

fn explained(path: &Path, error: &KubeconfigError) -> BuildError {
    let named = path.display();
    match error {
        KubeconfigError::ReadConfig(source, _) => BuildError::new(format!("{named} cannot be read: {source}"))
            .with_hint("name a kubeconfig that is there and that this user may read"),
        KubeconfigError::Parse(source) => BuildError::new(format!("{named} is no kubeconfig: {source}"))
            .with_hint("fetch it anew, or correct it at this line: `kubectl --kubeconfig FILE config view` tries it"),
        other => BuildError::new(format!("{named} cannot be used: {other}")).with_hint("fetch it anew"),
    }
}

fn no_kubeconfig(tried: &[PathBuf]) -> BuildError {
    let tried: Vec<_> = tried.iter().map(|path| path.display().to_string()).collect();
    let tried = if tried.is_empty() { "neither KUBECONFIG nor HOME is set".into() } else { tried.join(", ") };
    BuildError::new(format!("there is no kubeconfig ({tried})"))
        .with_hint("name it: `kubeconfig: FILE` of the target, or set KUBECONFIG")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(text: &str, context: Option<&str>) -> Result<Endpoint, BuildError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config");
        std::fs::write(&path, text).unwrap();
        Endpoint::find(Some(&path), context)
    }

    const GOOD: &str = r#"
clusters: [{ name: c, cluster: { server: "https://127.0.0.1:6443" } }]
users: [{ name: u, user: { token: t } }]
contexts: [{ name: x, context: { cluster: c, user: u, namespace: shop } }, { name: lost, context: { cluster: d } }]
current-context: x
"#;

    #[test]
    fn a_context_says_which_server_and_namespace() {
        let endpoint = find(GOOD, None).unwrap();
        assert_eq!((&*endpoint.server, &*endpoint.namespace), ("https://127.0.0.1:6443", "shop"));
        assert!(!format!("{endpoint:?}").contains("token: Some(\"t\")"), "{endpoint:?}");
        let written = find(GOOD, Some("x")).unwrap().kubeconfig();
        assert_eq!((&written["current-context"], &written["users"][0]["user"]["token"]), (&json!("x"), &json!("t")));
    }

    #[test]
    fn what_is_wrong_with_a_kubeconfig_is_said_with_its_name_and_a_remedy() {
        let missing = Endpoint::find(Some(Path::new("/nowhere/config")), None).unwrap_err();
        assert!(missing.to_string().contains("/nowhere/config"), "{missing}");
        for (text, context, says, hint) in [
            (GOOD, Some("prod"), "no context `prod`", "it has: x, lost"),
            (GOOD, Some("lost"), "cluster `d`", "anew"),
            ("contexts: []", None, "no current context", "it has none"),
            ("clusters: [", None, "is no kubeconfig", "correct it"),
        ] {
            let error = find(text, context).unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
            assert!(error.hint.as_deref().unwrap_or_default().contains(hint), "{error:?}");
        }
    }
}
