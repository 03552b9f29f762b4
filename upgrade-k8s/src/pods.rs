//! What pods say: their events and the last lines of their logs, for whoever must mend them.

use serde_json::Value;

use crate::kind::Kind;
use crate::object::Object;
use crate::server::ApiServer;

/// How many lines of a log, and how many events, are worth reading at three in the morning.
const LINES: usize = 10;

/// Returns what the cluster told of a pod last, a line each; nothing where it cannot be asked.
pub(crate) async fn events(server: &ApiServer, namespace: &str, pod: &str) -> Vec<String> {
    let fields = format!("involvedObject.name={pod},type=Warning");
    let Ok((mut events, _)) = server.list(&Kind::event(), Some(namespace), "", &fields).await else {
        return Vec::new();
    };
    events.sort_by(|a, b| when(a).cmp(when(b)));
    let lines =
        events.iter().map(|event| format!("event {}: {}", event.text("/reason"), event.text("/message").trim()));
    let lines: Vec<_> = lines.collect();
    lines[lines.len().saturating_sub(LINES)..].to_vec()
}

/// Tells whether an autoscaler of nodes has said that it makes room for a pod; false where the cluster cannot
/// be asked.
///
/// The reason is that of Kubernetes' cluster autoscaler (`TriggeredScaleUp`) and of Karpenter (`Nominated`).
pub(crate) async fn is_room_promised(server: &ApiServer, namespace: &str, pod: &str) -> bool {
    let fields = format!("involvedObject.name={pod}");
    let Ok((events, _)) = server.list(&Kind::event(), Some(namespace), "", &fields).await else { return false };
    events.iter().any(|event| matches!(event.text("/reason"), "TriggeredScaleUp" | "Nominated"))
}

fn when(event: &Object) -> &str {
    ["/lastTimestamp", "/eventTime", "/metadata/creationTimestamp"]
        .iter()
        .find_map(|field| event.at(field).as_str())
        .unwrap_or_default()
}

/// Returns the last lines of a container's log, of the one that ended before with `previous`; nothing where
/// its node cannot be asked.
pub(crate) async fn last_lines(
    server: &ApiServer,
    namespace: &str,
    pod: &str,
    container: Option<&str>,
    previous: bool,
) -> Vec<String> {
    let path = format!("{}/{pod}/log", Kind::pod().path(Some(namespace)));
    let lines = LINES.to_string();
    let mut query = vec![("tailLines", lines.as_str())];
    query.extend(container.map(|container| ("container", container)));
    if previous {
        query.push(("previous", "true"));
    }
    let text = server.get_text(&path, &query, || format!("reading the log of pod {pod}")).await.unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// Joins the labels of a selector; none where it is more than labels, which a list cannot ask for so.
pub(crate) fn selector(match_labels: &Value, expressions: &Value) -> Option<String> {
    if expressions.as_array().is_some_and(|each| !each.is_empty()) {
        return None;
    }
    let labels = match_labels.as_object()?;
    let each = labels.iter().map(|(name, value)| format!("{name}={}", value.as_str().unwrap_or_default()));
    Some(each.collect::<Vec<_>>().join(","))
}

/// Writes a selector as a list takes it: its labels, and its expressions.
pub(crate) fn label_selector(selector: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let labels = selector["matchLabels"].as_object().into_iter().flatten();
    let mut parts: Vec<_> = labels.map(|(name, value)| format!("{name}={}", text(value))).collect();
    for each in selector["matchExpressions"].as_array().into_iter().flatten() {
        let key = text(&each["key"]);
        let values: Vec<_> = each["values"].as_array().into_iter().flatten().map(text).collect();
        parts.push(match each["operator"].as_str() {
            Some("In") => format!("{key} in ({})", values.join(",")),
            Some("NotIn") => format!("{key} notin ({})", values.join(",")),
            Some("DoesNotExist") => format!("!{key}"),
            _ => key,
        });
    }
    parts.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn selectors_are_written_as_lists_take_them() {
        let written = label_selector(&json!({ "matchLabels": { "app": "web" }, "matchExpressions": [
            { "key": "tier", "operator": "In", "values": ["a", "b"] },
            { "key": "old", "operator": "DoesNotExist" },
        ] }));
        assert_eq!(written, "app=web,tier in (a,b),!old");
    }
}
