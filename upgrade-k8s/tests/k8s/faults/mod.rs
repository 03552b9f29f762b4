//! Every request of a run may go wrong: refused, lost on the way there or back, answered too late, a watch cut
//! or expired. The run must end as it would have, and nothing may be done twice.

#![cfg(test)]

pub(crate) mod proxy;

use std::sync::Arc;

use upgrade_core::executor::{Executor, Interrupt, Outcome, RunOptions};
use upgrade_core::journal::MemoryJournal;
use upgrade_testbed::kubernetes::Cluster;

use crate::sweeps::Case;
use crate::world::Corner;
use proxy::{Fault, Proxy, TIMEOUT};

/// How many requests more than undisturbed a fault may cost: the one again, a list, and what is asked
/// while a pause lasts.
const MORE: usize = 60;

/// Which way a run goes.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// To its commit.
    Forward,
    /// Until a verification fails, and back.
    Back,
}

struct Lived {
    after: String,
    asked: Vec<String>,
}

/// Lives through a case with one fault, and holds it to what an undisturbed run leaves.
fn live(
    case: &Case,
    cluster: &Cluster,
    proxy: &Proxy,
    way: Way,
    fault: Option<(usize, Fault)>,
) -> Result<Lived, String> {
    let corner = Corner { namespace: cluster.namespace("faults") };
    (case.setup)(&corner);
    let before = (case.observe)(&corner);
    let verify = match way {
        Way::Forward => "",
        Way::Back => "verify:\n  - { uses: k8s.cluster, with: { target: cluster, version: \">=99\" } }\n",
    };
    let pipeline = case.read(&proxy.kubeconfig(), &corner, &format!(", timeout: {TIMEOUT}"), verify);
    proxy.fail(fault);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let executor = Executor::new(Arc::new(MemoryJournal::new()));
    let report = runtime.block_on(executor.run(&pipeline, &RunOptions::default(), &Interrupt::new()));
    let asked = proxy.asked();
    proxy.fail(None);
    let outcome = report.map_err(|error| error.to_string())?.outcome;
    let after = (case.observe)(&corner);
    match (way, &outcome) {
        (Way::Forward, Outcome::Committed) => Ok(Lived { after, asked }),
        (Way::Back, Outcome::RolledBack { .. }) if after == before => Ok(Lived { after, asked }),
        (Way::Back, Outcome::RolledBack { .. }) => Err(format!("it is not as before:\n{after}\nbefore:\n{before}")),
        _ => Err(format!("it ended so: {outcome:?}")),
    }
}

/// Lets every `stride`th request of a case go wrong, the faults in turn; with a stride of one, each request in
/// every way.
fn every_request_may_go_wrong(case: &Case, stride: usize) {
    let Some(cluster) = upgrade_testbed::kubernetes::shared() else { return };
    let proxy = Proxy::before(cluster.kubeconfig());
    let mut lived = 0;
    for way in [Way::Forward, Way::Back] {
        let undisturbed = live(case, &cluster, &proxy, way, None).unwrap_or_else(|error| panic!("{way:?}: {error}"));
        let count = undisturbed.asked.len();
        for at in (0..count).step_by(stride) {
            let faults =
                if stride == 1 { &Fault::ALL[..] } else { &Fault::ALL[(at / stride) % Fault::ALL.len()..][..1] };
            for fault in faults {
                let name = format!("{way:?}: {fault:?} at request {at} ({})", undisturbed.asked[at]);
                let disturbed = live(case, &cluster, &proxy, way, Some((at, *fault)));
                let disturbed = disturbed.unwrap_or_else(|error| panic!("{name}: {error}"));
                assert_eq!(disturbed.after, undisturbed.after, "{name}");
                assert!(
                    disturbed.asked.len() <= count + MORE,
                    "{name}: {} requests, {count} else",
                    disturbed.asked.len()
                );
                lived += 1;
            }
        }
    }
    println!("{lived} faults lived through");
    assert!(lived >= 5, "{lived}");
}

macro_rules! faults {
    ($($name:ident, $campaign:ident: $case:expr, $stride:expr;)*) => {
        $(
            #[test]
            fn $name() {
                every_request_may_go_wrong(&$case, $stride);
            }

            #[test]
            #[ignore = "each request in every way, an hour: cargo test -p upgrade-k8s -- --ignored campaign_faults"]
            fn $campaign() {
                every_request_may_go_wrong(&$case, 1);
            }
        )*
    };
}

faults! {
    an_apply_survives_faults, campaign_faults_of_apply: crate::sweeps::apply::CASE, 23;
    a_backup_survives_faults, campaign_faults_of_backup: crate::sweeps::backup::CASE, 11;
    a_switch_survives_faults, campaign_faults_of_blue_green: crate::sweeps::blue_green::CASE, 37;
    a_canary_survives_faults, campaign_faults_of_canary: crate::sweeps::canary::ROUTED, 37;
    a_configuration_survives_faults, campaign_faults_of_config: crate::sweeps::config::CASE, 11;
    a_job_survives_faults, campaign_faults_of_job: crate::sweeps::job::ONE, 11;
    a_rollout_survives_faults, campaign_faults_of_rollout: crate::sweeps::rollout::CASE, 23;
    a_scaling_survives_faults, campaign_faults_of_scale: crate::sweeps::scale::CASE, 19;
}
