//! How two states of an object differ, what of it is ours, and how ours is taken back: pure functions on the
//! cluster's own words.
//!
//! Objects are written to by many: controllers, autoscalers, admission. What a step changed is therefore
//! judged and taken back field by field, and what it did not touch is left to whoever did.

use serde_json::{Map, Value};

/// Returns of `stored` what `asked` states: the server's spelling of what somebody wrote down.
///
/// Lists are matched by the `name` of their members where all have one, else by place.
pub fn project(stored: &Value, asked: &Value) -> Value {
    match (stored, asked) {
        (Value::Object(stored), Value::Object(asked)) => asked
            .keys()
            .filter_map(|key| Some((key.clone(), project(stored.get(key)?, &asked[key]))))
            .collect::<Map<_, _>>()
            .into(),
        (Value::Array(stored), Value::Array(asked)) if is_named(stored) && is_named(asked) => asked
            .iter()
            .filter_map(|each| named(stored, each).map(|stored| project(stored, each)))
            .collect::<Vec<_>>()
            .into(),
        (Value::Array(stored), Value::Array(asked)) if stored.len() == asked.len() => {
            stored.iter().zip(asked).map(|(stored, asked)| project(stored, asked)).collect::<Vec<_>>().into()
        }
        (stored, _) => stored.clone(),
    }
}

/// Tells whether a state holds all of another one; more in it does not matter.
pub fn covers(present: &Value, intended: &Value) -> bool {
    match (present, intended) {
        (Value::Object(present), Value::Object(intended)) => {
            intended.iter().all(|(key, value)| match present.get(key) {
                Some(present) => covers(present, value),
                // The API leaves out what is empty.
                None => is_empty(value),
            })
        }
        (Value::Array(present), Value::Array(intended)) if is_named(present) && is_named(intended) => {
            intended.iter().all(|each| named(present, each).is_some_and(|present| covers(present, each)))
        }
        (Value::Array(present), Value::Array(intended)) => {
            present.len() == intended.len() && present.iter().zip(intended).all(|(a, b)| covers(a, b))
        }
        (present, intended) => present == intended,
    }
}

/// Tells whether nothing is left in a state of what `found` held and `after` no longer does.
///
/// [`covers`] cannot tell: what is to be gone is not stated.
pub fn lacks(present: &Value, found: &Value, after: &Value) -> bool {
    let (Value::Object(present), Value::Object(found), Value::Object(after)) = (present, found, after) else {
        return true;
    };
    let nothing = Value::Object(Map::new());
    found.iter().all(|(key, was)| match (present.get(key), after.get(key)) {
        (None, _) => true,
        (Some(now), Some(became)) => lacks(now, was, became),
        // Others may have put something beside what was taken away.
        (Some(now @ Value::Object(_)), None) if was.is_object() => lacks(now, was, &nothing),
        (Some(_), None) => false,
    })
}

/// Takes back what became of `found` when `after` was made of it: those fields are as they were found,
/// all others as they are.
pub fn revert(present: &Value, found: &Value, after: &Value) -> Value {
    match (present, found, after) {
        (Value::Object(present), Value::Object(found), Value::Object(after)) => {
            let mut reverted = present.clone();
            for key in after.keys().chain(found.keys().filter(|key| !after.contains_key(*key))) {
                let (was, became) = (found.get(key), after.get(key));
                if was == became {
                    continue;
                }
                let nothing = Value::Object(Map::new());
                let back = match (was, reverted.get(key), became) {
                    // Others may have put something beside what is ours.
                    (None, Some(now @ Value::Object(_)), Some(became @ Value::Object(_))) => {
                        Some(revert(now, &nothing, became)).filter(|left| *left != nothing)
                    }
                    (Some(was @ Value::Object(_)), Some(now @ Value::Object(_)), became) => {
                        Some(revert(now, was, became.unwrap_or(&nothing)))
                    }
                    (was, _, _) => was.cloned(),
                };
                match back {
                    Some(back) => drop(reverted.insert(key.clone(), back)),
                    None => drop(reverted.remove(key)),
                }
            }
            reverted.into()
        }
        _ => found.clone(),
    }
}

/// Says in short lines how two states differ. What variables hold may be secret, and is never said; with
/// `is_secret`, no value is.
pub fn differences(before: &Value, after: &Value, is_secret: bool) -> Vec<String> {
    let mut lines = Vec::new();
    walk("", before, after, is_secret, &mut lines);
    lines
}

fn walk(path: &str, before: &Value, after: &Value, is_secret: bool, lines: &mut Vec<String>) {
    if before == after {
        return;
    }
    match (before, after) {
        (Value::Object(old), Value::Object(new)) => {
            for key in old.keys().chain(new.keys().filter(|key| !old.contains_key(*key))) {
                let of = |map: &Map<String, Value>| map.get(key).cloned().unwrap_or_default();
                walk(&format!("{path}.{key}"), &of(old), &of(new), is_secret, lines);
            }
        }
        // Lists of named things are compared by name, so that a new one does not shift the others.
        (Value::Array(old), Value::Array(new)) if is_named(old) && is_named(new) => {
            for each in old.iter().chain(new.iter().filter(|each| named(old, each).is_none())) {
                let of = |list: &[Value]| named(list, each).cloned().unwrap_or_default();
                let path = format!("{path}[{}]", each["name"].as_str().unwrap_or_default());
                walk(&path, &of(old), &of(new), is_secret, lines);
            }
        }
        _ => {
            let path = path.trim_start_matches(['.', '[']);
            if is_secret || path.contains(".env[") {
                lines.push(format!("{path}: changed"));
            } else {
                lines.push(format!("{path}: {} -> {}", short(before), short(after)));
            }
        }
    }
}

fn is_named(list: &[Value]) -> bool {
    list.iter().all(|each| each["name"].is_string())
}

fn named<'a>(list: &'a [Value], like: &Value) -> Option<&'a Value> {
    list.iter().find(|each| each["name"] == like["name"])
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(map) => map.values().all(is_empty),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

/// How much of a value is shown.
const SHOWN: usize = 80;

fn short(value: &Value) -> String {
    let text = match value {
        Value::Null => "none".into(),
        Value::String(text) => text.escape_debug().to_string(),
        other => other.to_string(),
    };
    match text.char_indices().nth(SHOWN) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_others_add_does_not_hide_what_is_ours() {
        let asked = json!({ "spec": { "cpu": "1000m", "containers": [{ "name": "web", "image": "web:2" }] } });
        let stored = json!({ "spec": { "cpu": "1", "replicas": 1,
            "containers": [{ "name": "web", "image": "web:2", "imagePullPolicy": "IfNotPresent" }] } });
        let intended = project(&stored, &asked);
        let expected = json!({ "spec": { "cpu": "1", "containers": [{ "name": "web", "image": "web:2" }] } });
        assert_eq!(intended, expected);
        let mut present = stored;
        present["spec"]["replicas"] = json!(5);
        present["spec"]["containers"].as_array_mut().unwrap().push(json!({ "name": "sidecar", "image": "mesh:1" }));
        assert!(covers(&present, &intended));
        present["spec"]["containers"][0]["image"] = json!("web:3");
        assert!(!covers(&present, &intended));
        assert!(covers(&json!({}), &json!({ "labels": {} })));
    }

    #[test]
    fn what_was_taken_away_and_is_there_again_is_seen() {
        let found = json!({ "data": { "A": "1", "B": "2" }, "annotations": { "x": "1" } });
        let after = json!({ "data": { "A": "1" } });
        assert!(lacks(&after, &found, &after));
        assert!(lacks(&json!({ "data": { "A": "9", "C": "3" }, "annotations": { "y": "1" } }), &found, &after));
        for again in [json!({ "data": { "B": "else" } }), json!({ "annotations": { "x": "1" } }), found.clone()] {
            assert!(!lacks(&again, &found, &after), "{again}");
        }
    }

    #[test]
    fn what_is_taken_back_is_what_was_changed_and_nothing_else() {
        let found = json!({ "data": { "A": "1", "B": "2" }, "spec": { "replicas": 2 } });
        let after = json!({ "data": { "A": "9", "C": "3" }, "spec": { "replicas": 2 }, "labels": { "x": "y" } });
        let mut present = after.clone();
        present["spec"]["replicas"] = json!(7);
        present["data"]["D"] = json!("others");
        let back = revert(&present, &found, &after);
        assert_eq!(back, json!({ "data": { "A": "1", "B": "2", "D": "others" }, "spec": { "replicas": 7 } }));
        assert_eq!(revert(&back, &found, &after), back, "twice is once");
        assert_eq!(revert(&found, &found, &after), found);
        let annotated = json!({ "annotations": { "ours": "1" } });
        let beside = json!({ "annotations": { "ours": "1", "theirs": "2" } });
        assert_eq!(revert(&annotated, &json!({}), &annotated), json!({}));
        assert_eq!(revert(&beside, &json!({}), &annotated), json!({ "annotations": { "theirs": "2" } }));
    }

    #[test]
    fn differences_name_places_and_no_values_of_variables() {
        let before = json!({ "spec": { "containers": [{ "name": "web", "image": "web:1",
            "env": [{ "name": "A", "value": "hidden" }] }] } });
        let mut after = before.clone();
        after["spec"]["containers"][0]["image"] = json!("web:2");
        after["spec"]["containers"][0]["env"][0]["value"] = json!("hidden too");
        let lines = differences(&before, &after, false);
        assert!(lines.iter().any(|line| line == "spec.containers[web].image: web:1 -> web:2"), "{lines:?}");
        assert!(lines.iter().any(|line| line.ends_with("env[A].value: changed")), "{lines:?}");
        assert!(!lines.concat().contains("hidden"), "{lines:?}");
        let secret = differences(&json!({ "data": { "k": "dg==" } }), &json!({ "data": { "k": "dw==" } }), true);
        assert_eq!(secret, ["data.k: changed"]);
        let long = differences(&json!("a"), &json!("é".repeat(200)), false);
        assert!(long[0].chars().count() < 100, "{long:?}");
    }
}
