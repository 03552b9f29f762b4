//! Who else decides how many pods a workload has.

use upgrade_core::error::StepError;

use crate::object::Object;
use crate::server::ApiServer;
use crate::workload::WorkloadName;

/// Names the HorizontalPodAutoscaler that the number of a workload's pods belongs to, if there is one.
pub(crate) async fn of(
    server: &ApiServer,
    namespace: &str,
    workload: &WorkloadName,
) -> Result<Option<String>, StepError> {
    let Some(kind) = server.find_kind(None, "HorizontalPodAutoscaler").await? else { return Ok(None) };
    let (scalers, _) = server.list(&kind, Some(namespace), "", "").await?;
    let of_it = |scaler: &&Object| {
        let target = scaler.at("/spec/scaleTargetRef");
        target["kind"] == workload.kind.kind().kind && target["name"] == workload.name
    };
    Ok(scalers.iter().find(of_it).map(|scaler| scaler.name().to_owned()))
}
