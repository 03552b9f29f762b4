//! What `prepare` finds, and what it refuses.

use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::step::{Change, Effect, Prepared};

use super::selector::HASH;
use super::{BlueGreen, BlueGreenOutput, BlueGreenUndo, LedService, Selector};
use crate::difference::differences;
use crate::kept::keep;
use crate::kind::Kind;
use crate::naming::beside;
use crate::object::{Object, digest, patch};
use crate::pods;
use crate::server::ApiServer;
use crate::steps::rollout::images_of;
use crate::workload::WorkloadKind;
use crate::workload::status::{self, Rollout};

impl BlueGreen {
    pub(super) async fn plan(&self, cx: &Context) -> Result<Prepared<BlueGreenUndo, BlueGreenOutput>, StepError> {
        let server = self.cluster.connect(cx).await?;
        let name = self.deployment(&self.config.deployment);
        let (present, after) = server
            .try_change(&name, |present| {
                let template = self.changes().template().applied_to(present.at("/spec/template")).map_err(|error| {
                    StepError::permanent(format!("{name}: {error}")).with_hint("correct the container's name")
                })?;
                Ok(patch(present, [("/spec/template".to_owned(), Some(template))]))
            })
            .await?;
        let (found, intended) = (digest(present.at("/spec/template")), digest(after.at("/spec/template")));
        let is_complete = status::of(WorkloadKind::Deployment, &present) == Rollout::Complete;
        if found == intended && is_complete {
            let output = BlueGreenOutput { deployment: self.config.deployment.clone(), images: images_of(&after) };
            return Ok(Prepared::unchanged(output, "it runs with these settings already"));
        }
        if !is_complete {
            return Err(StepError::permanent(format!("{name} is in the middle of a rollout"))
                .with_hint(format!("wait for it, or mend it: `kubectl rollout status deployment/{}`", name.name)));
        }
        let Some(blue) = hash_of(&server, &present, &self.namespace).await? else {
            return Err(StepError::permanent(format!("{name} has no ReplicaSet of its template"))
                .with_hint("see whether its controller works: `kubectl describe deployment`"));
        };
        let names = [Some(&self.config.service), self.config.preview.as_ref()];
        let mut services = Vec::new();
        for service in names.into_iter().flatten() {
            services.push(self.led(&server, service, &present).await?);
        }
        let green = beside(&self.config.deployment, "green", cx);
        let template = keep(cx, after.at("/spec/template")).await?;
        let lines = differences(present.at("/spec/template"), after.at("/spec/template"), false);
        let changes = [
            Change::new(Effect::Create, format!("deployment {}/{green}", self.namespace))
                .with_summary(lines.join("; ")),
            Change::new(Effect::Modify, self.service(&self.config.service).to_string())
                .with_summary(format!("switched to it; {} is kept until commit", self.config.deployment)),
        ];
        let undo = BlueGreenUndo {
            namespace: self.namespace.clone(),
            deployment: self.config.deployment.clone(),
            uid: present.uid().to_owned(),
            found,
            intended,
            template,
            blue,
            green,
            services,
        };
        Ok(Prepared::change(undo, changes))
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
