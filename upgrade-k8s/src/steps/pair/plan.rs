//! What is found of a pair, and what is refused.

use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use super::selector::HASH;
use super::{LedService, Pair, PairUndo, Selector};
use crate::difference::differences;
use crate::kept::keep;
use crate::kind::Kind;
use crate::naming::beside;
use crate::object::{Object, digest, patch};
use crate::pods;
use crate::server::ApiServer;
use crate::workload::WorkloadKind;
use crate::workload::status::{self, Rollout};

/// Says what is to be done with a Deployment.
pub(in crate::steps) enum Planned {
    /// Nothing: it runs so already.
    Already(Object),
    /// A second one is to be made; in a few words, what differs.
    Beside(Box<PairUndo>, String),
}

impl Pair {
    pub(in crate::steps) async fn plan(&self, server: &ApiServer, cx: &Context) -> Result<Planned, StepError> {
        let name = self.deployment(&self.deployment);
        let (present, after) = server
            .try_change(&name, |present| {
                let template = self.template.applied_to(present.at("/spec/template")).map_err(|error| {
                    StepError::permanent(format!("{name}: {error}")).with_hint("correct the container's name")
                })?;
                Ok(patch(present, [("/spec/template".to_owned(), Some(template))]))
            })
            .await?;
        let (found, intended) = (digest(present.at("/spec/template")), digest(after.at("/spec/template")));
        let is_complete = status::of(WorkloadKind::Deployment, &present) == Rollout::Complete;
        if found == intended && is_complete {
            return Ok(Planned::Already(after));
        }
        if !is_complete {
            return Err(StepError::permanent(format!("{name} is in the middle of a rollout"))
                .with_hint(format!("wait for it, or mend it: `kubectl rollout status deployment/{}`", name.name)));
        }
        let Some(blue) = hash_of(server, &present, &self.namespace).await? else {
            return Err(StepError::permanent(format!("{name} has no ReplicaSet of its template"))
                .with_hint("see whether its controller works: `kubectl describe deployment`"));
        };
        let mut services = Vec::new();
        for service in &self.services {
            services.push(self.led(server, service, &present).await?);
        }
        let template = keep(cx, after.at("/spec/template")).await?;
        let lines = differences(present.at("/spec/template"), after.at("/spec/template"), false);
        let undo = PairUndo {
            namespace: self.namespace.clone(),
            deployment: self.deployment.clone(),
            uid: present.uid().to_owned(),
            found,
            intended,
            template,
            blue,
            green: beside(&self.deployment, self.role, cx),
            services,
        };
        Ok(Planned::Beside(Box::new(undo), lines.join("; ")))
    }

    /// Looks at a Service that is to be led.
    async fn led(&self, server: &ApiServer, name: &str, deployment: &Object) -> Result<LedService, StepError> {
        let object = self.service(name);
        let service = server.require(&object).await?;
        let selector = Selector::of(&service);
        if selector.0.contains_key(HASH) {
            return Err(StepError::permanent(format!(
                "{object} is pinned to one template already: {}",
                selector.text()
            ))
            .with_hint("another run is at work on it, or left it so: `upgrade list`; else take that label out"));
        }
        if !selector.follows(deployment.at("/spec/template/metadata/labels")) {
            return Err(StepError::permanent(format!(
                "{object} does not lead to the pods of {}: it follows `{}`",
                deployment.name(),
                selector.text()
            ))
            .with_hint("name the Service whose selector the pods' labels match"));
        }
        Ok(LedService { name: name.to_owned(), uid: service.uid().to_owned(), selector: selector.0 })
    }
}

/// Finds the label of the pods of a Deployment's newest template.
pub(super) async fn hash_of(
    server: &ApiServer,
    deployment: &Object,
    namespace: &str,
) -> Result<Option<String>, StepError> {
    let labels = deployment.at("/spec/selector");
    let selector = pods::selector(&labels["matchLabels"], &labels["matchExpressions"]).unwrap_or_default();
    let (sets, _) = server.list(&Kind::replica_set(), Some(namespace), &selector, "").await?;
    let revision = "deployment.kubernetes.io/revision";
    let newest = sets
        .iter()
        .find(|set| set.is_owned_by(deployment.uid()) && set.annotation(revision) == deployment.annotation(revision));
    Ok(newest.and_then(|set| set.label(HASH)).map(str::to_owned))
}
