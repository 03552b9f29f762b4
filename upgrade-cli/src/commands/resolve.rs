//! `upgrade resolve`: decides about a step whose undo failed.

use clap::Args;
use upgrade_core::entry::{Demand, Resolution};
use upgrade_core::names::StepId;

use crate::asking::ask;
use crate::exit::Asked;
use crate::failure::{Failure, Result};
use crate::runs::open_run;
use crate::session::{Ending, Session, drive};

const EXAMPLES: &str = "\
Examples:
  upgrade status                                                   # which step, and what it said
  upgrade resolve 0193ab12 config --retry --reason 'disk has room again'
  upgrade resolve 0193ab12 config --skip --reason 'put back by hand from the backup'
  upgrade resolve 0193ab12 config --abandon --reason 'the machine is scrapped' --yes";

/// Decide about a step whose undo failed, and go on with the rollback.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Resolve {
    /// The run, or the first characters of its id.
    #[arg(value_name = "RUN")]
    run: String,
    /// The step.
    #[arg(value_name = "STEP")]
    step: StepId,
    #[command(flatten)]
    decision: Decision,
    /// Why, for the journal.
    #[arg(long, value_name = "TEXT")]
    reason: String,
    /// Return when the driver of the run took the request up.
    #[arg(long)]
    detach: bool,
}

/// One of the three ways out.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Decision {
    /// Undo it again: what stood in the way is mended.
    #[arg(long)]
    retry: bool,
    /// Count it as undone: it was put back by hand.
    #[arg(long)]
    skip: bool,
    /// Leave it as it is, and what it needs with it.
    #[arg(long)]
    abandon: bool,
}

impl Decision {
    fn resolution(&self) -> Resolution {
        match (self.retry, self.skip) {
            (true, _) => Resolution::Retry,
            (_, true) => Resolution::Skip,
            _ => Resolution::Abandon,
        }
    }
}

impl Resolve {
    pub(crate) fn execute(self, session: &Session) -> Result<Ending> {
        drive(async {
            let (journal, recorded) = open_run(session, Some(&self.run)).await?;
            let resolution = self.decision.resolution();
            let question = || format!("leave `{}`, and what it needs, as it is: never to be put back?", self.step);
            if resolution == Resolution::Abandon && !session.console.confirm(&question())? {
                return Err(Failure::refused("not confirmed: nothing was changed"));
            }
            let demand = Demand::Resolve { step: self.step, resolution, reason: self.reason };
            ask(session, journal, &recorded, demand, Asked::Resolution, self.detach).await
        })
    }
}
