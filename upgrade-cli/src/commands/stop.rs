//! `upgrade stop`: holds a run after its running steps.

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
  upgrade stop --reason 'wait for the night'
  upgrade resume                       # goes on later";

/// Hold a run: the running steps finish, no new one starts.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Stop {
    #[command(flatten)]
    selector: OpenSelector,
    /// Why, for the journal.
    #[arg(long, value_name = "TEXT", default_value = "asked for by the operator")]
    reason: String,
    /// Return when the driver of the run took the request up.
    #[arg(long)]
    detach: bool,
}

impl Stop {
    pub(crate) fn execute(self, session: &Session) -> Result<Ending> {
        drive(async {
            let (journal, recorded) = open_run(session, self.selector.run.as_deref()).await?;
            let demand = Demand::Stop { reason: self.reason };
            ask(session, journal, &recorded, demand, Asked::Stop, self.detach).await
        })
    }
}
