//! What `prepare` finds, and what it refuses.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::StepError;
use upgrade_core::step::{Change, Effect, Prepared};

use super::{RolloutOutput, RolloutStep, RolloutUndo, State, WorkloadConfig, WorkloadUndo};
use crate::difference::differences;
use crate::kept::keep;
use crate::object::{Object, ObjectName, digest, patch};
use crate::server::ApiServer;
use crate::workload::status::{self, Rollout};
use crate::workload::{WorkloadKind, autoscaler};

impl RolloutStep {
    pub(super) async fn plan(&self, cx: &Context) -> Result<Prepared<RolloutUndo, RolloutOutput>, StepError> {
        let server = self.cluster.connect(cx).await?;
        let (mut workloads, mut changes, mut images) = (Vec::new(), Vec::new(), BTreeMap::new());
        for each in &self.config.workloads {
            let object = self.object(&each.workload);
            let present = server.require(&object).await?;
            self.refuse(&server, each, &present, cx).await?;
            let base = self.base(&server, each, &present).await?;
            // The server adds what it takes for granted: the intended state is the one that it would store.
            let (present, after) = server
                .try_change(&object, |present| {
                    let template = changed(each, &object, base.as_ref(), present)?;
                    Ok(patch(present, parts(&template, each.replicas)))
                })
                .await?;
            images.insert(each.workload.to_string(), images_of(&after));
            let is_complete = status::of(each.workload.kind, &present) == Rollout::Complete;
            let (found, intended) = (state(&present, each), state(&after, each));
            if found == intended && is_complete {
                continue;
            }
            let sealed = keep(cx, present.at("/spec/template")).await?;
            let mut lines = differences(present.at("/spec/template"), after.at("/spec/template"), false);
            if found.replicas != intended.replicas {
                lines.push(format!("replicas: {} -> {}", shown(found.replicas), shown(intended.replicas)));
            }
            let summary = if lines.is_empty() { "its rollout is completed".to_owned() } else { lines.join("; ") };
            changes.push(Change::new(Effect::Modify, object.to_string()).with_summary(summary));
            workloads.push(WorkloadUndo {
                workload: each.workload.clone(),
                uid: present.uid().to_owned(),
                found,
                intended,
                template: sealed,
                was_complete: is_complete,
            });
        }
        if workloads.is_empty() {
            return Ok(Prepared::unchanged(RolloutOutput { images }, "they run with these settings already"));
        }
        Ok(Prepared::change(RolloutUndo { namespace: self.namespace.clone(), workloads }, changes))
    }

    /// Refuses what could not be rolled out, or would be undone by somebody else at once.
    async fn refuse(
        &self,
        server: &ApiServer,
        each: &WorkloadConfig,
        present: &Object,
        cx: &Context,
    ) -> Result<(), StepError> {
        let name = &each.workload;
        if present.at("/spec/paused") == &Value::Bool(true) {
            return Err(StepError::permanent(format!("{name} is paused: nothing would be rolled out"))
                .with_hint(format!("`kubectl rollout resume {name}`, once you know why it was paused")));
        }
        if present.text("/spec/updateStrategy/type") == "OnDelete" {
            return Err(StepError::permanent(format!("{name} has the update strategy OnDelete: nobody rolls it out"))
                .with_hint("set its update strategy to RollingUpdate"));
        }
        if cx.on_conflict() == OnConflict::Stop
            && let Some(manager) = owner(present, &each.template())
        {
            return Err(StepError::permanent(format!(
                "{name}: {manager} applies the fields that would change, and would put them back"
            ))
            .with_hint("make the change where it comes from, or say `on_conflict: overwrite` on the step"));
        }
        if each.replicas.is_some()
            && let Some(scaler) = autoscaler::of(server, &self.namespace, name).await?
        {
            return Err(StepError::permanent(format!(
                "{name}: the number of its pods belongs to HorizontalPodAutoscaler {scaler}"
            ))
            .with_hint("leave `replicas` out, or change the autoscaler's limits"));
        }
        Ok(())
    }
}

/// Returns the template that is asked for.
pub(super) fn changed(
    asked: &WorkloadConfig,
    name: &ObjectName,
    base: Option<&Value>,
    present: &Object,
) -> Result<Value, StepError> {
    asked
        .template()
        .applied_to(base.unwrap_or_else(|| present.at("/spec/template")))
        .map_err(|error| StepError::permanent(format!("{name}: {error}")).with_hint("correct the container's name"))
}

/// The parts of a workload that the step writes.
pub(super) fn parts(template: &Value, replicas: Option<u32>) -> Vec<(String, Option<Value>)> {
    let mut parts = vec![("/spec/template".to_owned(), Some(template.clone()))];
    parts.extend(replicas.map(|replicas| ("/spec/replicas".to_owned(), Some(json!(replicas)))));
    parts
}

fn state(object: &Object, each: &WorkloadConfig) -> State {
    let replicas = each.replicas.map(|_| object.at("/spec/replicas").as_u64().unwrap_or(1));
    State { template: digest(object.at("/spec/template")), replicas }
}

fn shown(replicas: Option<u64>) -> String {
    replicas.map_or_else(String::new, |replicas| replicas.to_string())
}

pub(in crate::steps) fn images_of(object: &Object) -> BTreeMap<String, String> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    object.list("/spec/template/spec/containers").map(|each| (text(&each["name"]), text(&each["image"]))).collect()
}

/// Tells who applies a field that would change: a controller that applies its own idea of the object again
/// and again. Whoever only updated it once does not.
fn owner(object: &Object, changes: &crate::workload::template::TemplateChanges) -> Option<String> {
    let others = object
        .list("/metadata/managedFields")
        .filter(|each| each["operation"] == "Apply" && each["manager"] != crate::server::FIELD_MANAGER);
    others.into_iter().find_map(|each| {
        let containers = &each["fieldsV1"]["f:spec"]["f:template"]["f:spec"]["f:containers"];
        let owned = containers.as_object()?.iter().any(|(key, fields)| {
            let name = key.strip_prefix("k:").and_then(|key| serde_json::from_str::<Value>(key).ok());
            let name = name.and_then(|name| name["name"].as_str().map(str::to_owned)).unwrap_or_default();
            let image = changes.images.contains_key(&name) || changes.images.contains_key("*");
            let variables = changes.env.get(&name);
            let env = variables.is_some_and(|variables| {
                variables.keys().any(|variable| fields["f:env"].get(format!("k:{{\"name\":\"{variable}\"}}")).is_some())
            });
            (image && fields.get("f:image").is_some()) || env
        });
        owned.then(|| each["manager"].as_str().unwrap_or_default().to_owned())
    })
}

impl WorkloadUndo {
    /// Tells whether a workload is in a state.
    pub(super) fn is(&self, object: &Object, state: &State) -> bool {
        digest(object.at("/spec/template")) == state.template
            && state.replicas.is_none_or(|replicas| object.at("/spec/replicas").as_u64().unwrap_or(1) == replicas)
    }

    /// Tells whether the newest pods of a broken rollout must be removed by hand: a StatefulSet waits for a
    /// pod that never becomes ready before it replaces it
    /// (<https://kubernetes.io/docs/concepts/workloads/controllers/statefulset/#forced-rollback>).
    pub(super) fn waits_for_broken_pods(&self) -> bool {
        self.workload.kind == WorkloadKind::StatefulSet
    }
}
