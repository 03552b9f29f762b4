//! `k8s.job`: Jobs that add to what is there, so that doing one twice shows.

#![cfg(test)]

use super::{Case, notices_every_seeded_defect, sweep};
use crate::world::Corner;

/// The first step, of both cases.
macro_rules! second {
    () => {
        r#"
upgrade: jobs
steps:
  - id: second
    uses: k8s.job
    with:
      target: cluster
      name: second
      image: "shop/db:done"
      env: { ADDS: two }
      undo: { command: [undo], env: { REMOVES: two } }
"#
    };
}

pub(crate) const ONE: Case = Case {
    setup: |corner| {
        corner.namespace.kubectl(&["create", "configmap", "effects", "--from-literal", "lines=one\n"]);
    },
    pipeline: second!(),
    observe,
    interfere: |_, _| false,
    survived: |_, _| true,
};

const TWO: Case = Case {
    pipeline: concat!(
        second!(),
        r#"  - id: third
    uses: k8s.job
    with:
      target: cluster
      name: third
      image: "shop/db:done"
      env: { ADDS: three }
      undo: { command: [undo], env: { REMOVES: three } }
"#
    ),
    ..ONE
};

/// What the Jobs did, and that none is left.
fn observe(corner: &Corner) -> String {
    corner.written("jobs,configmaps")
}

#[test]
fn a_job_runs_once_or_is_undone() {
    sweep(&ONE, 3, 25);
}

#[test]
#[ignore = "two steps, all appends of all directions, minutes: cargo test -p upgrade-k8s -- --ignored campaign_jobs"]
fn campaign_jobs_are_all_done_or_none() {
    sweep(&TWO, 1, 70);
}

#[test]
fn every_seeded_defect_of_jobs_is_noticed() {
    notices_every_seeded_defect(&TWO);
}
