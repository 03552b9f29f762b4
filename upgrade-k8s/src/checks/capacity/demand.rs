//! What an upgrade adds: how many pods of a workload, and what each of them asks for.

use std::collections::BTreeMap;

use serde_json::Value;
use upgrade_core::error::CheckError;

use crate::object::Object;
use crate::quantity::{Amounts, Quantity};
use crate::workload::WorkloadKind;

/// Holds pods of one make that must find room.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Demand {
    /// Whose pods they are.
    pub(super) who: String,
    pub(super) pods: u64,
    /// What each asks for; one pod of a node's count is among it.
    pub(super) requests: Amounts,
    /// What each is limited to.
    pub(super) limits: Amounts,
    /// The labels that a node must have.
    pub(super) selector: BTreeMap<String, String>,
    pub(super) tolerations: Vec<Value>,
    /// Each of these nodes gets one, and no other node.
    pub(super) on: Option<Vec<String>>,
    /// What else decides where they may run, and is not looked at.
    pub(super) unseen: Vec<&'static str>,
}

impl Demand {
    /// Names so many pods that ask for `requests` each, and tolerate nothing.
    pub(super) fn of(pods: u64, mut requests: Amounts) -> Self {
        requests.insert("pods".into(), Quantity::whole(1));
        Self { who: "pods".into(), pods, requests, ..Self::default() }
    }

    /// Reads what pods of a template ask for.
    pub(super) fn read(who: String, pods: u64, template: &Value, ranges: &[Object]) -> Result<Self, CheckError> {
        let spec = &template["spec"];
        let (requests, limits) = (requests_of_pod(spec, ranges)?, limits_of_pod(spec, ranges)?);
        let text = |(key, value): (&String, &Value)| Some((key.clone(), value.as_str()?.to_owned()));
        let selector = spec["nodeSelector"].as_object().into_iter().flatten().filter_map(text).collect();
        let tolerations = spec["tolerations"].as_array().cloned().unwrap_or_default();
        Ok(Self { who, pods, requests, limits, selector, tolerations, on: None, unseen: unseen(spec) })
    }

    /// Tells whether the pods ask for nothing and are limited in nothing, as a quota's scope says it.
    pub(super) fn is_best_effort(&self) -> bool {
        let is_counted = |amounts: &Amounts| amounts.contains_key("cpu") || amounts.contains_key("memory");
        !is_counted(&self.requests) && !is_counted(&self.limits)
    }
}

/// Counts the pods that a rollout of a workload runs above those that it has.
///
/// As its controller counts: a share is rounded up, and never are there more new pods than wanted ones
/// (<https://kubernetes.io/docs/concepts/workloads/controllers/deployment/#max-surge>). A StatefulSet ends each pod
/// before it starts the next.
pub(super) fn surge(kind: WorkloadKind, object: &Object) -> u64 {
    let (strategy, most, default) = match kind {
        WorkloadKind::ReplicaSet | WorkloadKind::StatefulSet => return 0,
        WorkloadKind::Deployment => ("/spec/strategy", object.at("/spec/replicas").as_u64().unwrap_or(1), "25%"),
        WorkloadKind::DaemonSet => {
            let wanted = object.number("/status/desiredNumberScheduled");
            ("/spec/updateStrategy", u64::try_from(wanted).unwrap_or_default(), "0")
        }
    };
    let kind = object.text(&format!("{strategy}/type"));
    if !matches!(kind, "" | "RollingUpdate") {
        return 0;
    }
    let surge = match object.at(&format!("{strategy}/rollingUpdate/maxSurge")) {
        Value::Number(number) => number.as_u64().unwrap_or_default(),
        Value::String(share) => part_of(most, share),
        _ => part_of(most, default),
    };
    surge.min(most)
}

/// Returns a share such as `25%` of a number, rounded up; or the number that the text is.
fn part_of(whole: u64, text: &str) -> u64 {
    match text.strip_suffix('%') {
        Some(percent) => (whole * percent.parse::<u64>().unwrap_or_default()).div_ceil(100),
        None => text.parse().unwrap_or_default(),
    }
}

/// Adds up what the containers of a pod come to, as the scheduler does.
///
/// Containers run together; those that initialise run one after another before them, and those of them that go on
/// beside the rest
/// (<https://kubernetes.io/docs/concepts/workloads/pods/sidecar-containers/#resource-sharing-within-containers>).
fn pod_total(spec: &Value, of: impl Fn(&Value) -> Result<Amounts, CheckError>) -> Result<Amounts, CheckError> {
    let (mut beside, mut before) = (Amounts::new(), Amounts::new());
    for container in spec["initContainers"].as_array().into_iter().flatten() {
        let own = of(container)?;
        let mut now = beside.clone();
        add(&mut now, &own);
        if container["restartPolicy"] == "Always" {
            beside = now.clone();
        }
        most(&mut before, &now);
    }
    let mut total = beside;
    for container in spec["containers"].as_array().into_iter().flatten() {
        add(&mut total, &of(container)?);
    }
    most(&mut total, &before);
    Ok(total)
}

/// Adds up what a pod asks for, by its `spec`.
pub(super) fn requests_of_pod(spec: &Value, ranges: &[Object]) -> Result<Amounts, CheckError> {
    let mut total = pod_total(spec, |container| requested(container, ranges))?;
    // What a pod says of itself as a whole goes before what its containers add up to.
    total.extend(amounts(&spec["resources"]["requests"])?);
    add(&mut total, &amounts(&spec["overhead"])?);
    total.insert("pods".into(), Quantity::whole(1));
    Ok(total)
}

fn limits_of_pod(spec: &Value, ranges: &[Object]) -> Result<Amounts, CheckError> {
    let mut total = pod_total(spec, |container| limited(container, ranges))?;
    total.extend(amounts(&spec["resources"]["limits"])?);
    for (resource, overhead) in amounts(&spec["overhead"])? {
        // What has no limit gets none by its overhead.
        total.entry(resource).and_modify(|limit| *limit = *limit + overhead);
    }
    Ok(total)
}

/// What a container asks for is what it says, or what it is limited to, or what its namespace gives it.
fn requested(container: &Value, ranges: &[Object]) -> Result<Amounts, CheckError> {
    let mut all = given(ranges, "defaultRequest")?;
    all.extend(amounts(&container["resources"]["limits"])?);
    all.extend(amounts(&container["resources"]["requests"])?);
    Ok(all)
}

fn limited(container: &Value, ranges: &[Object]) -> Result<Amounts, CheckError> {
    let mut all = given(ranges, "default")?;
    all.extend(amounts(&container["resources"]["limits"])?);
    Ok(all)
}

/// Returns what LimitRanges give containers that say nothing.
fn given(ranges: &[Object], key: &str) -> Result<Amounts, CheckError> {
    let mut all = Amounts::new();
    for limit in ranges.iter().flat_map(|range| range.list("/spec/limits")).filter(|limit| limit["type"] == "Container")
    {
        all.extend(amounts(&limit[key])?);
    }
    Ok(all)
}

/// Reads amounts as objects hold them.
pub(super) fn amounts(of: &Value) -> Result<Amounts, CheckError> {
    let mut all = Amounts::new();
    for (resource, value) in of.as_object().into_iter().flatten() {
        let amount = serde_json::from_value(value.clone()).map_err(|error| {
            CheckError::permanent(format!("the cluster gave an amount of {resource} that cannot be read"))
                .with_cause(&error)
        })?;
        all.insert(resource.clone(), amount);
    }
    Ok(all)
}

pub(super) fn add(to: &mut Amounts, other: &Amounts) {
    for (resource, amount) in other {
        let sum = to.entry(resource.clone()).or_default();
        *sum = *sum + *amount;
    }
}

fn most(of: &mut Amounts, other: &Amounts) {
    for (resource, amount) in other {
        let larger = of.entry(resource.clone()).or_default();
        *larger = (*larger).max(*amount);
    }
}

/// Names what decides where a pod may run, beside requests, taints and `nodeSelector`.
fn unseen(spec: &Value) -> Vec<&'static str> {
    const REQUIRED: &str = "requiredDuringSchedulingIgnoredDuringExecution";
    let affinity = |kind: &str| !spec["affinity"][kind][REQUIRED].is_null();
    let list = |key: &str| spec[key].as_array().into_iter().flatten();
    let ports = list("containers").flat_map(|container| container["ports"].as_array().into_iter().flatten());
    let all = [
        ("node affinity", affinity("nodeAffinity")),
        ("pod affinity", affinity("podAffinity")),
        ("pod anti-affinity", affinity("podAntiAffinity")),
        (
            "spread over the topology",
            list("topologySpreadConstraints").any(|each| each["whenUnsatisfiable"] == "DoNotSchedule"),
        ),
        ("ports of the host", ports.into_iter().any(|port| port["hostPort"].as_u64().is_some_and(|port| port > 0))),
        ("volume claims", list("volumes").any(|volume| !volume["persistentVolumeClaim"].is_null())),
        ("devices", list("resourceClaims").next().is_some()),
    ];
    all.into_iter().filter(|(_, is_so)| *is_so).map(|(what, _)| what).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn shown(amounts: &Amounts) -> String {
        amounts.iter().map(|(name, amount)| format!("{name} {}", amount.of(name))).collect::<Vec<_>>().join(", ")
    }

    #[test]
    fn a_surge_is_counted_as_the_controller_counts_it() {
        let of = |replicas: u64, strategy: Value| {
            surge(WorkloadKind::Deployment, &Object(json!({ "spec": { "replicas": replicas, "strategy": strategy } })))
        };
        let rolling = |surge: Value| json!({ "type": "RollingUpdate", "rollingUpdate": { "maxSurge": surge } });
        assert_eq!(of(10, rolling(json!("25%"))), 3, "rounded up");
        assert_eq!(of(10, rolling(json!(2))), 2);
        assert_eq!(of(1, rolling(json!(5))), 1, "no more new pods than wanted ones");
        assert_eq!(of(0, rolling(json!(1))), 0);
        assert_eq!(of(4, rolling(json!(0))), 0);
        assert_eq!(of(4, json!({})), 1, "a quarter where nothing is said");
        assert_eq!(of(4, json!({ "type": "Recreate" })), 0);
        assert_eq!(surge(WorkloadKind::StatefulSet, &Object(json!({ "spec": { "replicas": 9 } }))), 0);
        let daemon = |strategy: Value| {
            let status = json!({ "desiredNumberScheduled": 5 });
            surge(WorkloadKind::DaemonSet, &Object(json!({ "spec": { "updateStrategy": strategy }, "status": status })))
        };
        assert_eq!(daemon(json!({ "type": "RollingUpdate", "rollingUpdate": { "maxUnavailable": 1 } })), 0);
        assert_eq!(daemon(rolling(json!("30%"))), 2);
        assert_eq!(daemon(json!({ "type": "OnDelete" })), 0);
    }

    #[test]
    fn containers_that_initialise_count_where_they_ask_for_more() {
        let container = |cpu: &str, more: Value| {
            let mut all = json!({ "resources": { "requests": { "cpu": cpu } } });
            all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            all
        };
        let plain = |cpu: &str| container(cpu, json!({}));
        let total = |spec: Value| shown(&Demand::read("w".into(), 1, &json!({ "spec": spec }), &[]).unwrap().requests);
        assert_eq!(total(json!({ "containers": [plain("100m"), plain("200m")] })), "cpu 0.3, pods 1");
        assert_eq!(
            total(json!({ "containers": [plain("100m")], "initContainers": [plain("1"), plain("2")] })),
            "cpu 2, pods 1"
        );
        let sidecar = container("500m", json!({ "restartPolicy": "Always" }));
        assert_eq!(
            total(json!({ "containers": [plain("1")], "initContainers": [sidecar, plain("2")],
                "overhead": { "cpu": "50m" } })),
            "cpu 2.55, pods 1"
        );
    }

    #[test]
    fn what_is_not_asked_for_is_taken_from_the_limit_and_from_the_namespace() {
        let ranges = [Object(json!({ "spec": { "limits": [
            { "type": "Container", "default": { "memory": "1Gi" }, "defaultRequest": { "memory": "64Mi", "cpu": "10m" } },
            { "type": "Pod", "max": { "cpu": "9" } },
        ] } }))];
        let spec = json!({ "containers": [{ "resources": { "limits": { "cpu": "2" } } }, {}] });
        let demand = Demand::read("w".into(), 1, &json!({ "spec": spec }), &ranges).unwrap();
        assert_eq!(shown(&demand.requests), "cpu 2.01, memory 128Mi, pods 1");
        assert_eq!(shown(&demand.limits), "cpu 2, memory 2Gi");
        assert!(!demand.is_best_effort() && Demand::of(1, Amounts::new()).is_best_effort());
    }

    #[test]
    fn what_is_not_looked_at_is_named() {
        let spec = json!({
            "affinity": { "podAntiAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": [{}] },
                "nodeAffinity": { "preferredDuringSchedulingIgnoredDuringExecution": [{}] } },
            "topologySpreadConstraints": [{ "whenUnsatisfiable": "ScheduleAnyway" }],
            "containers": [{ "ports": [{ "containerPort": 80 }] }],
        });
        assert_eq!(unseen(&spec), ["pod anti-affinity"]);
    }
}
