//! Weights of a route of the Gateway API: pure functions on its `backendRefs`.
//!
//! Source: <https://gateway-api.sigs.k8s.io/reference/spec/#httpbackendref>; a weight that is left out is one,
//! a kind that is left out is Service, and the largest weight is a million.

use serde_json::{Value, json};

use crate::object::Object;

/// Names the kind of route.
pub(super) const HTTP_ROUTES: &str = "httproutes.gateway.networking.k8s.io";

/// The largest weight.
const LARGEST: u64 = 1_000_000;

/// Returns the `backendRefs` of each rule; null where a rule has none.
pub(super) fn backends(route: &Object) -> Vec<Value> {
    route.list("/spec/rules").map(|rule| rule["backendRefs"].clone()).collect()
}

/// Tells whether a backend is a Service of this name in the route's namespace.
fn is_service(backend: &Value, name: &str, namespace: &str) -> bool {
    let or = |key: &str, default: &str| backend[key].as_str().unwrap_or(default) == default;
    backend["name"] == name && or("kind", "Service") && or("group", "") && or("namespace", namespace)
}

/// Names the Services that a route leads to.
pub(super) fn names(backends: &[Value]) -> Vec<&str> {
    let all = backends.iter().flat_map(|list| list.as_array().into_iter().flatten());
    all.filter_map(|backend| backend["name"].as_str()).collect()
}

/// Tells whether a route leads to a Service at all.
pub(super) fn leads_to(backends: &[Value], service: &str, namespace: &str) -> bool {
    let mut all = backends.iter().flat_map(|list| list.as_array().into_iter().flatten());
    all.any(|backend| is_service(backend, service, namespace))
}

/// Tells whether the weights found leave room for shares of a hundred.
pub(super) fn is_divisible(backends: &[Value]) -> bool {
    let mut all = backends.iter().flat_map(|list| list.as_array().into_iter().flatten());
    all.all(|backend| backend["weight"].as_u64().unwrap_or(1).saturating_mul(100) <= LARGEST)
}

/// Returns the `backendRefs` by which so many of a hundred requests that went to a Service go to another one.
///
/// What else a rule leads to keeps its share.
pub(super) fn shared(found: &[Value], stable: &str, canary: &str, namespace: &str, weight: u8) -> Vec<Value> {
    let share = |list: &Vec<Value>| -> Value {
        if !list.iter().any(|backend| is_service(backend, stable, namespace)) {
            return list.clone().into();
        }
        let mut shared = Vec::new();
        for backend in list {
            let whole = backend["weight"].as_u64().unwrap_or(1);
            let with = |parts: u64| {
                let mut backend = backend.clone();
                backend["weight"] = json!(whole * parts);
                backend
            };
            if !is_service(backend, stable, namespace) {
                shared.push(with(100));
                continue;
            }
            shared.push(with(100 - u64::from(weight)));
            let mut other = with(u64::from(weight));
            other["name"] = json!(canary);
            shared.push(other);
        }
        shared.into()
    };
    found.iter().map(|list| list.as_array().map_or(Value::Null, share)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_goes_to_the_canary_and_others_keep_theirs() {
        let found = [
            json!([{ "name": "web", "port": 80 }]),
            json!([{ "name": "web", "port": 80, "weight": 3 }, { "name": "api", "port": 80, "weight": 1 }]),
            json!([{ "name": "api", "port": 80 }]),
            json!([{ "name": "web", "namespace": "else", "port": 80 }]),
            Value::Null,
        ];
        let shared = shared(&found, "web", "web-canary", "shop", 25);
        assert_eq!(
            shared[0],
            json!([{ "name": "web", "port": 80, "weight": 75 }, { "name": "web-canary", "port": 80, "weight": 25 }])
        );
        assert_eq!(
            shared[1],
            json!([
                { "name": "web", "port": 80, "weight": 225 },
                { "name": "web-canary", "port": 80, "weight": 75 },
                { "name": "api", "port": 80, "weight": 100 },
            ])
        );
        assert_eq!(shared[2..], found[2..]);
        assert!(leads_to(&found, "web", "shop") && !leads_to(&found[2..], "web", "shop"));
        assert_eq!(names(&found[..2]), ["web", "web", "api"]);
        assert!(is_divisible(&found) && !is_divisible(&[json!([{ "name": "web", "weight": 20_000 }])]));
    }
}
