//! `upgrade rollback`: puts everything back, until it is committed.

use clap::Args;
use upgrade_core::entry::Demand;
use upgrade_core::transition::RunState;

use crate::arguments::OpenSelector;
use crate::asking::ask;
use crate::exit::Asked;
use crate::failure::{Failure, Result};
use crate::render::Title;
use crate::runs::open_run;
use crate::session::{Ending, Session, drive};

const EXAMPLES: &str = "\
Examples:
  upgrade rollback --reason 'orders fail'
  upgrade rollback 0193ab12 --yes

A run that is driven by another process is cancelled there and rolled back. Before a finished
upgrade is taken back, a person at a terminal is asked; without one, it goes on.";

/// Put everything back as it was found; possible until the upgrade is committed.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Rollback {
    #[command(flatten)]
    selector: OpenSelector,
    /// Why, for the journal.
    #[arg(long, value_name = "TEXT", default_value = "asked for by the operator")]
    reason: String,
    /// Return when the driver of the run took the request up.
    #[arg(long)]
    detach: bool,
}

impl Rollback {
    pub(crate) fn execute(self, session: &Session) -> Result<Ending> {
        drive(async {
            let (journal, recorded) = open_run(session, self.selector.run.as_deref()).await?;
            let finished = recorded.run.state() == RunState::Probation;
            let question = || format!("take back {}, which is applied and in use?", Title::from(recorded.run.header()));
            if finished && !session.console.confirm(&question())? {
                return Err(Failure::refused("not confirmed: nothing was changed"));
            }
            let demand = Demand::Rollback { reason: self.reason };
            ask(session, journal, &recorded, demand, Asked::Rollback, self.detach).await
        })
    }
}
