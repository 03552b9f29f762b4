//! A run as its journal tells it: its pipeline, its state, and its entries as they come.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use upgrade_core::entry::Record;
use upgrade_core::executor::Report;
use upgrade_core::executor::state::Run;
use upgrade_core::file;
use upgrade_core::journal::{Journal, JournalError};
use upgrade_core::names::{RunId, Seq};
use upgrade_core::pipeline::Pipeline;
use upgrade_core::transition::RunState;

use crate::failure::{Failure, Result};
use crate::render::narrator::Narrator;
use crate::session::registry;

/// Holds a run with the records that it was read from.
pub(crate) struct Recorded {
    pub(crate) run: Run,
    pub(crate) records: Vec<Record>,
}

impl Recorded {
    pub(crate) async fn load(journal: &dyn Journal, run: &RunId) -> Result<Self> {
        let records = journal.load(run).await?;
        Ok(Self { run: Run::replay(&records)?, records })
    }

    /// Builds the pipeline again from what the run is bound to: no file is needed.
    pub(crate) fn pipeline(&self) -> Result<Pipeline> {
        let definition = self.run.definition();
        if definition.document.is_null() {
            return Err(Failure::refused(format!("run {} was not made from a pipeline file", self.run.id()))
                .with_hint("only the program that made it knows its steps: resume it there"));
        }
        Ok(file::reload(definition, &registry())?)
    }

    pub(crate) fn base_dir(&self) -> PathBuf {
        self.run.definition().base_dir.clone()
    }
}

/// Says when following a run ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Until {
    /// When it waits for an operator or is over.
    Settled,
    /// The same; and a driver that is gone is an error, since it took a request of ours along.
    SettledByDriver,
}

/// Follows a run that another process drives, from entry `seen` on.
pub(crate) async fn follow(
    journal: &Arc<dyn Journal>,
    run: &RunId,
    mut seen: Seq,
    narrator: &mut Narrator,
    until: Until,
) -> Result<Report> {
    let mut quiet_since = Instant::now();
    loop {
        let started = Instant::now();
        let recorded = Recorded::load(&**journal, run).await?;
        for record in recorded.records.iter().filter(|record| record.seq >= seen) {
            narrator.tell(run, record);
            quiet_since = Instant::now();
        }
        seen = recorded.run.entries();
        let state = recorded.run.state();
        if state.is_final() || matches!(state, RunState::Held | RunState::Stuck) {
            return Ok(Report { run: run.clone(), outcome: recorded.run.outcome() });
        }
        if until == Until::SettledByDriver && quiet_since.elapsed() > Duration::from_secs(2) {
            abandoned(journal, &recorded, seen).await?;
            quiet_since = Instant::now();
        }
        // A long journal takes a while to read: following it must not take the machine.
        tokio::time::sleep(Duration::from_millis(200).max(started.elapsed() * 4)).await;
    }
}

/// Fails if nobody drives the run any more and it is where it was.
async fn abandoned(journal: &Arc<dyn Journal>, recorded: &Recorded, seen: Seq) -> Result<()> {
    let lease = match journal.acquire(&recorded.run.header().locks, Duration::ZERO).await {
        Ok(lease) => lease,
        Err(JournalError::Held { .. }) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let now = journal.load(recorded.run.id()).await?.len() as Seq;
    drop(lease);
    if now > seen {
        return Ok(());
    }
    Err(Failure::internal(format!("the process that drove run {} is gone", recorded.run.id()))
        .with_hint("`upgrade resume` goes on where it was, `upgrade rollback` puts everything back"))
}
