//! `k8s.rollout` against `kubectl set image` and `kubectl rollout status`, and how soon it gives up.
//!
//! `cargo run --release -p upgrade-benches --bin k8s_rollout [ROUNDS [WORKLOADS]]`
//!
//! On the tests' control plane, whose nodes only tell what a kubelet would tell: a pod is ready as soon as
//! it is seen. Theirs and ours take turns on one Deployment of two pods, and then on many of one pod each
//! (theirs: `set image` of all, then `rollout status` of one after the other). Ours is a whole run, from its
//! first entry to its commit. Hopeless is a rollout whose image does not exist: counted from the moment when
//! the status of a pod says `ImagePullBackOff` or `ErrImagePull`, as a watch of `kubectl` shows it, to the
//! entry in the journal that says that the step failed. A first round warms up.

use std::collections::BTreeSet;
use std::io::BufRead as _;
use std::process::Stdio;
use std::time::Instant;

use serde_json::json;
use upgrade_benches::runs::Runs;
use upgrade_benches::{Outcome, spread, status_mib};
use upgrade_core::registry::{AnyTarget, BuildContext};
use upgrade_k8s::steps::RolloutStep;
use upgrade_k8s::{Cluster, ClusterConfig};
use upgrade_testbed::kubernetes::{self, Namespace};

fn main() -> Outcome<()> {
    let mut arguments = std::env::args().skip(1);
    let rounds: usize = arguments.next().map_or(Ok(5), |text| text.parse())?;
    let many: usize = arguments.next().map_or(Ok(100), |text| text.parse())?;
    let own = kubernetes::own().ok_or("there is no control plane: scripts/kubernetes builds it")?;
    let namespace = own.cluster().namespace("bench");
    let home = tempfile::tempdir()?;
    let runs = Runs::below(home.path())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;

    apply(&namespace, &["one".to_owned()], 2);
    let one: Vec<_> = (0..=rounds).map(|round| turn(&runtime, &runs, &namespace, &["one".to_owned()], round)).collect();
    report("one Deployment of two pods", one, "≤ 1.05")?;

    let mut hopeless = Vec::new();
    for _ in 0..rounds {
        let seen = std::thread::spawn({
            let mut watch = namespace.cluster().command(["--namespace", &namespace.name, "get", "pods", "--watch"]);
            move || -> Outcome<Instant> {
                let mut child = watch.stdout(Stdio::piped()).spawn()?;
                let lines = std::io::BufReader::new(child.stdout.take().ok_or("a pipe")?).lines();
                let bad = lines.map_while(Result::ok).find(|line| line.contains("ImagePull"));
                let at = Instant::now();
                child.kill()?;
                child.wait()?;
                bad.map(|_| at).ok_or_else(|| "no pod was hopeless".into())
            }
        });
        let step = step(&namespace, &["one".to_owned()], "2-missing")?;
        let failed = runtime.block_on(runs.fail(step))?;
        let cause = seen.join().map_err(|_| "the watch failed")??;
        hopeless.push(failed.saturating_duration_since(cause).as_secs_f64());
    }
    println!("  hopeless, from its cause to the decision  {} s   (target ≤ 3)", spread(hopeless));

    let names: Vec<String> = (1..=many).map(|number| format!("web{number}")).collect();
    apply(&namespace, &names, 1);
    let all: Vec<_> = (0..=2).map(|round| turn(&runtime, &runs, &namespace, &names, round)).collect();
    report(&format!("{many} Deployments of one pod, as one unit"), all, "none: one after the other")?;
    let slowest = (0..2).map(|round| slowest(&runtime, &runs, &namespace, &names, round));
    let slowest = slowest.collect::<Outcome<Vec<_>>>()?;
    println!("  a run / its slowest Deployment     {} ×   (target ≤ 1.1)", spread(slowest));
    println!("  memory at most {:.0} MiB   (target < 64)", status_mib("VmHWM:")?);
    Ok(())
}

fn report(what: &str, rows: Vec<Outcome<[f64; 2]>>, target: &str) -> Outcome<()> {
    let rows = rows.into_iter().collect::<Outcome<Vec<_>>>()?;
    let of = |value: fn(&[f64; 2]) -> f64| spread(rows.iter().skip(1).map(value).collect());
    println!("{what} ({} rounds):", rows.len() - 1);
    println!("  kubectl set image, rollout status  {} s", of(|row| row[0]));
    println!("  k8s.rollout in a run               {} s", of(|row| row[1]));
    println!("  ours / theirs                      {} ×   (target {target})", of(|row| row[1] / row[0]));
    Ok(())
}

/// Lets kubectl roll workloads out, and then a run.
fn turn(
    runtime: &tokio::runtime::Runtime,
    runs: &Runs,
    namespace: &Namespace,
    names: &[String],
    round: usize,
) -> Outcome<[f64; 2]> {
    let began = Instant::now();
    let workloads: Vec<_> = names.iter().map(|name| format!("deployment/{name}")).collect();
    let image = format!("web=shop/web:theirs{round}");
    let mut set = vec!["set", "image"];
    set.extend(workloads.iter().map(String::as_str));
    set.push(&image);
    namespace.kubectl(&set);
    for workload in &workloads {
        namespace.kubectl(&["rollout", "status", workload]);
    }
    let theirs = began.elapsed();
    let ours = runtime.block_on(runs.commit(step(namespace, names, &format!("ours{round}"))?))?;
    Ok([theirs, ours].map(|time| time.as_secs_f64()))
}

/// Measures a run against the time until the last of its Deployments is complete, as a watch of kubectl shows it.
fn slowest(
    runtime: &tokio::runtime::Runtime,
    runs: &Runs,
    namespace: &Namespace,
    names: &[String],
    round: usize,
) -> Outcome<f64> {
    let tag = format!("slowest{round}");
    let format = "jsonpath={.metadata.name} {.spec.template.spec.containers[0].image} {.status.updatedReplicas} \
                  {.status.availableReplicas} {.status.replicas} {.metadata.generation} \
                  {.status.observedGeneration}{'\\n'}";
    let mut watch = namespace.cluster().command(["--namespace", &namespace.name, "get", "deployments", "--watch"]);
    let mut child = watch.args(["--output", format]).stdout(Stdio::piped()).spawn()?;
    let lines = std::io::BufReader::new(child.stdout.take().ok_or("a pipe")?).lines();
    let (image, mut missing) = (format!("shop/web:{tag}"), names.iter().cloned().collect::<BTreeSet<_>>());
    let seen = std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            let words: Vec<_> = line.split(' ').collect();
            if let [name, of, "1", "1", "1", wanted, observed] = words[..]
                && of == image
                && wanted == observed
            {
                missing.remove(name);
            }
            if missing.is_empty() {
                return Some(Instant::now());
            }
        }
        None
    });
    let step = step(namespace, names, &tag)?;
    let began = Instant::now();
    let ours = runtime.block_on(runs.commit(step))?;
    let last = seen.join().map_err(|_| "the watch failed")?;
    child.kill()?;
    child.wait()?;
    let last = last.ok_or("a Deployment was never complete")?.saturating_duration_since(began);
    Ok(ours.as_secs_f64() / last.as_secs_f64())
}

fn step(namespace: &Namespace, names: &[String], tag: &str) -> Outcome<RolloutStep> {
    let config = ClusterConfig {
        kubeconfig: Some(namespace.cluster().kubeconfig().to_owned()),
        namespace: Some(namespace.name.clone()),
        ..ClusterConfig::default()
    };
    let cluster = Cluster::from_config(config, &BuildContext::new("/"))?;
    let context = BuildContext::new("/").with_target("cluster", AnyTarget::new("k8s", cluster));
    let workload =
        |name| json!({ "workload": format!("deployment/{name}"), "images": { "web": format!("shop/web:{tag}") } });
    let workloads: Vec<_> = names.iter().map(workload).collect();
    let config = json!({ "target": "cluster", "workloads": workloads });
    Ok(RolloutStep::from_config(serde_json::from_value(config)?, &context)?)
}

/// Makes Deployments, and waits for their pods.
fn apply(namespace: &Namespace, names: &[String], replicas: u32) {
    let manifest = |name: &String| {
        format!(
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{ name: {name} }}\nspec:\n  replicas: {replicas}\n  \
             selector: {{ matchLabels: {{ app: {name} }} }}\n  template:\n    metadata: {{ labels: {{ app: {name} }} }}\n    \
             spec: {{ terminationGracePeriodSeconds: 0, containers: [{{ name: web, image: \"shop/web:1\" }}] }}\n"
        )
    };
    namespace.apply(&names.iter().map(manifest).collect::<Vec<_>>().join("---\n"));
    for name in names {
        namespace.kubectl(&["rollout", "status", &format!("deployment/{name}")]);
    }
}
