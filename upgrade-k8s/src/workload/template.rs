//! Pod templates changed as asked, everything else the same: pure functions on the cluster's own words.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::references::{self, References};

/// Says what changes in a pod template.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TemplateChanges {
    /// New images, by container; `*` means every container that has no line of its own.
    pub images: BTreeMap<String, String>,
    /// Environment variables, by container, then by name; none takes one away.
    pub env: BTreeMap<String, BTreeMap<String, Option<String>>>,
    /// Annotations of the pods; none takes one away.
    pub annotations: BTreeMap<String, Option<String>>,
    /// ConfigMaps and Secrets that are read under another name.
    pub references: References,
}

/// Says why a template cannot be changed so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no container `{container}`; there are: {there}")]
pub struct NoContainer {
    /// The container that is asked for.
    pub container: String,
    /// Those there are.
    pub there: String,
}

impl TemplateChanges {
    /// Tells whether nothing is asked for.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Changes a template.
    ///
    /// # Errors
    /// A container is named that the template does not have.
    pub fn applied_to(&self, template: &Value) -> Result<Value, NoContainer> {
        let mut template = template.clone();
        for name in self.images.keys().chain(self.env.keys()).filter(|name| *name != "*") {
            let all: Vec<_> = containers(&mut template).map(|(_, container)| name_of(container)).collect();
            if !all.contains(name) {
                return Err(NoContainer { container: name.clone(), there: all.join(", ") });
            }
        }
        for (is_init, container) in containers(&mut template) {
            let name = name_of(container);
            let image = self.images.get(&name).or_else(|| self.images.get("*").filter(|_| !is_init));
            if let Some(image) = image {
                container["image"] = json!(image);
            }
            if let Some(variables) = self.env.get(&name) {
                change_env(container, variables);
            }
        }
        if !self.annotations.is_empty() {
            change_annotations(&mut template, &self.annotations);
        }
        references::rename(&mut template, &self.references);
        Ok(template)
    }
}

/// All containers of a template, and whether each runs before the others.
fn containers(template: &mut Value) -> impl Iterator<Item = (bool, &mut Value)> {
    let spec = template.get_mut("spec").and_then(Value::as_object_mut);
    let lists = spec.into_iter().flat_map(|spec| spec.iter_mut());
    lists.filter(|(key, _)| matches!(key.as_str(), "containers" | "initContainers")).flat_map(|(key, list)| {
        let is_init = key == "initContainers";
        list.as_array_mut().into_iter().flatten().map(move |container| (is_init, container))
    })
}

fn name_of(container: &Value) -> String {
    container["name"].as_str().unwrap_or_default().to_owned()
}

/// Changes variables in place: those that refer to others must come after them.
fn change_env(container: &mut Value, variables: &BTreeMap<String, Option<String>>) {
    let mut env = container["env"].as_array().cloned().unwrap_or_default();
    for (name, value) in variables {
        let place = env.iter().position(|each| each["name"] == *name);
        match (place, value) {
            (Some(place), Some(value)) => env[place] = json!({ "name": name, "value": value }),
            (None, Some(value)) => env.push(json!({ "name": name, "value": value })),
            (Some(place), None) => drop(env.remove(place)),
            (None, None) => {}
        }
    }
    if let Some(container) = container.as_object_mut() {
        if env.is_empty() {
            container.remove("env");
        } else {
            container.insert("env".into(), Value::Array(env));
        }
    }
}

fn change_annotations(template: &mut Value, changes: &BTreeMap<String, Option<String>>) {
    let mut annotations = template["metadata"]["annotations"].as_object().cloned().unwrap_or_default();
    for (name, value) in changes {
        match value {
            Some(value) => drop(annotations.insert(name.clone(), json!(value))),
            None => drop(annotations.remove(name)),
        }
    }
    if !template["metadata"].is_object() {
        template["metadata"] = Value::Object(Map::new());
    }
    if let Some(metadata) = template["metadata"].as_object_mut() {
        if annotations.is_empty() {
            metadata.remove("annotations");
        } else {
            metadata.insert("annotations".into(), Value::Object(annotations));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template() -> Value {
        json!({
            "metadata": { "labels": { "app": "web" } },
            "spec": {
                "initContainers": [{ "name": "wait", "image": "wait:1" }],
                "containers": [
                    { "name": "web", "image": "web:1", "env": [{ "name": "A", "value": "1" }, { "name": "B", "value": "$(A)" }] },
                    { "name": "proxy", "image": "proxy:1" },
                ],
            },
        })
    }

    fn changes(text: &str) -> TemplateChanges {
        let asked: Value = serde_json::from_str(text).unwrap();
        let read = |key: &str| asked.get(key).cloned().unwrap_or_else(|| json!({}));
        TemplateChanges {
            images: serde_json::from_value(read("images")).unwrap(),
            env: serde_json::from_value(read("env")).unwrap(),
            annotations: serde_json::from_value(read("annotations")).unwrap(),
            references: References::new(),
        }
    }

    #[test]
    fn only_what_is_asked_for_changes() {
        let changed = changes(
            r#"{ "images": { "web": "web:2" }, "env": { "web": { "A": null, "C": "3" } },
            "annotations": { "note": "x" } }"#,
        );
        let after = changed.applied_to(&template()).unwrap();
        assert_eq!(after["spec"]["containers"][0]["image"], "web:2");
        assert_eq!(
            after["spec"]["containers"][0]["env"],
            json!([{ "name": "B", "value": "$(A)" }, { "name": "C", "value": "3" }])
        );
        assert_eq!(after["metadata"], json!({ "labels": { "app": "web" }, "annotations": { "note": "x" } }));
        assert_eq!(after["spec"]["containers"][1], template()["spec"]["containers"][1]);
        let back = changes(r#"{ "annotations": { "note": null } }"#).applied_to(&after).unwrap();
        assert_eq!(back["metadata"], template()["metadata"]);
    }

    #[test]
    fn a_star_means_the_containers_that_are_not_named_and_no_init_container() {
        let after = changes(r#"{ "images": { "*": "all:2", "proxy": "proxy:2" } }"#).applied_to(&template()).unwrap();
        assert_eq!(after["spec"]["containers"][0]["image"], "all:2");
        assert_eq!(after["spec"]["containers"][1]["image"], "proxy:2");
        assert_eq!(after["spec"]["initContainers"][0]["image"], "wait:1");
    }

    #[test]
    fn a_container_that_is_not_there_is_named_with_those_that_are() {
        let error = changes(r#"{ "images": { "wbe": "x" } }"#).applied_to(&template()).unwrap_err();
        assert!(error.to_string().contains("`wbe`") && error.to_string().contains("web, proxy"), "{error}");
    }
}
