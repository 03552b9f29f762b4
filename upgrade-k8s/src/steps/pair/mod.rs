//! Two Deployments of one application side by side: the one that was found, blue, and one that a step makes, green.
//!
//! A Service follows labels, and the pods of both bear those of the application. What tells them apart is
//! the label `pod-template-hash` that every ReplicaSet gives its pods: a Service is pinned by it to one
//! side, and led from one to the other by a single write.
//!
//! ```text
//!   found ──▶ green is made ──▶ green is complete ──▶ traffic, as the step says
//!     ▲                                                    │
//!     │   rollback: Services to blue, green removed, ◀─────┤
//!     │             pins off                               │
//!     └── commit: blue takes the new template, Services ◀──┘
//!                 to it, green removed, pins off
//! ```

mod drive;
mod plan;
mod selector;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use upgrade_core::context::Context;
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::sealed::SealedRef;
use upgrade_core::target::Target;

use crate::kind::Kind;
use crate::object::ObjectName;
use crate::server::ApiServer;
use crate::target::{Cluster, check_name};
use crate::workload::progress::Patience;
use crate::workload::template::TemplateChanges;

pub(super) use plan::Planned;
pub(super) use selector::Selector;

/// Holds what the way back, and the commit, of a second Deployment beside the first need.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PairUndo {
    /// The namespace.
    pub namespace: String,
    /// The Deployment that was found.
    pub deployment: String,
    /// What tells it from another of that name.
    pub uid: String,
    /// The digest of its pod template.
    pub found: String,
    /// The digest of the template that is intended.
    pub intended: String,
    /// The template that is intended, sealed: its variables may be secret.
    pub template: SealedRef,
    /// The `pod-template-hash` of its pods.
    pub blue: String,
    /// The name of the Deployment that is made.
    pub green: String,
    /// The Services that are led, the one with the traffic first.
    pub services: Vec<LedService>,
}

/// Names a Service that is led from one side to the other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedService {
    /// Its name.
    pub name: String,
    /// What tells it from another of that name.
    pub uid: String,
    /// Its selector as it was found.
    pub selector: BTreeMap<String, String>,
}

/// Knows a Deployment, the Services before it, and what is to change.
#[derive(Debug, Clone)]
pub(super) struct Pair {
    pub(super) cluster: Arc<Cluster>,
    pub(super) namespace: String,
    /// The Deployment that is there.
    pub(super) deployment: String,
    /// The Services that lead to its pods, the one with the traffic first.
    pub(super) services: Vec<String>,
    /// What the second one is called by: `green`, `canary`.
    pub(super) role: &'static str,
    pub(super) template: TemplateChanges,
    pub(super) patience: Patience,
}

/// Says what a pair is to be made of, in the words of a configuration.
pub(super) struct PairConfig<'a> {
    pub(super) target: Option<&'a str>,
    pub(super) namespace: Option<&'a str>,
    pub(super) deployment: &'a str,
    /// The Services, each by the key that names it.
    pub(super) services: Vec<(&'static str, &'a str)>,
    pub(super) role: &'static str,
    pub(super) template: TemplateChanges,
    pub(super) patience: Patience,
}

/// Works on both sides within one call of a step.
pub(super) struct Sides<'a> {
    pub(super) pair: &'a Pair,
    pub(super) server: ApiServer,
    pub(super) cx: &'a Context,
    pub(super) undo: &'a PairUndo,
}

impl Pair {
    /// # Errors
    /// There is no such target, a name cannot be one, or nothing is asked for.
    pub(super) fn new(config: PairConfig<'_>, cx: &BuildContext) -> Result<Self, BuildError> {
        let PairConfig { target, namespace, deployment, services, role, template, patience } = config;
        let cluster = Cluster::named(target, cx)?;
        let namespace = namespace.unwrap_or(cluster.namespace()).to_owned();
        check_name(&namespace, "namespace")?;
        check_name(deployment, "deployment")?;
        for (key, service) in &services {
            check_name(service, key)?;
        }
        if template.is_empty() {
            return Err(BuildError::new(format!("nothing changes in {deployment}"))
                .at("images")
                .with_hint("say what: `images`, `env`, `annotations`"));
        }
        let services = services.into_iter().map(|(_, service)| service.to_owned()).collect();
        Ok(Self { cluster, namespace, deployment: deployment.to_owned(), services, role, template, patience })
    }

    pub(super) async fn sides<'a>(&'a self, cx: &'a Context, undo: &'a PairUndo) -> Result<Sides<'a>, StepError> {
        Ok(Sides { pair: self, server: self.cluster.connect(cx).await?, cx, undo })
    }

    pub(super) fn targets(&self) -> Vec<Arc<dyn Target>> {
        let services = self.services.iter().map(|name| self.cluster.resource(&self.service(name)));
        [self.cluster.resource(&self.deployment(&self.deployment))].into_iter().chain(services).collect()
    }

    pub(super) fn deployment(&self, name: &str) -> ObjectName {
        ObjectName::new(Kind::deployment(), &self.namespace, name)
    }

    pub(super) fn service(&self, name: &str) -> ObjectName {
        ObjectName::new(Kind::service(), &self.namespace, name)
    }
}

/// Says that somebody else changed what is led or made; digests are cut to what tells them apart.
pub(super) fn conflict(subject: &str, found: &str, intended: &str, present: &str) -> StepError {
    let short =
        |text: &str| if text.starts_with("sha256:") { text.chars().take(19).collect() } else { text.to_owned() };
    StepError::conflict(Conflict {
        subject: subject.to_owned(),
        found: short(found),
        intended: short(intended),
        present: short(present),
    })
}
