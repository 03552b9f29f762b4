//! Runs kept apart in the cluster itself, by a Lease, for machines that share no journal.
//!
//! A namespace has one Lease of this crate's, `upgrade`, whose annotation lists the runs that are open and
//! what each has locked. It is written under optimistic concurrency only, so of two runs that want the same
//! thing at once, one gets it. It is deleted with its last run.

use std::collections::{BTreeMap, BTreeSet};

use async_trait::async_trait;
use jiff::Timestamp;
use jiff::fmt::temporal::DateTimePrinter;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::names::{Actor, LockName, RunId};
use upgrade_core::target::{Claimed, Claims};

use crate::error::KubeError;
use crate::kind::Kind;
use crate::object::{Object, ObjectName, patch};
use crate::server::{ApiServer, Deletion, WRITERS};
use crate::target::Cluster;

/// The name of the Lease.
const NAME: &str = "upgrade";
/// The annotation that lists the open runs.
const RUNS: &str = "upgrade-rs.github.io/runs";

/// What one run has claimed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Claim {
    /// Who drives it, and where.
    by: String,
    since: Timestamp,
    /// What it changes.
    locks: BTreeSet<String>,
}

type Runs = BTreeMap<String, Claim>;

/// Claims parts of a cluster in the namespace that is worked in.
pub(crate) struct NamespaceClaims {
    pub(crate) cluster: Cluster,
}

impl NamespaceClaims {
    fn lease(&self) -> ObjectName {
        ObjectName::new(Kind::lease(), self.cluster.namespace(), NAME)
    }

    /// Names what a lock stands for as every machine would, whatever it calls the API server.
    fn part(&self, lock: &LockName) -> String {
        let resource = lock.parts().1;
        resource.strip_prefix(&*self.cluster.escaped_server()).unwrap_or(resource).trim_start().to_owned()
    }

    /// Says of a refusal what right is wanting.
    fn explained(&self, error: KubeError) -> StepError {
        let is_forbidden = error.status() == Some(403);
        let error = StepError::from(error);
        if !is_forbidden {
            return error;
        }
        let hint = format!(
            "let this user `get`, `create`, `patch` and `delete` leases.coordination.k8s.io in namespace {}; or set \
             `lease: false` of the target where no other machine upgrades it",
            self.cluster.namespace()
        );
        error.with_hint(hint)
    }

    async fn change(
        &self,
        server: &ApiServer,
        decide: impl Fn(&Runs) -> Result<Option<Runs>, Claimed>,
    ) -> Result<Option<Claimed>, StepError> {
        let name = self.lease();
        let mut attempt = 1;
        loop {
            let present = server.get(&name).await.map_err(|error| self.explained(error))?;
            let runs = present.as_ref().map(runs).transpose()?.unwrap_or_default();
            let after = match decide(&runs) {
                Ok(Some(after)) => after,
                Ok(None) => return Ok(None),
                Err(claimed) => return Ok(Some(claimed)),
            };
            let done = match &present {
                Some(present) if after.is_empty() => {
                    let version = Some(present.resource_version().to_owned());
                    let how = Deletion { uid: Some(present.uid().to_owned()), version, ..Deletion::default() };
                    server.delete(&name, &how).await.map_err(|error| self.explained(error))?;
                    // Whether it was deleted or somebody has written to it, the next look tells.
                    attempt += 1;
                    if attempt > WRITERS {
                        return Err(StepError::transient(format!("{name} is written to all the time")));
                    }
                    continue;
                }
                Some(present) => {
                    let whole = lease(&after);
                    let parts =
                        ["/metadata/annotations", "/spec"].map(|part| (part.to_owned(), whole.pointer(part).cloned()));
                    server.patch(&name, &patch(present, parts)).await
                }
                None => server.create(&name, &lease(&after)).await,
            };
            match done {
                Err(error) if (error.is_in_conflict() || error.is_missing()) && attempt < WRITERS => attempt += 1,
                done => return done.map(|_| None).map_err(|error| self.explained(error)),
            }
        }
    }
}

#[async_trait]
impl Claims for NamespaceClaims {
    fn place(&self) -> String {
        format!("{} of {}", self.lease(), self.cluster.server())
    }

    async fn claim(&self, cx: &Context, locks: &[LockName]) -> Result<Option<Claimed>, StepError> {
        let server = self.cluster.connect(cx).await?;
        let locks: BTreeSet<_> = locks.iter().map(|lock| self.part(lock)).collect();
        let run = cx.run().to_string();
        let namespace = self.cluster.namespace();
        self.change(&server, |runs| {
            if let Some((other, claim, shared)) = holder(runs, &run, &locks) {
                return Err(Claimed {
                    run: other.to_owned(),
                    by: format!("{shared}, claimed by {} at {}", claim.by, claim.since),
                    remedy: format!(
                        "finish it there: `upgrade resume {other}` or `upgrade rollback {other}`; where its journal is \
                         lost, mend by hand and `kubectl --namespace {namespace} delete lease {NAME}`"
                    ),
                });
            }
            let mut after = runs.clone();
            let since = runs.get(&run).map_or_else(Timestamp::now, |claim| claim.since);
            after.insert(run.clone(), Claim { by: Actor::current().to_string(), since, locks: locks.clone() });
            Ok((after != *runs).then_some(after))
        })
        .await
    }

    async fn release(&self, cx: &Context, run: &RunId) -> Result<(), StepError> {
        let server = self.cluster.connect(cx).await?;
        let released = self.change(&server, |runs| {
            let mut after = runs.clone();
            Ok(after.remove(run.as_str()).map(|_| after))
        });
        released.await.map(drop)
    }
}

/// Finds the run that has what is wanted, and what of it.
fn holder<'a>(runs: &'a Runs, own: &str, wanted: &BTreeSet<String>) -> Option<(&'a str, &'a Claim, &'a str)> {
    let shared = |claim: &'a Claim| claim.locks.iter().find(|lock| wanted.contains(*lock));
    let mut others = runs.iter().filter(|(run, _)| *run != own);
    others.find_map(|(run, claim)| Some((&**run, claim, &**shared(claim)?)))
}

fn runs(lease: &Object) -> Result<Runs, StepError> {
    let text = lease.annotation(RUNS).unwrap_or("{}");
    serde_json::from_str(text).map_err(|error| {
        StepError::permanent(format!("lease {}/{NAME} does not say which runs it is of", lease.namespace()))
            .with_cause(&error)
            .with_hint("a newer version of this command may have written it: use that one, or delete the Lease")
    })
}

fn lease(runs: &Runs) -> Value {
    let holders: Vec<_> = runs.keys().map(String::as_str).collect();
    let now = DateTimePrinter::new().precision(Some(6)).timestamp_to_string(&Timestamp::now());
    json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": { "name": NAME, "annotations": { RUNS: serde_json::to_string(runs).unwrap_or_default() } },
        "spec": { "holderIdentity": holders.join(","), "renewTime": now },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_in_the_way_of_those_that_want_the_same() {
        let claim = |locks: &[&str]| Claim {
            by: "ann@a".into(),
            since: Timestamp::UNIX_EPOCH,
            locks: locks.iter().map(|&lock| lock.to_owned()).collect(),
        };
        let runs: Runs =
            [("1".to_owned(), claim(&["deployments.apps shop/web"])), ("2".to_owned(), claim(&["nodes. a"]))].into();
        let wanted = |locks: &[&str]| locks.iter().map(|&lock| lock.to_owned()).collect::<BTreeSet<_>>();
        let found = |own: &str, locks: &[&str]| holder(&runs, own, &wanted(locks)).map(|(run, ..)| run);
        assert_eq!(found("3", &["deployments.apps shop/web", "services. shop/web"]), Some("1"));
        assert_eq!(found("1", &["deployments.apps shop/web"]), None, "one's own is no hindrance");
        assert_eq!(found("3", &["deployments.apps shop/api"]), None);
    }
}
