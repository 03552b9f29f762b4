//! The Job as it is given to the cluster, and as a plan shows it.

use serde_json::{Map, Value, json};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::secret::ExposeSecret as _;

use super::config::{EnvSource, Pod, Work};
use crate::naming;
use crate::object::ObjectName;

/// Makes the Job, its secrets resolved.
pub(super) async fn job(cx: &Context, name: &ObjectName, work: &Work) -> Result<Value, StepError> {
    let mut template = match &work.pod {
        Pod::Template(template) => Value::Object(template.clone()),
        Pod::Container { image, command, args, env, env_from, service_account } => {
            let mut variables = Vec::new();
            for (name, value) in env {
                variables.push(json!({ "name": name, "value": value.resolve(cx).await?.expose_secret() }));
            }
            let mut container = json!({ "name": "job", "image": image });
            let lists = [("command", json!(command)), ("args", json!(args)), ("env", Value::Array(variables))];
            let lists = lists.into_iter().chain([("envFrom", env_from.iter().map(source).collect())]);
            for (key, list) in lists.filter(|(_, list)| list.as_array().is_some_and(|list| !list.is_empty())) {
                container[key] = list;
            }
            let mut spec = json!({ "containers": [container] });
            if let Some(account) = service_account {
                spec["serviceAccountName"] = json!(account);
            }
            json!({ "spec": spec })
        }
    };
    template["spec"]["restartPolicy"] = json!("Never");
    if let Some(node) = &work.node {
        pin(&mut template["spec"], node, matches!(work.pod, Pod::Container { .. }));
    }
    // So that what runs is found even where its Job is gone.
    mark(&mut template, cx);
    let seconds = work.deadline.0.as_millis().div_ceil(1000).max(1);
    let mut job = json!({
        "apiVersion": name.kind.api_version(),
        "kind": name.kind.kind,
        "metadata": { "name": name.name, "namespace": name.namespace },
        "spec": {
            "backoffLimit": work.retries,
            "activeDeadlineSeconds": u64::try_from(seconds).unwrap_or(u64::MAX),
            "template": template,
        },
    });
    mark(&mut job, cx);
    Ok(job)
}

/// Puts a pod on a node whatever keeps others away from it, and gives it the machine if nobody said more
/// exactly what it gets: the one of `kubectl debug node` with the profile `sysadmin`, its root at `/host`.
fn pin(spec: &mut Value, node: &str, with_the_machine: bool) {
    spec["nodeName"] = json!(node);
    if spec["tolerations"].is_null() {
        spec["tolerations"] = json!([{ "operator": "Exists" }]);
    }
    if with_the_machine {
        for namespace in ["hostPID", "hostIPC", "hostNetwork"] {
            spec[namespace] = json!(true);
        }
        spec["volumes"] = json!([{ "name": "host", "hostPath": { "path": "/" } }]);
        spec["containers"][0]["securityContext"] = json!({ "privileged": true });
        spec["containers"][0]["volumeMounts"] = json!([{ "name": "host", "mountPath": "/host" }]);
    }
}

/// Marks what may have `metadata`, `labels` or `annotations` that are null, as YAML has them.
fn mark(object: &mut Value, cx: &Context) {
    for path in ["/metadata", "/metadata/labels", "/metadata/annotations"] {
        if object.pointer(path).is_none_or(|value| !value.is_object()) {
            let (parent, key) = path.rsplit_once('/').unwrap_or_default();
            if let Some(parent) = object.pointer_mut(parent).and_then(Value::as_object_mut) {
                parent.insert(key.to_owned(), Value::Object(Map::new()));
            }
        }
    }
    naming::put_mark(object, cx);
}

/// Makes a pod as the Job's controller would, to ask whether the cluster would take it.
pub(super) fn pod(job: &Value) -> Value {
    let mut pod = job["spec"]["template"].clone();
    pod["apiVersion"] = json!("v1");
    pod["kind"] = json!("Pod");
    pod["metadata"]["name"] = job["metadata"]["name"].clone();
    pod["metadata"]["namespace"] = job["metadata"]["namespace"].clone();
    pod
}

fn source(source: &EnvSource) -> Value {
    match source {
        EnvSource::Secret(name) => json!({ "secretRef": { "name": name } }),
        EnvSource::ConfigMap(name) => json!({ "configMapRef": { "name": name } }),
    }
}

/// Says in one line what runs, without what variables hold.
pub(super) fn line(pod: &Pod) -> String {
    let words = |value: &Value| -> Vec<String> {
        value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let one =
        |image: &str, words: Vec<String>| std::iter::once(image.to_owned()).chain(words).collect::<Vec<_>>().join(" ");
    match pod {
        Pod::Container { image, command, args, .. } => one(image, command.iter().chain(args).cloned().collect()),
        Pod::Template(template) => {
            let containers = template["spec"]["containers"].as_array().into_iter().flatten();
            let each = containers.map(|container| {
                let said = words(&container["command"]).into_iter().chain(words(&container["args"]));
                one(container["image"].as_str().unwrap_or_default(), said.collect())
            });
            each.collect::<Vec<_>>().join("; ")
        }
    }
}

/// Names the variables, without what they hold.
pub(super) fn variables(pod: &Pod) -> Option<String> {
    let Pod::Container { env, env_from, .. } = pod else { return None };
    let names: Vec<_> = env.keys().cloned().chain(env_from.iter().map(ToString::to_string)).collect();
    (!names.is_empty()).then(|| format!("variables: {}", names.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kind::Kind;
    use crate::steps::job::config::JobConfig;
    use upgrade_core::testkit::TestContext;

    fn config(value: Value) -> JobConfig {
        serde_json::from_value(value).unwrap()
    }

    #[tokio::test]
    async fn a_job_has_what_is_asked_for_and_its_marks() {
        let test = TestContext::new("migrate");
        let name = ObjectName::new(Kind::job(), "shop", "migrate-job-1");
        let asked = config(json!({ "name": "migrate", "image": "shop/web:2", "command": ["./migrate"],
            "args": ["--to", "7"], "env": { "MODE": "full" }, "env_from": ["secret/db", "configmap/shop"],
            "service_account": "migrator", "deadline": "1500ms", "retries": 2 }));
        let job = job(&test.forward(), &name, &asked.work().unwrap()).await.unwrap();
        assert_eq!(job["spec"]["activeDeadlineSeconds"], 2);
        assert_eq!(job["spec"]["backoffLimit"], 2);
        let spec = &job["spec"]["template"]["spec"];
        let container = json!({ "name": "job", "image": "shop/web:2", "command": ["./migrate"], "args": ["--to", "7"],
            "env": [{ "name": "MODE", "value": "full" }],
            "envFrom": [{ "secretRef": { "name": "db" } }, { "configMapRef": { "name": "shop" } }] });
        let expected = json!({ "containers": [container], "serviceAccountName": "migrator", "restartPolicy": "Never" });
        assert_eq!(spec, &expected);
        assert!(naming::is_ours(&crate::Object(job.clone()), &test.back()));
        assert_eq!(pod(&job)["metadata"]["annotations"], job["metadata"]["annotations"]);
    }

    #[tokio::test]
    async fn a_job_of_a_node_is_on_it_and_has_its_machine() {
        let test = TestContext::new("nodes");
        let name = ObjectName::new(Kind::job(), "kube-system", "n1-job-1");
        let asked = config(json!({ "name": "n1", "image": "tools:1", "command": ["chroot", "/host", "upgrade"] }));
        let work = Work { node: Some("n1".into()), ..asked.work().unwrap() };
        let spec = job(&test.forward(), &name, &work).await.unwrap()["spec"]["template"]["spec"].clone();
        assert_eq!((&spec["nodeName"], &spec["hostPID"]), (&json!("n1"), &json!(true)));
        assert_eq!(spec["tolerations"][0]["operator"], "Exists");
        assert_eq!(spec["containers"][0]["securityContext"]["privileged"], true);
    }

    #[tokio::test]
    async fn a_template_stays_as_it_is_written() {
        let test = TestContext::new("migrate");
        let name = ObjectName::new(Kind::job(), "shop", "migrate-job-1");
        let template = json!({ "metadata": { "labels": { "team": "db" }, "annotations": null },
            "spec": { "containers": [{ "name": "a", "image": "x:1", "command": ["run"] }], "priority": 7 } });
        let work = config(json!({ "name": "migrate", "template": template })).work().unwrap();
        let job = job(&test.forward(), &name, &work).await.unwrap();
        let made = &job["spec"]["template"];
        assert_eq!((&made["metadata"]["labels"]["team"], &made["spec"]["priority"]), (&json!("db"), &json!(7)));
        assert_eq!(line(&work.pod), "x:1 run");
    }

    #[test]
    fn what_contradicts_itself_names_its_key() {
        let containers = json!({ "spec": { "containers": [{ "name": "a", "image": "x" }] } });
        let again = json!({ "spec": { "restartPolicy": "OnFailure", "containers": [{ "name": "a", "image": "x" }] } });
        for (more, key) in [
            (json!({}), "image"),
            (json!({ "image": "x", "template": containers }), "image"),
            (json!({ "template": containers, "env": { "A": "1" } }), "env"),
            (json!({ "template": { "containers": [] } }), "template"),
            (json!({ "template": again }), "template"),
            (json!({ "image": " " }), "image"),
            (json!({ "image": "x", "deadline": "0s" }), "deadline"),
            (json!({ "image": "x", "env": { "A=B": "1" } }), "env"),
            (json!({ "image": "x", "service_account": "a/b" }), "service_account"),
            (json!({ "image": "x", "undo": {} }), "undo.command"),
            (json!({ "template": containers, "undo": { "command": ["y"] } }), "undo.image"),
            (json!({ "image": "x", "undo": { "template": {} } }), "undo.template"),
        ] {
            let mut all = json!({ "name": "migrate" });
            all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let config = config(all);
            let error = config.work().and_then(|_| config.undo_work()).unwrap_err();
            assert_eq!(error.key.as_deref(), Some(key), "{more}: {error}");
        }
        assert!("pod/x".parse::<EnvSource>().unwrap_err().contains("secret/NAME"));
    }

    #[test]
    fn an_undo_takes_over_what_it_does_not_say() {
        let config = config(json!({ "name": "migrate", "image": "x:1", "command": ["up"], "env": { "A": "1" },
            "env_from": ["secret/db"], "deadline": "5m", "undo": { "command": ["down"] } }));
        let undo = config.undo_work().unwrap().unwrap();
        assert_eq!(line(&undo.pod), "x:1 down");
        assert_eq!(variables(&undo.pod).unwrap(), "variables: A, secret/db");
        assert_eq!(undo.deadline, config.deadline);
    }
}
