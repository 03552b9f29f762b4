//! `upgrade commit`: confirms an upgrade in its probation.

use clap::Args;
use upgrade_core::entry::Demand;

use crate::arguments::OpenSelector;
use crate::asking::ask;
use crate::exit::Asked;
use crate::failure::Result;
use crate::runs::open_run;
use crate::session::{Ending, Session, drive};

const EXAMPLES: &str = "\
Examples:
  upgrade commit
  upgrade commit 0193ab12 --reason 'the shop confirms orders'";

/// Confirm an upgrade that is applied and verified; it cannot be rolled back any more.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Commit {
    #[command(flatten)]
    selector: OpenSelector,
    /// Why, for the journal.
    #[arg(long, value_name = "TEXT", default_value = "confirmed by the operator")]
    reason: String,
    /// Return when the driver of the run took the request up.
    #[arg(long)]
    detach: bool,
}

impl Commit {
    pub(crate) fn execute(self, session: &Session) -> Result<Ending> {
        drive(async {
            let (journal, recorded) = open_run(session, self.selector.run.as_deref()).await?;
            let demand = Demand::Confirm { reason: self.reason };
            ask(session, journal, &recorded, demand, Asked::Upgrade, self.detach).await
        })
    }
}
