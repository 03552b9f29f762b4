//! Where pods find room: nodes with what is free on them, and what a namespace's quotas leave.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use upgrade_core::error::CheckError;

use super::demand::{Demand, add, amounts, requests_of_pod};
use crate::object::Object;
use crate::quantity::{Amounts, Quantity};

/// How many nodes a message names.
const NAMED: usize = 3;

/// Holds what is free on a node.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Node {
    pub(super) name: String,
    labels: BTreeMap<String, String>,
    /// The taints that keep pods away: by key, value and effect.
    taints: Vec<(String, String, String)>,
    allocatable: Amounts,
    pub(super) free: Amounts,
}

/// Reads nodes, and takes from each what the pods that are bound to it ask for.
pub(super) fn nodes(nodes: &[Object], pods: &[Object]) -> Result<Vec<Node>, CheckError> {
    let mut used: BTreeMap<&str, Amounts> = BTreeMap::new();
    for pod in pods {
        // What has ended asks for nothing any more.
        if !matches!(pod.text("/status/phase"), "Succeeded" | "Failed") {
            add(used.entry(pod.text("/spec/nodeName")).or_default(), &requests_of_pod(pod.at("/spec"), &[])?);
        }
    }
    nodes.iter().map(|node| read(node, used.get(node.name()))).collect()
}

fn read(object: &Object, used: Option<&Amounts>) -> Result<Node, CheckError> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let labels = object.at("/metadata/labels").as_object().into_iter().flatten();
    let mut taints: Vec<_> = object
        .list("/spec/taints")
        .map(|taint| (text(&taint["key"]), text(&taint["value"]), text(&taint["effect"])))
        .filter(|(_, _, effect)| effect != "PreferNoSchedule")
        .collect();
    let cordon = "node.kubernetes.io/unschedulable";
    if object.at("/spec/unschedulable") == true && taints.iter().all(|(key, ..)| key != cordon) {
        taints.push((cordon.into(), String::new(), "NoSchedule".into()));
    }
    let allocatable = amounts(object.at("/status/allocatable"))?;
    let mut free = allocatable.clone();
    for (resource, amount) in used.into_iter().flatten() {
        let left = free.entry(resource.clone()).or_default();
        *left = *left - *amount;
    }
    Ok(Node {
        name: object.name().to_owned(),
        labels: labels.map(|(key, value)| (key.clone(), text(value))).collect(),
        taints,
        allocatable,
        free,
    })
}

impl Node {
    /// Tells why pods may not run here, whatever is free.
    fn refuses(&self, demand: &Demand) -> Option<Refusal> {
        if demand.on.as_ref().is_some_and(|names| !names.contains(&self.name)) {
            return Some(Refusal::NotMeant);
        }
        let lacks = |(key, value): (&String, &String)| self.labels.get(key) != Some(value);
        if demand.selector.iter().any(lacks) {
            return Some(Refusal::Label);
        }
        // The controller of a DaemonSet gives its pods the tolerations that they need on their nodes.
        let taint = self.taints.iter().find(|taint| !demand.tolerations.iter().any(|each| tolerates(each, taint)));
        taint.filter(|_| demand.on.is_none()).map(|(key, ..)| Refusal::Taint(format!("{} ({key})", self.name)))
    }

    fn has_room(&self, requests: &Amounts) -> bool {
        requests.iter().all(|(resource, amount)| self.left(resource) >= *amount)
    }

    fn left(&self, resource: &str) -> Quantity {
        self.free.get(resource).copied().unwrap_or_default()
    }

    /// Rates how much would be left of what is then scarcest, as a share of all there is.
    fn rest(&self, requests: &Amounts) -> f64 {
        let share = |(resource, amount): (&String, &Quantity)| {
            let all = self.allocatable.get(resource).copied().unwrap_or_default().as_f64();
            (self.left(resource) - *amount).as_f64() / all.max(f64::MIN_POSITIVE)
        };
        requests.iter().map(share).fold(f64::INFINITY, f64::min)
    }

    fn take(&mut self, requests: &Amounts) {
        for (resource, amount) in requests {
            let left = self.free.entry(resource.clone()).or_default();
            *left = *left - *amount;
        }
    }
}

enum Refusal {
    NotMeant,
    Label,
    Taint(String),
}

/// Tells whether a toleration is one of a taint
/// (<https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/>).
fn tolerates(toleration: &Value, (key, value, effect): &(String, String, String)) -> bool {
    let text = |field: &str| toleration[field].as_str().unwrap_or_default();
    let is_any = text("key").is_empty() && text("operator") == "Exists";
    let is_meant = text("operator") == "Exists" || text("value") == value;
    (text("effect").is_empty() || text("effect") == effect) && (is_any || text("key") == key && is_meant)
}

/// Returns the nodes that pods of some demand may run on.
pub(super) fn open<'a>(nodes: &'a [Node], demands: &[Demand]) -> impl Iterator<Item = &'a Node> {
    nodes.iter().filter(move |node| demands.iter().any(|demand| node.refuses(demand).is_none()))
}

/// Puts pods on nodes one after another, as the scheduler does: each where most is left. Says what finds no room.
pub(super) fn place(demands: &[Demand], nodes: &mut [Node]) -> Vec<String> {
    let mut faults = Vec::new();
    // What may run on one node alone goes before what can go elsewhere.
    let (bound, free): (Vec<_>, Vec<_>) = demands.iter().partition(|demand| demand.on.is_some());
    for demand in bound {
        let mut full = Vec::new();
        for node in nodes.iter_mut().filter(|node| node.refuses(demand).is_none()) {
            if node.has_room(&demand.requests) {
                node.take(&demand.requests);
            } else {
                full.push(&*node);
            }
        }
        if !full.is_empty() {
            let names = named(full.iter().map(|node| node.name.clone()));
            faults.push(format!("{}: no room for one more pod on {names}: {}", demand.who, lacking(demand, &full)));
        }
    }
    for demand in free {
        let mut placed = 0;
        while placed < demand.pods {
            let able =
                nodes.iter_mut().filter(|node| node.refuses(demand).is_none() && node.has_room(&demand.requests));
            let best = able.max_by(|a, b| a.rest(&demand.requests).total_cmp(&b.rest(&demand.requests)));
            let Some(node) = best else { break };
            node.take(&demand.requests);
            placed += 1;
        }
        if placed < demand.pods {
            faults.push(short(demand, demand.pods - placed, nodes));
        }
    }
    faults
}

/// Says why pods find no room, and how much is lacking.
fn short(demand: &Demand, left: u64, nodes: &[Node]) -> String {
    let (mut tainted, mut unlabelled, mut able) = (Vec::new(), 0, Vec::new());
    for node in nodes {
        match node.refuses(demand) {
            Some(Refusal::Taint(name)) => tainted.push(name),
            Some(Refusal::Label) => unlabelled += 1,
            Some(Refusal::NotMeant) => {}
            None => able.push(node),
        }
    }
    let mut why = Vec::new();
    if !able.is_empty() {
        why.push(lacking(demand, &able));
    }
    if !tainted.is_empty() {
        why.push(format!("not tolerated: {}", named(tainted.into_iter())));
    }
    if unlabelled > 0 {
        let labels: Vec<_> = demand.selector.iter().map(|(key, value)| format!("{key}={value}")).collect();
        why.push(format!("{unlabelled} nodes without {}", labels.join(",")));
    }
    if why.is_empty() {
        why.push("there are no nodes".into());
    }
    let of = if left == demand.pods { String::new() } else { format!(" of {}", demand.pods) };
    format!("{}: no room for {left}{of} more pods: {}", demand.who, why.join("; "))
}

/// Says of what too little is free on each of some nodes.
fn lacking(demand: &Demand, nodes: &[&Node]) -> String {
    let lacks = demand.requests.iter().filter_map(|(resource, amount)| {
        let free = nodes.iter().map(|node| node.left(resource)).max().unwrap_or_default();
        (free < *amount).then(|| {
            format!(
                "{resource}: {} a pod, {} is the most that a node has free, {} too little",
                amount.of(resource),
                free.of(resource),
                (*amount - free).of(resource)
            )
        })
    });
    let lacks: Vec<_> = lacks.collect();
    if !lacks.is_empty() {
        return lacks.join(", ");
    }
    let all: Vec<_> =
        demand.requests.iter().map(|(resource, amount)| format!("{} {resource}", amount.of(resource))).collect();
    format!("no node has {} free at once", all.join(", "))
}

fn named(names: impl Iterator<Item = String>) -> String {
    let all: Vec<_> = names.collect();
    let more = all.len().saturating_sub(NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", all[..all.len().min(NAMED)].join(", "))
}

/// Says what quotas leave too little of; adds to `unseen` those whose scope is not looked at.
pub(super) fn quotas(
    demands: &[Demand],
    quotas: &[Object],
    unseen: &mut BTreeSet<String>,
) -> Result<Vec<String>, CheckError> {
    let mut faults = Vec::new();
    for quota in quotas {
        let (hard, used) = (amounts(quota.at("/status/hard"))?, amounts(quota.at("/status/used"))?);
        if !quota.at("/spec/scopeSelector").is_null() {
            unseen.insert(format!("the quota {} with its scopeSelector", quota.name()));
            continue;
        }
        let scopes: Vec<_> = quota.list("/spec/scopes").filter_map(Value::as_str).collect();
        let counts = |demand: &&Demand| {
            scopes.iter().all(|scope| match *scope {
                "BestEffort" => demand.is_best_effort(),
                "NotBestEffort" => !demand.is_best_effort(),
                "NotTerminating" => true,
                // Pods that shall end by themselves are not those of a workload that goes on.
                _ => false,
            })
        };
        let counted: Vec<_> = demands.iter().filter(counts).collect();
        for (key, most) in &hard {
            let (limits, resource) = match key.split_once('.') {
                Some(("requests", resource)) => (false, resource),
                Some(("limits", resource)) => (true, resource),
                _ => (false, key.strip_prefix("count/").unwrap_or(key)),
            };
            let of = |demand: &&Demand| {
                let amounts = if limits { &demand.limits } else { &demand.requests };
                amounts.get(resource).copied().unwrap_or_default() * demand.pods
            };
            let needed: Quantity = counted.iter().map(of).sum();
            let left = *most - used.get(key).copied().unwrap_or_default();
            if needed > Quantity::default() && needed > left {
                faults.push(format!(
                    "the quota {} leaves {} of {key}, {} more is needed, {} too little",
                    quota.name(),
                    left.of(resource),
                    needed.of(resource),
                    (needed - left).of(resource)
                ));
            }
        }
    }
    Ok(faults)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn node(name: &str, cpu: &str, more: Value) -> Object {
        let mut spec = json!({ "metadata": { "name": name, "labels": { "disk": "ssd" } },
            "status": { "allocatable": { "cpu": cpu, "memory": "1Gi", "pods": "3" } } });
        spec["spec"] = more;
        Object(spec)
    }

    fn pod(on: &str, cpu: &str, phase: &str) -> Object {
        Object(json!({ "spec": { "nodeName": on, "containers": [{ "resources": { "requests": { "cpu": cpu } } }] },
            "status": { "phase": phase } }))
    }

    fn demand(pods: u64, cpu: &str) -> Demand {
        Demand::of(pods, Amounts::from([("cpu".to_owned(), cpu.parse().unwrap())]))
    }

    #[test]
    fn pods_go_where_most_is_left_until_nothing_is() {
        let objects = [node("a", "1", Value::Null), node("b", "2", Value::Null)];
        let pods = [pod("a", "500m", "Running"), pod("b", "9", "Succeeded"), pod("", "9", "Pending")];
        let fresh = || nodes(&objects, &pods).unwrap();
        assert_eq!(fresh().iter().map(|node| node.left("cpu").to_string()).collect::<Vec<_>>(), ["0.5", "2"]);
        assert_eq!(place(&[demand(4, "500m")], &mut fresh()), [] as [&str; 0]);
        // The larger node has processors left, and no place for a fourth pod.
        let said = place(&[demand(6, "500m")], &mut fresh());
        assert_eq!(said, ["pods: no room for 2 of 6 more pods: no node has 0.5 cpu, 1 pods free at once"]);
        let said = place(&[demand(2, "1500m")], &mut fresh());
        assert!(said[0].ends_with("cpu: 1.5 a pod, 0.5 is the most that a node has free, 1 too little"), "{said:?}");
    }

    #[test]
    fn what_a_node_keeps_away_stays_away() {
        let taint = json!({ "taints": [{ "key": "gpu", "value": "yes", "effect": "NoSchedule" }, { "key": "soft", "effect": "PreferNoSchedule" }] });
        let objects = [node("a", "4", taint), node("b", "4", json!({ "unschedulable": true }))];
        let fresh = || nodes(&objects, &[]).unwrap();
        let said = place(&[demand(1, "1")], &mut fresh());
        assert!(said[0].contains("not tolerated: a (gpu), b (node.kubernetes.io/unschedulable)"), "{said:?}");
        for (toleration, is_enough) in [
            (json!({ "operator": "Exists" }), true),
            (json!({ "key": "gpu", "operator": "Exists" }), true),
            (json!({ "key": "gpu", "value": "yes" }), true),
            (json!({ "key": "gpu", "value": "yes", "effect": "NoSchedule" }), true),
            (json!({ "key": "gpu", "value": "no" }), false),
            (json!({ "key": "gpu", "value": "yes", "effect": "NoExecute" }), false),
            (json!({ "key": "other", "operator": "Exists" }), false),
        ] {
            let tolerant = Demand { tolerations: vec![toleration.clone()], ..demand(1, "1") };
            assert_eq!(place(&[tolerant], &mut fresh()).is_empty(), is_enough, "{toleration}");
        }
        let picky = Demand { selector: [("disk".to_owned(), "tape".to_owned())].into(), ..demand(1, "1") };
        assert!(place(&[picky], &mut fresh())[0].contains("2 nodes without disk=tape"));
        let daemon = Demand { on: Some(vec!["b".into()]), ..demand(1, "5") };
        let said = place(&[daemon], &mut fresh());
        assert!(said[0].contains("on b: cpu: 5 a pod, 4 is the most that a node has free, 1 too little"), "{said:?}");
    }

    #[test]
    fn quotas_count_what_their_scope_holds() {
        let quota = |hard: Value, used: Value, spec: Value| {
            Object(json!({ "metadata": { "name": "q" }, "spec": spec, "status": { "hard": hard, "used": used } }))
        };
        let ask = |of: Object| {
            let mut unseen = BTreeSet::new();
            (quotas(&[demand(2, "500m")], &[of], &mut unseen).unwrap(), unseen.len())
        };
        let (faults, _) =
            ask(quota(json!({ "requests.cpu": "4", "pods": "9" }), json!({ "requests.cpu": "3500m" }), json!({})));
        assert_eq!(faults, ["the quota q leaves 0.5 of requests.cpu, 1 more is needed, 0.5 too little"]);
        assert_eq!(
            ask(quota(json!({ "cpu": "1", "limits.cpu": "0", "count/pods": "2" }), json!({}), json!({}))).0.len(),
            0
        );
        let (faults, _) = ask(quota(json!({ "pods": "1" }), json!({}), json!({ "scopes": ["NotBestEffort"] })));
        assert_eq!(faults, ["the quota q leaves 1 of pods, 2 more is needed, 1 too little"]);
        assert_eq!(ask(quota(json!({ "pods": "1" }), json!({}), json!({ "scopes": ["BestEffort"] }))).0.len(), 0);
        assert_eq!(ask(quota(json!({ "pods": "1" }), json!({}), json!({ "scopeSelector": {} }))), (vec![], 1));
    }
}
