//! `k8s.access`: whether the cluster lets this user do what a pipeline needs.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::CheckError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::verdict::Verdict;

use super::joined;
use crate::server::ApiServer;
use crate::target::{Cluster, check_name};

/// Where a review is asked for, since 1.6.
const REVIEWS: &str = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";

/// Configures `k8s.access`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AccessCheckConfig {
    /// The cluster. Default: the one that `kubectl` would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The namespace of what names none. Default: the target's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// What must be allowed.
    pub rights: Vec<RightConfig>,
}

/// Names something that must be allowed.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RightConfig {
    /// What is done: `get`, `list`, `watch`, `create`, `patch`, `delete`, ….
    pub verbs: Vec<String>,
    /// To what: `deployments.apps`, `pods`, `pods/log`.
    pub resource: ResourceName,
    /// In which namespace; `*` means all. Default: the check's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// To which object alone. Default: to each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Names a resource as rules of a Role do: `deployments.apps`, `pods/log`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ResourceName {
    /// The resource: `deployments`.
    pub plural: String,
    /// Its group, where one is named.
    pub group: Option<String>,
    /// A part of it: `log`.
    pub part: Option<String>,
}

impl FromStr for ResourceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (whole, part) = match text.split_once('/') {
            Some((whole, part)) => (whole, Some(part)),
            None => (text, None),
        };
        let (plural, group) = match whole.split_once('.') {
            Some((plural, group)) => (plural, Some(group)),
            None => (whole, None),
        };
        let is_word = |text: &str| {
            !text.is_empty()
                && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.'))
        };
        if !is_word(plural) || group.is_some_and(|group| !is_word(group)) || part.is_some_and(|part| !is_word(part)) {
            return Err(format!(
                "`{text}` names no resource: write its plural, as in pods, deployments.apps or pods/log"
            ));
        }
        Ok(Self { plural: plural.to_owned(), group: group.map(str::to_owned), part: part.map(str::to_owned) })
    }
}

impl TryFrom<String> for ResourceName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<ResourceName> for String {
    fn from(name: ResourceName) -> Self {
        name.to_string()
    }
}

impl fmt::Display for ResourceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.plural)?;
        if let Some(group) = &self.group {
            write!(f, ".{group}")?;
        }
        if let Some(part) = &self.part {
            write!(f, "/{part}")?;
        }
        Ok(())
    }
}

impl JsonSchema for ResourceName {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "ResourceName".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "description": "A resource by its plural, with its group and a part of it: `pods`, `deployments.apps`, `pods/log`.",
            "pattern": "^[a-z0-9-]+(\\.[a-z0-9.-]+)?(/[a-z0-9-]+)?$",
        })
    }
}

/// Asks what this user may do.
#[derive(Debug)]
pub struct AccessCheck {
    config: AccessCheckConfig,
    cluster: Arc<Cluster>,
    namespace: String,
}

/// A rule that would grant what is missing: by scope, group, resource and name, its verbs.
type Rules = BTreeMap<Scope, BTreeMap<(String, String, Option<String>), Vec<String>>>;

/// What is wrong with a right.
enum Fault {
    NoSuch(String),
    Denied(String),
}

/// Where a rule must be granted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Scope {
    Namespace(String),
    Cluster,
}

impl AccessCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// There is no such target, or nothing is asked for.
    pub fn from_config(config: AccessCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let cluster = Cluster::named(config.target.as_deref(), cx)?;
        let namespace = config.namespace.clone().unwrap_or_else(|| cluster.namespace().to_owned());
        check_name(&namespace, "namespace")?;
        if config.rights.is_empty() {
            return Err(BuildError::new("it asks for no right")
                .at("rights")
                .with_hint("name one: `rights: [{ verbs: [get, patch], resource: deployments.apps }]`"));
        }
        for (at, right) in config.rights.iter().enumerate() {
            if right.verbs.is_empty() {
                return Err(BuildError::new("it names no verb").at(format!("rights.{at}.verbs")));
            }
        }
        Ok(Self { config, cluster, namespace })
    }

    /// Asks for one right; notes the rules that are missing.
    async fn ask(
        &self,
        server: &ApiServer,
        right: &RightConfig,
        missing: &mut Rules,
    ) -> Result<Option<Fault>, CheckError> {
        let asked = &right.resource;
        let name = match &asked.group {
            Some(group) => format!("{}.{group}", asked.plural),
            None => asked.plural.clone(),
        };
        let Some(kind) = server.find_kind(None, &name).await? else {
            return Ok(Some(Fault::NoSuch(format!("the cluster has no {name}"))));
        };
        let namespace = match right.namespace.as_deref() {
            _ if !kind.namespaced => None,
            Some("*") => None,
            Some(namespace) => Some(namespace),
            None => Some(self.namespace.as_str()),
        };
        let mut denied = Vec::new();
        for verb in &right.verbs {
            let mut attributes =
                json!({ "verb": verb, "group": kind.group, "version": kind.version, "resource": kind.plural });
            let given =
                [("namespace", namespace), ("subresource", asked.part.as_deref()), ("name", right.name.as_deref())];
            for (key, value) in given.into_iter().filter_map(|(key, value)| Some((key, value?))) {
                attributes[key] = json!(value);
            }
            let body = json!({ "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
                "spec": { "resourceAttributes": attributes } });
            let answer =
                server.review(REVIEWS, &body, || format!("asking whether {verb} of {asked} is allowed")).await?;
            if answer["status"]["allowed"] != true {
                denied.push(verb.clone());
            }
        }
        if denied.is_empty() {
            return Ok(None);
        }
        let scope = namespace.map_or(Scope::Cluster, |namespace| Scope::Namespace(namespace.to_owned()));
        let resource = match &asked.part {
            Some(part) => format!("{}/{part}", kind.plural),
            None => kind.plural.clone(),
        };
        let place = match &scope {
            Scope::Namespace(namespace) => format!("in namespace {namespace}"),
            Scope::Cluster => "in the cluster".to_owned(),
        };
        let one = right.name.as_ref().map(|name| format!(" {name}")).unwrap_or_default();
        let said = format!("{} of {asked}{one} {place}", denied.join(", "));
        let verbs = missing.entry(scope).or_default().entry((kind.group, resource, right.name.clone())).or_default();
        verbs.extend(denied);
        verbs.sort();
        verbs.dedup();
        Ok(Some(Fault::Denied(said)))
    }
}

/// Writes the rules that would grant what is missing, as a Role or a ClusterRole takes them.
fn written(missing: &Rules) -> String {
    let each = missing.iter().map(|(scope, rules)| {
        let role = match scope {
            Scope::Namespace(namespace) => format!("a Role in namespace {namespace}"),
            Scope::Cluster => "a ClusterRole".to_owned(),
        };
        let rules = rules.iter().map(|((group, resource, name), verbs)| {
            let names = name.as_ref().map(|name| format!(", resourceNames: [\"{name}\"]")).unwrap_or_default();
            format!("{{ apiGroups: [\"{group}\"], resources: [\"{resource}\"]{names}, verbs: [{}] }}", verbs.join(", "))
        });
        format!("{role} with `rules: [{}]`", rules.collect::<Vec<_>>().join(", "))
    });
    each.collect::<Vec<_>>().join("; ")
}

#[async_trait]
impl Check for AccessCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let server = self.cluster.connect(cx).await?;
        let (mut absent, mut refused, mut missing) = (Vec::new(), Vec::new(), Rules::new());
        for right in &self.config.rights {
            match self.ask(&server, right, &mut missing).await? {
                Some(Fault::NoSuch(said)) => absent.push(said),
                Some(Fault::Denied(said)) => refused.push(said),
                None => {}
            }
        }
        let asked: usize = self.config.rights.iter().map(|right| right.verbs.len()).sum();
        let denied: usize = missing.values().flat_map(|rules| rules.values().map(Vec::len)).sum();
        let verdict = match (joined(&refused), joined(&absent)) {
            (Some(refused), absent) => {
                let absent = absent.map(|absent| format!("; {absent}")).unwrap_or_default();
                Verdict::fail(format!("not allowed: {refused}{absent}"))
                    .with_hint(format!("bind this user to {}", written(&missing)))
            }
            (None, Some(absent)) => {
                Verdict::fail(absent).with_hint("install its CustomResourceDefinition, or correct `resource`")
            }
            (None, None) => Verdict::pass(format!("{asked} rights are granted")),
        };
        Ok(verdict.with_measurement("asked", asked as f64).with_measurement("denied", denied as f64))
    }

    fn kind(&self) -> &str {
        "k8s.access"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_are_named_as_rules_name_them() {
        for text in ["pods", "deployments.apps", "pods/log", "certificates.cert-manager.io/status"] {
            assert_eq!(text.parse::<ResourceName>().unwrap().to_string(), text);
        }
        for bad in ["", "Pods", "pods/", "a b", ".apps"] {
            assert!(bad.parse::<ResourceName>().unwrap_err().contains("deployments.apps"), "{bad}");
        }
    }

    #[test]
    fn rules_are_written_as_a_role_takes_them() {
        let mut missing = Rules::new();
        let shop = missing.entry(Scope::Namespace("shop".into())).or_default();
        shop.insert(("apps".into(), "deployments".into(), Some("web".into())), vec!["get".into(), "patch".into()]);
        missing.entry(Scope::Cluster).or_default().insert((String::new(), "nodes".into(), None), vec!["list".into()]);
        assert_eq!(
            written(&missing),
            "a Role in namespace shop with `rules: [{ apiGroups: [\"apps\"], resources: [\"deployments\"], \
             resourceNames: [\"web\"], verbs: [get, patch] }]`; a ClusterRole with `rules: [{ apiGroups: [\"\"], \
             resources: [\"nodes\"], verbs: [list] }]`"
        );
    }
}
