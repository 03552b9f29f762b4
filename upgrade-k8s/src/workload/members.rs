//! The pods of a workload: those that it owns, whatever else bears its labels.

use std::collections::BTreeSet;

use upgrade_core::error::StepError;

use crate::kind::Kind;
use crate::object::Object;
use crate::pods::label_selector;
use crate::server::ApiServer;
use crate::workload::WorkloadKind;

/// Lists the pods of a workload, those on their way out included.
pub(crate) async fn pods_of(
    server: &ApiServer,
    kind: WorkloadKind,
    workload: &Object,
) -> Result<Vec<Object>, StepError> {
    let labels = label_selector(workload.at("/spec/selector"));
    let namespace = Some(workload.namespace());
    let owners: BTreeSet<String> = if kind == WorkloadKind::Deployment {
        let (sets, _) = server.list(&Kind::replica_set(), namespace, &labels, "").await?;
        sets.iter().filter(|set| set.is_owned_by(workload.uid())).map(|set| set.uid().to_owned()).collect()
    } else {
        BTreeSet::from([workload.uid().to_owned()])
    };
    let (mut pods, _) = server.list(&Kind::pod(), namespace, &labels, "").await?;
    pods.retain(|pod| owners.iter().any(|owner| pod.is_owned_by(owner)));
    Ok(pods)
}
