//! Targets claimed for a run in the targets themselves, for machines that share no journal.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::admission::targets;
use super::drive::Driver;
use super::{Executor, ExecutorError};
use crate::entry::{Cause, Entry};
use crate::error::StepError;
use crate::names::{LockName, RunId};
use crate::pipeline::Pipeline;
use crate::target::Claims;
use crate::transition::RunState;

/// How long the end of a run waits for its claims to be taken away.
const RELEASE: Duration = Duration::from_secs(30);

type Places = BTreeMap<String, (Arc<dyn Claims>, Vec<LockName>)>;

/// Lists the places where a pipeline's targets are claimed, with the locks of each.
fn places(pipeline: &Pipeline) -> Places {
    let mut places = Places::new();
    for (lock, target) in targets(pipeline) {
        if let Some(claims) = target.claims() {
            places.entry(claims.place()).or_insert_with(|| (claims, Vec::new())).1.push(lock);
        }
    }
    places
}

impl Driver<'_> {
    /// Claims the run's targets; a run that has not begun and cannot have them is rejected.
    pub(crate) async fn claim(&mut self) -> Result<(), ExecutorError> {
        if self.run.state().is_final() {
            return Ok(());
        }
        let places = places(&self.pipeline);
        let mut refused = None;
        for (claims, locks) in places.values() {
            refused = self.claim_one(&**claims, locks).await?;
            if refused.is_some() {
                break;
            }
        }
        let Some((message, hint)) = refused else { return Ok(()) };
        if self.run.state() == RunState::Checking {
            let cause = Some(Cause::Claimed { message: message.clone(), hint: hint.clone() });
            self.note(Entry::RunEntered { state: RunState::Rejected, cause, deadline: None, health: None })?;
            self.flush().await?;
        }
        Err(ExecutorError::Refused { message, hint: Some(hint) })
    }

    async fn claim_one(
        &self,
        claims: &dyn Claims,
        locks: &[LockName],
    ) -> Result<Option<(String, String)>, ExecutorError> {
        let failed = |error: StepError| {
            let hint = error.hint().map_or_else(|| "mend it, then `upgrade resume`".to_owned(), str::to_owned);
            Ok(Some((format!("what is upgraded cannot be claimed: {}", error.message()), hint)))
        };
        let cx = self.caller.plain_context(&self.run, "admission", "admission").map_err(ExecutorError::Pipeline)?;
        loop {
            let claimed = match claims.claim(&cx, locks).await {
                Ok(None) => return Ok(None),
                Ok(Some(claimed)) => claimed,
                Err(error) => return failed(error),
            };
            // One of this journal's own that ended while nobody could tell the target.
            let over = match RunId::try_from(claimed.run.as_str()) {
                Ok(run) if self.executor.is_over(&run).await? => run,
                _ => return Ok(Some((format!("run {} works on it: {}", claimed.run, claimed.by), claimed.remedy))),
            };
            if let Err(error) = claims.release(&cx, &over).await {
                return failed(error);
            }
        }
    }

    /// Takes the claims away, if one of the entries to be written ends the run.
    pub(crate) async fn release(&self) {
        let ends = |entry: &Entry| matches!(entry, Entry::RunEntered { state, .. } if state.is_final());
        if !self.pending.iter().any(ends) {
            return;
        }
        let Ok(cx) = self.caller.plain_context(&self.run, "admission", "admission") else { return };
        for (place, (claims, _)) in places(&self.pipeline) {
            match timeout(RELEASE, claims.release(&cx, self.run.id())).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "the claim in {place} could not be taken away"),
                Err(_) => tracing::warn!("the claim in {place} could not be taken away in time"),
            }
        }
    }
}

impl Executor {
    /// Tells whether a run of this journal is over.
    async fn is_over(&self, run: &RunId) -> Result<bool, ExecutorError> {
        let runs = self.journal.runs().await?;
        Ok(runs.iter().any(|known| known.run == *run && known.state.is_some_and(RunState::is_final)))
    }
}
