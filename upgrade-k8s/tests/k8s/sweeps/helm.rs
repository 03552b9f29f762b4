//! `k8s.helm`: one release that is upgraded, and one that is installed, by a real `helm`.

#![cfg(test)]

use super::{Case, notices_every_seeded_defect, sweep};
use crate::helm::{helm, observe, run, write_charts};
use crate::world::Corner;

/// The first step, of both cases.
macro_rules! first {
    () => {
        "upgrade: shop\nsteps:\n  - id: shop\n    uses: k8s.helm\n    with:\n      target: cluster\n      release: shop\n      \
         chart: DIRECTORY/chart-2\n      set: { key: two, replicas: 0 }\n      program: DIRECTORY/helm\n      deadline: 1m\n"
    };
}

const ONE: Case = Case { setup, pipeline: first!(), observe, interfere, survived };

const TWO: Case = Case {
    pipeline: concat!(
        first!(),
        "  - id: tools\n    uses: k8s.helm\n    with:\n      target: cluster\n      release: tools\n      \
         chart: DIRECTORY/tools\n      install: true\n      program: DIRECTORY/helm\n      deadline: 1m\n"
    ),
    ..ONE
};

fn setup(corner: &Corner) {
    let (directory, program) = (corner.directory(), helm().expect("asked before"));
    write_charts(&directory);
    let tools = directory.join("tools");
    std::fs::create_dir_all(tools.join("templates")).unwrap();
    std::fs::write(tools.join("Chart.yaml"), "apiVersion: v2\nname: tools\nversion: 0.1.0\n").unwrap();
    let template = "apiVersion: v1\nkind: ConfigMap\nmetadata: { name: tools }\ndata: { OF: {{ .Values.of | default \"ours\" }} }\n";
    std::fs::write(tools.join("templates/tools.yaml"), template).unwrap();
    std::os::unix::fs::symlink(&program, directory.join("helm")).unwrap();
    let chart = directory.join("chart-1").display().to_string();
    run(&program, corner, &["install", "shop", &chart, "--set", "key=one,replicas=0"]);
}

fn interfere(corner: &Corner, step: &str) -> bool {
    let chart = corner.directory().join(if step == "shop" { "chart-1" } else { "tools" }).display().to_string();
    let program = helm().expect("asked before");
    run(&program, corner, &["upgrade", step, &chart, "--install", "--set", "key=foreign,of=foreign,replicas=0"]);
    true
}

fn survived(corner: &Corner, step: &str) -> bool {
    match step {
        "shop" => corner.get("secret/key").text("/data/KEY") == "Zm9yZWlnbg==",
        _ => corner.get("configmap/tools").text("/data/OF") == "foreign",
    }
}

#[test]
fn a_release_survives_every_crash() {
    if helm().is_some() {
        sweep(&ONE, 5, 10);
    }
}

#[test]
#[ignore = "two releases, all appends of all directions, minutes: cargo test -p upgrade-k8s -- --ignored campaign_releases"]
fn campaign_releases_survive_every_crash() {
    if helm().is_some() {
        sweep(&TWO, 1, 70);
    }
}

#[test]
fn every_seeded_defect_of_releases_is_noticed() {
    if helm().is_some() {
        notices_every_seeded_defect(&TWO);
    }
}
